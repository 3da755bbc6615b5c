"""One hop to a worker thread of anyio's, whose cancellation waits for the thread.

``to_thread.run_sync()`` by itself holds against cancel scopes of anyio's alone. A time-out of
asyncio's returns at once and leaves the thread at work, where a write could land after a newer one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from .cancellation import Interrupter, wait_until_done

T = TypeVar("T")

# Slots limit the threads. The tokens of anyio's default limiter are left to the application.
_unlimited: RunVar[CapacityLimiter] = RunVar("hybrid_storage_threads")


async def run_in_thread(function: Callable[[], T], interrupter: Interrupter | None = None) -> T:
    """Call a function in a worker thread.

    Cancelled before the thread begins, it does nothing. Cancelled later, it ends the statement
    under way, waits for the thread, and re-raises.
    """
    outcome: Future[T] = Future()
    try:
        # Not shielded by anyio: both kinds of cancellation take the same path below.
        await to_thread.run_sync(
            partial(_run, function, outcome), abandon_on_cancel=True, limiter=_limiter()
        )
    except asyncio.CancelledError as cancelled:
        cancellation = cancelled
    else:
        return outcome.result()
    if not outcome.cancel():
        done = asyncio.wrap_future(outcome)
        try:
            if interrupter is not None:
                await wait_until_done(interrupter.request_until(done, _in_another_thread))
        finally:
            await wait_until_done(done)
    raise cancellation


def _run(function: Callable[[], T], outcome: Future[T]) -> None:
    if not outcome.set_running_or_notify_cancel():
        return  # cancelled before the thread was free
    try:
        result = function()
    except BaseException as error:
        outcome.set_exception(error)
    else:
        outcome.set_result(result)


async def _in_another_thread(request: Callable[[], None]) -> None:
    await to_thread.run_sync(request, limiter=_limiter())


def _limiter() -> CapacityLimiter:
    limiter = _unlimited.get(None)
    if limiter is None:
        limiter = CapacityLimiter(math.inf)
        _unlimited.set(limiter)
    return limiter
