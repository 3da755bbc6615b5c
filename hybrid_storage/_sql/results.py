"""What a database answers to a statement, and what depends on which database it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from sqlalchemy import Connection, Dialect, Executable

D = TypeVar("D")


class Result(NamedTuple):
    """All that a statement has returned: nothing is left to be fetched."""

    rows: Sequence[Sequence[Any]] | None
    """All rows; None if the statement returns none."""
    changed: int
    """How many rows a statement that returns none has found, if the driver knows."""

    def column(self) -> list[Any]:
        """Return the first column of all rows."""
        return [row[0] for row in self.rows or ()]

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
    connection: Connection, statement: Executable, parameters: Mapping[str, Any] | None = None
) -> Result:
    """Execute a statement."""
    result = connection.execute(statement, parameters)
    if result.returns_rows:
        return Result(result.all(), -1)
    return Result(None, result.rowcount)


Execute: TypeAlias = Callable[[Connection, Executable, Mapping[str, Any]], Result]


def per_dialect(make: Callable[[Dialect], D]) -> Callable[[Connection], D]:
    """Return a function that makes something once for each kind of database, and remembers it."""
    made: dict[type[Dialect], D] = {}

    def of(connection: Connection) -> D:
        kind = type(connection.dialect)
        if kind not in made:
            made[kind] = make(connection.dialect)
        return made[kind]

    return of
