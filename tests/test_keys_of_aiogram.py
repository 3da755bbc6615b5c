"""Strings of aiogram's own key builder: read where they say enough, refused by name elsewhere."""

from __future__ import annotations

import re
from typing import Any

import pytest
from aiogram.fsm.storage.base import DEFAULT_DESTINY, DefaultKeyBuilder, StorageKey
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hybrid_storage._default_keys import parse_default_key

ALL = {"with_bot_id": True, "with_business_connection_id": True, "with_destiny": True}


def key(**fields: Any) -> StorageKey:
    return StorageKey(**{"bot_id": 42, "chat_id": -100, "user_id": 7, **fields})


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "fsm:-100:7", key()),
        ({}, "fsm:-100:5:7", key(thread_id=5)),
        ({"with_bot_id": True}, "fsm:42:-100:7", key()),
        ({"with_bot_id": True}, "fsm:42:-100:5:7", key(thread_id=5)),
        ({"with_destiny": True}, "fsm:-100:7:default", key()),
        ({"with_destiny": True}, "fsm:-100:5:7:default", key(thread_id=5)),
        ({"with_destiny": True}, "fsm:-100:7:5", key(destiny="5")),
        ({"with_destiny": True}, "fsm:-100:7:", key(destiny="")),
        ({"with_destiny": True}, "fsm:-100:7:aiogd:stack:", key(destiny="aiogd:stack:")),
        (ALL, "fsm:42:-100:5:7:aiogd:context:x", key(thread_id=5, destiny="aiogd:context:x")),
        (ALL, "fsm:42:Ab_1:-100:7:default", key(business_connection_id="Ab_1")),
        (
            {"with_business_connection_id": True},
            "fsm:Ab:-100:5:7",
            key(business_connection_id="Ab", thread_id=5),
        ),
        ({"prefix": "my.bot", "separator": "/"}, "my.bot/-100/7", key()),
        ({"prefix": "f", "separator": "-"}, "f--100-7", key()),
    ],
)
def test_a_string_gives_its_key(options: dict[str, Any], text: str, expected: StorageKey) -> None:
    builder = DefaultKeyBuilder(**options)
    assert builder.build(expected) == text
    assert parse_default_key(text, builder, bot_id=42) == expected


@pytest.mark.parametrize(
    ("options", "text", "why"),
    [
        ({}, "other:-100:7", "does not begin with the prefix 'fsm' and the separator ':'"),
        ({}, "fsm", "does not begin with the prefix 'fsm' and the separator ':'"),
        ({}, "fsm:7", "does not have the parts"),
        ({}, "fsm:a:7", "does not have the parts"),
        ({}, "fsm:007:7", "does not have the parts"),
        ({}, "fsm:-100:7:default", "with_destiny=False"),
        ({"with_bot_id": True}, "fsm:42:-100:5:7:x", "with_destiny=False"),
        ({"with_bot_id": True}, "fsm:42:7", "with_bot_id=True"),
        ({"with_destiny": True}, "fsm:-100:0:7:x", "begins with a number and the separator"),
        ({"separator": ""}, "fsm1234", "the separator '' does not tell its parts"),
        ({"separator": "0"}, "fsm0100507", "the separator '0' does not tell its parts"),
    ],
)
def test_a_string_that_does_not_say_enough_is_refused(
    options: dict[str, Any], text: str, why: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        parse_default_key(text, DefaultKeyBuilder(**options), bot_id=42)


def test_a_bot_that_is_in_no_string_has_to_be_told() -> None:
    with pytest.raises(ValueError, match=re.escape("with_bot_id=False): pass bot_id")):
        parse_default_key("fsm:7:7", DefaultKeyBuilder())
    for builder in (DefaultKeyBuilder(), DefaultKeyBuilder(with_bot_id=True)):
        with pytest.raises(ValueError, match="--source-key-builder hybrid_storage:FullKeyBuilder"):
            parse_default_key("42:7:7", builder)
    assert parse_default_key("fsm:7:7", DefaultKeyBuilder(), bot_id=1).bot_id == 1
    builder = DefaultKeyBuilder(with_bot_id=True)
    assert parse_default_key("fsm:42:7:7", builder, bot_id=1).bot_id == 42


numbers = st.integers(-(10**13), 10**13)
texts = st.text(max_size=8) | st.sampled_from(["a:b", ":", "aiogd:stack:<7>", "7x", "-", "7"])
builders = st.builds(
    DefaultKeyBuilder,
    prefix=st.sampled_from(["fsm", "", "a:b", "7"]),
    separator=st.sampled_from([":", "/", "::", "-", "."]),
    with_bot_id=st.booleans(),
    with_business_connection_id=st.booleans(),
    with_destiny=st.booleans(),
)


@settings(deadline=None, max_examples=500)
@given(
    builders,
    numbers,
    numbers,
    numbers,
    st.none() | st.integers(1, 10**9),
    st.none() | st.text(min_size=1, max_size=8),
    st.just(DEFAULT_DESTINY) | texts,
)
@example(DefaultKeyBuilder(with_destiny=True), 42, -100, 7, 5, None, "aiogd:stack:")
def test_a_key_is_read_back_or_refused_but_never_taken_for_another(
    builder: DefaultKeyBuilder,
    bot: int,
    chat: int,
    user: int,
    thread: int | None,
    business: str | None,
    destiny: str,
) -> None:
    """For a business connection that is not a number, and a destiny that begins with none."""
    number = r"-?[0-9]+"
    if not builder.with_business_connection_id:
        business = None
    if not builder.with_destiny:
        destiny = DEFAULT_DESTINY
    separator = re.escape(builder.separator)
    assume(business is None or not re.match(rf"{number}({separator}|$)", business))
    assume(not re.match(rf"{number}{separator}", destiny))
    # A separator in a business connection may be anything.
    assume(business is None or builder.separator not in f"{business}{builder.separator[:-1]}")
    assume(business is None or builder.separator != "-")
    one = StorageKey(bot, chat, user, thread, business, destiny)
    try:
        found = parse_default_key(builder.build(one), builder, bot_id=bot)
    except ValueError:
        assert builder.separator == "-"  # also the sign of a number
    else:
        assert found == one
