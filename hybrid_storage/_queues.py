"""Those of one event loop who wait for a conversation, in their order, and those who hold one.

For ``isolation.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
from aiogram.fsm.storage.base import StorageKey


class Queues:
    """What one event loop holds and waits for."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        # A lock of anyio's is its task's, and a block may be left in another task.
        self._queues: dict[str, tuple[anyio.Semaphore, int]] = {}

    @contextmanager
    def queue(self, row: str) -> Iterator[anyio.Semaphore]:
        """Give the queue for a conversation, which is gone when nobody uses it any more."""
        turn, users = self._queues.get(row) or (_semaphore(), 0)
        self._queues[row] = turn, users + 1
        try:
            yield turn
        finally:
            users = self._queues[row][1] - 1
            if users:
                self._queues[row] = turn, users
            else:
                del self._queues[row]


def _semaphore() -> anyio.Semaphore:
    return anyio.Semaphore(1, max_value=1, fast_acquire=True)


def current_task() -> object:
    return asyncio.current_task()


@dataclass
class HeldLock:
    """A conversation that a task holds, known to what the task calls."""

    row: str
    """The id of its row."""
    keys: set[StorageKey]
    parent: HeldLock | None
    task: object = field(default_factory=current_task)
    is_held: bool = True

    @contextmanager
    def nested(self, key: StorageKey) -> Iterator[None]:
        """Hold the conversation by another of its keys, of another destiny for instance.

        :raises RuntimeError: if the task would wait for itself
        """
        if key in self.keys:
            raise RuntimeError(
                f"this task holds the lock of {key} already: a handler has that of its own user"
            )
        self.keys.add(key)
        try:
            yield
        finally:
            self.keys.discard(key)
