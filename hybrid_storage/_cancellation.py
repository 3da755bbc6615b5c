"""What has begun is finished, and then the cancellation goes on.

``asyncio.shield()`` takes a task of its own for that, and three turns of the event loop, each of
which costs as much as a good part of a statement. :func:`completed` stays in the caller's task: it
stands between the task and what is awaited, and does not let a cancellation pass.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context
from types import coroutine as awaitable
from typing import Any, TypeVar, cast

from anyio import CancelScope

T = TypeVar("T")


def completed(coroutine: Coroutine[Any, Any, T]) -> Awaitable[T]:
    """Complete a coroutine, whatever cancels the caller meanwhile; then let that go on.

    :param coroutine: sees a current task of its own, as in :func:`asyncio.shield`
    :return: what it returns
    """
    return _completed(coroutine)


@awaitable
def _completed(coroutine: Coroutine[Any, Any, T]) -> Generator[Any, None, T]:
    loop = asyncio.get_running_loop()
    outer: Any = asyncio.current_task()
    inner = _Inner(outer, coroutine)
    interruption: asyncio.CancelledError | None = None
    shield: CancelScope | None = None
    error: BaseException | None = None
    try:
        while True:
            # Time-outs in there are to cancel what is in there, not the caller.
            _leave_task(loop, outer)
            _enter_task(loop, inner.as_task)
            try:
                awaited = inner.step(error)
            finally:
                _leave_task(loop, inner.as_task)
                _enter_task(loop, outer)
            error = None
            while True:
                # Not at once where it is done: its callbacks come first, as for a task.
                wait = None if awaited is None or awaited.done() else _Wait(awaited)
                try:
                    yield wait
                    break
                except asyncio.CancelledError as cancelled:
                    if wait is not None and not wait.is_cancelled:
                        error = cancelled  # that of what is awaited
                        break
                    if shield is None:
                        # anyio would cancel this task in each turn of the event loop.
                        shield = CancelScope(shield=True).__enter__()
                    interruption = cancelled
                except BaseException as failed:
                    error = failed
                    break
    except StopIteration as stop:
        if interruption is not None:
            raise interruption from None
        return cast("T", stop.value)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        if interruption is not None:
            raise interruption from None
        raise
    finally:
        if shield is not None:
            shield.__exit__(*sys.exc_info())


class _Inner:
    """What the coroutine takes for its task."""

    def __init__(self, outer: asyncio.Task[Any], coroutine: Coroutine[Any, Any, Any]) -> None:
        self._outer = outer
        self._coroutine = coroutine
        # Named as those of a task, for anyio looks at them.
        self._fut_waiter: Any = None
        self._must_cancel = False
        self._requests = 0
        self.as_task = cast("asyncio.Task[Any]", self)

    def step(self, error: BaseException | None) -> Any:
        """Go on until there is something to wait for."""
        if self._must_cancel:
            self._must_cancel = False
            error = asyncio.CancelledError()
        coroutine = self._coroutine
        awaited = coroutine.send(None) if error is None else coroutine.throw(error)
        if awaited is not None:
            awaited._asyncio_future_blocking = False  # as a task does
            self._fut_waiter = awaited
        return awaited

    def cancel(self, msg: object = None) -> bool:
        """Cancel the coroutine alone."""
        self._requests += 1
        waiter = self._fut_waiter
        if waiter is None or not waiter.cancel(msg=msg):
            self._must_cancel = True
        return True

    def cancelling(self) -> int:
        """Return how many requests to cancel it there are."""
        return self._requests

    def uncancel(self) -> int:
        """Take back a request to cancel it."""
        self._requests -= 1
        return self._requests

    def get_coro(self) -> Coroutine[Any, Any, Any]:
        """Return the coroutine."""
        return self._coroutine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outer, name)


class _Wait:
    """A future as the task sees it: to cancel it wakes the task, and leaves the future alone."""

    __slots__ = ("_asyncio_future_blocking", "_callback", "_context", "_future", "is_cancelled")

    _callback: Callable[[Any], object]
    _context: Context | None

    def __init__(self, future: Any) -> None:
        self._future = future
        self._asyncio_future_blocking = True
        self.is_cancelled = False

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return cast("asyncio.AbstractEventLoop", self._future.get_loop())

    def add_done_callback(
        self, callback: Callable[[Any], object], *, context: Context | None = None
    ) -> None:
        self._callback = callback
        self._context = context
        self._future.add_done_callback(callback, context=context)

    def remove_done_callback(self, callback: Callable[[Any], object]) -> int:
        return cast("int", self._future.remove_done_callback(callback))

    def done(self) -> bool:
        return cast("bool", self._future.done())

    def cancel(self, msg: object = None) -> bool:
        if self.is_cancelled:
            return True  # the task has been woken
        self.is_cancelled = True
        if self._future.done():
            return False  # the task cancels itself when it wakes
        self._future.remove_done_callback(self._callback)
        wakes: asyncio.Future[None] = self.get_loop().create_future()
        wakes.cancel(msg)
        wakes.add_done_callback(self._callback, context=self._context)
        return True


async def ended(future: asyncio.Future[Any]) -> None:
    """Wait for the end of a future, whatever cancels the caller meanwhile; then let that go on.

    Not for an ``except`` block: before Python 3.11, anyio goes by the context of a cancellation
    when it tells its own from those of others.

    :param future: what has been begun
    """
    interruption: asyncio.CancelledError | None = None
    with CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as cancelled:
                interruption = cancelled
    if not future.cancelled():
        future.exception()  # looked at, or asyncio logs that nobody did
    if interruption is not None:
        raise interruption
