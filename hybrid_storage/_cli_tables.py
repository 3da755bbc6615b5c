"""The commands ``hybrid-storage tables``: create them, check them, print their SQL."""

from __future__ import annotations

import asyncio
import sys

import click

from ._cli_command import TABLE, Call, offline, on_database
from ._cli_output import Output
from ._cli_storage import create_statements, opened, problems
from ._sql.tables import missing

_columns = click.option("--columns/--no-columns", help="With the columns to find conversations by.")
_lock_table = click.option(
    "--lock-table/--no-lock-table", default=True, help="With the table of event isolation's locks."
)


@click.group()
def tables() -> None:
    """Create and check the tables."""


@tables.command()
@on_database
@_columns
@_lock_table
@click.option("--dry-run", is_flag=True, help="Create nothing, only say what is missing.")
def create(call: Call, columns: bool, lock_table: bool, dry_run: bool) -> None:
    """Create the tables that are missing."""

    async def run() -> tuple[list[str], list[str]]:
        async with opened(call.url, call.table, columns=columns, creates=True) as storage:
            if lock_table:
                storage.create_isolation()
            names = await storage._with_tables(missing)
            if dry_run:
                return names, []
            await storage.create_table()
            return names, await problems(storage)

    names, wrong = asyncio.run(run())
    what = ", ".join(names) or "nothing: the tables are there"
    text = f"{'would create' if dry_run else 'created'} {what}"
    call.out.result({"created": names, "dry_run": dry_run, "problems": wrong}, text)
    _fail_if(wrong, call.out)


@tables.command()
@on_database
@click.option("--columns/--no-columns", default=None, help="Whether the table needs the columns.")
@_lock_table
def check(call: Call, columns: bool | None, lock_table: bool) -> None:
    """Check that the tables are there, with all their columns. If not, the exit code is 1."""

    async def run() -> list[str]:
        async with opened(call.url, call.table, columns=columns) as storage:
            if lock_table:
                storage.create_isolation()
            return await problems(storage)

    wrong = asyncio.run(run())
    if call.out.as_json or not wrong:
        call.out.result({"ok": not wrong, "problems": wrong}, "the tables are as they should be")
    _fail_if(wrong, call.out)


@tables.command()
@offline
@click.option(
    "--dialect",
    type=click.Choice(["mariadb", "mysql", "postgresql", "sqlite"]),
    required=True,
    help="Whose SQL to print.",
)
@TABLE
@_columns
@_lock_table
def sql(out: Output, dialect: str, table: str, columns: bool, lock_table: bool) -> None:
    """Print the SQL that creates the tables. Connects to nothing."""
    statements = create_statements(table, dialect, columns=columns, lock_table=lock_table)
    out.result({"statements": statements}, "\n\n".join(statements))


def _fail_if(wrong: list[str], out: Output) -> None:
    if wrong and not out.as_json:
        click.echo("\n".join(wrong), err=True)
    if wrong:
        sys.exit(1)
