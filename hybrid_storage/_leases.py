"""The leases that this process holds: taken, renewed by one timer, freed.

For ``isolation.py``. No connection and no thread is held while a handler runs.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from anyio.lowlevel import RunVar
from sqlalchemy import Connection

from ._engine.access import Access
from ._engine.calls import Call
from ._engine.cancellation import run_to_completion
from ._engine.errors import in_short, is_missing_table
from ._engine.retries import logger
from ._sql.leases import Fence, Leases, Taken

T = TypeVar("T")

FIRST_PAUSE = 0.02  # seconds; the pauses between two looks at a lock grow from here
SOON = 30  # the part of a lease after which to try again to renew one that was locked
_CHUNK = 500  # keys that one statement renews
_PURGE_EVERY = 60.0  # seconds
_PURGE_AFTER = 3600.0  # seconds: longer than any statement hangs
_PURGED_AT_ONCE = 1000  # rows
_LOST = "another process has taken it over"


@dataclass
class HeldLease:
    """A lock that a handler of this process holds."""

    fence: Fence
    deadline: float
    """When it may end, by ``time.monotonic()``: not later than by the database's clock."""
    taken: Taken
    is_lost: bool = False
    is_ending: bool = False
    """Whether its handler is over, so that it may be freed at any moment."""


class HeldLeases:
    """Takes, renews and frees leases, by an owner of each event loop's own."""

    def __init__(self, access: Access, leases: Leases, *, lease: float, poll: float) -> None:
        """Remember what to use; see :meth:`SQLAlchemyStorage.create_isolation`."""
        self._access = access
        self._leases = leases
        self._lease = lease
        self._poll = poll
        self._local: RunVar[_Here] = RunVar(f"leases-{uuid.uuid4().hex}")

    async def take(self, row: str, wanted: Sequence[str]) -> HeldLease:
        """Take the lease of a key, asking again while another process has it.

        :param row: the key, as text
        :param wanted: the ids of the conversations' rows to read along
        """
        here = self._here()
        unanswered = False
        deadline = 0.0

        def acquire(connection: Connection) -> Taken | None:
            nonlocal unanswered, deadline
            unanswered, deadline = True, time.monotonic() + self._lease
            return self._leases.acquire(connection, row, here.owner, self._lease, wanted)

        call = self._call(acquire, row)

        async def attempt() -> Taken | None:
            nonlocal unanswered
            taken = await self._access.execute(call, is_apart=True)
            unanswered = False
            return taken

        try:
            taken, pause = await attempt(), FIRST_PAUSE
            while taken is None:
                await asyncio.sleep(random.uniform(0, pause))
                taken, pause = await attempt(), min(2 * pause, self._poll)
        except BaseException as error:
            # It may have been taken, for a caller that is gone.
            if unanswered and not is_missing_table(error):
                await run_to_completion(partial(self._release, here, row, retry_for=0))
            raise
        fence = Fence(row, here.owner, taken.version, self._lease)
        hold = here.holds[row] = HeldLease(fence, deadline, taken)
        # It counts from the moment of asking, and may have been long in coming.
        self._schedule(here, deadline - 2 / 3 * self._lease - time.monotonic())
        return hold

    async def free(self, hold: HeldLease, *, is_freed: bool, is_locked: bool) -> None:
        """Hold a lease no longer.

        :param is_freed: whether the database has freed it already
        :param is_locked: whether a transaction of the application's may have locked its row, so
            that to wait for it may be to wait for the caller
        """
        here = self._here()
        here.holds.pop(hold.fence.row, None)
        self._rest(here)
        if is_locked and not is_freed:
            if not await self._free_unlocked(hold):
                task = asyncio.ensure_future(self._free_later(hold))
                here.releases.add(task)
                task.add_done_callback(here.releases.discard)
        elif not is_freed:
            retry_for = min(self._access.retry_for, self._lease)
            await self._release(here, hold.fence.row, retry_for)
        if here.purges_at < time.monotonic():
            here.purges_at = time.monotonic() + _PURGE_EVERY
            here.purge = asyncio.ensure_future(self._purge())

    def is_held(self, row: str) -> bool:
        """Tell whether a lease is held still, by the time of its last renewal."""
        hold = self._here().holds.get(row)
        return hold is not None and not hold.is_lost and time.monotonic() < hold.deadline

    async def close(self) -> None:
        """Wait for what frees leases in the background, and renew no more if nothing is held."""
        here = self._here()
        while here.releases:
            await asyncio.wait(here.releases)
        self._rest(here)

    def _rest(self, here: _Here) -> None:
        # A timer would keep an event loop that has ended.
        if here.timer is not None and not here.holds:
            here.timer.cancel()
            here.timer = None

    def _here(self) -> _Here:
        here = self._local.get(None)
        if here is None:
            here = _Here()
            self._local.set(here)
        return here

    async def _release(self, here: _Here, row: str, retry_for: float) -> None:
        release = partial(self._leases.release, row=row, owner=here.owner)
        try:
            call = self._call(release, row)
            await self._access.execute(call, is_apart=True, retry_for=retry_for)
        except Exception as error:
            # The update has been handled; the lease ends by itself.
            logger.warning("could not free the lock of %r: %s", row, in_short(error))

    async def _free_unlocked(self, hold: HeldLease) -> bool:
        free = partial(self._leases.release_unlocked, fence=hold.fence)
        try:
            call = self._call(free, hold.fence.row)
            return await self._access.execute(call, is_apart=True, retry_for=0)
        except Exception as error:
            logger.debug("could not free the lock of %r yet: %s", hold.fence.row, in_short(error))
            return False

    async def _free_later(self, hold: HeldLease) -> None:
        """Free a lease once the transaction that has locked its row is over."""
        pause, is_freed = FIRST_PAUSE, False
        while not is_freed and time.monotonic() < hold.deadline:
            await asyncio.sleep(pause)
            pause = min(2 * pause, self._poll)
            is_freed = await self._free_unlocked(hold)

    async def _purge(self) -> None:
        purge = partial(self._leases.purge, age=_PURGE_AFTER, limit=_PURGED_AT_ONCE)
        try:
            while await self._access.runner.execute(self._call(purge, "old locks")):
                pass
        except Exception as error:  # another process does the same; there is a next time
            logger.debug("could not delete old locks: %s", in_short(error))

    def _call(self, function: Callable[[Connection], T], row: str) -> Call[T]:
        arguments = {**self._access.runner.bind_arguments, "clause": self._leases.update}
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
        holds = {row: hold for row, hold in here.holds.items() if not hold.is_lost}
        rows = list(holds)
        pause = self._lease / 3
        before = time.monotonic()
        try:
            for start in range(0, len(rows), _CHUNK):
                chunk = rows[start : start + _CHUNK]
                renew = partial(self._leases.renew, rows=chunk, owner=here.owner, lease=self._lease)
                renewed, locked = await self._access.runner.execute(
                    self._call(renew, "leases"), is_heartbeat=True
                )
                for row in renewed:
                    holds[row].deadline = before + self._lease
                for row in locked:  # nobody can take it meanwhile
                    pause = self._lease / SOON
                    holds[row].deadline = max(holds[row].deadline, before + 3 * pause)
                for row in set(chunk) - renewed - locked:
                    here.lose(holds[row], _LOST)
        except Exception as error:
            pause = self._lease / 10
            for hold in holds.values():
                if hold.deadline < time.monotonic():
                    here.lose(hold, f"it could not be renewed in time: {in_short(error)}")
        finally:
            if here.renewal is asyncio.current_task():
                here.renewal = None
            if here.holds:
                self._schedule(here, pause)


class _Here:
    """What one event loop holds."""

    def __init__(self) -> None:
        self.owner = uuid.uuid4().hex
        self.holds: dict[str, HeldLease] = {}
        self.timer: asyncio.TimerHandle | None = None
        # Kept from the garbage collector
        self.renewal: asyncio.Future[None] | None = None
        self.purge: asyncio.Future[None] | None = None
        self.releases: set[asyncio.Future[None]] = set()
        self.purges_at = time.monotonic() + _PURGE_EVERY

    def lose(self, hold: HeldLease, why: str) -> None:
        """Mark a lock as lost, unless it was freed meanwhile, and say so once."""
        row = hold.fence.row
        if self.holds.get(row) is hold and not (hold.is_lost or hold.is_ending):
            hold.is_lost = True
            logger.warning(
                "the lock of %r is lost while its handler runs, so that another may run at the "
                "same time: %s",
                row,
                why,
            )
