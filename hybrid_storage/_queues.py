"""Those of one event loop who wait for a conversation, in their order, and those who hold one.

For ``isolation.py``.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import ref

import anyio
from aiogram.fsm.storage.base import StorageKey

_TWO_LOOPS = (
    "create_isolation(lease=None) locks in one event loop at a time, and another one holds or "
    "waits for a lock of it, by which this one would not be kept out: leave out lease=None, for a "
    "lease in the database holds between event loops, too"
)


class Queues:
    """What one event loop holds and waits for."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        # A lock of anyio's is its task's, and a block may be left in another task.
        self._queues: dict[str, tuple[anyio.Semaphore, int]] = {}

    @contextmanager
    def queue(self, row: str) -> Iterator[anyio.Semaphore]:
        """Give the queue for a conversation, which is gone when nobody uses it any more."""
        turn, users = self._queues.get(row) or (None, 0)
        turn = turn or anyio.Semaphore(1, max_value=1, fast_acquire=True)
        self._queues[row] = turn, users + 1
        try:
            yield turn
        finally:
            users = self._queues[row][1] - 1
            if users:
                self._queues[row] = turn, users
            else:
                del self._queues[row]


class OneLoop:
    """Lets one event loop at a time use locks that are in memory, and excludes no tasks itself."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._loop: Callable[[], asyncio.AbstractEventLoop | None] = lambda: None
        self._process = 0
        self._users = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use the locks.

        :raises RuntimeError: if another event loop does, in another thread
        """
        this = asyncio.get_running_loop(), os.getpid()
        with self._guard:
            loop = self._loop()
            if (loop, self._process) != this:
                # After a fork, the parent's loop is there still, and runs no more.
                is_alive = loop is not None and not loop.is_closed()
                if self._users and is_alive and self._process == this[1]:
                    raise RuntimeError(_TWO_LOOPS)
                self._loop, self._process, self._users = ref(this[0]), this[1], 0
            self._users += 1
        try:
            yield
        finally:
            with self._guard:
                if (self._loop(), self._process) == this:
                    self._users -= 1


@dataclass
class HeldLock:
    """A conversation that a task holds, known to what the task calls."""

    row: str
    """The id of its row."""
    keys: set[StorageKey]
    parent: HeldLock | None
    task: object = field(default_factory=asyncio.current_task)
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
