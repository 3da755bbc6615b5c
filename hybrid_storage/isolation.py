"""One handler at a time per conversation, across tasks, processes and hosts.

In one process those who want a key wait for each other in memory, in the order they came. The one
whose turn it is takes a lease in the database, asking again after growing pauses while another
process has it. One timer per process renews all leases that are held; no connection and no thread
is held while a handler runs.
"""

from __future__ import annotations

import asyncio
import operator
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import anyio
from aiogram.fsm.storage.base import BaseEventIsolation, StorageKey
from anyio.lowlevel import RunVar
from sqlalchemy import Connection
from tenacity import AsyncRetrying, retry_if_result, wait_random_exponential

from ._engine.calls import Call
from ._engine.cancellation import run_to_completion
from ._engine.errors import in_short
from ._engine.retries import logger, warning_if_slow, with_retries
from ._engine.runner import Runner
from ._engine.scopes import Scope, ScopeClosed
from ._sql.leases import Leases

T = TypeVar("T")

_FIRST_PAUSE = 0.02  # seconds; the pauses between two looks at a lock grow from here
_CHUNK = 500  # keys that one statement renews


class SQLAlchemyEventIsolation(BaseEventIsolation):
    """Lets one handler at a time run for a key, whichever process got the update.

    Get one as ``storage.create_isolation()`` and pass it as ``Dispatcher(events_isolation=...)``.

    A lock is a lease of some seconds that is renewed while the handler runs. If a process dies,
    its leases end by themselves and others go on. A database's own advisory locks would each
    hold a connection for as long as a handler runs, and are not there in SQLite.

    Locks of different keys nest. A task that asks for a key it holds gets a ``RuntimeError``.
    """

    def __init__(
        self,
        runner: Runner,
        leases: Leases,
        row_of: Callable[[StorageKey], str],
        scope: Callable[[], Scope | None],
        *,
        lease: float,
        poll: float,
        wait: float | None,
        retry_for: float,
        slow_after: float,
    ) -> None:
        """Remember what to use; see :meth:`SQLAlchemyStorage.create_isolation`."""
        if not isinstance(runner, Runner):
            raise TypeError(
                "SQLAlchemyEventIsolation is not for you to construct: pass "
                "events_isolation=storage.create_isolation()"
            )
        for name, seconds in {"lease": lease, "poll": poll, "wait": wait}.items():
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} is a number of seconds above 0, not {seconds!r}")
        self._runner = runner
        self._leases = leases
        self._row_of = row_of
        self._scope = scope
        self._lease = lease
        self._poll = poll
        self._wait = wait
        self._retry_for = retry_for
        self._slow_after = slow_after
        self._local: RunVar[_Here] = RunVar(f"isolation-{uuid.uuid4().hex}")

    @asynccontextmanager
    async def lock(self, key: StorageKey) -> AsyncGenerator[None, None]:
        """Hold the lock of a key.

        Cancelled while it waits, it leaves nothing behind; cancelled while it is held, it frees it.

        :param key: the conversation's key
        :raises TimeoutError: if the lock could not be acquired within ``wait`` seconds
        :raises RuntimeError: if this task holds it already
        """
        row = self._row_of(key)
        here = self._here()
        with here.queue(row) as turn:
            with anyio.move_on_after(self._wait) as limit:
                await turn.acquire()
                try:
                    await self._take(here, row)
                except BaseException:
                    turn.release()
                    raise
            if limit.cancelled_caught:
                raise TimeoutError(
                    f"could not acquire the lock for {row!r} within {self._wait:g} s: its holder "
                    "is still at work, or has died within the last lease"
                )
            try:
                yield
            finally:
                try:
                    await run_to_completion(
                        self._free(here, row, min(self._retry_for, self._lease))
                    )
                finally:
                    turn.release()

    def still_held(self, key: StorageKey) -> bool:
        """Tell a handler whether it is still the only one for its key.

        It is not after a lease could not be renewed in time, because the database was away or the
        event loop blocked for longer. Costs nothing: goes by the time of the last renewal.

        :param key: the conversation's key
        :return: False if this process does not hold the key, or may have lost it
        """
        hold = self._here().holds.get(self._row_of(key))
        return hold is not None and not hold.lost and time.monotonic() < hold.deadline

    async def close(self) -> None:
        """Stop renewing if nothing is held; locks that are held go on to be renewed."""
        self._here().rest()

    def _here(self) -> _Here:
        here = self._local.get(None)
        if here is None:
            here = _Here()
            self._local.set(here)
        return here

    async def _take(self, here: _Here, row: str) -> None:
        unanswered = False
        deadline = 0.0

        def acquire(connection: Connection) -> bool:
            nonlocal unanswered, deadline
            unanswered, deadline = True, time.monotonic() + self._lease
            return self._leases.acquire(connection, row, here.owner, self._lease)

        async def attempt() -> bool:
            nonlocal unanswered
            taken = await self._execute(acquire, row, self._retry_for)
            unanswered = False
            return taken

        again = AsyncRetrying(
            retry=retry_if_result(operator.not_),
            wait=wait_random_exponential(multiplier=_FIRST_PAUSE, max=self._poll),
        )
        try:
            await again(attempt)
        except BaseException:
            if unanswered:  # it may have been taken, for a caller that is gone
                await run_to_completion(self._free(here, row, retry_for=0))
            raise
        here.holds[row] = _Hold(deadline)
        # It counts from the moment of asking, and may have been long in coming.
        self._schedule(here, deadline - 2 / 3 * self._lease - time.monotonic())

    async def _free(self, here: _Here, row: str, retry_for: float) -> None:
        here.holds.pop(row, None)
        here.rest()
        try:
            await self._execute(
                partial(self._leases.release, row=row, owner=here.owner), row, retry_for
            )
        except Exception as error:
            # The update has been handled; the lease ends by itself.
            logger.warning("could not free the lock of %r: %s", row, in_short(error))

    async def _execute(self, function: Callable[[Connection], T], row: str, retry_for: float) -> T:
        call = self._call(function, row)
        with warning_if_slow(self._slow_after, call):
            scope = self._scope()
            if scope is not None and scope.holds_write_lock():  # which nobody else can take
                with suppress(ScopeClosed):
                    return await scope.execute(call)
            return await with_retries(partial(self._runner.execute, call), retry_for, call)

    def _call(self, function: Callable[[Connection], T], row: str) -> Call[T]:
        arguments = {**self._runner.bind_arguments, "clause": self._leases.delete}
        return Call(function, arguments, row, self._leases.table.fullname)

    def _schedule(self, here: _Here, pause: float) -> None:
        loop = asyncio.get_running_loop()
        if here.timer is not None:
            if here.timer.when() <= loop.time() + pause:
                return
            here.timer.cancel()
        # In a context of its own: the timer outlives the handler that happens to set it.
        here.timer = loop.call_later(pause, self._beat, here, context=Context())

    def _beat(self, here: _Here) -> None:
        here.timer = None
        if here.holds:
            here.renewal = asyncio.ensure_future(self._renew(here))

    async def _renew(self, here: _Here) -> None:
        holds = {row: hold for row, hold in here.holds.items() if not hold.lost}
        rows = list(holds)
        pause = self._lease / 3
        before = time.monotonic()
        try:
            for start in range(0, len(rows), _CHUNK):
                chunk = rows[start : start + _CHUNK]
                renew = partial(self._leases.renew, rows=chunk, owner=here.owner, lease=self._lease)
                kept = await self._runner.execute(self._call(renew, "leases"), is_heartbeat=True)
                for row in kept:
                    holds[row].deadline = before + self._lease
                for row in set(chunk) - kept:
                    here.lose(row, holds[row], "another process has taken it over")
        except Exception as error:
            pause = self._lease / 10
            for row, hold in holds.items():
                if hold.deadline < time.monotonic():
                    here.lose(row, hold, f"it could not be renewed in time: {in_short(error)}")
        finally:
            if here.renewal is asyncio.current_task():
                here.renewal = None
            if here.holds:
                self._schedule(here, pause)


@dataclass
class _Hold:
    """A lock that a handler of this process holds."""

    deadline: float
    """When it may end, by ``time.monotonic()``: not later than by the database's clock."""
    lost: bool = False


class _Here:
    """What one event loop has and waits for."""

    def __init__(self) -> None:
        self.owner = uuid.uuid4().hex
        self.holds: dict[str, _Hold] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.renewal: asyncio.Future[None] | None = None  # kept from the garbage collector
        self._queues: dict[str, tuple[anyio.Lock, int]] = {}

    @contextmanager
    def queue(self, row: str) -> Iterator[anyio.Lock]:
        """Give the queue for a key, which is gone when nobody uses it any more."""
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

    def rest(self) -> None:
        """Renew no more if nothing is held; a timer would keep an event loop that has ended."""
        if self.timer is not None and not self.holds:
            self.timer.cancel()
            self.timer = None

    def lose(self, row: str, hold: _Hold, why: str) -> None:
        """Mark a lock as lost, unless it was freed meanwhile, and say so once."""
        if self.holds.get(row) is hold and not hold.lost:
            hold.lost = True
            logger.warning(
                "the lock of %r is lost while its handler runs, so that another may run at the "
                "same time: %s",
                row,
                why,
            )
