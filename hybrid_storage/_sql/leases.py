"""Every statement on the table of locks. A lock is a lease: it ends when its time is over.

The time is the database's, told by its clock alone: those of the processes do not matter. Each
row has a ``version``, which taking and freeing both increase. So the statement that takes a lock
can tell whether what it has read beside is what the former holder left, and an owner that was
overtaken is told by owner and version. A free row stays until :meth:`Leases.purge`.

As in ``rows.py``, each operation is safe with or without a transaction around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Dialect, Table
from sqlalchemy.dialects.mysql import insert as mysql_insert
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.ext.compiler import compiles

from .changes import Texts
from .clock import now
from .results import Execute, executed, per_dialect
from .rows import Rows
from .taking import Taking
from .upsert import native_insert

NOBODY = ""  # the owner of a free lock


@dataclass(frozen=True)
class Fence:
    """A lease that was taken: what is written behind it is written only while it is held."""

    row: str
    owner: str
    version: int
    lease: float
    """In seconds."""

    @property
    def parameters(self) -> dict[str, Any]:
        """What a statement names it by."""
        return {"_row": self.row, "_owner": self.owner, "_version": self.version}


@dataclass(frozen=True)
class Taken:
    """The answer to a lease that was asked for and taken."""

    version: int
    is_latest: bool
    """Whether ``found`` is what the former holder has left. If not, read again."""
    found: dict[str, Texts | None]
    """What the wanted rows hold, None for those that are not there."""


class Leases:
    """Takes, renews and frees leases, for an owner, in seconds."""

    def __init__(self, table: Table, beside: Rows, execute: Execute = executed) -> None:
        """Build the statements that are the same on every database.

        :param table: the table of locks
        :param beside: the conversations, read along
        :param execute: carries out what an update waits for
        """
        self.table: Table = table
        self.execute: Execute = execute
        self._dialect = per_dialect(partial(_Dialect, self, beside))
        columns = table.c
        self._owner_of = sa.select(columns.owner, columns.version).where(
            columns.id == sa.bindparam("_row")
        )
        mine = columns.owner == sa.bindparam("_owner")
        self.mine: sa.ColumnElement[bool] = sa.and_(
            columns.id.in_(sa.bindparam("_rows", expanding=True)), mine
        )
        self.select_mine: sa.Select[Any] = sa.select(columns.id).where(self.mine)
        self.this: sa.ColumnElement[bool] = sa.and_(columns.id == sa.bindparam("_row"), mine)
        self.update: sa.Update = sa.update(table)

    def acquire(
        self, connection: Connection, row: str, owner: str, lease: float, wanted: Sequence[str]
    ) -> Taken | None:
        """Take a lease unless another owner has it and its time is not over.

        :param wanted: the ids of the conversations' rows to read beside
        """
        dialect = self._dialect(connection)
        parameters: dict[str, Any] = {"_row": row, "_owner": owner, "_lease": lease}
        is_latest = True
        rows: Sequence[Sequence[Any]] = []
        if dialect.taking is not None:
            statement, these = dialect.taking.statement(wanted)
            rows = self.execute(connection, statement, {**parameters, **these}).rows or []
            version, seen = rows[0][:2]
            is_latest = version == (seen or 0) + 1
        else:
            answer = executed(connection, dialect.acquire, parameters)
            version = answer.scalar()
            # Read after the upsert has locked the row, or not taken.
            if answer.rows is None or (answer.rows and wanted):
                parameters = {"_row": row, "_wanted": list(wanted)}
                rows = executed(connection, dialect.read, parameters).rows or []
            if answer.rows is None and rows[0][1] == owner:
                version = rows[0][0]
        if version is None:
            return None
        there = {each[-3]: Texts(*each[-2:]) for each in rows if each[-3] is not None}
        return Taken(version, is_latest, {row: there.get(row) for row in wanted})

    def renew(
        self, connection: Connection, rows: Sequence[str], owner: str, lease: float
    ) -> tuple[set[str], set[str]]:
        """Begin the time of an owner's leases anew, without waiting for a row that is locked.

        :return: those that are renewed, and those that the owner has still, but that are locked: by
            a transaction of its own process, or for a moment by somebody who wants the lock
        """
        dialect = self._dialect(connection)
        parameters = {"_rows": list(rows), "_owner": owner, "_lease": lease}
        if dialect.select_unlocked is not None:
            renewed = executed(connection, dialect.select_unlocked, parameters).column()
            for row in renewed:
                executed(connection, dialect.renew_one, {**parameters, "_row": row})
        else:
            answer = executed(connection, dialect.renew, parameters)
            if answer.rows is None:
                answer = executed(connection, self.select_mine, parameters)
            renewed = answer.column()
        if len(renewed) == len(rows):
            return set(renewed), set()
        mine = executed(connection, self.select_mine, parameters).column()
        return set(renewed), set(mine) - set(renewed)

    def release(self, connection: Connection, row: str, owner: str) -> None:
        """Free a lease, if it is the owner's still."""
        self.execute(connection, self._dialect(connection).release, {"_row": row, "_owner": owner})

    def release_unlocked(self, connection: Connection, fence: Fence) -> bool:
        """Free a lease without waiting for a transaction that has locked its row.

        :return: whether it is freed, or held no more
        """
        dialect = self._dialect(connection)
        parameters = {**fence.parameters, "_rows": [fence.row]}
        unlocked = dialect.select_unlocked
        is_reached = unlocked is None or executed(connection, unlocked, parameters).found()
        if is_reached and executed(connection, dialect.free_unlocked, parameters).found():
            return True
        return self.look(connection, fence.row) != (fence.owner, fence.version)

    def holds(self, connection: Connection, fence: Fence, *, frees: bool) -> bool:
        """Renew or free a lease if it is held still, and lock its row until the commit."""
        dialect = self._dialect(connection)
        statement = dialect.free_fenced if frees else dialect.renew_fenced
        return executed(connection, statement, {**fence.parameters, "_lease": fence.lease}).found()

    def freeing(self, connection: Connection) -> sa.Update:
        """Return the statement that frees a lease if it is held still."""
        return self._dialect(connection).free_fenced

    def look(self, connection: Connection, row: str) -> tuple[str, int]:
        """Return owner and version of a lock, nobody and 0 if it has no row."""
        for owner, version in executed(connection, self._owner_of, {"_row": row}).rows or ():
            return owner, version
        return NOBODY, 0

    def purge(self, connection: Connection, age: float, limit: int) -> int:
        """Delete some rows whose time has been over for long.

        :param age: for how many seconds; longer than a statement can hang, or one that took the
            lock before might take what it has read for the latest
        :param limit: how many rows at most
        :return: how many there were
        """
        dialect = self._dialect(connection)
        parameters = {"_age": age, "_limit": limit}
        rows = executed(connection, dialect.select_old, parameters).column()
        if rows:
            executed(connection, dialect.delete_old, {"_rows": rows, "_age": age})
        return len(rows)


class _LatestUpdate(sa.Update):
    """An update of the latest row, though the transaction may have a snapshot that is older."""

    inherit_cache = True


@compiles(_LatestUpdate, "mysql", "mariadb")
def _latest(update: _LatestUpdate, compiler: Any, **options: Any) -> str:
    # MariaDB 11.6.2 would roll back a transaction of the application's that has read before the
    # lock was taken. What else that writes is checked still. A comment to all other servers.
    text: str = compiler.visit_update(update, **options)
    return f"/*M!110602 SET STATEMENT innodb_snapshot_isolation=OFF FOR */ {text}"


class _Dialect:
    """What differs from one kind of database to another."""

    def __init__(self, leases: Leases, rows: Rows, dialect: Dialect) -> None:
        table, beside = leases.table, rows.table
        columns = table.c
        clock = now(dialect)
        values: dict[str, Any] = {
            "id": sa.bindparam("_row"),
            "owner": sa.bindparam("_owner"),
            "expires": clock + sa.bindparam("_lease", type_=sa.Double),
            "version": sa.literal_column("1", sa.BigInteger),
        }
        # The owner may acquire its own lease again: a retry after a lost response must succeed.
        free = sa.or_(columns.expires <= clock, columns.owner == sa.bindparam("_owner"))
        self.acquire: sa.Executable
        self.taking: Taking | None = None
        if isinstance(dialect, MySQLDialect):
            new = mysql_insert(table).values(values)
            owner, end = new.inserted.owner, new.inserted.expires
            # Assigned in this order: the last goes by what the second has decided.
            self.acquire = new.on_duplicate_key_update(
                [
                    ("version", sa.func.if_(free, columns.version + 1, columns.version)),
                    ("owner", sa.func.if_(free, owner, columns.owner)),
                    ("expires", sa.func.if_(columns.owner == owner, end, columns.expires)),
                ]
            )
        else:
            row = native_insert(dialect)(table).values(values)
            upsert = row.on_conflict_do_update(
                index_elements=["id"],
                set_={
                    "owner": row.excluded.owner,
                    "expires": row.excluded.expires,
                    "version": columns.version + 1,
                },
                where=free,
            )
            returns = dialect.insert_returning
            self.acquire = upsert.returning(columns.version) if returns else upsert
            if isinstance(dialect, PGDialect):
                self.taking = Taking(upsert, table, rows)
        these = beside.c.id.in_(sa.bindparam("_wanted", expanding=True))
        wanted = sa.and_(these, rows.lookups.alive)
        self.read = (
            sa.select(columns.version, columns.owner, beside.c.id, beside.c.state, beside.c.data)
            .select_from(table.outerjoin(beside, wanted))
            .where(columns.id == sa.bindparam("_row"))
        )
        if isinstance(dialect, MySQLDialect):  # a snapshot may be older than the lock
            self.read = self.read.with_for_update()  # TiDB has no locks to share
        # Renewal never waits for a row. One that a transaction of this process has locked, after a
        # write behind the fence, would hold up the renewal of all others.
        unlocked = leases.select_mine.with_for_update(skip_locked=True)
        is_free = columns.id.in_(sa.select(unlocked.cte("unlocked").c.id))
        self.select_unlocked: sa.Executable | None = None
        self.renew = leases.update.where(leases.mine).values(expires=values["expires"])
        self.renew_one = leases.update.where(leases.this).values(expires=values["expires"])
        if isinstance(dialect, PGDialect):
            self.renew = leases.update.where(is_free).values(expires=values["expires"])
            self.renew = self.renew.returning(columns.id)
        elif _skips_locked(dialect):
            # By the key, one by one: MySQL locks, and waits for, each row that it looks at.
            self.select_unlocked = unlocked.with_hint(table, "FORCE INDEX (PRIMARY)")
        this_version = sa.and_(leases.this, columns.version == sa.bindparam("_version"))
        freed = {"owner": NOBODY, "expires": clock, "version": columns.version + 1}
        self.renew_fenced = _LatestUpdate(table).where(this_version)
        self.renew_fenced = self.renew_fenced.values(expires=values["expires"])
        self.release = leases.update.where(leases.this).values(freed)
        self.free_fenced = leases.update.where(this_version).values(freed)
        self.free_unlocked = self.free_fenced
        if isinstance(dialect, PGDialect):
            self.free_unlocked = self.free_fenced.where(is_free)
        is_old = columns.expires < clock - sa.bindparam("_age", type_=sa.Double)
        self.select_old = sa.select(columns.id).where(is_old).limit(sa.bindparam("_limit"))
        self.delete_old = sa.delete(table).where(
            columns.id.in_(sa.bindparam("_rows", expanding=True)), is_old
        )


def _skips_locked(dialect: Dialect) -> bool:
    if not isinstance(dialect, MySQLDialect):
        return False
    since = (10, 6) if dialect.is_mariadb else (8, 0, 1)
    return (dialect.server_version_info or ()) >= since
