"""Which of the tables are there."""

from __future__ import annotations

from sqlalchemy import Connection, Table, inspect

from .lookups import COLUMNS, has_columns


def create(connection: Connection, tables: list[Table]) -> None:
    """Create those of the tables that are missing."""
    tables[0].metadata.create_all(connection, tables=tables)


def missing(connection: Connection, tables: list[Table]) -> list[str]:
    """Return the names of those that are missing."""
    inspector = inspect(connection)
    return [
        table.fullname
        for table in tables
        if not inspector.has_table(table.name, schema=table.schema)
    ]


def lacking(connection: Connection, tables: list[Table]) -> list[tuple[str, list[str]]]:
    """Return the tables that lack columns of this package's, with the names of these."""
    inspector = inspect(connection)
    found = []
    for table in tables if has_columns(tables[0]) else tables[1:]:
        there = {each["name"] for each in inspector.get_columns(table.name, schema=table.schema)}
        wanted = COLUMNS if table is tables[0] else {column.name for column in table.columns}
        if names := sorted(wanted - there):
            found.append((table.fullname, names))
    return found
