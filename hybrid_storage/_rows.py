"""Every statement on the table: SQL only, text in and text out, by a synchronous executor.

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
from ._statements import Answer, Executor
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

    def to_read(self, session: Session) -> Executor:
        """Return what runs statements where a session would read the table."""
        return Executor(session.connection({**self.bind_arguments, "clause": self._select_data}))

    def to_write(self, session: Session) -> Executor:
        """Return what runs statements where a session would change the table."""
        return Executor(session.connection({**self.bind_arguments, "clause": self.replace_data}))

    def get_state(self, executor: Executor, row: str) -> str | None:
        """Return the state, None if there is none."""
        return self._scalar(executor, self._select_state, row)

    def get_data(self, executor: Executor, row: str) -> str | None:
        """Return the data's text, None or an empty string if there is none."""
        return self._scalar(executor, self._select_data, row)

    def set_state(self, executor: Executor, row: str, state: str | None) -> None:
        """Set the state; None removes it, and the row with it if there is no data."""
        dialect = self._dialect(executor, row)
        if state is not None:
            dialect.state.set(executor, row, state)
        else:
            self._unset(executor, row, self.unset_state, dialect.unset_state_returning)

    def set_data(self, executor: Executor, row: str, data: str) -> None:
        """Set the data; an empty string removes it, and the row with it if there is no state."""
        dialect = self._dialect(executor, row)
        if data:
            dialect.data.set(executor, row, data)
        else:
            self._unset(executor, row, self.unset_data, dialect.unset_data_returning)

    def clear(self, executor: Executor, row: str) -> None:
        """Remove the row."""
        self.execute(executor, self._delete, {"_row": row})

    def update_data(self, executor: Executor, row: str, merge: Callable[[str | None], str]) -> None:
        """Replace the data by what ``merge`` makes of it: read, then compare-and-set.

        :param executor: what runs the statements
        :param row: the row's id
        :param merge: gets the stored text and returns the new one; called again after a conflict
        :raises StaleDataError: if the row changed under every one of a great many attempts
        """
        dialect = self._dialect(executor, row)
        if dialect.locks_by_writing:
            # SQLite: a transaction that reads first and writes later fails if another wrote
            # in between; one that begins with a write holds the lock by the time it reads.
            self.execute(executor, self._touch, {"_row": row})
        old = self._scalar(executor, self._select_data, row)
        for _ in range(_ATTEMPTS):
            new = merge(old)
            # What is there already was stored by this call (MySQL does not tell) or by its equal.
            if new == old or self._compare_and_set(executor, dialect, row, old, new):
                return
            # Inside a transaction this reads the latest row, whatever the isolation level showed
            # so far, and locks it: the next attempt succeeds.
            old = self._scalar(executor, self._select_data_locked, row)
        raise StaleDataError(
            f"the data of {row!r} in table {self.table.fullname!r} changed under each of "
            f"{_ATTEMPTS} attempts to update it: write to this key less often"
        )

    def execute(
        self, executor: Executor, statement: Executable, parameters: dict[str, Any]
    ) -> Answer:
        """Run a statement, having checked that the database can hold its texts.

        :param executor: what runs it
        :param statement: a Core statement
        :param parameters: its parameters
        :raises ValueError: if the database cannot hold one of them
        :return: what it says
        """
        if is_suspect(parameters):
            self._dialect(executor, "").limits.check(executor, parameters)
        return execute(executor, statement, parameters, self.table)

    def _scalar(self, executor: Executor, statement: Executable, row: str) -> str | None:
        return cast("str | None", self.execute(executor, statement, {"_row": row}).scalar())

    def _unset(
        self, executor: Executor, row: str, statement: Executable, returning: Executable | None
    ) -> None:
        # First the column, then the row if nothing is left in it. The other way round, two
        # clients that unset one column each would both find the other's, and leave an empty row.
        if returning is not None:
            rest = self.execute(executor, returning, {"_row": row}).rows
            may_be_empty = any(not value for (value,) in rest or ())
        else:
            may_be_empty = self.execute(executor, statement, {"_row": row}).found()
        if may_be_empty:
            self.execute(executor, self._delete_empty, {"_row": row})

    def _compare_and_set(
        self, executor: Executor, dialect: _Dialect, row: str, old: str | None, new: str
    ) -> bool:
        if not old:
            return dialect.data.set_if_empty(executor, row, new)
        parameters = {"_row": row, "_old": dialect.comparable(old), "_value": new}
        return self.execute(executor, dialect.compare_and_set, parameters).found()

    def _dialect(self, executor: Executor, row: str) -> _Dialect:
        used = executor.dialect
        dialect = self._dialects.get(type(used))
        if dialect is None:
            dialect = self._dialects[type(used)] = _Dialect(self, used)
        dialect.limits.check_key(row)
        return dialect


def execute(
    executor: Executor, statement: Executable, parameters: dict[str, Any], table: Table
) -> Answer:
    """Run a statement.

    :param executor: what runs it
    :param statement: a Core statement
    :param parameters: its parameters
    :param table: the statement's table
    :raises DBAPIError: whatever the database answers; a missing table is explained
    :return: what it says
    """
    try:
        return executor.execute(statement, parameters)
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
        self.limits = Limits(rows.table, dialect)
        self.locks_by_writing = isinstance(dialect, SQLiteDialect)
        self._by_bytes = isinstance(dialect, MySQLDialect)
        self.state = Upsert(rows.table, "state", dialect, rows.execute)
        self.data = Upsert(rows.table, "data", dialect, rows.execute)
        self.unset_state_returning: Executable | None = None
        self.unset_data_returning: Executable | None = None
        if dialect.update_returning:
            self.unset_state_returning = rows.unset_state.returning(data)
            self.unset_data_returning = rows.unset_data.returning(rows.table.c.state)
        # MySQL's "=" goes by the collation, which may ignore case and trailing blanks.
        unchanged = (
            sql_cast(data, LargeBinary) == bindparam("_old", type_=LargeBinary)
            if self._by_bytes
            else data == bindparam("_old")
        )
        self.compare_and_set = telling(rows.replace_data.where(unchanged), rows.table, dialect)

    def comparable(self, text: str) -> str | bytes:
        return text.encode() if self._by_bytes else text
