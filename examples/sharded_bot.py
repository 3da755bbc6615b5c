"""One bot on several databases: each conversation lives in one of them, with its lock.

By the chat's id, since that is the same for all destinies of a conversation, so that a unit of
work finds all of its rows on one shard. Run it with the databases' URLs in ``SHARDS``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from aiogram import Bot, Dispatcher
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State
from aiogram.fsm.storage.base import BaseEventIsolation, BaseStorage, StorageKey
from aiogram.types import Message

from hybrid_storage import SQLAlchemyStorage


class ShardedStorage(BaseStorage):
    """Asks the storage that a key's chat belongs to.

    :param shards: the storages; another number of them needs a migration
    """

    def __init__(self, shards: Sequence[SQLAlchemyStorage]) -> None:
        self.shards = shards

    def number(self, key: StorageKey) -> int:
        """Return which shard has a conversation."""
        return abs(key.chat_id) % len(self.shards)

    def of(self, key: StorageKey) -> SQLAlchemyStorage:
        """Return the storage that has a conversation."""
        return self.shards[self.number(key)]

    async def set_state(self, key: StorageKey, state: str | State | None = None) -> None:
        await self.of(key).set_state(key, state)

    async def get_state(self, key: StorageKey) -> str | None:
        return await self.of(key).get_state(key)

    async def set_data(self, key: StorageKey, data: Mapping[str, Any]) -> None:
        await self.of(key).set_data(key, data)

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        return await self.of(key).get_data(key)

    async def update_data(self, key: StorageKey, data: Mapping[str, Any]) -> dict[str, Any]:
        return await self.of(key).update_data(key, data)

    async def close(self) -> None:
        for shard in self.shards:
            await shard.close()


class ShardedIsolation(BaseEventIsolation):
    """Takes a lock where the conversation is, and opens its unit of work there."""

    def __init__(self, storage: ShardedStorage) -> None:
        self._storage = storage
        self._isolations = [each.create_isolation(unit_of_work=True) for each in storage.shards]

    def lock(self, key: StorageKey) -> AbstractAsyncContextManager[None]:  # type: ignore[override]
        return self._isolations[self._storage.number(key)].lock(key)

    async def close(self) -> None:
        for isolation in self._isolations:
            await isolation.close()


async def count(message: Message, state: FSMContext) -> None:
    """Count a user's messages."""
    seen = await state.get_value("seen", 0) + 1
    await state.update_data(seen=seen)
    await message.answer(f"Message number {seen}")


def dispatcher(shards: Sequence[SQLAlchemyStorage]) -> Dispatcher:
    """Return the bot's dispatcher."""
    storage = ShardedStorage(shards)
    dp = Dispatcher(storage=storage, events_isolation=ShardedIsolation(storage))
    for shard in shards:
        dp.startup.register(shard.create_table)
    dp.message.register(count)
    return dp


if __name__ == "__main__":
    urls = os.environ.get("SHARDS", "sqlite:///shard0.db sqlite:///shard1.db").split()
    dp = dispatcher([SQLAlchemyStorage.from_url(url) for url in urls])
    asyncio.run(dp.start_polling(Bot(os.environ["BOT_TOKEN"])))
