"""One hop to a worker thread of anyio's, whose cancellation waits for the thread.

``to_thread.run_sync()`` by itself holds against cancel scopes of anyio's alone. A time-out of
asyncio's returns at once and leaves the thread at work, where a write could land after a newer one.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from anyio import CapacityLimiter, to_thread

from .cancellation import Interrupter, wait_until_done

T = TypeVar("T")


async def run_in_thread(function: Callable[[], T], interrupter: Interrupter | None = None) -> T:
    """Call a function in a worker thread.

    Cancelled before the thread begins, it does nothing. Cancelled later, it ends the statement
    under way, waits for the thread, and re-raises.
    """
    job = _Job(function)
    try:
        # Not shielded by anyio: both kinds of cancellation take the same path below.
        return await to_thread.run_sync(job.run, abandon_on_cancel=True, limiter=_limiter())
    except asyncio.CancelledError as cancelled:
        cancellation = cancelled
    end = job.cancel()
    if end is not None:
        done = asyncio.wrap_future(end)
        try:
            if interrupter is not None:
                await wait_until_done(interrupter.request_until(done, _in_another_thread))
        finally:
            await wait_until_done(done)
    raise cancellation


class _Job(Generic[T]):
    """A function that a thread calls, unless it is cancelled before."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._is_cancelled = self._is_running = False
        self._end: Future[None] | None = None  # made for whoever waits: it costs more than the rest

    def run(self) -> T:
        """Call the function, in the thread."""
        with self._lock:
            if self._is_cancelled:
                raise asyncio.CancelledError  # nobody waits for this any more
            self._is_running = True
        try:
            return self._function()
        finally:
            with self._lock:
                self._is_running = False
                if self._end is not None:
                    self._end.set_result(None)

    def cancel(self) -> Future[None] | None:
        """Keep the function from being called; return the end to wait for if it runs already."""
        with self._lock:
            self._is_cancelled = True
            if self._is_running:
                self._end = Future()
            return self._end


async def _in_another_thread(request: Callable[[], None]) -> None:
    await to_thread.run_sync(request, limiter=_limiter())


def _limiter() -> CapacityLimiter:
    # Slots limit the threads. The tokens of anyio's default limiter are left to the application.
    return CapacityLimiter(math.inf)
