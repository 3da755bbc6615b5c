"""Every statement on the table of locks. A lock is a lease: it ends when its time is over.

The time is the database's, told by its clock alone: those of the processes do not matter. As in
``rows.py``, each operation is safe with or without a transaction around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Dialect,
    Double,
    Executable,
    Table,
    Update,
    bindparam,
    cast,
    delete,
    extract,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.mysql import insert as mysql_insert
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.dialects.sqlite.base import SQLiteDialect

from .results import executed
from .upsert import telling


class Leases:
    """Takes, renews and frees leases, for an owner, in seconds."""

    def __init__(self, table: Table) -> None:
        """Build the statements that are the same on every database."""
        self.table: Table = table
        self._dialects: dict[type[Dialect], _Dialect] = {}
        mine = table.c.owner == bindparam("_owner")
        these = table.c.id.in_(bindparam("_rows", expanding=True))
        self._select_owner = select(table.c.owner).where(table.c.id == bindparam("_row"))
        self._select_mine = select(table.c.id).where(these, mine)
        self.delete: Delete = delete(table).where(table.c.id == bindparam("_row"), mine)
        self.renew_mine: Update = update(table).where(these, mine)

    def acquire(self, connection: Connection, row: str, owner: str, lease: float) -> bool:
        """Take a lease unless another owner has it and its time is not over."""
        dialect = self._dialect(connection)
        parameters = {"_row": row, "_owner": owner, "_lease": lease}
        result = executed(connection, dialect.acquire, parameters)
        if dialect.tells:
            return result.found()
        found = executed(connection, self._select_owner, {"_row": row})
        return bool(found.scalar() == owner)

    def renew(
        self, connection: Connection, rows: Sequence[str], owner: str, lease: float
    ) -> set[str]:
        """Begin the time of an owner's leases anew."""
        parameters = {"_rows": rows, "_owner": owner, "_lease": lease}
        renewed = executed(connection, self._dialect(connection).renew, parameters)
        if renewed.changed == len(rows):
            return set(rows)
        found = executed(connection, self._select_mine, {"_rows": rows, "_owner": owner})
        return {row for (row,) in found.rows or ()}

    def release(self, connection: Connection, row: str, owner: str) -> None:
        """Free a lease, if it is the owner's still."""
        executed(connection, self.delete, {"_row": row, "_owner": owner})

    def _dialect(self, connection: Connection) -> _Dialect:
        kind = type(connection.dialect)
        dialect = self._dialects.get(kind)
        if dialect is None:
            dialect = self._dialects[kind] = _Dialect(self, self.table, connection.dialect)
        return dialect


class _Dialect:
    """What differs from one kind of database to another."""

    def __init__(self, leases: Leases, table: Table, dialect: Dialect) -> None:
        now = _now(dialect)
        expires = now + bindparam("_lease", type_=Double)
        values: dict[str, Any] = {
            "id": bindparam("_row"),
            "owner": bindparam("_owner"),
            "expires": expires,
        }
        # The owner may acquire its own lease again: a retry after a lost response must succeed.
        free = or_(table.c.expires < now, table.c.owner == bindparam("_owner"))
        self.tells = not isinstance(dialect, MySQLDialect)
        self.acquire: Executable
        if isinstance(dialect, MySQLDialect):
            new = mysql_insert(table).values(values)
            owner, end = new.inserted.owner, new.inserted.expires
            # Assigned in this order: the second goes by what the first has decided.
            self.acquire = new.on_duplicate_key_update(
                [
                    ("owner", func.if_(free, owner, table.c.owner)),
                    ("expires", func.if_(table.c.owner == owner, end, table.c.expires)),
                ]
            )
        else:
            native = postgresql_insert if isinstance(dialect, PGDialect) else sqlite_insert
            row = native(table).values(values)
            upsert = row.on_conflict_do_update(
                index_elements=["id"],
                set_={"owner": row.excluded.owner, "expires": row.excluded.expires},
                where=free,
            )
            self.acquire = telling(upsert, table, dialect)
        self.renew = leases.renew_mine.values(expires=expires)


def _now(dialect: Dialect) -> ColumnElement[Any]:
    """Return the database's clock, in seconds since 1970, whatever its time zone."""
    if isinstance(dialect, PGDialect):
        # Not now(), which stands still in a transaction.
        return cast(extract("epoch", func.clock_timestamp()), Double)
    if isinstance(dialect, MySQLDialect):
        now = func.utc_timestamp(literal_column("6"))
        since = func.timestampdiff(literal_column("MICROSECOND"), "1970-01-01", now, type_=Double)
        return since / 1e6
    if isinstance(dialect, SQLiteDialect):
        return (func.julianday("now", type_=Double) - 2440587.5) * 86400.0
    raise NotImplementedError(
        f"event isolation knows the clocks of PostgreSQL, MySQL, MariaDB and SQLite, not that of "
        f"{dialect.name}"
    )
