"""What a block that fails takes back from a unit of work: what it has done, and nothing else.

Other tasks of the update collect changes of their own meanwhile, and these stay. For ``_unit.py``
and ``unit_of_work.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

from ._codec import CorruptDataError
from ._engine.calls import Call
from ._engine.scopes import Scope
from ._sql.changes import ChangedRow, Texts

T = TypeVar("T")

_UNKNOWN = Texts()
"""What a row holds that was read in a block that failed: not this, so that it is read again."""


class Block:
    """A block of a task, and the tasks that are started inside."""

    def __init__(self, outer: Scope | None) -> None:
        """Begin.

        :param outer: what calls outside of the block join, None if they join nothing
        """
        self._outer = outer
        self.scope: Scope | None = None
        """The block's own transaction, if it is not a nested one."""

    @property
    def is_committed(self) -> bool:
        """Whether it has been committed, though a cancellation has arrived meanwhile."""
        return self.scope is not None and self.scope.is_committed

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have the calls of this task, and of those it starts, be of the block."""
        token = _entered.set((*_entered.get(), self))
        try:
            yield
        finally:
            with suppress(ValueError):  # left in another context than entered
                _entered.reset(token)

    def has_made(self, scope: Scope | None) -> bool:
        """Tell whether a call that is made here is undone with the block.

        :param scope: what the call joins
        """
        return self in _entered.get() and scope is not self._outer


class Before:
    """The rows of a unit when a block began, and what others have changed since."""

    def __init__(self, block: Block, rows: dict[str, ChangedRow]) -> None:
        """Remember the rows."""
        self._block = block
        self._rows = {id: row.copied() for id, row in rows.items()}
        self._others: list[Call[Any]] = []

    def note(self, call: Call[Any], scope: Scope | None) -> None:
        """Remember a write, unless it is undone with the block."""
        if not self._block.has_made(scope):
            self._others.append(call)

    def restored(self) -> tuple[dict[str, ChangedRow], set[str]]:
        """Return the rows as they are without the block, and the ids of those to be read again."""
        unknown = {call.row for call in self._others} - self._rows.keys()
        rows = self._rows | {id: ChangedRow(id, _UNKNOWN) for id in unknown}
        for call in self._others:
            # On data that the block had replaced, and that cannot be changed.
            with suppress(CorruptDataError):
                changed_by(call, rows[call.row])
        return rows, unknown


def changed_by(call: Call[T], row: ChangedRow) -> T:
    """Do a call to the row that has been read."""
    assert call.in_unit is not None
    row.columns = call.columns or row.columns
    return call.in_unit(row)


_entered: ContextVar[tuple[Block, ...]] = ContextVar("blocks", default=())
