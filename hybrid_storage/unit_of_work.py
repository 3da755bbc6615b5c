"""One update, one read and one write: what a handler does to its conversation is collected.

A unit of work spans what an update's lock spans. Rows are read once, together with the lock where
that is in the database. What the handler writes is kept until it is over, and then written in one
statement, behind the check that the lock is still held. Entered by ``isolation.py``; ``storage.py``
asks it before the database.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace

from aiogram.fsm.storage.base import DEFAULT_DESTINY, StorageKey

from ._blocks import Block
from ._codec import Codec
from ._engine.access import Access
from ._leases import HeldLease
from ._sql.units import Units
from ._unit import UnitOfWork
from .operations import Calls

_CONVERSATIONS = 10_000  # of which it is remembered what their last update has read
_DESTINIES = 16  # that one update is expected to read


class UnitsOfWork:
    """The units that the tasks of a storage have open."""

    def __init__(self, access: Access, calls: Calls, codec: Codec) -> None:
        """Remember what to use; see :class:`UnitOfWork`."""
        self._access = access
        self._calls = calls
        self._codec = codec
        self._current: ContextVar[UnitOfWork | None] = ContextVar("unit_of_work", default=None)
        self._habits = _Habits()

    def expected(self, key: StorageKey) -> list[str]:
        """Return the ids of the rows that an update of a conversation is likely to read."""
        destinies = self._habits.of(self._codec.conversation(key))
        return [self._codec.row(replace(key, destiny=destiny)) for destiny in destinies]

    @contextmanager
    def opened(self, key: StorageKey, units: Units, hold: HeldLease | None) -> Iterator[UnitOfWork]:
        """Have the calls of this task, and of those it starts, go to a new unit.

        :param key: the key that was locked
        :param units: the statements
        :param hold: the lease behind which to write, None where there is none
        """
        parent = self._current.get()
        while parent is not None and not parent.is_open:
            parent = parent.parent
        conversation = self._codec.conversation(key)
        unit = UnitOfWork(self._access, self._calls, units, conversation, hold, parent)
        unit.expected = self.expected(key)
        if hold is not None and hold.taken.is_latest:
            unit.found(hold.taken.found)
        token = self._current.set(unit)
        try:
            yield unit
        finally:
            unit.is_open = False
            with suppress(ValueError):  # left in another context than entered
                self._current.reset(token)

    def find(self, key: StorageKey) -> UnitOfWork | None:
        """Return the unit that calls for a key go to here."""
        if self._current.get() is None:
            return None
        conversation = self._codec.conversation(key)
        unit = next((each for each in self._open() if each.conversation == conversation), None)
        if unit is None or self._has_part_in_transaction(unit):
            return unit
        if unit.task is asyncio.current_task():
            unit.forget()  # what it will find changed
        return None

    def remember(self, key: StorageKey) -> None:
        """Expect a destiny in the next update of its conversation, for this one has read it."""
        if key.destiny != DEFAULT_DESTINY:
            self._habits.add(self._codec.conversation(key), key.destiny)

    async def write(self) -> bool:
        """Write what this update has collected so far, in all its conversations.

        In a task that the update has started, ``asyncio.wait_for()`` for instance, that is what the
        update has collected.

        :return: whether anything was written in a transaction, and so is not there for others yet
        """
        units = list(self._of_this_task()) or list(
            filter(self._has_part_in_transaction, self._open())
        )
        written = [await unit.write() for unit in units]
        return any(written) and self._access.scope() is not None

    def forget(self) -> None:
        """Read anew what this task has not changed."""
        for unit in self._of_this_task():
            unit.forget()

    @contextmanager
    def undone_on_failure(self) -> Iterator[Block]:
        """Take back what the block has collected, and what it has written, if it fails.

        What other tasks have collected meanwhile stays.
        """
        block = Block(self._access.scope())
        with ExitStack() as stack:
            stack.enter_context(block.entered())
            for unit in self._of_this_task():
                stack.enter_context(unit.undone_on_failure(block))
            yield block

    def _of_this_task(self) -> Iterator[UnitOfWork]:
        return (unit for unit in self._open() if unit.task is asyncio.current_task())

    def _open(self) -> Iterator[UnitOfWork]:
        unit, loop = self._current.get(), asyncio.get_running_loop()
        while unit is not None:
            if unit.is_open and unit.loop is loop:
                yield unit
            unit = unit.parent

    def _has_part_in_transaction(self, unit: UnitOfWork) -> bool:
        """Tell whether what is joined here, if anything, is of the task that the unit is of."""
        scope = self._access.scope()
        return scope is None or scope.task is unit.task


class _Habits:
    """Which destinies an update of a conversation reads: those that the last one did.

    Scenes read the history, dialogs the stack and the current context. Read along with the first
    row, they take no round trip of their own. Names are kept, never what the rows hold.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, dict[str, None]] = OrderedDict()

    def of(self, conversation: str) -> list[str]:
        return list(self._of.get(conversation, ()))

    def add(self, conversation: str, destiny: str) -> None:
        destinies = self._of.setdefault(conversation, {})
        self._of.move_to_end(conversation)
        destinies.pop(destiny, None)
        destinies[destiny] = None  # the last one
        if len(destinies) > _DESTINIES:
            del destinies[next(iter(destinies))]
        if len(self._of) > _CONVERSATIONS:
            self._of.popitem(last=False)
