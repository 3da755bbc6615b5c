"""Every statement on the table: SQL only, text in and text out, and no waiting.

An operation yields its statements and is sent the answers: who runs them, and waits meanwhile, is
none of its business.

Each operation is one statement, or statements that end well however they are interleaved with
those of others. So it is right under AUTOCOMMIT, where PostgreSQL needs one round trip a
statement, and right inside a transaction, be it the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from sqlalchemy import (
    Dialect,
    Executable,
    LargeBinary,
    Table,
    Update,
    bindparam,
    delete,
    inspect,
    select,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from ._errors import is_missing_table
from ._limits import Limits, is_suspect
from ._statements import Answer, Ask, CoreExecutor, Steps
from ._upsert import Upsert, is_empty, telling
from .model import FSMData, table_of

_ATTEMPTS = 1000  # of one update_data(), before it gives up


class Rows:
    """The reads and writes on one table."""

    def __init__(self, model: type[FSMData]) -> None:
        """Build the statements that are the same on every database.

        :param model: the mapped class whose table to use
        """
        self.table: Table = table_of(model)
        table = self.table
        # What the ORM passes when it looks for a statement's engine: Session(binds=...) works.
        self.bind_arguments: dict[str, Any] = {"mapper": inspect(model)}
        self._dialects: dict[type[Dialect], _Dialect] = {}
        this_row = table.c.id == bindparam("_row")
        self._select_state = select(table.c.state).where(this_row)
        self._select_data = select(table.c.data).where(this_row)
        self._select_data_locked = self._select_data.with_for_update()
        self._touch = update(table).where(this_row).values(id=table.c.id)
        self.unset_state: Update = update(table).where(this_row).values(state=None)
        self.unset_data: Update = update(table).where(this_row).values(data="")
        self.replace_data: Update = update(table).where(this_row).values(data=bindparam("_value"))
        self._delete = delete(table).where(this_row)
        self._delete_empty = self._delete.where(table.c.state.is_(None), is_empty(table.c.data))

    def to_read(self, session: Session) -> CoreExecutor:
        """Return what runs statements where a session would read the table."""
        return self._executor(session, self._select_data)

    def to_write(self, session: Session) -> CoreExecutor:
        """Return what runs statements where a session would change the table."""
        return self._executor(session, self.replace_data)

    def _executor(self, session: Session, clause: Executable) -> CoreExecutor:
        if hasattr(session, "sync_session"):
            raise TypeError(
                "an AsyncSession runs the operation itself: "
                "await session.run_sync(storage.operations.get_state, key)"
            )
        return CoreExecutor(session.connection({**self.bind_arguments, "clause": clause}))

    def get_state(self, database: Dialect, row: str) -> Steps[str | None]:
        """Return the state, None if there is none."""
        return (yield from self._read(database, self._select_state, row))

    def get_data(self, database: Dialect, row: str) -> Steps[str | None]:
        """Return the data's text, None or an empty string if there is none."""
        return (yield from self._read(database, self._select_data, row))

    def set_state(self, database: Dialect, row: str, state: str | None) -> Steps[None]:
        """Set the state; None removes it, and the row with it if there is no data."""
        dialect = self._dialect(database, row)
        if state is not None:
            yield from dialect.state.set(row, state)
        else:
            yield from self._unset(dialect, dialect.unset_state, row)

    def set_data(self, database: Dialect, row: str, data: str) -> Steps[None]:
        """Set the data; an empty string removes it, and the row with it if there is no state."""
        dialect = self._dialect(database, row)
        if data:
            yield from dialect.data.set(row, data)
        else:
            yield from self._unset(dialect, dialect.unset_data, row)

    def clear(self, database: Dialect, row: str) -> Steps[None]:
        """Remove the row."""
        yield from self._dialect(database).run(Ask(self._delete, {"_row": row}))

    def update_data(
        self, database: Dialect, row: str, merge: Callable[[str | None], str]
    ) -> Steps[None]:
        """Replace the data by what ``merge`` makes of it: read, then compare-and-set.

        :param database: the dialect of the database
        :param row: the row's id
        :param merge: gets the stored text and returns the new one; called again after a conflict
        :raises StaleDataError: if the row changed under every one of a great many attempts
        """
        dialect = self._dialect(database, row)
        if dialect.locks_by_writing:
            # SQLite: a transaction that reads first and writes later fails if another wrote
            # in between; one that begins with a write holds the lock by the time it reads.
            yield from dialect.run(Ask(self._touch, {"_row": row}))
        old = yield from self._read(database, self._select_data, row)
        for _ in range(_ATTEMPTS):
            new = merge(old)
            # What is there already was stored by this call (MySQL does not tell) or by its equal.
            if new == old or (yield from self._compare_and_set(dialect, row, old, new)):
                return
            # Inside a transaction this reads the latest row, whatever the isolation level showed
            # so far, and locks it: the next attempt succeeds.
            old = yield from self._read(database, self._select_data_locked, row)
        raise StaleDataError(
            f"the data of {row!r} in table {self.table.fullname!r} changed under each of "
            f"{_ATTEMPTS} attempts to update it: write to this key less often"
        )

    def _read(self, database: Dialect, statement: Executable, row: str) -> Steps[str | None]:
        answer = yield from self._dialect(database).run(Ask(statement, {"_row": row}))
        return cast("str | None", answer.scalar())

    def _unset(self, dialect: _Dialect, statement: Executable, row: str) -> Steps[None]:
        # First the column, then the row if nothing is left in it. The other way round, two
        # clients that unset one column each would both find the other's, and leave an empty row.
        answer = yield from dialect.run(Ask(statement, {"_row": row}))
        if answer.rows is None:
            may_be_empty = answer.found()
        else:  # of the other column
            may_be_empty = any(not rest for (rest,) in answer.rows)
        if may_be_empty:
            yield from dialect.run(Ask(self._delete_empty, {"_row": row}))

    def _compare_and_set(
        self, dialect: _Dialect, row: str, old: str | None, new: str
    ) -> Steps[bool]:
        if not old:
            return (yield from dialect.data.set_if_empty(row, new))
        parameters = {"_row": row, "_old": dialect.comparable(old), "_value": new}
        return (yield from dialect.run(Ask(dialect.compare_and_set, parameters))).found()

    def _dialect(self, database: Dialect, row: str | None = None) -> _Dialect:
        dialect = self._dialects.get(type(database))
        if dialect is None:
            dialect = self._dialects[type(database)] = _Dialect(self, database)
        if row is not None:
            dialect.limits.check_key(row)
        return dialect


def asked(ask: Ask, table: Table) -> Steps[Answer]:
    """Run a statement.

    :param ask: the statement
    :param table: its table
    :raises DBAPIError: whatever the database answers; a missing table is explained
    :return: what it says
    """
    try:
        return (yield ask)
    except DBAPIError as error:
        if is_missing_table(error):
            error.add_detail(
                f"table {table.fullname!r} is missing or lacks a column: create it with "
                "`await storage.create_table()`, `metadata.create_all(engine)` or a migration"
            )
        raise


class _Dialect:
    """What differs from one kind of database to another."""

    def __init__(self, rows: Rows, dialect: Dialect) -> None:
        data = rows.table.c.data
        self._table = rows.table
        self.limits = Limits(rows.table, dialect)
        self.locks_by_writing = isinstance(dialect, SQLiteDialect)
        self._by_bytes = isinstance(dialect, MySQLDialect)
        self.state = Upsert(rows.table, "state", dialect, self.run)
        self.data = Upsert(rows.table, "data", dialect, self.run)
        self.unset_state: Executable = rows.unset_state
        self.unset_data: Executable = rows.unset_data
        if dialect.update_returning:
            self.unset_state = rows.unset_state.returning(data)
            self.unset_data = rows.unset_data.returning(rows.table.c.state)
        # MySQL's "=" goes by the collation, which may ignore case and trailing blanks.
        unchanged = (
            sql_cast(data, LargeBinary) == bindparam("_old", type_=LargeBinary)
            if self._by_bytes
            else data == bindparam("_old")
        )
        self.compare_and_set = telling(rows.replace_data.where(unchanged), rows.table, dialect)

    def run(self, ask: Ask) -> Steps[Answer]:
        """Run a statement, having checked that the database can hold its texts.

        :param ask: the statement
        :raises ValueError: if the database cannot hold one of them
        :return: what the database says
        """
        if is_suspect(ask.parameters):
            yield from self.limits.check(ask.parameters)
        return (yield from asked(ask, self._table))

    def comparable(self, text: str) -> str | bytes:
        return text.encode() if self._by_bytes else text
