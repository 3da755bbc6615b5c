"""What one update has read of its conversation, and what it is about to write.

For ``unit_of_work.py`` and ``isolation.py``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from anyio import Lock
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm.exc import StaleDataError

from ._blocks import Before, Block, changed_by
from ._engine.access import Access
from ._engine.calls import Call
from ._leases import HeldLease
from ._sql.changes import ChangedRow, Texts
from ._sql.leases import NOBODY
from ._sql.limits import is_doubtful
from ._sql.units import Outcome, Units
from .operations import Calls

T = TypeVar("T")

_ATTEMPTS = 1000  # of one write, on top of what others have written meanwhile
_UNWRITTEN = "nothing of what its handler has done is written"
_UNSEEN = (
    ". Or the transaction began before the lock was taken, and at REPEATABLE READ it does not see "
    "the lock: take the lock first"
)


class LockLostError(RuntimeError):
    """The lock of a conversation was lost while its handler ran, so nothing was written.

    Another process may have dealt with an update of the same conversation meanwhile.
    """

    __module__ = "hybrid_storage"


class UnitClosed(Exception):
    """The update is over. The call has not begun."""


class UnitOfWork:
    """What one update has read of its conversation, and what it is about to write."""

    def __init__(
        self,
        access: Access,
        calls: Calls,
        units: Units,
        conversation: str,
        hold: HeldLease | None,
        parent: UnitOfWork | None,
    ) -> None:
        """Begin with nothing read.

        :param conversation: the id of its row
        :param hold: the lease behind which to write, None where there is none
        :param parent: the unit of another conversation, of the same update
        """
        self.conversation: str = conversation
        self.parent: UnitOfWork | None = parent
        self.task: asyncio.Task[Any] | None = asyncio.current_task()
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.is_open: bool = True
        self.rows: dict[str, ChangedRow] = {}
        self.expected: Sequence[str] = ()
        """The ids of the rows to read along with the first."""
        self._access = access
        self._calls = calls
        self._units = units
        self._hold = hold
        self._turn = Lock(fast_acquire=True)
        self._lock = Lock(fast_acquire=True)
        self._stale: set[str] = set()
        self._before: list[Before] = []  # the blocks that are open
        self.is_fenced: bool = False
        """Whether a transaction that may be open has locked the lease's row."""

    async def execute(self, call: Call[T]) -> T:
        """Carry out a call on what has been read, reading it first if need be.

        :raises UnitClosed: if the update has ended meanwhile
        """
        # What the update itself has begun comes before what a task that it has started wants:
        # aiogram-dialog's bg() reads what the handler is about to write.
        async with self._turn:
            if asyncio.current_task() is self.task:
                return await self._execute(call)
        return await self._execute(call)

    async def _execute(self, call: Call[T]) -> T:
        # The owner of a session that was lent commits when it likes: nothing is kept back from it.
        scope = self._access.scope()
        is_borrowed = scope is not None and scope.is_borrowed
        if is_borrowed:
            self.forget()
        checked: Texts | None = None
        while True:
            if call.row not in self.rows or call.row in self._stale:
                await self._read(call.row)
            async with self._lock:
                if not self.is_open or call.in_unit is None:
                    raise UnitClosed
                row = self.rows.get(call.row)
                if row is None:  # forgotten meanwhile
                    continue
                changed = row.copied() if call.writes else row
                result = changed_by(call, changed)
                is_fine = not call.writes or not any(map(is_doubtful, changed.now))
                if is_fine or changed.now == checked:
                    self.rows[call.row] = changed
                    for before in self._before if call.writes else ():
                        before.note(call, self._access.scope())
                    break
            # At the call, and not at the end of the update.
            check = partial(self._units.check, change=changed)
            await self._access.execute(self._calls.reading(call.row, check))
            checked = changed.now
        if is_borrowed and call.writes:
            await self.write()
        return result

    def found(self, rows: dict[str, Texts | None]) -> None:
        """Take what has been read of some rows, unless that was known before."""
        for row, texts in rows.items():
            if row in self._stale and row in self.rows:
                self.rows[row].rebase(texts)
            else:
                self.rows.setdefault(row, ChangedRow(row, texts))
            self._stale.discard(row)

    def forget(self) -> None:
        """Read anew, since others may have written: what has been changed is changed on top."""
        self.rows = {id: row for id, row in self.rows.items() if row.is_changed}
        self._stale = set(self.rows)

    @contextmanager
    def undone_on_failure(self, block: Block) -> Iterator[None]:
        """Take back what a block has collected, and what it has written, if it fails."""
        before = Before(block, self.rows)
        self._before.append(before)
        try:
            yield
        except BaseException:
            if not block.is_committed:
                self.rows, unknown = before.restored()
                self._stale |= unknown
            raise
        finally:
            self._before.remove(before)

    async def write(self, *, ends: bool = False) -> bool:
        """Write what has been collected, in the transaction that this task has joined, if any.

        :param ends: whether the update is over, so that its lease is freed along
        :raises LockLostError: if the lease is not held any more; nothing is written
        :return: whether anything was to be written
        """
        async with self._lock:
            try:
                return await self._write(ends=ends)
            finally:
                # Only now: who comes meanwhile waits, and finds in the database what was written.
                self.is_open = not ends

    async def _write(self, *, ends: bool) -> bool:
        keeps_time = self._units.keeps_time
        changes: list[ChangedRow] = []
        for row in self.rows.values():
            if row.is_to_be_written(keeps_time=keeps_time):
                changes.append(row)
            else:
                row.written()  # it is there already
        scope = self._access.scope()
        # A transaction that has written behind the fence goes on holding up those who want the
        # lock. At its end they find it renewed.
        if not changes and (scope is None or ends or not self.is_fenced):
            return False
        if scope is not None:
            self.is_fenced = self._hold is not None
            # A rollback would take back that the lease is free: it is freed afterwards.
            work = self._work(self._units.write, changes, ends=False, nests=True)
            outcome = await self._access.execute(self._writing(work))
        else:
            outcome = await self._write_apart(changes, ends)
        if outcome is Outcome.LOST:
            is_held = self._hold is not None and time.monotonic() < self._hold.deadline
            raise _lost(self._row, _UNWRITTEN + _UNSEEN * (scope is not None and is_held))
        for change in changes:
            change.written()
        return True

    async def _read(self, row: str) -> None:
        wanted = [row, *(each for each in self.expected if each not in self.rows and each != row)]
        read = self._calls.reading(row, partial(self._units.read, rows=wanted))
        found = await self._access.execute(read)
        async with self._lock:
            self.found(found)

    async def _write_apart(self, changes: Sequence[ChangedRow], ends: bool) -> Outcome:
        at_once = self._writing(
            self._work(self._units.write_at_once, changes, ends),
            in_transaction=not self._units.fits_one_statement,
        )
        on_top = self._writing(self._work(self._units.write, changes, ends))
        is_unsure = False

        async def attempt() -> Outcome:
            nonlocal is_unsure
            hold = self._hold if is_unsure and ends else None
            if hold is not None:
                answer = await self._lost_answer(hold)
                if answer is not None:
                    return answer
            is_unsure = True
            call = at_once
            for _ in range(_ATTEMPTS):
                try:
                    outcome = await self._access.runner.execute(call)
                except IntegrityError:
                    if not await self._reread(changes):
                        raise
                    outcome = Outcome.CONFLICT
                if outcome is Outcome.LOST and hold is not None:
                    # The write whose answer was lost was still under way, and came first.
                    return await self._lost_answer(hold) or outcome
                if outcome is not Outcome.CONFLICT:
                    return outcome
                call = on_top
            raise StaleDataError(
                f"the rows of {self.conversation!r} changed under each of {_ATTEMPTS} attempts to "
                "write them: write to this conversation less often"
            )

        return await self._access.execute(at_once, attempt, is_apart=True)

    async def _reread(self, changes: Sequence[ChangedRow]) -> bool:
        """Read all rows anew, and tell whether one is not as it was."""
        rows = [change.row for change in changes]
        read = self._calls.reading(rows[0], partial(self._units.read, rows=rows))
        found = await self._access.runner.execute(read)
        others = [change for change in changes if found[change.row] != change.found]
        for change in others:
            change.rebase(found[change.row])
        return bool(others)

    async def _lost_answer(self, hold: HeldLease) -> Outcome | None:
        """Tell what has become of a write whose answer was lost, None if it was not carried out."""
        fence = hold.fence
        look = self._calls.reading(fence.row, partial(self._units.look, row=fence.row))
        owner, version = await self._access.runner.execute(look)
        if (owner, version) == (fence.owner, fence.version):
            return None
        if (owner, version) == (NOBODY, fence.version + 1):
            return Outcome.WRITTEN
        # Taken over from us, who had not freed it; or not even taken, after a crash of the server.
        if 0 < version <= fence.version + 1:
            return Outcome.LOST
        if time.monotonic() < hold.deadline:  # before that nobody can take it unless it was freed
            return Outcome.WRITTEN if version else Outcome.LOST
        raise _lost(fence.row, "what its handler has done may have been written or not")

    def _work(
        self, write: Callable[..., Outcome], changes: Sequence[ChangedRow], ends: bool, **more: bool
    ) -> Callable[[Any], Outcome]:
        fence = None if self._hold is None else self._hold.fence
        return partial(write, changes=changes, fence=fence, frees=ends, **more)

    def _writing(self, work: Callable[[Any], T], *, in_transaction: bool = True) -> Call[T]:
        return self._calls.writing(self._row, work, in_transaction=in_transaction)

    @property
    def _row(self) -> str:
        if not self.rows and self._hold is not None:  # all has been written, and forgotten
            return self._hold.fence.row
        return next(iter(self.rows))


def _lost(row: str, what: str) -> LockLostError:
    return LockLostError(
        f"the lock of {row!r} was lost while its handler ran, since it could not be renewed within "
        f"its lease: {what}"
    )
