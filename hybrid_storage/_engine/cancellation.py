"""Cancellation: waiting for what must not be cut short, and ending a statement that waits.

For the rest of ``_engine``, ``isolation.py`` and ``transactions.py``. Cancellation is asyncio's own
(``task.cancel()``, ``asyncio.timeout()``) or that of a cancel scope of anyio's, alone or nested.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from inspect import iscoroutinefunction
from types import coroutine
from typing import Any, TypeVar, cast

from anyio import CancelScope
from sqlalchemy import Connection

from .retries import logger

T = TypeVar("T")

_SERVER_ANSWERS_WITHIN = 5.0  # seconds: the limit of one request to cancel
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0  # seconds between requests to cancel


_ending: set[asyncio.Future[None]] = set()

# The task that runs to completion, so that what it calls need not start another.
_completing: ContextVar[asyncio.Task[Any] | None] = ContextVar("completing", default=None)


def _always() -> bool:
    return True


class StatementCancelledError(asyncio.CancelledError):
    """The caller was cancelled: the worker must not go on to the next step."""


class Interrupter:
    """Ends the statement that a call waits for, and never a statement of another call.

    A request to cancel reaches whatever the connection does at that moment. So the worker says
    from when until when the connection serves this call, and a request holds the same lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._driver_connection: Any = None
        self._is_requested: Callable[[], bool] = bool  # which is False

    @contextmanager
    def reaching(self, connection: Connection) -> Iterator[None]:
        """Let requests end what a connection does in the block, and nothing that it does later.

        To be left before COMMIT, and before the connection is given back.

        :raises StatementCancelledError: if the call is cancelled before the block or in it
        """
        with self._lock:
            self._refuse_if_requested()
            self._driver_connection = connection.connection.driver_connection
        try:
            yield
        finally:
            with self._lock:
                self._driver_connection = None
                self._refuse_if_requested()

    def _refuse_if_requested(self) -> None:
        if self._is_requested():
            raise StatementCancelledError

    def request(self, still: Callable[[], bool] = _always) -> None:
        """End the statement under way, if there is one. Blocks until the server has answered.

        :param still: tells later on whether the caller is cancelled, or was not meant
        """
        with self._lock:
            self._is_requested = still
            _end_statement(self._driver_connection)

    async def request_until(
        self, done: asyncio.Future[Any], call: Callable[[Callable[[], None]], Awaitable[None]]
    ) -> None:
        """Go on requesting until a call has ended: one between two statements ends nothing."""
        pause = _FIRST_PAUSE
        while not done.done():
            try:
                await call(self.request)
            except Exception as error:  # the server does not answer; it may the next time
                logger.warning("could not cancel a statement: %s", error)
            await asyncio.wait([done], timeout=pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _end_statement(driver_connection: Any) -> None:
    """End the statement of a driver's connection, if the driver has a way to."""
    families = {kind.__module__.partition(".")[0] for kind in type(driver_connection).__mro__}
    if "aiosqlite" in families:
        task = asyncio.ensure_future(_end_in_aiosqlite(driver_connection))
        _ending.add(task)  # or the garbage collector would take it
        task.add_done_callback(_ending.discard)
    elif "sqlite3" in families:
        driver_connection.interrupt()
    elif families & {"psycopg", "psycopg2"} and not iscoroutinefunction(driver_connection.close):
        if hasattr(driver_connection, "cancel_safe"):  # since psycopg 3.2
            driver_connection.cancel_safe(timeout=_SERVER_ANSWERS_WITHIN)
        else:
            driver_connection.cancel()


async def _end_in_aiosqlite(connection: Any) -> None:
    with suppress(Exception):  # it may be closed already
        await connection.interrupt()
        # Ahead of its being closed, which SQLite puts off for as long as a traceback has a cursor.
        await connection.rollback()


@coroutine
def in_callers_task(awaitable: Awaitable[T], interrupter: Interrupter) -> Generator[Any, Any, T]:
    """Await in the caller's task, and end the statement under way before a cancellation passes.

    Passed first, it would have SQLAlchemy close the connection, and aiosqlite's thread does that
    after the statement. A driver's time-out cancels the task as well, and takes that back as soon
    as it has caught it: the caller is not to be told of that one.
    """
    steps = awaitable.__await__()
    step: Callable[[], Any] = partial(next, steps)
    is_cancelled = _cancelled_since_now()
    cancellation: asyncio.CancelledError | None = None
    shield: CancelScope | None = None
    try:
        while True:
            try:
                awaited = step()
            finally:
                if shield is not None and not is_cancelled():
                    shield.__exit__(None, None, None)
                    cancellation = shield = None
            try:
                step = partial(steps.send, (yield awaited))
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError) and cancellation is None:
                    cancellation = error
                    # anyio would cancel again in each turn of the loop, and interrupt what the
                    # driver does to cancel at the server.
                    shield = CancelScope(shield=True).__enter__()
                    interrupter.request(is_cancelled)
                    if _ending:  # for a turn: aiosqlite's thread is to roll back before it closes
                        with suppress(asyncio.CancelledError):
                            yield
                step = partial(steps.throw, error)
    except StopIteration as stop:
        if cancellation is not None:
            raise cancellation from None
        return cast("T", stop.value)
    except Exception:
        if cancellation is not None:
            raise cancellation from None
        raise
    except asyncio.CancelledError:
        raise cancellation or asyncio.CancelledError from None
    finally:
        if shield is not None:
            shield.__exit__(None, None, None)


def _cancelled_since_now() -> Callable[[], bool]:
    """Return what tells whether somebody has cancelled this task, and not taken it back."""
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    if cancelling is None:  # before Python 3.11 it is not told
        return _always
    before = cancelling()
    return lambda: cancelling() > before


class _CancelledOnce(asyncio.Task[T]):
    """A task that heeds one request to cancel: the storage's, the loop's, or another task's.

    A driver that is cancelled again while it cancels at the server gives up, and the statement
    goes on there. ``asyncio.run()`` cancels all tasks at its end, when the loop has stopped.
    """

    is_ending = False

    def cancel(self, msg: Any = None) -> bool:
        """Pass a request on, unless there was one. The driver's time-outs always pass."""
        loop = self.get_loop()
        if not loop.is_running() or asyncio.current_task(loop) not in (None, self):
            # No time-out inside of the task: those cancel it in a callback of the loop.
            if self.is_ending:
                return False
            self.is_ending = True
        return super().cancel(msg)


class _Uncancelled(asyncio.Task[T]):
    """A task that heeds no request to cancel, not even that of a loop which ends."""

    def cancel(self, msg: Any = None) -> bool:
        """Refuse."""
        return False


async def run_to_completion(
    function: Callable[[], Awaitable[T]],
    interrupter: Interrupter | None = None,
    *,
    cancels: bool = False,
) -> T:
    """Run an async function to completion even if the caller is cancelled, then re-raise.

    :param function: called in a task of its own, unless the caller runs to completion already
    :param interrupter: ends the function's statements if the caller is cancelled
    :param cancels: cancel the function, but once only
    """
    if _completing.get() is asyncio.current_task():
        return await function()
    done = asyncio.get_running_loop().create_future()

    def end(_: object = None) -> None:
        if not done.done():
            done.set_result(None)

    async def run() -> T:
        _completing.set(asyncio.current_task())
        try:
            return await function()
        finally:
            end()  # at once: asyncio.shield() would wake the caller one turn of the loop later

    task = _CancelledOnce(run(), loop=asyncio.get_running_loop())
    task.add_done_callback(end)  # for a task that is cancelled before it starts
    try:
        await done
        return task.result()
    except asyncio.CancelledError as cancelled:
        cancellation = cancelled  # of the caller, or of the function itself
    # Outside of the except block: before Python 3.11, anyio tells its own cancellations from those
    # of others by the exception's context.
    try:
        if cancels:
            if not getattr(task, "cancelling", bool)():  # by a callback that ends all tasks
                task.cancel()
        elif interrupter is not None:
            await wait_until_done(interrupter.request_until(task, _at_once))
    finally:
        await wait_until_done(task)
    raise cancellation


async def _at_once(request: Callable[[], None]) -> None:
    request()


async def wait_until_done(awaitable: asyncio.Future[Any] | Coroutine[Any, Any, Any]) -> None:
    """Wait until something has ended, however often the caller is cancelled, then re-raise that.

    :param awaitable: a coroutine goes on even if the loop ends, which waits for the caller
    """
    future = (
        awaitable
        if asyncio.isfuture(awaitable)
        else _Uncancelled(awaitable, loop=asyncio.get_running_loop())
    )
    cancellation: asyncio.CancelledError | None = None
    with CancelScope(shield=True):  # anyio repeats its cancellation in each turn of the loop
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as cancelled:
                cancellation = cancelled
    if not future.cancelled():
        future.exception()  # retrieved, or asyncio logs that nobody did
    if cancellation is not None:
        raise cancellation
