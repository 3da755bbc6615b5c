"""Guides whose examples are files and commands: they are run as a reader would run them."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiogram.fsm.storage.base import StorageKey
from alembic.config import CommandLine, Config
from click.testing import CliRunner
from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.orm import sessionmaker
from test_readme import close_engines, run_awaiting

from hybrid_storage import SQLAlchemyStorage
from hybrid_storage.cli import app

GUIDES = Path(__file__).parent.parent / "docs" / "guides"
FILE = re.compile(r"^<!-- run: (\S+\.(?:py|ini)) -->\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def files_of(name: str) -> list[tuple[str, str]]:
    """Return the files that a guide shows, some of them in several versions."""
    return FILE.findall((GUIDES / f"{name}.md").read_text())


def environment(**further: str) -> dict[str, str]:
    """Return an environment in which this package is found."""
    return {**os.environ, "PYTHONPATH": str(GUIDES.parents[1]), **further}


# Webhooks


def update(update_id: int, user_id: int = 7) -> dict[str, Any]:
    user = {"id": user_id, "is_bot": False, "first_name": "Ada"}
    chat = {"id": user_id, "type": "private"}
    message = {"message_id": update_id, "date": 1_700_000_000, "chat": chat, "from": user}
    return {"update_id": update_id, "message": {**message, "text": "hi"}}


async def post(port: int, body: dict[str, Any], secret: str = "s3cret") -> str:
    headers = {"X-Telegram-Bot-Api-Secret-Token": secret}
    url = f"http://127.0.0.1:{port}/webhook"
    async with (
        aiohttp.ClientSession(headers=headers) as client,
        client.post(url, json=body) as response,
    ):
        return await response.text()


@contextmanager
def worker(folder: Path, url: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run the worker of the guide, which listens before the block begins."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    further = {"BOT_TOKEN": "42:TEST", "WEBHOOK_SECRET": "s3cret", "PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, "worker.py"], cwd=folder, env=environment(DATABASE_URL=url, **further)
    )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            assert process.poll() is None
            time.sleep(0.1)
        yield process, port
    finally:
        process.kill()
        process.wait()


async def test_a_worker_that_is_told_to_stop_ends_its_update_and_the_next_one_waits(
    postgres_database: URL, tmp_path: Path
) -> None:
    for name, code in files_of("webhooks"):
        (tmp_path / name).write_text(code)
    url = postgres_database.render_as_string(hide_password=False)
    with worker(tmp_path, url) as (old, port), worker(tmp_path, url) as (_, new_port):
        first = asyncio.create_task(post(port, update(1)))
        await asyncio.sleep(0.5)
        second = asyncio.create_task(post(new_port, update(2)))
        old.terminate()
        assert "Message number 1" in await first
        assert await asyncio.to_thread(old.wait, 10) == 0
        assert "Message number 2" in await second
        assert await post(new_port, update(3), "wrong") == "Unauthorized"


# Alembic

COMMANDS = re.compile(r"(?<=<!-- run -->\n```console\n)(.*?)(?=```)", re.DOTALL)


class Reader:
    """Somebody who follows a guide in an empty folder, which is the current one.

    :param folder: the folder
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, code: str) -> None:
        """Write one of the guide's files."""
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(code)

    def run(self, line: str, ok: bool = True) -> str:
        """Run a command; return what it prints. Python's own run here: their imports take long."""
        program, *arguments = shlex.split(line)
        if program == "alembic":
            printed = alembic(arguments, ok)
        elif program == "hybrid-storage":
            result = CliRunner().invoke(app, arguments)
            assert (result.exit_code == 0) == ok, result.output
            printed = result.stdout
        else:
            arguments = [sys.executable, "-m", "pytest"] if program == "pytest" else [program]
            printed = subprocess.run(
                [*arguments, *shlex.split(line)[1:]],
                env=environment(),
                capture_output=True,
                text=True,
                check=ok,
            ).stdout
        self.forget()
        return printed.replace(f"{self.folder}/", "")

    def follow(self, block: str) -> str:
        """Run a block's commands; return it with what they print."""
        lines = [line for line in block.splitlines() if line.startswith("$ ")]
        return "".join(f"{line}\n{self.run(line[2:])}" for line in lines)

    def python(self, code: str) -> None:
        """Run Python code that may import the guide's files."""
        names: dict[str, Any] = {"__name__": "reader"}
        exec(textwrap.dedent(code), names)
        if "engine" in names:
            names["engine"].dispose()
        self.forget()

    def forget(self) -> None:
        """Let the guide's files be imported anew."""
        for name in ("bot", "models"):
            engine = getattr(sys.modules.pop(name, None), "engine", None)
            if engine is not None:
                engine.dispose()


def alembic(arguments: list[str], ok: bool) -> str:
    """Run Alembic's command."""
    command, printed = CommandLine(), io.StringIO()
    options = command.parser.parse_args(arguments)
    config = Config("alembic.ini", stdout=printed, cmd_opts=options)
    with redirect_stdout(printed), nullcontext() if ok else pytest.raises(DBAPIError):
        command.run_cmd(config, options)
    return printed.getvalue()


OLD_PROCESS = """
    import asyncio
    from aiogram.fsm.storage.base import StorageKey
    from hybrid_storage import SQLAlchemyStorage
    from bot import SessionLocal

    old = SQLAlchemyStorage(SessionLocal)  # does not know of the columns
    asyncio.run(old.set_state(StorageKey(42, {0}, {0}), "order:payment"))
"""
FORMER_LOCKS = """
    import models
    from sqlalchemy import create_engine
    import os

    engine = create_engine(os.environ["DATABASE_URL"])
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM aiogram_fsm_data_lock")
        connection.exec_driver_sql("ALTER TABLE aiogram_fsm_data_lock DROP COLUMN version")
        connection.exec_driver_sql("INSERT INTO aiogram_fsm_data_lock VALUES ('42:7:7', '', 0)")
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def reader(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reader]:
    """Return somebody who has either database."""
    url = f"sqlite:///{tmp_path}/bot.db"
    if request.param == "postgresql":
        database: URL = request.getfixturevalue("postgres_database")
        url = database.render_as_string(hide_password=False)
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("HYBRID_STORAGE_URL", url)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file is changed within a second
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path)
    yield reader
    reader.forget()
    close_engines()


def test_the_guide_to_alembic_does_what_it_says(reader: Reader) -> None:
    page = (GUIDES / "alembic.md").read_text()
    first, second = COMMANDS.findall(page)
    reader.run("alembic init migrations")
    files = files_of("alembic")
    assert [name for name, _ in files] == ["bot.py", "migrations/env.py", "models.py"]
    for name, code in files:
        reader.write(name, code)
    assert reader.follow(first) == first
    revision = (reader.folder / "migrations/versions/0001_conversations.py").read_text()
    assert "hybrid_storage" not in revision
    assert "aiogram_fsm_data_lock" in revision

    reader.python(OLD_PROCESS.format(7))
    assert reader.follow(second) == second
    check_concurrent_index(reader, page)
    reader.python(OLD_PROCESS.format(8))  # after the expansion
    assert reader.run("hybrid-storage fill") == "filled 1 row\n"
    assert '"total": 2' in reader.run("hybrid-storage count --json")
    reader.run("alembic downgrade 0001")
    reader.python(OLD_PROCESS.format(9))
    reader.run("alembic upgrade head")

    # The models alone declare both tables, and a former table of locks is migrated.
    reader.run("alembic downgrade 0001")
    env = reader.folder / "migrations/env.py"
    env.write_text(env.read_text().replace("from bot import Base, engine", ENGINE_OF_MODELS))
    (reader.folder / "migrations/versions/0002_columns.py").unlink()
    reader.run("alembic check")
    reader.python(FORMER_LOCKS)
    reader.run("alembic revision --autogenerate --rev-id 0003 -m version")
    reader.run("alembic upgrade head", ok=False)
    written = reader.folder / "migrations/versions/0003_version.py"
    head = "def upgrade() -> None:\n"
    code = written.read_text()
    delete = '    op.execute("DELETE FROM aiogram_fsm_data_lock")\n'
    assert delete.strip() in page
    written.write_text(code.replace(head, head + delete))
    reader.run("alembic upgrade head")
    reader.run("alembic check")
    assert reader.run("hybrid-storage tables check") == "the tables are as they should be\n"


def check_concurrent_index(reader: Reader, page: str) -> None:
    """Create an index of the guide's migration as the guide says for large tables."""
    found = re.search(r"^```text\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    assert found is not None
    reader.run("alembic revision --rev-id 9001 -m index")
    revision = reader.folder / "migrations/versions/9001_index.py"
    head = "def upgrade() -> None:\n"
    drop = 'op.drop_index("ix_aiogram_fsm_data_user_id", "aiogram_fsm_data")\n'
    code = textwrap.indent(drop + found[1], "    ")
    revision.write_text(revision.read_text().replace(head, head + code, 1))
    reader.run("alembic upgrade head")
    reader.run("alembic check")
    reader.run("alembic downgrade 0002")
    revision.unlink()


ENGINE_OF_MODELS = """import os

from models import Base
from sqlalchemy import NullPool, create_engine

engine = create_engine(os.environ["DATABASE_URL"], poolclass=NullPool)"""


# Tests

SECONDS = re.compile(r"in [0-9.]+s")


@pytest.mark.parametrize("reader", ["postgresql"], indirect=True)
def test_the_guide_to_tests_has_tests_that_pass(reader: Reader) -> None:
    reader.write("pytest.ini", "[pytest]\nfilterwarnings = error\n")  # as a careful reader has it
    for name, code in files_of("testing-your-handlers") + files_of("testing-on-a-database"):
        reader.write(name, code)
    [block] = COMMANDS.findall((GUIDES / "testing-your-handlers.md").read_text())
    assert SECONDS.sub("", reader.follow(block)) == SECONDS.sub("", block)
    assert "2 passed" in reader.run("pytest -q test_database.py")
    shown = reader.run("hybrid-storage show 42:7:7 --json")
    assert '"data": {}' in shown  # nothing has stayed


# The production checklist


@pytest.fixture
def checklist() -> dict[str, str]:
    """Return the blocks of the checklist by their names."""
    page = (GUIDES / "production-checklist.md").read_text()
    block = re.compile(r"<!-- run: (\w+) -->\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    blocks = dict(block.findall(page))
    assert sorted(blocks) == ["privileges", "settings", "timeouts"]
    return blocks


@pytest.fixture
def database_of_bot(postgres_database: URL, checklist: dict[str, str]) -> Iterator[URL]:
    """Return a database whose tables a role may use as the checklist says, and no more."""
    admin = create_engine(postgres_database)
    role = f"bot_{uuid.uuid4().hex}"
    storage = SQLAlchemyStorage(sessionmaker(admin))
    storage.create_isolation()
    storage.metadata.create_all(admin)
    grants = [line for name in ("privileges", "timeouts") for line in checklist[name].splitlines()]
    with admin.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN")
        for line in grants:
            connection.exec_driver_sql(re.sub(r"\bbot\b", role, line))
    try:
        yield postgres_database.set(username=role)
    finally:
        with admin.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")
        admin.dispose()


async def test_the_checklists_privileges_and_settings_suffice(
    checklist: dict[str, str],
    database_of_bot: URL,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = database_of_bot.render_as_string(hide_password=False)
    monkeypatch.setenv("DATABASE_URL", url)
    names: dict[str, Any] = {"__name__": "checklist"}
    try:
        await run_awaiting(checklist["settings"], names)
    finally:
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # but for what the block has made, as before
    storage, isolation, key = names["storage"], names["isolation"], StorageKey(42, 7, 7)
    await storage.check_table()
    await storage.create_table()  # finds them, and creates nothing
    for _ in range(2):
        async with isolation.lock(key):
            assert await storage.get_state(key) is None
            await storage.set_state(key, "order:payment")
            await storage.update_data(key, {"name": "Ada"})
        assert await storage.get_data(key) == {"name": "Ada"}
        await storage.clear(key)

    def hold_the_lock() -> None:
        with isolation.lock_sync(key), names["sessionmaker"](names["engine"]).begin() as session:
            storage.operations.update_data(session, key, {"name": "Bob"})

    await asyncio.to_thread(hold_the_lock)
    assert await storage.get_data(key) == {"name": "Bob"}
    for name, seconds in {"statement": "10s", "lock": "5s"}.items():
        shown = text(f"SHOW {name}_timeout")
        assert await storage.run_sync(lambda session, shown=shown: session.scalar(shown)) == seconds

    refused = text("INSERT INTO aiogram_fsm_data (id, data) VALUES ('42:7:7', :secret)")
    with pytest.raises(IntegrityError) as error:
        await storage.run_sync(lambda session: session.execute(refused, {"secret": "s3cret"}))
    assert "s3cret" not in str(error.value)
    slow = text("SET LOCAL statement_timeout = '50ms'; SELECT pg_sleep(5)")
    with pytest.raises(OperationalError, match="statement timeout"):  # at once
        await storage.run_sync(lambda session: session.execute(slow))
    with pytest.raises(ProgrammingError, match="permission denied"):
        await storage.run_sync(lambda session: session.execute(text("CREATE TABLE other (a int)")))
    assert not caplog.records
    await isolation.close()
    names["engine"].dispose()
