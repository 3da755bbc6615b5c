"""The lock of a conversation for synchronous code: the same lease, renewed by a thread.

For ``isolation.py``.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection

from ._engine.access import Access
from ._engine.calls import Call
from ._engine.errors import in_short, is_missing_table
from ._engine.factories import synchronous
from ._engine.poolers import look
from ._engine.retries import logger, with_retries_sync
from ._engine.runner import Runner, checked_out
from ._engine.slots import are_connections_taken
from ._leases import FIRST_PAUSE, SOON
from ._sql.leases import Leases

T = TypeVar("T")

NO_LEASE = (
    "lock_sync() needs a lease: create_isolation(lease=None) locks handlers of this process only, "
    "which no other thread or process sees. Give the dispatcher one with a lease, too"
)
HELD_BY_HANDLER = (
    "the handler that called this function holds the lock of {}, so that lock_sync() would wait "
    "for its own handler: take the lock in the view, outside the function that view and handler "
    "share"
)

IS_HELD = (
    "could not acquire the lock for {1!r} within {0:g} s: its holder is still at work, or has died "
    "within the last lease"
)


class _Held(threading.local):
    """What this thread holds."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, str], float] = {}
        """When the leases end, unless they are renewed."""


_held = _Held()


def is_synchronous() -> bool:
    """Tell whether no event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def is_held_by_this_thread(leases: Leases, row: str) -> bool:
    """Tell whether this thread is inside the block, and its lease has not been lost or run out."""
    return time.monotonic() < _held.ends.get((id(leases.table), row), -math.inf)


@contextmanager
def held_in_this_thread(
    access: Access, leases: Leases, row: str, *, lease: float, poll: float, wait: float | None
) -> Iterator[None]:
    """Hold a lease; see :meth:`SQLAlchemyEventIsolation.lock_sync`."""
    mine, this = _held.ends, (id(leases.table), row)
    if not is_synchronous():
        raise RuntimeError(
            "lock_sync() blocks its thread, and with it this event loop and the handler that holds "
            "the lock: write `async with isolation.lock(key)`"
        )
    if this in mine:
        raise RuntimeError(f"this thread holds the lock of {row!r} already")
    owner = uuid.uuid4().hex  # of this block's own, so that threads exclude each other, too
    arguments = {**access.runner.bind_arguments, "clause": leases.update}

    sent = -math.inf  # the last statement: the lease begins when it arrives, or later

    def execute(function: Callable[[Connection], T], seconds: float) -> T:
        call = Call(function, arguments, row, leases.table.fullname)

        def attempt() -> T:
            nonlocal sent
            sent = time.monotonic()
            return _run(access.runner, call)

        return with_retries_sync(attempt, seconds, call)

    acquire = partial(leases.acquire, row=row, owner=owner, lease=lease, wanted=())
    ends = threading.Event()

    def release(seconds: float) -> None:
        try:
            execute(partial(leases.release, row=row, owner=owner), seconds)
        except Exception as error:
            logger.warning("could not free the lock of %r: %s", row, in_short(error))

    def renew() -> None:
        renew = partial(leases.renew, rows=[row], owner=owner, lease=lease)
        pause = lease / 3
        while not ends.wait(pause):
            try:
                renewed, locked = execute(renew, lease / 3)
            except Exception as error:
                logger.warning("could not renew the lock of %r: %s", row, in_short(error))
                continue
            pause = lease / 3 if renewed else lease / SOON
            if ends.is_set():
                return
            if renewed:
                mine[this] = sent + lease
            elif not locked:
                logger.warning("the lock of %r is lost: another process has it", row)
                mine[this] = -math.inf
                return

    ends_at, pause = time.monotonic() + (math.inf if wait is None else wait), FIRST_PAUSE
    try:
        while not execute(acquire, min(access.retry_for, ends_at - time.monotonic())):
            if time.monotonic() > ends_at:
                raise TimeoutError(IS_HELD.format(wait, row))
            time.sleep(random.uniform(0, pause))
            pause = min(2 * pause, poll)
    except TypeError:  # asynchronous sessions: nothing was asked for
        raise
    except BaseException as error:  # it may have been taken, and the answer lost
        if not is_missing_table(error):
            release(0)
        raise
    mine[this] = sent + lease
    heartbeat = threading.Thread(target=renew, name=f"renews {row}", daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        ends.set()
        heartbeat.join()
        del mine[this]
        release(min(access.retry_for, lease))


def _run(runner: Runner, call: Call[T]) -> T:
    if runner.is_async:
        raise TypeError(
            "synchronous code needs a storage with a synchronous sessionmaker: this one has an "
            "async_sessionmaker"
        )
    session, bind = runner.open(call.bind_arguments)
    with runner.context(), synchronous(session) as own:
        # The thread may hold one itself, and would wait for it.
        if are_connections_taken(bind):
            with checked_out(bind, None) as connection, connection.begin():
                return call.run(connection)
        with own.begin():
            connection = own.connection(dict(call.bind_arguments))
            look(connection)
            return call.run(connection)
