"""One handler at a time per conversation, across tasks, processes and hosts.

In one process those who want a conversation wait for each other in memory, in the order they came.
The one whose turn it is takes a lease in the database, unless the bot has one process only. Inside,
a unit of work may collect what the handler does.
"""

from __future__ import annotations

import math
import uuid
from asyncio import current_task
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import (
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from contextvars import ContextVar
from functools import partial

import anyio
from aiogram.dispatcher.event.bases import CancelHandler, SkipHandler
from aiogram.fsm.storage.base import BaseEventIsolation, StorageKey
from anyio.lowlevel import RunVar

from ._codec import Codec
from ._engine.access import Access
from ._engine.cancellation import run_to_completion
from ._engine.retries import warning_if_slow
from ._engine.slots import PARENT_WAIT
from ._leases import HeldLease, HeldLeases
from ._queues import HeldLock, OneLoop, Queues
from ._sql.leases import Leases
from ._sql.units import Units
from ._sync_lock import (
    HELD_BY_HANDLER,
    IS_HELD,
    NO_LEASE,
    held_in_this_thread,
    is_held_by_this_thread,
    is_synchronous,
)
from ._unit import UnitOfWork
from .unit_of_work import UnitsOfWork

_WAITS_FOR_FILE = (
    "waited {:g} s for the lock of {!r} inside a transaction that holds SQLite's write lock, "
    "which a task needs to take the lock and to free it: take the lock first, then open the "
    "transaction"
)
_AT_WORK = (
    "Its holder is still at work. A handler that asks another isolation of the same storage for "
    "the lock waits for itself: use one isolation"
)


class SQLAlchemyEventIsolation(BaseEventIsolation):
    """Lets one handler at a time run for a conversation, whichever process got the update.

    Get one as ``storage.create_isolation()`` and pass it as ``Dispatcher(events_isolation=...)``.

    A lock is a lease of some seconds that is renewed while the handler runs. If a process dies,
    its leases end by themselves and others go on. A database's own advisory locks would each
    hold a connection for as long as a handler runs, and are not there in SQLite.

    Locks of different conversations nest. A task that asks for a key it holds gets a
    ``RuntimeError``; for another destiny of the conversation that it holds, it need not wait.
    """

    def __init__(
        self,
        access: Access,
        codec: Codec,
        units_of_work: UnitsOfWork,
        units: Units | None,
        leases: Leases | None,
        *,
        lease: float | None,
        poll: float,
        wait: float | None,
    ) -> None:
        """Remember what to use; see :meth:`SQLAlchemyStorage.create_isolation`."""
        if not isinstance(access, Access):
            raise TypeError(
                "SQLAlchemyEventIsolation is not for you to construct: pass "
                "events_isolation=storage.create_isolation()"
            )
        for name, seconds in {"lease": lease, "poll": poll, "wait": wait}.items():
            if seconds is None:
                continue
            if not isinstance(seconds, (int, float)):
                raise TypeError(f"{name} is a number of seconds, such as 30.0, not {seconds!r}")
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name} is a number of seconds above 0, not {seconds!r}")
        self._access = access
        self._codec = codec
        self._units_of_work = units_of_work
        self._units = units
        self._leases = leases
        self._lease = lease
        self._poll = poll
        self._wait = wait
        self._held: HeldLeases | None = None
        self._one_loop = OneLoop()
        if lease is not None and leases is not None:
            self._held = HeldLeases(access, leases, lease=lease, poll=poll)
        self._local: RunVar[Queues] = RunVar(f"isolation-{uuid.uuid4().hex}")
        self._current: ContextVar[HeldLock | None] = ContextVar("lock", default=None)

    @asynccontextmanager
    async def lock(self, key: StorageKey) -> AsyncGenerator[None, None]:
        """Hold the lock of a key's conversation, whatever the key's destiny.

        With ``unit_of_work=True``, what is done to the conversation inside is written at the end of
        the block, unless that ends with an exception. Cancelled while it waits, it leaves nothing
        behind; cancelled while it is held, it frees the lock and writes nothing.

        :param key: the conversation's key
        :raises TimeoutError: if the lock could not be acquired within ``wait`` seconds
        :raises RuntimeError: if this task holds the lock of the same key already, or waits for long
            inside a transaction that holds SQLite's write lock, which the holder may need; if
            another event loop uses this isolation, and it has no lease
        :raises LockLostError: if the lock was lost, so that the unit of work could not be written
        """
        row = self._codec.conversation(key)
        outer = self._holder(row, current_task())
        if outer is not None:
            with outer.nested(key):
                yield
            return
        here = self._here()
        scope = self._access.scope()
        is_writing = scope is not None and scope.holds_write_lock()
        wait = PARENT_WAIT if is_writing and self._wait is None else self._wait
        lease: HeldLease | None = None
        used = self._one_loop.used() if self._held is None else nullcontext()
        with used, here.queue(row) as turn:
            slow_after, what = self._access.slow_after, f"an update for the lock of {row!r}"
            with anyio.move_on_after(wait) as limit, warning_if_slow(slow_after, what, _AT_WORK):
                await turn.acquire()
                try:
                    lease = await self._take(key, row)
                except BaseException:
                    turn.release()
                    raise
            if limit.cancelled_caught:
                error = TimeoutError if wait == self._wait else RuntimeError
                raise error((_WAITS_FOR_FILE if is_writing else IS_HELD).format(wait, row))
            here.held.add(row)
            try:
                async with self._unit(key, lease):
                    with self._known(row, key):
                        yield
            finally:
                here.held.discard(row)
                turn.release()

    def lock_sync(self, key: StorageKey) -> AbstractContextManager[None]:
        """Hold the same lock in synchronous code, such as a view of Flask's or a Celery task::

            with isolation.lock_sync(key), SessionLocal.begin() as session:
                storage.operations.update_data(session, key, {"paid": True})

        Blocks the thread while another process, or a handler of this one, holds the lock. A thread
        renews the lease. No unit of work spans the block: commit in it.

        :param key: the conversation's key
        :raises TypeError: if the storage's sessions are asynchronous
        :raises RuntimeError: if the isolation has no lease, if this thread or the handler that has
            called it holds the lock already, or in the event loop's thread
        :raises TimeoutError: if the lock could not be acquired within ``wait`` seconds
        :return: a context manager
        """
        if self._leases is None or self._lease is None:
            raise RuntimeError(NO_LEASE)
        row = self._codec.conversation(key)
        if self._holder(row) is not None:  # run_sync() has passed on its context
            raise RuntimeError(HELD_BY_HANDLER.format(key))
        return held_in_this_thread(
            self._access, self._leases, row, lease=self._lease, poll=self._poll, wait=self._wait
        )

    def still_held(self, key: StorageKey) -> bool:
        """Tell a handler whether it is still the only one for its conversation.

        It is not after a lease could not be renewed in time, because the database was away or the
        event loop blocked for longer. Costs nothing: goes by the time of the last renewal.

        :param key: the conversation's key
        :return: False if this process does not hold the lock, or may have lost it
        """
        row = self._codec.conversation(key)
        if is_synchronous():
            return self._leases is not None and is_held_by_this_thread(self._leases, row)
        return row in self._here().held if self._held is None else self._held.is_held(row)

    async def close(self) -> None:
        """Wait until what is over is free; locks that are held go on to be renewed."""
        if self._held is not None:
            await self._held.close()

    async def _take(self, key: StorageKey, row: str) -> HeldLease | None:
        if self._held is None:
            return None
        scope = self._access.scope()
        if scope is not None and scope.holds_write_lock() and scope.task is not current_task():
            await scope.is_over()  # the lease would end with a rollback, before its handler does
        wanted: list[str] = []
        # A transaction that is open may have written, or locked, what others would read.
        if self._units is not None and self._access.scope() is None:
            wanted = [self._codec.row(key), *self._units_of_work.expected(key)]
        return await self._held.take(row, wanted)

    @asynccontextmanager
    async def _unit(self, key: StorageKey, lease: HeldLease | None) -> AsyncIterator[None]:
        """Open a unit of work, and write it at the end; free the lease."""
        is_done = False
        opened: AbstractContextManager[UnitOfWork | None] = nullcontext()
        if self._units is not None:
            opened = self._units_of_work.opened(key, self._units, lease)
        with opened as unit:
            try:
                yield
                is_done = True
            except (SkipHandler, CancelHandler):  # decisions and no failures
                is_done = True
                raise
            finally:
                await run_to_completion(partial(self._end, unit, lease, writes=is_done))

    async def _end(self, unit: UnitOfWork | None, lease: HeldLease | None, *, writes: bool) -> None:
        is_freed = False
        if lease is not None:
            lease.is_ending = True
        try:
            if unit is not None and writes:
                is_freed = await unit.write(ends=True) and self._access.scope() is None
        finally:
            if self._held is not None and lease is not None:
                is_locked = unit is not None and unit.is_fenced
                await self._held.free(lease, is_freed=is_freed, is_locked=is_locked)

    def _here(self) -> Queues:
        here = self._local.get(None)
        if here is None:
            here = Queues()
            self._local.set(here)
        return here

    def _holder(self, row: str, *tasks: object) -> HeldLock | None:
        """Return what holds a conversation here, in one of the tasks if some are given."""
        lock = self._current.get()
        while lock is not None and not (
            lock.is_held and lock.row == row and (not tasks or lock.task in tasks)
        ):
            lock = lock.parent
        return lock

    @contextmanager
    def _known(self, row: str, key: StorageKey) -> Iterator[None]:
        lock = HeldLock(row, {key}, self._current.get())
        token = self._current.set(lock)
        try:
            yield
        finally:
            lock.is_held = False
            with suppress(ValueError):  # left in another context than entered
                self._current.reset(token)
