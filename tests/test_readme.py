"""The README's code runs as it stands."""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from aiogram import Bot
from aiogram.client.session.base import BaseSession
from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import StorageKey
from aiogram.methods import SendMessage, TelegramMethod
from aiogram.types import Chat, Message, Update, User
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"<!-- run: ([\w ]+) -->\n```python\n(.*?)```", README, re.DOTALL)
STARTS = [code for kind, code in BLOCKS if kind == "a bot"]
LATER = [code for kind, code in BLOCKS if kind == "after the storage"]


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
    assert len(BLOCKS) == README.count("```python") > 0
    assert len(STARTS) == 2


@pytest.mark.parametrize("code", STARTS, ids=["sync", "async"])
async def test_the_first_bot_answers_and_keeps_its_state(
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


@pytest.mark.parametrize("code", LATER, ids=[code.split("\n")[0] for code in LATER])
async def test_the_further_examples_work_with_the_storage_of_the_first(
    code: str,
    key: StorageKey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    run(STARTS[0], names)
    await names["storage"].create_table()
    run(code, names)
    storage = names["storage"]
    await storage.create_table()
    await storage.update_data(key, {"a": 1})
    assert (await storage.get_data(key))["a"] == 1
    if "pay" in names:
        await storage.run_sync(lambda session: names["Base"].metadata.create_all(session.bind))
        await names["pay"](FSMContext(storage, key))
        assert await storage.get_state(key) == "order:paid"
        assert await storage.get_data(key) == {"a": 1, "order": 1}
    if "print(" in code:
        assert capsys.readouterr().out == "order:paid {'order': 1001}\n"
    await dispose(names)


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
    gc.collect()
    for engine in [each for each in gc.get_objects() if isinstance(each, Engine)]:
        if "shop.db" in str(engine.url) or "bot.db" in str(engine.url):
            assert getattr(engine.pool, "checkedout")() == 0  # noqa: B009
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


def test_the_two_starts_differ_by_the_factory_alone() -> None:
    sync, asynchronous = (set(code.splitlines()) for code in STARTS)
    assert {line for line in sync ^ asynchronous if "import" not in line} == {
        'SessionLocal = sessionmaker(create_engine("sqlite:///shop.db"))  # your application\'s',
        'SessionLocal = async_sessionmaker(create_async_engine("sqlite+aiosqlite:///shop.db"))',
        "class Base(DeclarativeBase):  # your application's",
        "class Base(DeclarativeBase):",
    }


def test_the_makefile_has_the_commands_that_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"\bmake (\w+)", README)
    assert commands
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
