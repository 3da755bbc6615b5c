"""Keys read from the strings of aiogram's own key builder. For ``migration.py``.

``DefaultKeyBuilder`` leaves out what is not set and escapes nothing. So a string is read in every
way that its options allow, and refused if none is left, or more than one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

from aiogram.fsm.storage.base import DEFAULT_DESTINY, DefaultKeyBuilder, StorageKey

from .keys import NUMBER, FullKeyBuilder


def parse_default_key(
    text: str, builder: DefaultKeyBuilder, *, bot_id: int | None = None
) -> StorageKey:
    """Return the key that aiogram's ``DefaultKeyBuilder`` has built a string of.

    Telegram's own identifiers are told apart: a topic's number is above 0, and the identifier of a
    business connection is not a number. A destiny may contain the separator, as those of
    aiogram-dialog do, but must not begin with a number and the separator: that reads as a topic.

    :param text: the string, without the part (``:state``, ``:data``)
    :param builder: the key builder, with the options it was built with
    :param bot_id: the bot, where the string does not say: ``with_bot_id=False``
    :raises ValueError: naming the reason and the option, if the string stands for no key or for
        several
    :return: the key
    """
    if not builder.with_bot_id and bot_id is None:
        raise ValueError(
            f"{text!r} does not say which bot it belongs to, since it was built by "
            "DefaultKeyBuilder(with_bot_id=False): pass bot_id, the number before the colon of "
            f"the bot's token{_perhaps_ours(text)}"
        )
    found = {key for key in _candidates(text, builder, bot_id) if builder.build(key) == text}
    if len(found) > 1:
        raise ValueError(
            f"{text!r} may be any of {len(found)} keys: the separator {builder.separator!r} does "
            f"not tell its parts from each other: {', '.join(sorted(map(str, found)))}"
        )
    if not found:
        raise ValueError(f"{text!r} {_why_not(text, builder)}{_perhaps_ours(text)}")
    return found.pop()


def _perhaps_ours(text: str) -> str:
    try:
        FullKeyBuilder().parse(text)
    except ValueError:
        return ""
    return (
        ". It reads as a key of this package's FullKeyBuilder. If it is one, pass "
        "key_builder=FullKeyBuilder(), on the command line "
        "--source-key-builder hybrid_storage:FullKeyBuilder"
    )


def _candidates(text: str, builder: DefaultKeyBuilder, bot_id: int | None) -> Iterator[StorageKey]:
    business = (False, True) if builder.with_business_connection_id else (False,)
    for has_business, has_thread in product(business, (False, True)):
        pattern = _pattern(builder, has_business=has_business, has_thread=has_thread)
        match = pattern.fullmatch(text)
        if match is None:
            continue
        parts = match.groupdict()
        told = parts.get("bot", bot_id)
        assert told is not None
        thread = parts.get("thread")
        yield StorageKey(
            bot_id=int(told),
            chat_id=int(parts["chat"]),
            user_id=int(parts["user"]),
            thread_id=None if thread is None else int(thread),
            business_connection_id=parts.get("business"),
            destiny=parts.get("destiny", DEFAULT_DESTINY),
        )


def _pattern(
    builder: DefaultKeyBuilder, *, has_business: bool, has_thread: bool
) -> re.Pattern[str]:
    separator = re.escape(builder.separator)
    parts = [re.escape(builder.prefix)]
    if builder.with_bot_id:
        parts.append(f"(?P<bot>{NUMBER})")
    if has_business:
        # Text up to the separator that is not a number.
        parts.append(f"(?P<business>(?!{NUMBER}{separator})(?:(?!{separator}).)+)")
    parts.append(f"(?P<chat>{NUMBER})")
    if has_thread:
        parts.append("(?P<thread>[1-9][0-9]*)")
    parts.append(f"(?P<user>{NUMBER})")
    if builder.with_destiny:
        parts.append(f"(?P<destiny>(?!{NUMBER}{separator}).*)")
    return re.compile(separator.join(parts), re.DOTALL)


def _why_not(text: str, builder: DefaultKeyBuilder) -> str:
    separator, prefix = builder.separator, builder.prefix
    if not text.startswith(prefix + separator):
        return f"does not begin with the prefix {prefix!r} and the separator {separator!r}"
    separated = re.escape(separator)
    ids = separated.join([NUMBER] * (3 if builder.with_bot_id else 2))
    rest = text[len(prefix + separator) :]
    if not builder.with_destiny and re.fullmatch(f"{ids}{separated}.*", rest, re.DOTALL):
        return (
            "has more parts than DefaultKeyBuilder(with_destiny=False) writes: pass the key "
            "builder with the options it was built with"
        )
    if builder.with_destiny and re.fullmatch(f"{ids}{separated}{NUMBER}{separated}.*", rest):
        return (
            "has a destiny that begins with a number and the separator, which reads as a topic "
            f"(with_destiny=True, separator={separator!r})"
        )
    return (
        "does not have the parts that DefaultKeyBuilder writes with "
        f"with_bot_id={builder.with_bot_id}, "
        f"with_business_connection_id={builder.with_business_connection_id} and "
        f"with_destiny={builder.with_destiny}: pass the key builder with the options it was "
        "built with"
    )
