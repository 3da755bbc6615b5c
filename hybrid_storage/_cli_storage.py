"""The storage that the command works on: opened by a URL, its batches counted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aiogram.fsm.storage.base import KeyBuilder
from sqlalchemy import URL, Connection, MetaData, Table, inspect, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.schema import CreateIndex, CreateTable, DDLElement

from ._engine.factories import DRIVERS, engine_and_factory
from ._sql.lookups import COLUMNS
from ._steps import Batch
from .model import declare_lock_table, declare_model, table_of
from .storage import SQLAlchemyStorage

_MISSING = "table {!r} is missing: create it with `hybrid-storage tables create`"


class CountingStorage(SQLAlchemyStorage[Any, Any]):
    """A storage that tells how far it is. On a dry run, it rolls each batch back."""

    dry_run = False
    changed = 0
    """How many rows the batches so far have changed."""
    report: Callable[[int], object] = staticmethod(lambda changed: None)

    async def _batch(self, step: Callable[[Connection], Batch]) -> Batch:
        batch = await super()._batch(partial(_rolled_back, step) if self.dry_run else step)
        self.changed += batch.changed
        self.report(self.changed)
        return batch


class Unfit(Exception):
    """The table is not what the command needs. The message says why, and what to do."""


def parse_url(text: str) -> URL:
    """Return the URL that a text is, with a driver that is installed.

    :raises ValueError: if it is not a URL; without quoting it, for the password in it
    """
    scheme, separator, rest = text.partition("://")
    scheme = {"postgres": "postgresql"}.get(scheme, scheme)
    for driver in DRIVERS.get(scheme, ()):
        if find_spec(driver):
            scheme = f"{scheme}+{driver}"
            break
    try:
        return make_url(scheme + separator + rest)
    except (ArgumentError, ValueError):
        pass  # it quotes what it could not parse
    raise ValueError(
        "not a database URL: write dialect://user:password@host/database, with special "
        "characters of the password percent-encoded"
    )


@asynccontextmanager
async def opened(
    url: URL,
    table: str,
    *,
    columns: bool | None = None,
    key_builder: KeyBuilder | None = None,
    expires_after: float | None = None,
    creates: bool = False,
) -> AsyncIterator[CountingStorage]:
    """Open a storage on a table, with the columns to look conversations by if it has them.

    :param table: its name, with its schema before a dot
    :param columns: whether the table is to have the columns; None looks
    :param expires_after: as for the storage; needs the columns
    :param creates: whether a SQLite file may be made
    :raises Unfit: if that is not there
    """
    if not creates:
        _require_file(url)
    engine, factory = engine_and_factory(url, {})
    schema, _, name = table.rpartition(".")
    options: dict[str, Any] = {"key_builder": key_builder}

    def make() -> CountingStorage:
        storage = CountingStorage(factory, MetaData(schema=schema or None), name, **options)
        storage.engine = engine
        return storage

    storage = make()
    try:
        if columns is None:
            names = await storage._with_tables(_names_of_columns)
            columns = names is not None and names >= COLUMNS
        options |= {"columns": columns, "expires_after": expires_after if columns else None}
        storage = make()
        yield storage
    finally:
        await storage.close()


def _require_file(url: URL) -> None:
    """Refuse a SQLite file that is not there: to connect would make it."""
    file = url.database if url.get_backend_name() == "sqlite" else None
    if file and file != ":memory:" and "file:" not in file and not Path(file).exists():
        raise Unfit(f"there is no file {Path(file).absolute()}")


async def require(storage: CountingStorage, *, columns: bool) -> None:
    """Refuse a table that is missing, or that lacks what is needed.

    :raises Unfit: saying what to do
    """
    names, table = await storage._with_tables(_names_of_columns), storage.table.fullname
    if names is None:
        raise Unfit(_MISSING.format(table))
    if columns and not names >= COLUMNS:
        raise Unfit(
            f"table {table!r} lacks the columns to find conversations by ({_list(COLUMNS - names)})"
            ": add them with a migration and run `hybrid-storage fill`. Without them, show, set "
            "and clear KEY work"
        )


async def problems(storage: CountingStorage) -> list[str]:
    """Return what is wrong with the tables, and what to do about each."""
    return await storage._with_tables(
        lambda connection, tables: list(_problems(connection, tables))
    )


def create_statements(table: str, dialect: str, *, columns: bool, lock_table: bool) -> list[str]:
    """Return the statements that create the tables, without a connection."""
    schema, _, name = table.rpartition(".")
    model = declare_model(MetaData(schema=schema or None), name, columns=columns)
    tables = [table_of(model), *([declare_lock_table(model)] if lock_table else [])]
    speaks = URL.create(dialect).get_dialect()()
    statements = []
    for each in tables:
        indexes = sorted(each.indexes, key=lambda index: str(index.name))
        elements: list[DDLElement] = [CreateTable(each), *map(CreateIndex, indexes)]
        for element in elements:
            lines = str(element.compile(dialect=speaks)).expandtabs(4).strip().splitlines()
            statements.append("\n".join(line.rstrip() for line in lines) + ";")
    return statements


def _problems(connection: Connection, tables: list[Table]) -> Iterator[str]:
    for table in tables:
        names = _names_of_columns(connection, [table])
        if names is None:
            yield _MISSING.format(table.fullname)
        elif lacking := set(table.columns.keys()) - names:
            yield (
                f"table {table.fullname!r} lacks the columns {_list(lacking)}: "
                "add them with a migration"
            )


def _names_of_columns(connection: Connection, tables: list[Table]) -> set[str] | None:
    inspector, table = inspect(connection), tables[0]
    if not inspector.has_table(table.name, schema=table.schema):
        return None
    return {each["name"] for each in inspector.get_columns(table.name, schema=table.schema)}


def _rolled_back(step: Callable[[Connection], Batch], connection: Connection) -> Batch:
    with connection.begin_nested() as savepoint:
        batch = step(connection)
        savepoint.rollback()
    return batch


def _list(names: AbstractSet[str]) -> str:
    return ", ".join(sorted(names))
