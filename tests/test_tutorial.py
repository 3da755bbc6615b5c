"""The tutorial's bot goes on after a restart, and its commands print what the page says."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from aiogram import Bot
from aiogram.fsm.storage.base import StorageKey
from aiogram.types import Update
from click.testing import CliRunner
from sqlalchemy import URL, create_engine, make_url
from test_cli_page import BLOCK as COMMANDS
from test_cli_page import printed
from test_readme import Answers, close_engines, message, run

from hybrid_storage import _cli_output
from hybrid_storage.cli import app

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: ([\w ]+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
CHATS = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)

KEY = StorageKey(bot_id=42, chat_id=7, user_id=7)
STORAGE = 'storage = SQLAlchemyStorage.from_url("sqlite+aiosqlite:///bot.db", columns=True)\n'
DISPATCHER = "dp = Dispatcher(storage=storage)\n"
BOT = '    bot = Bot(os.environ["BOT_TOKEN"])\n'


def replaced(code: str, old: str, new: str) -> str:
    """Carry out a change that the page tells of."""
    assert code.count(old) == 1
    return code.replace(old, new)


def with_imports(code: str, block: str) -> str:
    """Put the imports of a block at the top, and return the rest of it in its place."""
    return "\n".join([*re.findall("^from .*$", block, re.MULTILINE), code])


def synchronous(code: str) -> str:
    """Change the bot as the page tells a synchronous application to."""
    return with_imports(replaced(code, STORAGE, BLOCKS["synchronous"]), BLOCKS["synchronous"])


def isolated(code: str) -> str:
    """Give the bot one handler at a time."""
    return replaced(code, DISPATCHER, BLOCKS["isolation"])


CHANGES: dict[str, Callable[[str], str]] = {
    "as it is": lambda code: code,
    "synchronous": synchronous,
    "one handler at a time": isolated,
    "both": lambda code: isolated(synchronous(code)),
}


class Process:
    """A start of the bot: a new namespace, and at its end the shutdown that aiogram makes."""

    def __init__(self, code: str) -> None:
        self.answers = Answers()
        self.bot = Bot("42:TEST", session=self.answers)
        self.names: dict[str, Any] = {"__name__": "bot"}
        run(code, self.names)

    async def __aenter__(self) -> Process:
        await self.names["dp"].emit_startup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.names["dp"].emit_shutdown()
        self.names.clear()
        close_engines()

    async def say(self, text: str) -> None:
        update = Update(update_id=1, message=message(text))
        await self.names["dp"].feed_update(self.bot, update)


async def chat(code: str) -> None:
    """Have the page's two chats with the bot, each with a new start of it."""
    assert len(CHATS) == 2
    for each in CHATS:
        async with Process(code) as process:
            for who, text in re.findall(r"^(you|bot)> (.*)$", each, re.MULTILINE):
                if who == "you":
                    await process.say(text)
                else:
                    assert process.answers.sent.pop(0) == text
            assert process.answers.sent == []


def test_every_python_block_of_the_page_is_run() -> None:
    assert len(BLOCKS) == PAGE.count("```python")
    used = {"bot", "postgresql", "isolation", "synchronous", "imports", "without a token"}
    assert set(BLOCKS) == used


@pytest.mark.parametrize("change", CHANGES)
async def test_the_form_goes_on_after_a_restart(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    await chat(CHANGES[change](BLOCKS["bot"]))


@pytest.fixture
def postgres(postgres_url: URL) -> Iterator[URL]:
    """Return the database that the page's SQL creates, under a name that is free."""
    name = f"bot_{uuid.uuid4().hex}"
    [sql] = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    url = postgres_url.set(drivername="postgresql+psycopg")
    server = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with server.connect() as connection:
            for statement in re.sub(r"\bbot\b", name, sql).splitlines():
                connection.exec_driver_sql(statement)
        yield postgres_url.set(username=name, password="secret", database=name)
        with server.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
            connection.exec_driver_sql(f"DROP ROLE {name}")
    finally:
        server.dispose()


def on_postgres(postgres: URL) -> str:
    """Change the bot's URL as the page says, to that of the test's server."""
    [shown] = re.findall(r'"(postgresql.*)"', BLOCKS["postgresql"])
    url = postgres.set(drivername=make_url(shown).drivername)
    block = replaced(BLOCKS["postgresql"], shown, url.render_as_string(hide_password=False))
    return replaced(BLOCKS["bot"], STORAGE, block)


@pytest.mark.parametrize("change", [CHANGES["as it is"], isolated], ids=["as it is", "isolated"])
async def test_the_form_goes_on_after_a_restart_on_postgresql(
    change: Callable[[str], str], postgres: URL
) -> None:
    await chat(change(on_postgres(postgres)))


async def test_with_the_isolation_two_quick_messages_are_two_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with Process(isolated(BLOCKS["bot"])) as process:
        await process.say("/start")
        await asyncio.gather(process.say("Ada"), process.say("London"))
        assert process.answers.sent[2] == "Thank you. You are Ada from London."


def lines(commands: str) -> str:
    """Return commands with what they print."""
    return "".join(printed(commands))


async def test_the_commands_of_the_page_print_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: URL
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(_cli_output, "is_terminal", lambda stream: stream is sys.stdout)
    async with Process(BLOCKS["bot"]) as process:
        for number, block in enumerate(COMMANDS.findall(PAGE)):
            await process.say("/start")
            await process.say("Ada")
            url = postgres.render_as_string(hide_password=False)
            setting = re.match(r"\$ export HYBRID_STORAGE_URL=(.+)\n", block)
            assert bool(setting) == (number == 2)
            monkeypatch.setenv("HYBRID_STORAGE_URL", url if setting else "sqlite:///bot.db")
            commands = block[setting.end() :] if setting else block
            assert await asyncio.to_thread(lines, commands) == commands
    result = await asyncio.to_thread(CliRunner().invoke, app, ["list", "--json"])
    assert '"state": "Form:city"' in result.output


def said(pipe: IO[str], who: str) -> str:
    """Return the next line that somebody has printed."""
    line = pipe.readline()
    assert line.startswith(who), line
    return line.removeprefix(who).strip()


def test_the_bot_can_be_tried_without_a_token(tmp_path: Path) -> None:
    code = replaced(BLOCKS["bot"], BOT, BLOCKS["without a token"])
    (tmp_path / "bot.py").write_text(with_imports(code, BLOCKS["imports"]))
    script = ROOT / re.findall(r"python \.\./hybrid_storage/(\S+)", PAGE)[0]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(script)], **pipes) as talk:
        assert talk.stdin is not None
        assert talk.stdout is not None
        variables = {name: said(talk.stdout, f"{name}=") for name in ("BOT_TOKEN", "BOT_API_URL")}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        for each in CHATS:
            command = [sys.executable, "bot.py"]
            with subprocess.Popen(command, cwd=tmp_path, env=environment) as bot:
                try:
                    for who, text in re.findall(r"^(you|bot)> (.*)$", each, re.MULTILINE):
                        if who == "you":
                            print(text, file=talk.stdin, flush=True)
                        else:
                            assert said(talk.stdout, "bot> ") == text
                finally:
                    bot.send_signal(signal.SIGTERM)
            assert bot.returncode == 0
        talk.stdin.close()
        assert talk.wait(60) == 0
