"""Rides out what passes: a server that restarts, a deadlock, a database that is busy.

And says so in the log, as it does of a call that waits for long.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError
from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception,
    stop_before_delay,
    wait_random_exponential,
)

from .errors import in_short, is_lock_timeout, is_transient

T = TypeVar("T")

_MAY_BE_HELD = (
    "Another transaction may hold the row (in SQLite, the file), such as a session of your "
    "application with uncommitted changes: commit it, or call the storage inside "
    "`async with storage.using(session)`"
)

logger = logging.getLogger("hybrid_storage")


async def with_retries(
    call: Callable[[], Awaitable[T]],
    seconds: float,
    what: object,
    confirm: Callable[[], Awaitable[object]] | None = None,
) -> T:
    """Call until it succeeds, fails for good, or the time is over.

    :param call: awaited for each attempt
    :param seconds: for how long
    :param what: it does, for the log
    :param confirm: awaited after an attempt that was not the first: it may have found done what an
        earlier one had done, whose answer was lost
    """

    async def again() -> T:
        result = await call()
        if confirm is not None:
            await confirm()
        return result

    began = time.monotonic()
    try:
        try:
            return await call()
        except Exception as error:
            left = seconds - (time.monotonic() - began)
            if left <= 0 or not is_transient(error):
                raise
            logger.warning("%s failed, trying again for %.0f s: %s", what, left, in_short(error))
        return await AsyncRetrying(**_retrying(left))(again)
    except DBAPIError as error:
        if is_lock_timeout(error):
            error.add_detail(_MAY_BE_HELD)
        raise


def with_retries_sync(call: Callable[[], T], seconds: float, what: object) -> T:
    """Do the same in a thread of synchronous code."""
    try:
        return call()
    except Exception as error:
        if seconds <= 0 or not is_transient(error):
            raise
        logger.warning("%s failed, trying again for %.0f s: %s", what, seconds, in_short(error))
    return Retrying(**_retrying(seconds))(call)


def _retrying(seconds: float) -> dict[str, Any]:
    # Pauses of up to 50 ms, 100 ms, ... 2 s, of random length: those who failed together
    # do not come back together.
    return {
        "retry": retry_if_exception(is_transient),
        "wait": wait_random_exponential(multiplier=0.05, max=2),
        "stop": stop_before_delay(seconds),
        "reraise": True,
    }


@contextmanager
def warning_if_slow(seconds: float, what: object, why: str = _MAY_BE_HELD) -> Iterator[None]:
    """Log one warning if the block takes longer, while it is still at it."""
    # In a context of its own: a timer is not to keep what the caller's context holds.
    timer = asyncio.get_running_loop().call_later(
        seconds,
        partial(logger.warning, "%s has been waiting for %g s. %s", what, seconds, why),
        context=Context(),
    )
    try:
        yield
    finally:
        timer.cancel()
