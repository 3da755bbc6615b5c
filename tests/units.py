"""A bot whose updates are units of work, on each driver, with a lease in the database and without.

For ``test_unit_of_work.py`` and its neighbours.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from aiogram.fsm.storage.base import StorageKey
from sqlalchemy.orm import Session

from hybrid_storage import SQLAlchemyEventIsolation, SQLAlchemyStorage

T = TypeVar("T")

KEY = StorageKey(bot_id=42, chat_id=7, user_id=7)
HISTORY = replace(KEY, destiny="scenes_history")
ANOTHER = replace(KEY, chat_id=8, user_id=8)
BEFORE: tuple[str, dict[str, Any]] = ("Form:name", {"name": "Ada", "seen": [1]})
LEASES = {"lease": 30.0, "this process": None}


async def outside(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await what another task does, which has not been started by this one's update."""
    return await Context().run(asyncio.ensure_future, coroutine)


@dataclass
class Bot:
    """A storage and its isolation with a unit of work."""

    storage: SQLAlchemyStorage
    isolation: SQLAlchemyEventIsolation

    def update(self, key: StorageKey = KEY) -> AbstractAsyncContextManager[None]:
        """Return what spans an update."""
        return self.isolation.lock(key)

    async def stored(self, key: StorageKey = KEY) -> tuple[str | None, dict[str, Any]]:
        """Return what the database has, as everybody else sees it."""
        state = await outside(self.storage.get_state(key))
        return state, await outside(self.storage.get_data(key))

    async def meanwhile(self, operation: str, *arguments: Any, key: StorageKey = KEY) -> None:
        """Have synchronous code write to a conversation, in a session of its own."""
        function = getattr(self.storage.operations, operation)

        def write(session: Session) -> None:
            function(session, key, *arguments)

        await outside(self.storage.run_sync(write))

    async def assert_free(self, key: StorageKey = KEY) -> None:
        """Check that nobody has the lock."""
        assert not self.isolation.still_held(key)

        async def enter() -> None:
            async with self.isolation.lock(key):
                pass

        await asyncio.wait_for(outside(enter()), 20)


@asynccontextmanager
async def running(
    storage: SQLAlchemyStorage, lease: float | None, *, driver_statements: bool = False
) -> AsyncGenerator[Bot, None]:
    """Give a bot whose user has been here before."""
    isolation = storage.create_isolation(
        unit_of_work=True, lease=lease, driver_statements=driver_statements
    )
    await storage.create_table()
    await storage.set_state(KEY, BEFORE[0])
    await storage.set_data(KEY, BEFORE[1])
    yield Bot(storage, isolation)
    await isolation.close()
    locks = storage.metadata.tables.get(f"{storage.table.name}_lock")
    if locks is not None:
        await storage.run_sync(lambda session: locks.drop(session.connection()))


def writes(storage: SQLAlchemyStorage, seen: list[Any]) -> int:
    """Return how many statements write to the table of conversations.

    Not counted is what SQLite gets to have its write lock: a row set to what it is.
    """
    table = storage.table.name
    pattern = re.compile(rf"(INSERT INTO|UPDATE|DELETE FROM) {table}\b(?! SET id={table}.id)")
    return sum(bool(pattern.search(statement)) for _, statement in seen)
