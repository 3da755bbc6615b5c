"""How a command of ``hybrid-storage`` runs: its options, what it asks first, and its exit code."""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pkgutil import resolve_name
from typing import Any, TypeAlias

import click
from aiogram.fsm.storage.base import KeyBuilder
from sqlalchemy import URL
from sqlalchemy.exc import NoSuchModuleError

from ._arguments import checked_key_builder
from ._cli_output import Output, Secrets, is_terminal
from ._cli_storage import Unfit, opened, parse_url, require
from ._codec import CorruptDataError
from ._engine.errors import in_short, is_missing_table

Command: TypeAlias = Callable[..., None]
Decorator: TypeAlias = Callable[[Callable[..., Any]], Command]

_INTERRUPTED = 130
_WRONG_USAGE = (TypeError, ValueError, ImportError, NoSuchModuleError)
_EXTRAS = {"aiosqlite", "asyncmy", "asyncpg", "psycopg", "pymysql"}


@dataclass(frozen=True)
class Call:
    """What the options of every command say."""

    url: URL
    table: str
    key_builder: KeyBuilder | None
    out: Output


def parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return the callback of an option whose text is parsed. A ``ValueError`` is wrong usage."""

    def callback(context: click.Context, parameter: click.Parameter, text: str | None) -> Any:
        try:
            return None if text is None else parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error), context, parameter) from None

    return callback


def key_builder_of(name: str) -> KeyBuilder:
    """Return the key builder, or an instance of the class, that ``module:name`` names."""
    sys.path.insert(0, "")  # the command is installed; the bot is in the current folder
    try:
        made = resolve_name(name)
        return checked_key_builder(made() if isinstance(made, type) else made)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(in_short(error)) from error


_URL = click.option(
    "--url",
    envvar="HYBRID_STORAGE_URL",
    show_envvar=True,
    required=True,
    callback=parsed(parse_url),
    help="The database, as SQLAlchemy writes it. A password is safer in the variable.",
)
TABLE = click.option(
    "--table",
    default="aiogram_fsm_data",
    show_default=True,
    help="The table, with its schema before a dot.",
)
_OF_DATABASES = (
    TABLE,
    click.option(
        "--key-builder",
        metavar="MODULE:NAME",
        callback=parsed(key_builder_of),
        help="The bot's key builder, if it is not FullKeyBuilder.",
    ),
)
_OF_ALL = (
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    click.option("--debug", is_flag=True, help="Print tracebacks of errors."),
)


def with_options(function: Callable[..., None], *options: Callable[[Any], Any]) -> Command:
    """Give a command options, in this order."""
    for option in reversed(options):
        function = option(function)
    return function


def on_database(function: Callable[..., None], url_option: Callable[[Any], Any] = _URL) -> Command:
    """Make a command of a function that gets a :class:`Call` and the command's own arguments."""

    @wraps(function)
    def run(
        url: URL,
        table: str,
        key_builder: KeyBuilder | None,
        as_json: bool,
        debug: bool,
        **arguments: Any,
    ) -> None:
        urls = [url, *(each for each in arguments.values() if isinstance(each, URL))]
        with exit_codes(Secrets(*urls), debug):
            function(Call(url, table, key_builder, Output(as_json)), **arguments)

    return with_options(run, url_option, *_OF_DATABASES, *_OF_ALL)


def offline(function: Callable[..., None]) -> Command:
    """Make a command of a function that connects to nothing."""

    @wraps(function)
    def run(as_json: bool, debug: bool, **arguments: Any) -> None:
        with exit_codes(Secrets(), debug):
            function(Output(as_json), **arguments)

    return with_options(run, *_OF_ALL)


def reads(*, columns: bool = True) -> Decorator:
    """Make a command of a function that reads: it gets a storage, and what to print on.

    :param columns: whether it needs the columns to look conversations by
    """

    def decorate(function: Callable[..., Awaitable[None]]) -> Command:
        @wraps(function)
        def run(call: Call, **arguments: Any) -> None:
            async def read() -> None:
                async with opened(call.url, call.table, key_builder=call.key_builder) as storage:
                    await require(storage, columns=columns)
                    await function(storage, call.out, **arguments)

            asyncio.run(read())

        return on_database(run)

    return decorate


def changes(
    verb: str, past: str, *, what: str = "row", columns: bool = True, asks: bool = True
) -> Decorator:
    """Make a command of a function that changes rows: it gets a storage, and returns how many.

    The storage's ``dry_run`` tells it to change nothing; batches are rolled back by themselves.

    :param verb: what happens to the rows
    :param past: the same, of what has happened
    :param what: one of what is counted
    :param columns: whether it needs the columns to look conversations by
    :param asks: whether it destroys what nobody can bring back
    """

    def decorate(function: Callable[..., Awaitable[int]]) -> Command:
        @wraps(function)
        def run(call: Call, dry_run: bool, yes: bool = not asks, **arguments: Any) -> None:
            if not (dry_run or yes or is_terminal(sys.stdin)):
                raise click.UsageError("there is no terminal to ask on: pass --yes or --dry-run")
            total = None
            if dry_run or not yes:
                total = asyncio.run(change(call, arguments, None, dry_run=True))
            done = total
            if not dry_run and total != 0:
                if not yes:
                    click.confirm(
                        f"{verb.capitalize()} {_told(total, what)}?", abort=True, err=True
                    )
                done = asyncio.run(change(call, arguments, total, dry_run=False))
            text = f"would {verb} {_told(done, what)}" if dry_run else f"{past} {_told(done, what)}"
            call.out.result({"changed": done, "dry_run": dry_run}, text)

        async def change(
            call: Call, arguments: dict[str, Any], total: int | None, *, dry_run: bool
        ) -> int:
            expires_after = arguments.get("expires_after")
            async with opened(
                call.url, call.table, key_builder=call.key_builder, expires_after=expires_after
            ) as storage:
                await require(storage, columns=columns)
                storage.dry_run = dry_run
                with call.out.progress("counting" if dry_run else verb, total) as storage.report:
                    try:
                        return await function(storage, **arguments)
                    except asyncio.CancelledError:
                        if not dry_run:
                            click.echo(
                                f"{past} {_told(storage.changed, what)} before that", err=True
                            )
                        raise

        options = [click.option("--dry-run", is_flag=True, help="Change nothing, only count.")]
        if asks:
            options.append(click.option("--yes", is_flag=True, help="Do not ask first."))
        return with_options(on_database(run), *options)

    return decorate


@contextmanager
def exit_codes(secrets: Secrets, debug: bool) -> Iterator[None]:
    """Turn errors into a line on stderr and an exit code, and hide passwords in them."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(secrets, debug))
    logging.getLogger().addHandler(handler)
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(_INTERRUPTED)
    except (click.ClickException, BrokenPipeError):
        raise  # click knows what to do
    except Exception as error:
        trace = secrets.hide(traceback.format_exc()) if debug else None
        click.echo(trace or f"Error: {_explained(error, secrets)}", err=True)
        is_wrong = isinstance(error, _WRONG_USAGE) and not isinstance(error, CorruptDataError)
        sys.exit(2 if is_wrong else 1)
    finally:
        logging.getLogger().removeHandler(handler)


class _Formatter(logging.Formatter):
    """Writes one line for what the libraries log, without passwords."""

    def __init__(self, secrets: Secrets, debug: bool) -> None:
        super().__init__()
        self._secrets = secrets
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        return self._secrets.hide(super().format(record) if self._debug else record.getMessage())


def _explained(error: Exception, secrets: Secrets) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        return f'{error.name} is not installed: pip install "aiogram-hybrid-storage[{error.name}]"'
    if isinstance(error, NoSuchModuleError):
        return (
            f"{error}: SQLAlchemy knows no such database. To move conversations from Redis, use "
            "`hybrid-storage migrate`"
        )
    if is_missing_table(error):
        return "the table is missing: create it with `hybrid-storage tables create`"
    if isinstance(error, Unfit):
        return str(error)
    is_short = isinstance(error, (*_WRONG_USAGE, RuntimeError))
    return secrets.hide(str(error) if is_short else in_short(error))


def _told(number: int | None, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
