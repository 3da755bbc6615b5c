"""The README's code runs as it stands."""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import re
import warnings
from collections.abc import Iterator
from datetime import datetime, timezone
from itertools import chain, cycle, product
from pathlib import Path
from typing import Any

import pytest
from aiogram import Bot
from aiogram.client.session.base import BaseSession
from aiogram.fsm.storage.base import StorageKey
from aiogram.methods import SendMessage, TelegramMethod
from aiogram.types import Chat, Message, Update, User
from conftest import checked_out
from demo import CONVERSATION
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: ([\w, ]+) -->\n```python\n(.*?)```", README, re.DOTALL))
BOT = BLOCKS["a bot"]
FACTORY = BLOCKS["the same, synchronous"]
MAKES_FACTORY = re.compile(r"^SessionLocal = .*$", re.MULTILINE)
SYNCHRONOUS_BOT = MAKES_FACTORY.sub(lambda _: FACTORY, BOT)


class Answers(BaseSession):
    """A connection to Telegram that keeps what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    async def make_request(
        self, bot: Bot, method: TelegramMethod[Any], timeout: int | None = None
    ) -> Any:
        assert isinstance(method, SendMessage)
        self.sent.append(method.text)
        return message(method.text)

    def stream_content(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing to stream")

    async def close(self) -> None:
        pass


def message(text: str, user_id: int = 7) -> Message:
    user = User(id=user_id, is_bot=False, first_name="Ada")
    return Message(
        message_id=1,
        date=datetime.now(timezone.utc),
        chat=Chat(id=user_id, type="private"),
        from_user=user,
        text=text,
    )


async def dispose(names: dict[str, Any]) -> None:
    engine = names["SessionLocal"].kw["bind"]
    if isinstance(engine, AsyncEngine):
        await engine.dispose()
    elif isinstance(engine, Engine):
        engine.dispose()
    names.clear()
    gc.collect()


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "README.md", "exec", dont_inherit=True), names)


async def run_awaiting(block: str, names: dict[str, Any]) -> None:
    """Run code that awaits outside of functions."""
    code = compile(block, "docs", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & inspect.CO_COROUTINE:
        await eval(code, names)
    else:  # as at an import: no event loop runs there
        await asyncio.to_thread(exec, code, names)


def test_every_python_block_of_the_readme_is_run() -> None:
    assert len(BLOCKS) == README.count("```python") == 3
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("code", [BOT, SYNCHRONOUS_BOT], ids=["async", "sync"])
async def test_the_bot_answers_and_keeps_its_state(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answers = Answers()
    bot = Bot("42:TEST", session=answers)
    for started in (0, 1):  # the second time, it is started anew
        names: dict[str, Any] = {"__name__": "readme"}
        run(code, names)
        await names["dp"].emit_startup()
        for number in (1, 2):
            await names["dp"].feed_update(bot, Update(update_id=number, message=message("hi")))
        await names["dp"].emit_shutdown()
        await dispose(names)
        assert len(answers.sent) == 2 + 2 * started
    assert answers.sent == [f"Message number {number}" for number in (1, 2, 3, 4)]


async def test_a_synchronous_application_changes_a_conversation(
    key: StorageKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    run(SYNCHRONOUS_BOT, names)
    storage = names["storage"]
    await storage.create_table()
    run(BLOCKS["in a synchronous application"], names)
    assert await storage.get_state(names["key"]) == "order:paid"
    assert await storage.get_data(names["key"]) == {"order": 1001}
    await dispose(names)


def test_the_chat_of_the_readme_is_that_of_the_demo() -> None:
    (chat,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    played = chain.from_iterable(CONVERSATION)
    lines = (f"{who}>  {text}" for who, text in zip(cycle(["you", "bot"]), played, strict=False))
    assert all(line in lines for line in chat.splitlines())  # in this order


def test_the_round_trips_of_the_readme_are_those_measured() -> None:
    tables = (ROOT / "docs" / "performance-tables.md").read_text()
    titles = ["hybrid asyncpg, lease", "RedisStorage, RedisEventIsolation"]
    titles.append("replaced asyncpg, SimpleEventIsolation")
    trips = [
        re.findall(rf"^\| {title} \|.*? / .*? \| \d+ / (\d+) \|", tables, re.MULTILINE)
        for title in titles
    ]
    ours, redis, replaced = (round(int(found[0]) / 5) for found in trips)
    line = f"| round trips of that update, lock included | {ours} | {redis} | {replaced}, without"
    assert line in README


def test_the_figures_of_the_page_on_why_are_those_measured() -> None:
    tables = [(ROOT / "docs" / page).read_text() for page in ("performance.md", "concepts/why.md")]
    measured, copied = ({row[0]: row[1:] for row in rows_of(table)} for table in tables)
    columns = measured[""]
    for bot, users in product(("form", "scene"), (1, 16, 64)):
        row = copied[f"{bot}, {users} user{'s' * (users > 1)}"]
        all_of_bot = dict(zip(columns, measured[f"{bot} bot: hybrid asyncpg, lease"], strict=True))
        assert row == [all_of_bot[f"{delay} ms, {users}"] for delay in (0, 1, 5)]


def rows_of(page: str) -> Iterator[list[str]]:
    """Yield the cells of each line of a page's tables."""
    for line in page.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


async def test_the_examples_of_the_transactions_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "guides" / "transactions.md").read_text()
    blocks = re.findall(r"<!-- run: \w+ -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") > 0
    names: dict[str, Any] = {"__name__": "transactions"}
    for block in blocks:
        await run_awaiting(block, names)
    answers = Answers()
    bot = Bot("42:TEST", session=answers)
    await names["dp"].feed_update(bot, Update(update_id=1, message=message("hi")))
    assert answers.sent == ["4 orders so far"]
    data = {"product": "cake", "asked": 1, "order": 3, "orders": 4}
    assert await names["state"].get_data() == data
    await dispose(names)


def close_engines() -> None:
    """Close what the examples have opened, where nobody uses it any more."""
    with warnings.catch_warnings():
        # Their databases in memory end with the process, so the pages don't close them.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    # isinstance() would ask a weak proxy, whose object may have gone.
    engines = [each for each in gc.get_objects() if issubclass(type(each), Engine)]
    for engine in engines:
        if "shop.db" in str(engine.url) or "bot.db" in str(engine.url):
            assert checked_out(engine) == 0
            engine.dispose()


def test_the_admin_page_of_the_docs_quotes_the_examples_and_describes_its_pictures() -> None:
    page = (ROOT / "docs" / "guides" / "admin-pages.md").read_text()
    quotes = re.findall(r"<!-- from: (\S+) -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(quotes) == page.count("```python") > 0
    for name, code in quotes:
        assert code in (ROOT / name).read_text()
    pictures = re.findall(r"!\[(.+)\]\((.+)\)", page)
    assert {name for _, name in pictures} == {
        "../images/admin-flask.png",
        "../images/admin-starlette.png",
    }
    for text, name in pictures:
        assert len(text) > 50
        assert (ROOT / "docs" / "guides" / name).stat().st_size < 150_000


def test_the_makefile_has_the_commands_that_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"\bmake (\w+)", README)
    assert commands
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
