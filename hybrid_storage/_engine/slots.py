"""Slots: no more calls at a time use a pool than it keeps connections for.

Whoever waits here waits without a thread and without the pool's time-out, and can be cancelled.
Only what a pool says of itself in public counts, so the slots are ``pool_size``; the overflow is
left to the application.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import TypeAlias
from weakref import ReferenceType, WeakKeyDictionary, ref

from anyio import CapacityLimiter, WouldBlock, move_on_after
from sqlalchemy import Connection, Engine, Pool
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.pool import AssertionPool, QueuePool, StaticPool

Bind: TypeAlias = Engine | Connection

_UNLIMITED = 40  # calls at a time on a pool that sets no limit of its own
_HEARTBEAT_WAITS = 1.0  # seconds for the turn of a heartbeat, before SQLite decides whose it is
PARENT_WAIT = 10.0  # seconds for what a transaction of the same task, or of its parents, may hold
WAITS_FOR_PARENT = (
    "waited {:g} s for what an open transaction of this task or of its parent task holds: open one "
    "transaction for both, or pass its session and call inside `storage.using(session)`"
)
HOLDS_WRITE_LOCK = (
    "an open transaction of this task, or of its parent task, holds SQLite's write lock, so that "
    "this write would wait for its own task: make it inside `storage.using(session)` with that "
    "transaction's session, or after the transaction"
)

_locks: WeakKeyDictionary[Pool | Connection, threading.Lock] = WeakKeyDictionary()
_guard = threading.Lock()


class PoolTaken(Exception):
    """The call has not begun: handlers hold all connections that the pool keeps."""


class PoolState:
    """What the calls of one event loop to one pool share, by whatever storage."""

    def __init__(self, bind: Bind) -> None:
        """Make as many slots as the pool keeps connections."""
        self.is_shared = is_shared(bind)
        self.calls = CapacityLimiter(pool_size(bind))
        # Calls outside a transaction must go on meanwhile, unless they share its connection.
        self.transactions = self.calls if self.is_shared else CapacityLimiter(pool_size(bind))
        self.heartbeats = self.calls if self.is_shared else CapacityLimiter(1)
        self.spares = CapacityLimiter(pool_size(bind))
        # Writers would otherwise sleep in SQLite's busy handler, which wakes up far too late.
        self.writers = [CapacityLimiter(1)] if isinstance(bind.dialect, SQLiteDialect) else []
        # Where there is one for all, calls queue before it, so that a heartbeat waits for the call
        # under way alone.
        self.write_queue = [CapacityLimiter(1) for _ in self.writers]
        self.call_queue = [CapacityLimiter(1)] if self.is_shared else []
        # Connections of calls, which will be given back soon.
        self.of_calls: set[Connection] = set()
        self.open_transactions: set[asyncio.Event] = set()

    def call(self, writes: bool, limiter: CapacityLimiter | None) -> Slot:
        """Return a slot for a call."""
        return Slot(
            *([*self.write_queue, *self.writers] if writes else []),
            *([] if limiter is None else [of_this_loop(limiter)]),
            *([*self.call_queue, self.calls] if limiter is None or self.is_shared else []),
        )

    def transaction(self) -> Slot:
        """Return a slot to hold a connection for the time of a handler."""
        return Slot(*self.write_queue, *self.writers, *self.call_queue, self.transactions)

    @asynccontextmanager
    async def heartbeat(self) -> AsyncIterator[None]:
        """Hold a slot that other calls never wait in, however many there are."""
        async with self.heartbeats:
            turn = Slot(*self.writers)
            with move_on_after(_HEARTBEAT_WAITS):
                await turn.acquire()
            try:
                yield
            finally:
                turn.release()


def are_connections_taken(bind: Bind, of_calls: int = 0) -> bool:
    """Tell whether others hold all connections that a pool keeps.

    Who holds one while waiting for a call would wait for ever if that call waited for it.

    :param of_calls: how many are held by calls, which give them back soon
    """
    if isinstance(bind, Connection) or not isinstance(bind.pool, QueuePool):
        return False
    return 0 < bind.pool.size() <= bind.pool.checkedout() - of_calls


# No state refers to its event loop or its pool: it goes when nobody else has them.
_states: WeakKeyDictionary[
    asyncio.AbstractEventLoop, WeakKeyDictionary[Pool | Connection, PoolState]
] = WeakKeyDictionary()
_limiters: WeakKeyDictionary[
    asyncio.AbstractEventLoop, WeakKeyDictionary[CapacityLimiter, CapacityLimiter]
] = WeakKeyDictionary()
_first_loops: WeakKeyDictionary[CapacityLimiter, ReferenceType[asyncio.AbstractEventLoop]]
_first_loops = WeakKeyDictionary()


def pool_state(bind: Bind) -> PoolState:
    """Return the state of a pool in the running event loop."""
    loop = asyncio.get_running_loop()
    try:
        return _states[loop][_resource(bind)]
    except KeyError:
        with _guard:
            of_loop = _states.setdefault(loop, WeakKeyDictionary())
        return of_loop.setdefault(_resource(bind), PoolState(bind))


def of_this_loop(limiter: CapacityLimiter) -> CapacityLimiter:
    """Return the limiter to use in the running event loop: anyio's serve one loop only."""
    loop = asyncio.get_running_loop()
    with _guard:
        first = _first_loops.get(limiter)
        first_loop = None if first is None else first()
        if first_loop is None or first_loop.is_closed():
            _first_loops[limiter] = ref(loop)
            return limiter
        if first_loop is loop:
            return limiter
        of_loop = _limiters.setdefault(loop, WeakKeyDictionary())
        return of_loop.setdefault(limiter, CapacityLimiter(limiter.total_tokens))


class Slot:
    """A token of each limiter."""

    def __init__(self, *limiters: CapacityLimiter) -> None:
        """Remember where to wait."""
        self._limiters = limiters
        self._taken = 0

    def acquire_nowait(self) -> bool:
        """Take the tokens if there is nothing to wait for."""
        for limiter in self._limiters:
            if not _takes_at_once(limiter, self):
                self.release()
                return False
            self._taken += 1
        return True

    async def acquire(self) -> None:
        """Wait for the tokens. Cancelled, it keeps none."""
        try:
            for limiter in self._limiters:
                # On behalf of this slot, not of the task: that may hold a token of the
                # application's limiter already.
                if not _takes_at_once(limiter, self):
                    await limiter.acquire_on_behalf_of(self)
                self._taken += 1
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the tokens back."""
        for limiter in self._limiters[: self._taken]:
            limiter.release_on_behalf_of(self)
        self._taken = 0


def _takes_at_once(limiter: CapacityLimiter, borrower: object) -> bool:
    try:
        limiter.acquire_on_behalf_of_nowait(borrower)
    except WouldBlock:
        return False
    return True


# The transactions that the running task and its parents have opened, each set once it is over.
_transactions: ContextVar[tuple[asyncio.Event, ...]] = ContextVar("transactions", default=())


def is_held_by_parent(pool: PoolState) -> bool:
    """Tell whether this task, or a parent of it, has a transaction open on a pool."""
    return any(each in pool.open_transactions for each in _transactions.get())


async def parents_are_over(pool: PoolState) -> None:
    """Wait until no transaction of this task's parents is open on a pool."""
    for each in _transactions.get():
        if each in pool.open_transactions:
            await each.wait()


async def acquired(slot: Slot, pool: PoolState) -> None:
    """Wait for a slot, with a limit where it may be waiting for its own task.

    :raises RuntimeError: if a transaction of this task, or of its parents, holds it for too long
    """
    if not is_held_by_parent(pool):
        await slot.acquire()
        return
    with move_on_after(PARENT_WAIT) as limit:
        await slot.acquire()
    if limit.cancelled_caught:
        raise RuntimeError(WAITS_FOR_PARENT.format(PARENT_WAIT))


@asynccontextmanager
async def transaction_slot(pool: PoolState) -> AsyncIterator[None]:
    """Hold the slot of a transaction, known to the calls of this task and of its children.

    :raises RuntimeError: if a transaction of this task, or of its parents, holds it for too long
    """
    slot = pool.transaction()
    await acquired(slot, pool)
    this = asyncio.Event()
    pool.open_transactions.add(this)
    token = _transactions.set((*_transactions.get(), this))
    try:
        yield
    finally:
        pool.open_transactions.discard(this)
        slot.release()
        this.set()
        with suppress(ValueError):  # left in another context than entered
            _transactions.reset(token)


def exclusive(bind: Bind) -> AbstractContextManager[object]:
    """Keep other threads off a connection that all threads share."""
    if bind.dialect.is_async or not is_shared(bind):
        return nullcontext()
    with _guard:
        return _locks.setdefault(_resource(bind), threading.Lock())


def pool_size(bind: Bind) -> int:
    """Return how many calls at a time a bind can serve without opening further connections."""
    if is_shared(bind):
        return 1
    pool = bind.engine.pool
    # pool_size=0 is SQLAlchemy's way to set no limit.
    return (isinstance(pool, QueuePool) and pool.size()) or _UNLIMITED


def is_shared(bind: Bind) -> bool:
    """Tell whether all calls, and the application's, use the same connection."""
    return isinstance(bind, Connection) or isinstance(bind.pool, (StaticPool, AssertionPool))


def _resource(bind: Bind) -> Pool | Connection:
    return bind if isinstance(bind, Connection) else bind.pool
