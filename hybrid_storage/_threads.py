"""Worker threads: one hop for a call, or none where a worker is at hand.

A hop to a thread and back takes as long as a statement and its answer on the same machine, and
threads that are all at work wait for each other at the interpreter's lock. So a worker serves the
calls that wait one after another, and a moment longer; the event loop is woken once for all that
has been done meanwhile, and not while more calls wait than there are workers to take them; and
there are few workers unless calls have to wait.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context, copy_context
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from ._cancellation import ended

T = TypeVar("T")

_FEW = 3  # workers at once; more only compete for the interpreter's lock, unless calls take long
_PATIENCE = 0.003  # seconds that a call waits before there is another worker; an answer, at most
_QUICK = 0.001  # seconds; the answer to a call that took longer does not wait for those of others
_LINGER = 0.1  # seconds that a worker waits for another call

# How many threads there are is for others to decide; anyio's default limiter is the application's.
_any_number: RunVar[CapacityLimiter] = RunVar("any_number")


async def in_thread(work: Callable[[], T]) -> T:
    """Do the work in a worker thread, without taking one of the application's.

    :param work: once begun, it is finished, then cancelled
    :return: what it returns
    """
    outcome: Future[T] = Future()

    def job() -> None:
        if outcome.set_running_or_notify_cancel():
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

    try:
        await to_thread.run_sync(job, limiter=_unlimited())
    except asyncio.CancelledError as cancelled:
        interruption = cancelled
    else:
        return outcome.result()
    if not outcome.cancel():
        await ended(asyncio.wrap_future(outcome))
    raise interruption


class Crew:
    """Workers that share the calls of one event loop to one database."""

    def __init__(self, most: int) -> None:
        """Begin without any worker.

        :param most: how many workers there may be
        """
        self._most = most
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._done: deque[_Call[Any]] = deque()
        self._is_woken = False
        # What follows belongs to the event loop's thread.
        self._unanswered = 0
        self._workers: set[asyncio.Task[None]] = set()
        self._latest: _Call[Any] | None = None
        self._is_watching = False

    async def do(self, work: Callable[[], T]) -> T:
        """Do the work in a worker thread.

        :param work: cancelled before it begins, it is not done; once begun, it is finished, then
            cancelled
        :return: what it returns
        """
        loop = asyncio.get_running_loop()
        call = _Call(work, loop)
        self._latest = call
        self._unanswered += 1
        self._calls.put(call)
        if len(self._workers) < self._unanswered:
            self._hire(_FEW)
            self._watch()
        try:
            await call.answered
        except asyncio.CancelledError as cancelled:
            interruption = cancelled
        else:
            return call.result()
        if call.claim():
            self._unanswered -= 1
            self._forget()
        elif not call.is_done:
            call.answered = loop.create_future()
            await ended(call.answered)
        raise interruption

    def _hire(self, most: int) -> None:
        while len(self._workers) < min(most, self._most, self._unanswered):
            # In a context of its own: the worker outlives the caller.
            task = Context().run(asyncio.create_task, self._work())
            self._workers.add(task)
            task.add_done_callback(self._left)

    def _watch(self) -> None:
        """See to it that no answer waits for long, nor a call while there could be more workers."""
        if not self._is_watching and len(self._workers) < self._unanswered:
            self._is_watching = True
            loop = asyncio.get_running_loop()
            loop.call_later(_PATIENCE, self._look, self._latest, context=Context())

    def _look(self, call: _Call[Any] | None) -> None:
        self._is_watching = False
        self._answer()
        if call is not None and not call.has_begun:
            self._hire(self._most)
        self._watch()

    async def _work(self) -> None:
        try:
            await to_thread.run_sync(self._serve, limiter=_unlimited())
        except asyncio.CancelledError:
            self._calls.put(None)  # the thread need not linger
            raise

    def _left(self, task: asyncio.Task[None]) -> None:
        self._workers.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if not self._workers:
                self._fail(error)
        elif self._unanswered > len(self._workers):
            self._hire(_FEW)
        self._watch()

    def _fail(self, error: BaseException) -> None:
        """Have the calls that wait fail, for which there is no thread."""
        with suppress(Empty):
            while True:
                call = self._calls.get_nowait()
                if call is not None and call.claim():
                    call.error = error
                    self._report(call)

    def _serve(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=_LINGER)
            except Empty:
                return
            if call is None:
                return
            if call.claim():
                began = time.monotonic()
                call.run()
                self._report(call, is_quick=time.monotonic() - began < _QUICK)
            del call

    def _report(self, call: _Call[Any], *, is_quick: bool = False) -> None:
        self._done.append(call)
        if is_quick and self._unanswered - len(self._done) > len(self._workers):
            return  # more calls wait; should they take long, _watch() looks for what is done
        if not self._is_woken:  # otherwise the event loop is about to look
            self._is_woken = True
            with suppress(RuntimeError):  # it is closed: nobody waits any more
                call.answered.get_loop().call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._is_woken = False  # first: what comes from here on wakes the event loop again
        while self._done:
            call = self._done.popleft()
            self._unanswered -= 1
            call.is_done = True
            if not call.answered.done():
                call.answered.set_result(None)
        self._forget()

    def _forget(self) -> None:
        if not self._unanswered:
            self._latest = None  # what it was to do holds the engine, and it the event loop


class _Call(Generic[T]):
    """A piece of work, and what became of it."""

    __slots__ = ("_claims", "_context", "_result", "_work", "answered", "error", "is_done")

    _result: T

    def __init__(self, work: Callable[[], T], loop: asyncio.AbstractEventLoop) -> None:
        self._work = work
        self._context = copy_context()
        self._claims = [None]
        self.answered: asyncio.Future[None] = loop.create_future()
        self.error: BaseException | None = None
        self.is_done = False

    @property
    def has_begun(self) -> bool:
        """Whether somebody has claimed it."""
        return not self._claims

    def claim(self) -> bool:
        """Take it, to do it or to cancel it: True for the one who asks first."""
        try:
            self._claims.pop()
        except IndexError:
            return False
        return True

    def run(self) -> None:
        """Do the work."""
        try:
            self._result = self._context.run(self._work)
        except BaseException as error:
            self.error = error

    def result(self) -> T:
        """Return the result, or raise the error."""
        if self.error is None:
            return self._result
        try:
            raise self.error
        finally:
            self.error = None  # no reference cycle by way of the traceback


def _unlimited() -> CapacityLimiter:
    limiter = _any_number.get(None)
    if limiter is None:
        limiter = CapacityLimiter(math.inf)
        _any_number.set(limiter)
    return limiter
