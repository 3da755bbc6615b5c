"""The command ``hybrid-storage migrate``: conversations are moved from another storage."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import click
from aiogram.fsm.storage.base import DefaultKeyBuilder, KeyBuilder
from sqlalchemy import URL, make_url

from ._cli_command import Call, key_builder_of, on_database, parsed
from ._cli_output import printable
from ._cli_storage import opened, parse_url, require
from .migration import RaitoSource, RedisSource, Report, Source, TableSource
from .migration import migrate as migrate_all

_REDIS = {"redis", "rediss", "unix"}
_target = click.argument(
    "url", metavar="TARGET", envvar="HYBRID_STORAGE_URL", callback=parsed(parse_url)
)


def _parse_source(text: str) -> URL:
    return make_url(text) if text.partition("://")[0] in _REDIS else parse_url(text)


@click.command()
@click.argument("source", envvar="HYBRID_STORAGE_SOURCE", callback=parsed(_parse_source))
@click.option("--source-table", default="aiogram_fsm_data", show_default=True)
@click.option(
    "--source-key-builder",
    metavar="MODULE:NAME",
    callback=parsed(key_builder_of),
    help="Of the source; by default aiogram's DefaultKeyBuilder.",
)
@click.option("--bot", type=int, help="The bot, if the source's keys do not say.")
@click.option("--raito", is_flag=True, help="The source is raito's table.")
@click.option("--dry-run", is_flag=True, help="Change nothing, only count.")
@partial(on_database, url_option=_target)
def migrate(call: Call, source: URL, dry_run: bool, **options: Any) -> None:
    """Move the conversations of another storage.

    SOURCE is the URL of aiogram's RedisStorage, or of the database of a table. TARGET is the
    database to move them to. What is there already stays. Nothing is removed from the source, so
    you can stop the command and run it again. Conversations that can't be moved are listed.
    If some are, or if the second look at both finds a difference, the exit code is 1.
    """

    async def run() -> Report:
        async with (
            opened(call.url, call.table, key_builder=call.key_builder) as storage,
            _source(source, **options) as old,
        ):
            await require(storage, columns=False)
            with call.out.progress("looking" if dry_run else "moving", None) as show:
                return await migrate_all(
                    old, storage, dry_run=dry_run, on_progress=lambda report: show(report.found)
                )

    report = asyncio.run(run())
    call.out.result(asdict(report), str(report))
    if not call.out.as_json:
        for refused in report.refusals:
            click.echo(f"{printable(refused.name)}: {printable(refused.reason)}", err=True)
    if not dry_run and (report.refused or not report.verified):
        sys.exit(1)


@asynccontextmanager
async def _source(
    url: URL, source_table: str, source_key_builder: KeyBuilder | None, bot: int | None, raito: bool
) -> AsyncIterator[Source]:
    builder = source_key_builder or DefaultKeyBuilder()
    if url.drivername in _REDIS:
        from aiogram.fsm.storage.redis import RedisStorage

        redis = RedisStorage.from_url(url.render_as_string(hide_password=False))
        redis.key_builder = builder
        try:
            yield RedisSource(redis, bot_id=bot)
        finally:
            await redis.close()
        return
    async with opened(url, source_table, key_builder=builder, columns=False) as storage:
        if raito:
            yield RaitoSource(storage)
        else:
            await require(storage, columns=False)
            yield TableSource(storage, bot_id=bot)
