"""Those of one event loop who wait for a conversation, in the order in which they came.

For ``isolation.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio


class Queues:
    """What one event loop holds and waits for."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self._queues: dict[str, tuple[anyio.Lock, int]] = {}

    @contextmanager
    def queue(self, row: str) -> Iterator[anyio.Lock]:
        """Give the queue for a conversation, which is gone when nobody uses it any more."""
        turn, users = self._queues.get(row) or (anyio.Lock(fast_acquire=True), 0)
        self._queues[row] = turn, users + 1
        try:
            yield turn
        finally:
            users = self._queues[row][1] - 1
            if users:
                self._queues[row] = turn, users
            else:
                del self._queues[row]
