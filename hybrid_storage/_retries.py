"""Rides out what passes: a server that restarts, a deadlock, a database that is busy."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_before_delay,
    wait_random_exponential,
)

from ._errors import is_transient

T = TypeVar("T")

logger = logging.getLogger("hybrid_storage")


async def persist(call: Callable[[], Awaitable[T]], seconds: float, what: str) -> T:
    """Call until it succeeds, fails for good, or the time is over.

    :param call: the call, which may be made again after it has failed
    :param seconds: how long to go on after the first failure; 0 makes one call
    :param what: what is being done, for the log
    :return: what the call returns
    """
    began = time.monotonic()
    try:
        return await call()
    except Exception as error:
        left = seconds - (time.monotonic() - began)
        if left <= 0 or not is_transient(error):
            raise
        logger.warning("%s failed, trying again for %.0f s: %s", what, left, in_short(error))
    # Pauses of up to 50 ms, 100 ms, ... 2 s, of random length: those who failed together
    # do not come back together.
    retrying = AsyncRetrying(
        retry=retry_if_exception(is_transient),
        wait=wait_random_exponential(multiplier=0.05, max=2),
        stop=stop_before_delay(left),
        reraise=True,
    )
    async for attempt in retrying:
        with attempt:
            return await call()
    raise AssertionError("tenacity returns or raises")


def in_short(error: Exception) -> str:
    """Return an error's first line for the log, without the statement and its parameters.

    :param error: the error
    """
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {cause}".split("\n")[0]
