"""Lets no more calls at a time into a pool than it has connections.

Whoever waits here waits without a thread, without the pool's time-out, and can be cancelled.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias
from weakref import WeakKeyDictionary

from anyio import CapacityLimiter, WouldBlock
from sqlalchemy import Connection, Engine, Pool
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.pool import AssertionPool, QueuePool, StaticPool

from ._threads import Crew

Bind: TypeAlias = Engine | Connection

_UNLIMITED = 40  # calls at a time on a pool that sets no limit of its own

_locks: WeakKeyDictionary[object, threading.Lock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


class Place:
    """What the calls of one event loop to one pool share, by whatever storage."""

    def __init__(self, bind: Bind) -> None:
        """Make room for as many calls as there can be connections.

        :param bind: the engine, or the connection, that the calls will use
        """
        room = capacity(bind)
        self.calls = CapacityLimiter(room)
        # Calls outside a transaction must go on meanwhile, unless they share its connection.
        self.transactions = self.calls if is_shared(bind) else CapacityLimiter(room)
        self.writers = CapacityLimiter(1)
        self.spares = CapacityLimiter(1)
        self.crew = Crew(room)


# No place refers to its event loop or its pool: both go when nobody else has them.
_places: WeakKeyDictionary[
    asyncio.AbstractEventLoop, WeakKeyDictionary[Pool | Connection, Place]
] = WeakKeyDictionary()


def place(bind: Bind) -> Place:
    """Return the place for calls of the running event loop.

    :param bind: the engine, or the connection, that the calls will use
    """
    loop = asyncio.get_running_loop()
    try:
        return _places[loop][_resource(bind)]
    except KeyError:
        of_loop = _places.setdefault(loop, WeakKeyDictionary())
        return of_loop.setdefault(_resource(bind), Place(bind))


class Turn:
    """An async context manager that waits for a place, and keeps it."""

    def __init__(self, *limiters: CapacityLimiter) -> None:
        """Remember where to wait.

        :param limiters: each of which gives one token, in this order
        """
        self._limiters = limiters
        self._taken = 0

    async def __aenter__(self) -> None:
        try:
            for limiter in self._limiters:
                # On behalf of this turn, not of the task: that may hold a token of the
                # application's limiter already.
                if not _takes_at_once(limiter, self):
                    await limiter.acquire_on_behalf_of(self)
                self._taken += 1
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        for limiter in self._limiters[: self._taken]:
            limiter.release_on_behalf_of(self)


def _takes_at_once(limiter: CapacityLimiter, borrower: object) -> bool:
    try:
        limiter.acquire_on_behalf_of_nowait(borrower)
    except WouldBlock:
        return False
    return True


def turn(bind: Bind, writes: bool, limiter: CapacityLimiter | None) -> Turn:
    """Return a turn at the database for a call by a connection of its own.

    :param bind: the engine, or the connection, that the call will use
    :param writes: whether the call writes; SQLite takes one writer at a time
    :param limiter: the limiter to use in place of the pool's
    """
    limiters = []
    if writes and isinstance(bind.dialect, SQLiteDialect):
        # Writers would otherwise sleep in SQLite's busy handler, which wakes up far too late.
        limiters.append(place(bind).writers)
    if limiter is not None:
        limiters.append(limiter)
    if limiter is None or is_shared(bind):
        limiters.append(place(bind).calls)
    return Turn(*limiters)


def long_turn(bind: Bind) -> Turn:
    """Return a turn to hold a connection for the time of a handler.

    :param bind: the engine, or the connection, to hold one of
    """
    return Turn(place(bind).transactions)


def spare_turn(bind: Bind) -> Turn:
    """Return a turn to use a connection beyond those of the pool.

    :param bind: the engine whose pool is exhausted
    """
    return Turn(place(bind).spares)


def alone(bind: Bind) -> AbstractContextManager[object]:
    """Keep other threads off a connection that all threads share.

    :param bind: the engine, or the connection, that the call will use
    :return: a context manager to hold while using it
    """
    if bind.dialect.is_async or not is_shared(bind):
        return nullcontext()
    with _locks_guard:
        return _locks.setdefault(_resource(bind), threading.Lock())


def capacity(bind: Bind) -> int:
    """Return how many connections a bind can give at a time.

    :param bind: an engine or a connection
    """
    if is_shared(bind):
        return 1
    limit = _limit(bind)
    return _UNLIMITED if limit is None else limit


def _limit(bind: Bind) -> int | None:
    # pool_size=0 and max_overflow=-1 are SQLAlchemy's ways to set no limit.
    pool = bind.engine.pool
    if not isinstance(pool, QueuePool) or pool.size() == 0 or pool._max_overflow < 0:
        return None
    return pool.size() + pool._max_overflow


def is_exhausted(bind: Bind) -> bool:
    """Tell whether all connections of a pool are in use.

    :param bind: an engine or a connection
    """
    if isinstance(bind, Connection):
        return False
    limit = _limit(bind)
    return (
        limit is not None and isinstance(bind.pool, QueuePool) and (bind.pool.checkedout() >= limit)
    )


def is_shared(bind: Bind) -> bool:
    """Tell whether all calls, and the application's, use the same connection.

    :param bind: an engine or a connection
    """
    return isinstance(bind, Connection) or isinstance(bind.pool, (StaticPool, AssertionPool))


def _resource(bind: Bind) -> Pool | Connection:
    return bind if isinstance(bind, Connection) else bind.pool
