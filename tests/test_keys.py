"""The default keys: readable, plain ASCII, and never the same for two conversations."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, cast
from urllib.parse import unquote

import pytest
from aiogram.fsm.storage.base import DEFAULT_DESTINY, StorageKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid_storage import FullKeyBuilder

Part = Literal["data", "state", "lock"]
PARTS: tuple[Part | None, ...] = (None, "data", "state", "lock")
PLAIN = StorageKey(bot_id=42, chat_id=7, user_id=7)

build = FullKeyBuilder().build
parse_built = FullKeyBuilder().parse


# Examples


@pytest.mark.parametrize(
    ("fields", "built"),
    [
        ({}, "42:7:7"),
        ({"chat_id": -1001234567890}, "42:-1001234567890:7"),
        ({"thread_id": 5}, "42:7:7:thread_id=5"),
        ({"thread_id": 0}, "42:7:7:thread_id=0"),
        ({"thread_id": -5}, "42:7:7:thread_id=-5"),
        ({"business_connection_id": "Ab_1-x"}, "42:7:7:business_connection_id=Ab_1-x"),
        ({"business_connection_id": ""}, "42:7:7:business_connection_id="),
        ({"destiny": "scenes_history"}, "42:7:7:destiny=scenes_history"),
        ({"destiny": ""}, "42:7:7:destiny="),
        ({"destiny": "aiogd:stack:<7>"}, "42:7:7:destiny=aiogd%3Astack%3A%3C7%3E"),
        ({"destiny": "a b\n/é%"}, "42:7:7:destiny=a%20b%0A%2F%C3%A9%25"),
        (
            {"destiny": "d", "business_connection_id": "b", "thread_id": 5},
            "42:7:7:thread_id=5:business_connection_id=b:destiny=d",
        ),
    ],
)
def test_a_key_has_the_three_ids_and_then_by_name_whatever_else_is_set(
    fields: dict[str, Any], built: str
) -> None:
    key = StorageKey(**{"bot_id": 42, "chat_id": 7, "user_id": 7, **fields})
    assert build(key) == built


def test_the_docstring_shows_what_is_built() -> None:
    # Python 3.13 takes the indentation off.
    table = re.findall(r"^ *(\S.*?) +``(.+)``$", FullKeyBuilder.__doc__ or "", re.MULTILINE)
    keys = {
        "bot 42, chat 7, user 7": PLAIN,
        "the same in topic 5": StorageKey(bot_id=42, chat_id=7, user_id=7, thread_id=5),
        "the same, a scene's history": StorageKey(
            bot_id=42, chat_id=7, user_id=7, thread_id=5, destiny="scenes_history"
        ),
    }
    assert table == [(words, build(key)) for words, key in keys.items()]


@pytest.mark.parametrize(
    ("part", "built"),
    [
        (None, "42:7:7:destiny=d"),
        ("data", "42:7:7:destiny=d:part=data"),
        ("state", "42:7:7:destiny=d:part=state"),
        ("lock", "42:7:7:destiny=d:part=lock"),
    ],
)
def test_a_part_is_appended_by_name(part: Part | None, built: str) -> None:
    key = StorageKey(bot_id=42, chat_id=7, user_id=7, destiny="d")
    assert build(key, part) == build(key, part=part) == built


def test_text_of_an_enumeration_is_its_value() -> None:
    Destiny = Enum("Destiny", {"ORDERS": "orders"}, type=str)

    key = StorageKey(bot_id=42, chat_id=7, user_id=7, destiny=cast("str", Destiny.ORDERS))
    assert build(key) == "42:7:7:destiny=orders"


def test_the_fields_are_taken_by_name_whatever_their_order() -> None:
    @dataclass(frozen=True)
    class KeyOfAnotherRelease:
        destiny: str
        thread_id: int
        business_connection_id: str
        user_id: int
        chat_id: int
        bot_id: int

    key = KeyOfAnotherRelease("d", 5, "b", 3, 2, 1)
    built = build(cast("StorageKey", key))
    assert built == "1:2:3:thread_id=5:business_connection_id=b:destiny=d"


@pytest.mark.parametrize("field", ["bot_id", "chat_id", "user_id", "thread_id"])
@pytest.mark.parametrize("wrong", ["7", "7:7", "", 7.0, b"7", [7]], ids=repr)
def test_a_number_that_is_none_is_refused(field: str, wrong: object) -> None:
    fields: dict[str, Any] = {"bot_id": 42, "chat_id": 7, "user_id": 7, field: wrong}
    with pytest.raises((TypeError, ValueError)):
        build(StorageKey(**fields))


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("bot_id", None),
        ("chat_id", None),
        ("user_id", None),
        ("business_connection_id", 5),
        ("business_connection_id", b"b"),
        ("destiny", None),
        ("destiny", 5),
        ("destiny", b"default"),
        ("destiny", ["default"]),
    ],
)
def test_a_field_of_another_type_is_refused(field: str, wrong: object) -> None:
    fields: dict[str, Any] = {"bot_id": 42, "chat_id": 7, "user_id": 7, field: wrong}
    with pytest.raises((TypeError, ValueError)):
        build(StorageKey(**fields))


# Properties


FRAGMENTS = [
    *":=%/\\ \t\n\0.-_~+&",
    *(
        "a",
        "A",
        "ß",
        "SS",
        "\u017f",
        "S",
        "K",
        "\u212a",
        "i",
        "\u0130",
    ),  # twins when case is folded
    *("é", "e\u0301", "\ufeff", "\u200b", "\u2028", "\U0001f600"),
    *("\ud83d", "\ude00", "\ud800"),  # halves of a pair
    *("%3A", "%253A", "%", "3A", "%ED%A0%80", "%F0%9F%98%80", "\\ud800", "\ufffd"),
    *("default", "None", "0", "5", "-5", "data", "state", "lock", "1:2:3"),
    *("thread_id=", "business_connection_id=", "destiny=", "part=", "part", "destiny"),
    *(":thread_id=5", ":business_connection_id=a", ":destiny=a", ":part=data", "a:part=data"),
]
texts = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=4).map("".join),
    st.text(st.characters(), max_size=30),
    st.text(st.characters(categories=["Cs"]), max_size=3),
)
numbers = st.sampled_from([0, 1, 2, 5, 11, 12, -1, -5, 2**63, -(10**13)]) | st.integers()
keys = st.builds(
    StorageKey,
    bot_id=numbers,
    chat_id=numbers,
    user_id=numbers,
    thread_id=st.none() | numbers,
    business_connection_id=st.none() | texts,
    destiny=st.just(DEFAULT_DESTINY) | texts,
)
parts = st.sampled_from(PARTS)


def parse(built: str) -> tuple[StorageKey, str | None]:
    """Find the key and the part that a string was built of."""
    bot_id, chat_id, user_id, *rest = built.split(":")
    fields: dict[str, Any] = {"bot_id": int(bot_id), "chat_id": int(chat_id)}
    fields["user_id"] = int(user_id)
    for name, _, value in (each.partition("=") for each in rest):
        assert name not in fields
        fields[name] = int(value) if name == "thread_id" else unquote(value, errors="surrogatepass")
    part = fields.pop("part", None)
    return StorageKey(**fields), part


@settings(deadline=None, max_examples=200)
@given(keys, parts)
@example(PLAIN, "data")
@example(StorageKey(bot_id=42, chat_id=7, user_id=7, destiny="\ud83d\ude00"), None)
@example(StorageKey(bot_id=42, chat_id=7, user_id=7, destiny="\U0001f600"), None)
def test_the_key_and_the_part_can_be_read_from_the_string(
    key: StorageKey, part: Part | None
) -> None:
    assert parse(build(key, part)) == (key, part)


@settings(deadline=None, max_examples=300)
@given(keys)
@example(StorageKey(bot_id=42, chat_id=7, user_id=7, destiny="\ud83d\ude00"))
@example(StorageKey(bot_id=42, chat_id=7, user_id=7, business_connection_id="", destiny=""))
def test_the_key_builder_parses_what_it_has_built(key: StorageKey) -> None:
    assert parse_built(build(key)) == key


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), st.sampled_from(["", "1:2:3"])
)
def test_what_can_be_parsed_was_built(text: str, start: str) -> None:
    try:
        key = parse_built(start + text)
    except ValueError:
        return
    assert build(key) == start + text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "does not have the form bot:chat:user"),
        ("42:7", "does not have the form bot:chat:user"),
        ("fsm:42:7:7", "does not have the form bot:chat:user"),
        ("42:7:7:part=state", "does not have the form bot:chat:user"),
        ("42:7:7:destiny=a:b", "does not have the form bot:chat:user"),
        ("42:7:7:destiny=d:thread_id=5", "does not have the form bot:chat:user"),
        ("42:7:7\n", "does not have the form bot:chat:user"),
        ("42:7:\u0667", "does not have the form bot:chat:user"),
        ("42:07:7", "writes '42:7:7' for that key"),
        ("42:-0:7", "writes '42:0:7' for that key"),
        ("42:7:7:destiny=default", "writes '42:7:7' for that key"),
        ("42:7:7:destiny=a b", "writes '42:7:7:destiny=a%20b' for that key"),
        ("42:7:7:destiny=%3c", "writes '42:7:7:destiny=%3C' for that key"),
        ("42:7:7:destiny=%FF", "'%FF' is not percent-encoded UTF-8"),
    ],
)
def test_a_string_of_another_form_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))) as refused:
        parse_built(text)
    assert why in str(refused.value)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(keys, parts), unique=True, min_size=2, max_size=20))
def test_different_keys_and_parts_give_different_strings(
    different: list[tuple[StorageKey, Part | None]],
) -> None:
    built = {build(key, part) for key, part in different}
    assert len(built) == len(different)


@settings(deadline=None, max_examples=100)
@given(texts, texts, parts, parts)
def test_one_field_never_looks_like_another(
    text: str, other: str, part: Part | None, other_part: Part | None
) -> None:
    """Free text that imitates the other fields, in either field of free text or in both."""
    ids: dict[str, Any] = {"bot_id": 1, "chat_id": 2, "user_id": 3}
    optional: tuple[Part | None, ...] = (None, part, other_part)
    different: set[tuple[StorageKey, Part | None]] = {
        (StorageKey(**ids, thread_id=thread, business_connection_id=business, destiny=destiny), p)
        for thread, business, destiny, p in itertools.product(
            (None, 0, 5),
            (None, text, other),
            (DEFAULT_DESTINY, text, other, f"{text}:destiny={other}", f"{text}:part={part}"),
            optional,
        )
    }
    built = {build(key, p) for key, p in different}
    assert len(built) == len(different)


@settings(deadline=None, max_examples=200)
@given(keys, parts)
def test_the_string_is_printable_ascii_without_blanks(key: StorageKey, part: Part | None) -> None:
    assert re.fullmatch(r"[!-~]+", build(key, part))


@settings(deadline=None)
@given(numbers, numbers, numbers)
def test_where_nothing_else_is_set_the_ids_are_the_string(bot: int, chat: int, user: int) -> None:
    key = StorageKey(bot_id=bot, chat_id=chat, user_id=user)
    assert build(key) == f"{bot}:{chat}:{user}"
