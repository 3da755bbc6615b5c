"""Takes connections from the pool and gives them back, by asyncpg without a greenlet.

A pool of an asynchronous engine may have to wait, which SQLAlchemy does in a greenlet. To make one
takes a quarter of the time of a read; so it is done without where nothing is to be waited for.
"""

from __future__ import annotations

import re
import threading

from sqlalchemy import Engine, Pool, __version__, create_engine, event
from sqlalchemy.pool import PoolProxiedConnection, QueuePool

from ._statements import as_sqlalchemys

# Before, SQLAlchemy awaits its queue even where there is something in it.
_QUEUE_GIVES_AT_ONCE = [int(part) for part in re.findall(r"\d+", __version__)[:3]] >= [2, 1, 5]


def checked_out(engine: Engine, pool: Pool) -> PoolProxiedConnection:
    """Check a connection out of a pool.

    :param engine: the pool's engine
    :param pool: the pool
    :raises DBAPIError: what the driver says if it cannot connect
    :return: the connection, as the pool hands it out
    """
    try:
        return pool.connect()
    except engine.dialect.loaded_dbapi.Error as error:
        raise as_sqlalchemys(error, engine) from error


def checked_out_at_once(engine: Engine, pool: Pool) -> PoolProxiedConnection | None:
    """Check a connection out of a pool if there is nothing to wait for.

    :param engine: the pool's engine, an asynchronous one's synchronous side
    :param pool: the pool
    :return: the connection, None if it takes a greenlet to have one
    """
    if (
        not _QUEUE_GIVES_AT_ONCE
        or not isinstance(pool, QueuePool)
        or not pool.checkedin()
        or pool._pre_ping
        or pool._recycle >= 0
        or _any_event_of(pool)
        or pool._creator.__module__ != create_engine.__module__  # it would not ask _connect()
        # Those of the application may have to wait.
        or (listeners := list(engine.dialect.dispatch.do_connect)) not in ([], [_connect])
    ):
        return None
    if not listeners:
        event.listen(engine, "do_connect", _connect)
    _connecting.is_allowed = False
    try:
        return pool.connect()
    except _ConnectionWasLost:
        return None
    finally:
        _connecting.is_allowed = True


def is_taken_back_at_once(pool: Pool) -> bool:
    """Tell whether a pool takes a connection back with nothing to wait for.

    :param pool: the pool that the connection is from
    """
    return (
        isinstance(pool, QueuePool)
        and pool.checkedin() < pool.size()  # otherwise it closes the connection
        and not (pool.dispatch.reset or pool.dispatch.checkin)
    )


def _any_event_of(pool: Pool) -> bool:
    events = pool.dispatch
    return bool(events.checkout or events.checkin or events.close or events.invalidate)


class _Connecting(threading.local):
    """Whether a pool may connect now, in this thread."""

    is_allowed = True


_connecting = _Connecting()


class _ConnectionWasLost(Exception):
    """What the pool has is to be connected anew."""


def _connect(*_: object) -> None:
    """Listen to attempts to connect: only the pool knows when it makes one."""
    if not _connecting.is_allowed:
        raise _ConnectionWasLost
