"""Storages that conversations are moved from, for the tests of migration."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiogram.fsm.storage.base import BaseStorage, DefaultKeyBuilder, KeyBuilder, StorageKey
from aiogram.fsm.storage.redis import RedisStorage
from backends import REDIS_URL, SQLITE, redis_version
from sqlalchemy import URL, MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy_storage import SQLAlchemyStorage as OtherStorage

from hybrid_storage import FullKeyBuilder, SQLAlchemyStorage
from hybrid_storage.migration import RedisSource, Source, TableSource

KINDS = ["ours", "package", *(["redis"] if redis_version() else [])]
"""The storages that there are servers for here."""

FULL: dict[str, Any] = {
    "with_bot_id": True,
    "with_destiny": True,
    "with_business_connection_id": True,
}


@dataclass
class Former:
    """A storage that was used before, and what reads all of it."""

    storage: BaseStorage
    source: Source


@asynccontextmanager
async def former(
    kind: str,
    url: URL,
    builder: KeyBuilder | None = None,
    table: str = "former_fsm",
    **options: Any,
) -> AsyncIterator[Former]:
    """Give a storage of a kind.

    :param kind: one of ``KINDS``
    :param url: a SQLite file for its table
    :param builder: its key builder; by default one that writes all there is
    :param table: the name of its table
    :param options: those of its source
    """
    if kind == "redis":
        builder = builder or DefaultKeyBuilder(prefix=f"fsm_{uuid.uuid4().hex}", **FULL)
        async with AsyncExitStack() as stack:
            storage = RedisStorage.from_url(REDIS_URL, key_builder=builder)
            stack.push_async_callback(storage.close)
            if isinstance(builder, DefaultKeyBuilder):
                stack.push_async_callback(emptied, storage, builder.prefix)
            yield Former(storage, RedisSource(storage, **options))
        return
    engine = SQLITE[1].engine(url)
    assert isinstance(engine, AsyncEngine)
    factory: Any = async_sessionmaker(engine)
    builder = builder or (FullKeyBuilder() if kind == "ours" else DefaultKeyBuilder(**FULL))
    try:
        ours = SQLAlchemyStorage(factory, table_name=table, key_builder=builder)
        await ours.create_table()
        source = TableSource(ours, **options)
        if kind == "ours":
            yield Former(ours, source)
        else:
            yield Former(OtherStorage(factory, MetaData(), table, builder), source)
    finally:
        await engine.dispose()


async def emptied(storage: RedisStorage, prefix: str) -> None:
    """Remove a key builder's keys from Redis."""
    async for name in storage.redis.scan_iter(f"{prefix}*", count=1000):
        await storage.redis.delete(name)


def conversations(count: int) -> dict[StorageKey, tuple[str | None, dict[str, Any]]]:
    """Return conversations of all sorts: private ones, topics, scenes, dialogs."""
    made: dict[StorageKey, tuple[str | None, dict[str, Any]]] = {}
    sorts: list[Callable[[int], dict[str, Any]]] = [
        lambda number: {"chat_id": number},
        lambda number: {"chat_id": -(10**12) - number, "thread_id": number},
        lambda number: {"chat_id": number, "destiny": "scenes_history"},
        lambda number: {"chat_id": number, "destiny": "aiogd:stack:"},
        lambda number: {"chat_id": number, "business_connection_id": f"Ab_{number}"},
    ]
    for number in range(1, count + 1):
        key = StorageKey(bot_id=42, user_id=number, **sorts[number % len(sorts)](number))
        state = None if number % 3 == 0 else f"Form:{number}"
        data = {} if number % 3 == 1 else {"name": f"Adá {number} \U0001f600", "list": [1, None]}
        made[key] = state, data
    return made


async def fill(
    storage: BaseStorage, all_of: dict[StorageKey, tuple[str | None, dict[str, Any]]]
) -> None:
    """Put conversations into a storage."""
    for key, (state, data) in all_of.items():
        if state is not None:
            await storage.set_state(key, state)
        if data:
            await storage.set_data(key, data)


async def contents(
    storage: BaseStorage, keys: Any
) -> dict[StorageKey, tuple[str | None, dict[str, Any]]]:
    """Return what a storage holds of some conversations."""
    return {key: (await storage.get_state(key), await storage.get_data(key)) for key in keys}
