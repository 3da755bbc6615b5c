"""Where conversations come from: what a source is, and that of aiogram's ``RedisStorage``.

For ``_table_sources.py``, and ``migration.py``, which has the public names.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from aiogram.fsm.storage.base import DefaultKeyBuilder, KeyBuilder, StorageKey

from ._default_keys import parse_default_key
from .keys import FullKeyBuilder, Parse

if TYPE_CHECKING:
    from aiogram.fsm.storage.redis import RedisStorage

MODULE = "hybrid_storage.migration"


@dataclass(frozen=True)
class Conversation:
    """The state and the data of a conversation, as a source has them."""

    name: str
    """What the source knows it by: the text of its key."""
    key: StorageKey
    state: str | None
    data: Mapping[str, Any]
    age: float | None = None
    """How many seconds ago it was written to, where the source tells."""

    __module__ = MODULE


@dataclass(frozen=True)
class Refused:
    """A conversation that cannot be moved."""

    name: str
    """What the source knows it by: the text of its key."""
    reason: str

    __module__ = MODULE


class Source(Protocol):
    """Where conversations come from. Write your own to move them from elsewhere."""

    def names(self, batch: int) -> AsyncIterator[Sequence[str]]:
        """List what the source knows its conversations by.

        :param batch: about how many to return at a time
        :return: an asynchronous iterator over batches
        """
        ...

    async def read(self, names: Sequence[str]) -> Sequence[Conversation | Refused]:
        """Return what conversations hold by now, without those that are gone or hold nothing.

        :param names: what the source knows them by
        """
        ...


class RedisSource:
    """The conversations of aiogram's ``RedisStorage``.

    Keys are listed by SCAN, so that Redis goes on serving others. Those whose time is over are not
    there any more. Of the others, the time that is left tells their age, where the storage has a
    ``state_ttl`` or a ``data_ttl``; a target with the columns to look by keeps it.
    """

    __module__ = MODULE

    def __init__(
        self, storage: RedisStorage, *, bot_id: int | None = None, parse: Parse | None = None
    ) -> None:
        """Use a storage as the bot has made it, with its key builder and ``json_loads``.

        :param storage: the storage; it is yours to close
        :param bot_id: the bot, if the keys do not say: ``DefaultKeyBuilder(with_bot_id=False)``
        :param parse: makes keys of text, for a key builder of your own
        :raises TypeError: if the key builder is your own and ``parse`` is missing
        :raises ValueError: if the key builder does not append ``state`` and ``data`` to its keys
        """
        builder = storage.key_builder
        self._redis: Any = storage.redis
        self._loads = storage.json_loads
        self._ttls = [_seconds(ttl) for ttl in (storage.state_ttl, storage.data_ttl)]
        self._parse = parser_of(builder, bot_id, parse)
        self._state, self._data = _suffix(builder, "state"), _suffix(builder, "data")
        prefix = ""
        if isinstance(builder, DefaultKeyBuilder):
            prefix = builder.prefix + builder.separator
        self._pattern = re.sub(r"([\\*?\[\]])", r"\\\1", prefix) + "*"

    async def names(self, batch: int) -> AsyncIterator[Sequence[str]]:
        """List the keys, without ``:state`` and ``:data``. See :class:`Source`."""
        states: dict[bytes, None] = {}
        datas: dict[bytes, None] = {}
        async for found in self._redis.scan_iter(match=self._pattern, count=batch):
            key = found if isinstance(found, bytes) else found.encode()
            for names, suffix in ((states, self._state), (datas, self._data)):
                if key.endswith(suffix):
                    names[key[: -len(suffix)]] = None
            if len(states) + len(datas) >= batch:
                yield await self._once(states, datas)
                states, datas = {}, {}
        if states or datas:
            yield await self._once(states, datas)

    async def _once(self, states: dict[bytes, None], datas: dict[bytes, None]) -> list[str]:
        # A conversation has one or two keys, which SCAN lists far from each other.
        only_data = [name for name in datas if name not in states]
        listed: Sequence[int] = ()
        if only_data:
            pipeline = self._redis.pipeline(transaction=False)
            for name in only_data:
                pipeline.exists(name + self._state)
            listed = await pipeline.execute()
        states.update((name, None) for name, at in zip(only_data, listed, strict=True) if not at)
        return [name.decode("utf-8", "surrogateescape") for name in states]

    async def read(self, names: Sequence[str]) -> Sequence[Conversation | Refused]:
        """Return what the keys hold. See :class:`Source`."""
        if not names:
            return []
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            for suffix in (self._state, self._data):
                pipeline.get(name.encode("utf-8", "surrogateescape") + suffix)
                pipeline.pttl(name.encode("utf-8", "surrogateescape") + suffix)
        values: list[Any] = await pipeline.execute(raise_on_error=False)
        found = zip(names, values[::4], values[2::4], values[1::4], values[3::4], strict=True)
        return [
            read_one(name, partial(self._conversation, name, state, data, self._age(*left)))
            for name, state, data, *left in found
            if state is not None or data is not None
        ]

    def _age(self, *left: Any) -> float | None:
        """Return the seconds since the last write, by the milliseconds that are left."""
        ages = [
            whole - milliseconds / 1000
            for whole, milliseconds in zip(self._ttls, left, strict=True)
            if whole is not None and isinstance(milliseconds, int) and milliseconds >= 0
        ]
        return max(0.0, min(ages)) if ages else None

    def _conversation(self, name: str, state: Any, data: Any, age: float | None) -> Conversation:
        for value in (state, data):
            if isinstance(value, Exception):
                raise ValueError(f"Redis does not return its state and data: {value}") from value
        name.encode()  # raises if the key in Redis is not UTF-8
        key, text = self._parse(name), _text(data)
        return Conversation(name, key, _text(state), self._loads(text) if text else {}, age)


def parser_of(builder: KeyBuilder, bot_id: int | None, parse: Parse | None) -> Parse:
    """Return a function that makes keys of what a key builder has built.

    :raises TypeError: if the key builder is not known, and ``parse`` is missing
    """
    if parse is not None:
        return parse
    if isinstance(builder, FullKeyBuilder):
        return builder.parse
    if isinstance(builder, DefaultKeyBuilder):
        return partial(parse_default_key, builder=builder, bot_id=bot_id)
    raise TypeError(
        f"cannot read keys of {type(builder).__name__}: pass parse=, a function that makes a "
        "StorageKey of what its build() returns"
    )


def read_one(name: str, make: Callable[[], Conversation]) -> Conversation | Refused:
    """Return a conversation, or why there is none."""
    try:
        found = make()
        if not isinstance(found.data, Mapping):
            raise ValueError(f"its data is a {type(found.data).__name__}, not an object")
    except Exception as error:  # the application's functions raise what they like
        return Refused(name, str(error) or repr(error))
    return found


def _suffix(builder: KeyBuilder, part: Any) -> bytes:
    key = StorageKey(bot_id=42, chat_id=7, user_id=7)
    whole, built = builder.build(key), builder.build(key, part)
    if not built.startswith(whole) or built == whole:
        raise ValueError(
            f"{type(builder).__name__} does not append {part!r} to the key, so that state and data "
            "cannot be told apart: write a Source of your own"
        )
    return built[len(whole) :].encode()


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _seconds(ttl: Any) -> float | None:
    return ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
