"""A handler that counts up, under the lock of its conversation and in a unit of work."""

from __future__ import annotations

import random
import time

import anyio
from aiogram.fsm.storage.base import StorageKey

from hybrid_storage import (
    FullKeyBuilder,
    LockLostError,
    SQLAlchemyEventIsolation,
    SQLAlchemyStorage,
)

from .journal import Journal

CONVERSATIONS = [StorageKey(bot_id=2, chat_id=user, user_id=user) for user in range(3)]
"""That the updaters of all processes share."""
COUNT = "count"


class Updater:
    """Reads a number, thinks, and writes the next one as data and as a state.

    What it notes tells whether two have ever held one lock: each number is written once, and no
    two handlers that were told that all is well were inside at the same time.
    """

    def __init__(
        self, storage: SQLAlchemyStorage, isolation: SQLAlchemyEventIsolation, journal: Journal
    ) -> None:
        """Remember what to use."""
        self._storage = storage
        self._isolation = isolation
        self._journal = journal

    async def write(self) -> None:
        """Handle an update."""
        key = random.choice(CONVERSATIONS)
        row = FullKeyBuilder().build(key)
        asked = time.monotonic()
        try:
            async with self._isolation.lock(key):
                entered = time.monotonic()  # of one clock for all processes
                state = await self._storage.get_state(key)
                data = await self._storage.get_data(key)
                number = int(data.get(COUNT, 0))
                if state != (str(number) if number else None):
                    self._journal.note("half", row, state, number)
                await anyio.sleep(random.uniform(0, 0.02))
                self._journal.note("try update", row)
                await self._storage.set_state(key, str(number + 1))
                await self._storage.update_data(key, {COUNT: number + 1})
                left = time.monotonic()
        except LockLostError as error:
            self._journal.note("fenced", row, str(error), time.monotonic() - asked)
        else:
            took = time.monotonic() - asked
            self._journal.note("update", row, number + 1, entered, left, took)
