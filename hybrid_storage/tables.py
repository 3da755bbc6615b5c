"""The storage's tables: created, checked, and told to be of a former version."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias, TypeVar

from sqlalchemy import Connection, Table
from sqlalchemy.exc import DBAPIError

from ._engine.errors import is_transient
from ._engine.retries import with_retries
from ._sql.tables import create, lacking, missing
from .operations import Calls
from .transactions import S, Transactions

T = TypeVar("T")
OfTables: TypeAlias = Callable[[Connection, list[Table]], T]


class Tables(Transactions[S]):
    """The part of the storage that looks after its tables."""

    _calls: Calls
    _tables: list[Table]

    async def create_table(self) -> None:
        """Create the table unless it is there, with that of event isolation where it is used.

        Several processes may do so at once. Fit for ``dp.startup.register(storage.create_table)``.

        :raises RuntimeError: if the table of event isolation is that of a former version, or if the
            table is there and lacks the columns to look by
        """
        for table in self._tables:
            try:
                await self._retried("creating", create, [table])
            except DBAPIError as error:
                # Another process may have created it between the look and the statement.
                if is_transient(error) or table.fullname in await self._with_tables(missing):
                    raise
        await self._check_columns()

    async def check_table(self) -> None:
        """Refuse to start without the table. Fit for ``dp.startup.register(storage.check_table)``.

        :raises RuntimeError: if it is missing, or that of event isolation where it is used, or if
            the latter is that of a former version
        """
        for name in await self._retried("looking at", missing):
            raise RuntimeError(
                f"table {name!r} is missing: create it with `await storage.create_table()`, "
                "`metadata.create_all(engine)` or a migration"
            )
        await self._check_columns()

    async def _check_columns(self) -> None:
        for name, columns in await self._retried("looking at", lacking):
            if name == self._tables[0].fullname:
                raise RuntimeError(
                    f"table {name!r} lacks the columns {', '.join(columns)}, to look conversations "
                    "by: add them with a migration, then call fill_columns() once"
                )
            raise RuntimeError(
                f"table {name!r} lacks the columns {', '.join(columns)}, which event isolation "
                "needs by now: stop all processes of the bot, then drop the table (it "
                f"holds nothing but locks) by `DROP TABLE {name}` and call create_table() again, "
                "or migrate it with Alembic"
            )

    async def _retried(
        self, doing: str, function: OfTables[T], tables: list[Table] | None = None
    ) -> T:
        what = f"{doing} table {(tables or self._tables)[0].fullname!r}"
        attempt = partial(self._with_tables, function, tables)
        return await with_retries(attempt, self._access.retry_for, what)

    def _with_tables(
        self, function: OfTables[T], tables: list[Table] | None = None
    ) -> Awaitable[T]:
        return self._in_own_transaction(
            lambda session: function(
                session.connection(self._calls.to_write), tables or self._tables
            )
        )
