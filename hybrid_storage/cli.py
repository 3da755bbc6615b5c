"""The command ``hybrid-storage``: see and steer conversations from a shell.

Each command is a few lines on the storage's methods of the same names. ``_cli_command.py`` gives
them what they have in common.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
from aiogram.fsm.storage.base import DEFAULT_DESTINY, StorageKey

from ._cli_command import changes, parsed, reads, with_options
from ._cli_migrate import migrate
from ._cli_output import Output
from ._cli_storage import CountingStorage, require
from ._cli_tables import tables
from ._codec import CorruptDataError
from ._sql.lookups import FIELDS, has_columns
from .finding import FoundConversation
from .keys import FullKeyBuilder

_KEYS = FullKeyBuilder()
_NEGATIVE_NUMBERS = {"ignore_unknown_options": True}  # a group's id is not an option
_EPILOG = """\b
KEY is bot:chat:user, with what else is set by name: 42:7:7:thread_id=5.
Exit codes: 0 done, 1 the database or the check failed, 2 wrong usage,
130 interrupted, or you answered no. Changes are made in batches, each in
a transaction of its own: Ctrl-C leaves whole batches."""


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="aiogram-hybrid-storage")
def app() -> None:
    """See and steer the conversations of a bot: its FSM's states and data."""


def _parse_key(text: str) -> StorageKey:
    try:
        return _KEYS.parse(text)
    except ValueError:
        raise ValueError(f"{text!r} is no key: write bot:chat:user, such as 42:7:7") from None


_with_key = click.argument("key", callback=parsed(_parse_key))


def _with_filters(function: Callable[..., Any]) -> Callable[..., Any]:
    return with_options(
        function,
        click.option("--bot", "bot_id", type=int, help="Of this bot."),
        click.option("--chat", "chat_id", type=int, help="In this chat."),
        click.option("--user", "user_id", type=int, help="Of this user."),
        click.option("--thread", "thread_id", type=int, help="In this topic."),
        click.option("--business-connection", "business_connection_id", help="By this account."),
        click.option("--state", multiple=True, help="In this state; may be repeated."),
        click.option("--group", help="In a state of this group, or of a group in it."),
        click.option(
            "--idle-for",
            type=click.FloatRange(min=0),
            metavar="SECONDS",
            help="Not written to for so long.",
        ),
    )


async def _filters(storage: CountingStorage, **given: Any) -> dict[str, Any]:
    """Return the filters that are given. A group stands for its states that are in use."""
    group = given.pop("group")
    filters = {name: value for name, value in given.items() if value not in (None, ())}
    if group is not None:
        if "state" in filters:
            raise click.UsageError("pass --state or --group, not both")
        names = await storage.count_by_state(**filters)
        filters["state"] = [
            name for name in names if name and name.startswith((f"{group}:", f"{group}."))
        ]
    return filters


@app.command("list")
@reads()
@_with_filters
@click.option("--all-rows", is_flag=True, help="With the rows of scenes and dialogs.")
@click.option("--data", "with_data", is_flag=True, help="With the data.")
@click.option("--limit", type=click.IntRange(1), help="By default 100; with --json, all.")
async def list_(
    storage: CountingStorage,
    out: Output,
    all_rows: bool,
    with_data: bool,
    limit: int | None,
    **given: Any,
) -> None:
    """List conversations. JSON is one line each."""
    filters = await _filters(storage, **given)
    if all_rows:
        filters["destiny"] = None
    limit = limit or (None if out.as_json else 100)
    names = ["key", "state", "written_at", *(["data"] if with_data else [])]
    number, rows = 0, []
    async for conversation in storage.find(**filters):
        if number == limit:
            click.echo(f"these are the first {limit}: --limit shows more", err=True)
            break
        number += 1
        document = _document(conversation, with_data)
        if out.as_json:
            out.result(document, "")
        else:
            rows.append([_cell(document[name]) for name in names])
    if not out.as_json:
        out.rows([name.replace("_", " ") for name in names], rows)


def _document(conversation: FoundConversation, with_data: bool) -> dict[str, Any]:
    key, at = conversation.key, conversation.written_at
    document: dict[str, Any] = {
        "key": _KEYS.build(key),
        **{name: getattr(key, name) for name in FIELDS},
        "state": conversation.state,
        "written_at": None if at is None else at.isoformat(timespec="seconds"),
    }
    if with_data:
        try:
            document["data"] = conversation.data
        except CorruptDataError as error:
            click.echo(str(error), err=True)
            document["data"] = None
    return document


def _cell(value: object) -> object:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


@app.command()
@reads()
@_with_filters
async def count(storage: CountingStorage, out: Output, **given: Any) -> None:
    """Count conversations by state."""
    numbers = await storage.count_by_state(**await _filters(storage, **given))
    states = sorted(numbers.items(), key=lambda each: (-each[1], each[0] or ""))
    total = sum(numbers.values())
    if out.as_json:
        by_state = [{"state": state, "count": number} for state, number in states]
        out.result({"total": total, "states": by_state}, "")
    else:
        out.rows(["state", "count"], [*states, *([("total", total)] if out.is_rich else [])])


@app.command()
@reads(columns=False)
@_with_key
async def show(storage: CountingStorage, out: Output, key: StorageKey) -> None:
    """Show a conversation: its state and its data."""
    found = await storage.conversation(key)
    if found.state is None and not found.text and not out.as_json:
        click.echo("there is no such conversation", err=True)
    document = {**_document(found, with_data=False), "data": found.data}
    if out.as_json:
        out.result(document, "")
    else:
        names = ("key", "state", "written_at", "data")
        out.rows(["", ""], [(name.replace("_", " "), _cell(document[name])) for name in names])


@app.command("set")
@changes("change", "changed", columns=False, asks=False)
@_with_key
@click.option("--state", help="The new state.")
@click.option("--no-state", is_flag=True, help="Remove the state.")
@click.option("--data", callback=parsed(json.loads), help="The new data, a JSON object.")
async def set_(
    storage: CountingStorage, key: StorageKey, state: str | None, no_state: bool, data: Any
) -> int:
    """Replace the state or the data of a conversation, or both at once."""
    if (state is None and not no_state and data is None) or (state is not None and no_state):
        raise click.UsageError("pass --state or --no-state, or --data, or one of each")
    if data is not None and not isinstance(data, dict):
        raise click.UsageError(f"--data is a JSON object, not {json.dumps(data)}")
    async with storage.transaction():
        before = await storage.get_state(key), await storage.get_data(key)
        if (state is not None or no_state) and not storage.dry_run:
            await storage.set_state(key, state)
        if data is not None and not storage.dry_run:
            await storage.set_data(key, data)
    now = state if state is not None or no_state else before[0], before[1] if data is None else data
    return int(now != before)


@app.command()
@changes("delete", "deleted", what="conversation", columns=False)
@click.argument("key", required=False, callback=parsed(_parse_key))
@_with_filters
async def clear(storage: CountingStorage, key: StorageKey | None, **given: Any) -> int:
    """Delete a conversation, or those that filters find, with their scenes and dialogs."""
    if (key is None) == all(value in (None, ()) for value in given.values()):
        raise click.UsageError("pass a KEY, or options that say which conversations")
    if key is None:
        await require(storage, columns=True)
        return await storage.clear_all(**await _filters(storage, **given))
    if has_columns(storage.table) and key.destiny == DEFAULT_DESTINY:
        fields: dict[str, Any] = {name: getattr(key, name) for name in FIELDS}
        fields["destiny"] = None
        return await storage.clear_all(**fields)
    async with storage.transaction():
        is_there = bool(await storage.get_state(key) or await storage.get_data(key))
        if not storage.dry_run:
            await storage.clear(key)
    return int(is_there)


@app.command()
@changes("rename", "renamed")
@click.argument("old")
@click.argument("new")
@click.option("--group", "is_group", is_flag=True, help="OLD and NEW are names of groups.")
async def rename(storage: CountingStorage, old: str, new: str, is_group: bool) -> int:
    """Rename a state, in scenes and dialogs, too."""
    return await storage.rename_state(old, new, is_group=is_group)


@app.command()
@changes("delete", "deleted")
@click.argument("user_id", type=int)
@click.option("--bot", "bot_id", type=int, help="Of this bot only.")
async def forget(storage: CountingStorage, user_id: int, bot_id: int | None) -> int:
    """Delete all that is known of a user, in all chats."""
    return await storage.forget_user(user_id, bot_id=bot_id)


@app.command("move-chat", context_settings=_NEGATIVE_NUMBERS)
@changes("move", "moved")
@click.argument("old", type=int)
@click.argument("new", type=int)
@click.option("--bot", "bot_id", type=int, help="Of this bot only.")
async def move_chat(storage: CountingStorage, old: int, new: int, bot_id: int | None) -> int:
    """Give the conversations of a chat its new id.

    What is in the new chat already stays, and takes the place of what was in the old one.
    """
    return await storage.move_chat(old, new, bot_id=bot_id)


@app.command()
@changes("delete", "deleted")
@click.option(
    "--expires-after",
    type=click.FloatRange(min=0, min_open=True),
    required=True,
    metavar="SECONDS",
    help="Delete what was not written to for so long.",
)
async def purge(storage: CountingStorage, expires_after: float) -> int:
    """Delete the conversations that have expired."""
    return await storage.purge()


@app.command()
@changes("fill", "filled", asks=False)
@click.option("--written-now", is_flag=True, help="Their time begins now; else it is not known.")
async def fill(storage: CountingStorage, written_now: bool) -> int:
    """Fill the columns of rows that were there before the columns."""
    return await storage.fill_columns(written_now=written_now)


app.add_command(tables)
app.add_command(migrate)
