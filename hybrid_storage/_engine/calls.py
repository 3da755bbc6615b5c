"""One call: a function of a connection, and what is known of it. For ``operations.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from .errors import (
    is_missing_column,
    is_missing_table,
    is_of_the_wrong_server,
    is_serialization_failure,
)

T = TypeVar("T")

_OTHERS = 100  # who may be first, one after the other, before a call says that it failed
_STANDBYS = "SELECT current_setting('synchronous_standby_names', true)"
_WRITE_TO_LOG = "SELECT CAST(pg_logical_emit_message(true, 'hybrid_storage', '') AS TEXT)"


@dataclass(frozen=True)
class Call(Generic[T]):
    """A function of a connection, and what is known of it."""

    function: Callable[[Connection], T]
    """Its statements need no transaction around them, unless that is said below."""
    bind_arguments: Mapping[str, Any]
    """What a session chooses the engine by: the mapper and the kind of statement."""
    row: str
    """What it is about, for the log."""
    table: str
    """The table's name, for errors and the log."""
    writes: bool = True
    in_transaction: bool = False
    in_unit: Callable[[Any], T] | None = None
    """Does the same to the row that a unit of work has read."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else a write fills in, by the names of the parameters."""

    def __str__(self) -> str:
        return f"{'writing' if self.writes else 'reading'} {self.row!r} in table {self.table!r}"

    def run(self, connection: Connection) -> T:
        """Call the function.

        :raises DBAPIError: whatever the database answers; a missing table is explained
        """
        try:
            return self.function(connection)
        except DBAPIError as error:
            if is_missing_table(error):
                error.add_detail(
                    f"table {self.table!r} is missing: create it with "
                    "`await storage.create_table()`, `metadata.create_all(engine)` or a migration"
                )
            elif is_missing_column(error):
                error.add_detail(
                    f"table {self.table!r} lacks a column that its model has: add the column with "
                    "a migration; create_table() leaves a table that exists as it is"
                )
            raise


def until_first(transact: Callable[[], T]) -> T:
    """Do a transaction once more whenever another has written to one of its rows since it began.

    REPEATABLE READ and SERIALIZABLE have one of the two fail, and count on that. Each time, another
    one got further.
    """
    for _ in range(_OTHERS):
        try:
            return transact()
        except DBAPIError as error:
            if not is_serialization_failure(error):
                raise
    return transact()


def confirmation(call: Call[Any]) -> Call[None]:
    """Return a call that ends when what is committed by now is where commits have to be."""
    return replace(call, function=_wait_for_standbys, writes=True, in_transaction=False)


def _wait_for_standbys(connection: Connection) -> None:
    """Have PostgreSQL's synchronous standbys receive what has been committed so far.

    If the connection of a commit that waits for them is lost, or its client cancels it, only the
    wait ends: the commit stays, and others see it, though no standby may have it. Another commit
    waits for all before it, if it has written something; reading would not do.
    """
    if connection.dialect.name != "postgresql":
        return
    if connection.exec_driver_sql(_STANDBYS).scalar():  # in two: not everybody may do the second
        connection.exec_driver_sql(_WRITE_TO_LOG)


def leave_wrong_server(connection: Connection, error: DBAPIError) -> None:
    """Close a connection to a server that takes no writes: the pool is to find the one that does.

    The old primary may go on as a standby, and the pool would give the connection out again.
    """
    if is_of_the_wrong_server(error) and not (connection.closed or connection.invalidated):
        connection.invalidate(error)
