"""What a database answers to a statement, whatever the driver tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Executable


class Result(NamedTuple):
    """All that a statement has returned: nothing is left to be fetched."""

    rows: Sequence[Sequence[Any]] | None
    """All rows; None if the statement returns none."""
    changed: int
    """How many rows a statement that returns none has found, if the driver knows."""

    def scalar(self) -> Any:
        """Return the first column of the first row, None if there is no row."""
        return self.rows[0][0] if self.rows else None

    def first(self) -> Sequence[Any]:
        """Return the first row, which there must be."""
        assert self.rows
        return self.rows[0]

    def found(self) -> bool:
        """Tell whether there was a row to read or to change."""
        return self.changed > 0 if self.rows is None else bool(self.rows)


def executed(
    connection: Connection, statement: Executable, parameters: Mapping[str, Any]
) -> Result:
    """Execute a statement."""
    result = connection.execute(statement, parameters)
    if result.returns_rows:
        return Result(result.all(), -1)
    return Result(None, result.rowcount)
