"""The command ``hybrid-storage``: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from backends import FORKED, POSTGRESQL, SERVERS, SQLITE, Backend
from click.testing import CliRunner, Result
from sqlalchemy import URL, Engine, make_url, text
from terminal_worker import run_on_terminal

from hybrid_storage import SQLAlchemyStorage, _cli_output
from hybrid_storage.cli import app

ROOT = Path(__file__).parent.parent
CTRL_C = "\x03"
PATIENCE = 60.0  # seconds, nearly all for imports, where other processes want the cores
STARTED = [SQLITE[0], POSTGRESQL[2]]
"""Where the command is started as a process, too, whose imports take long."""
SQL = {backend.server: backend for backend in SERVERS if not backend.is_async}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")


@dataclass(frozen=True)
class Shell:
    """Runs commands on a table of a database."""

    url: URL
    table: str

    def run(self, *arguments: str) -> Result:
        """Run a command in this process."""
        with_table = [*arguments, "--table", self.table]
        return CliRunner().invoke(app, with_table, env=self.environment)

    def done(self, *arguments: str) -> Any:
        """Run a command that succeeds, and return what it says as JSON."""
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        assert not result.stderr
        return json.loads(result.stdout)

    def lines(self, *arguments: str) -> list[Any]:
        """Run a command that prints lines of JSON."""
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the real command."""
        return subprocess.Popen(
            [sys.executable, "-m", "hybrid_storage", *arguments, "--table", self.table],
            env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT)},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    @property
    def environment(self) -> dict[str, str]:
        return {"HYBRID_STORAGE_URL": self.url.render_as_string(hide_password=False)}

    def engine(self) -> Engine:
        """Return a synchronous engine on the same database."""
        backend = SQL[self.url.get_backend_name().replace("mysql", "mariadb")]
        engine = backend.engine(self.url)
        assert isinstance(engine, Engine)
        return engine

    def insert(self, number: int) -> None:
        """Write rows of many users, in the order of their ids."""
        storage = SQLAlchemyStorage.from_url(self.url, table_name=self.table, columns=True)

        async def write() -> None:
            await storage.set_state(StorageKey(bot_id=42, chat_id=1, user_id=100_000), "a:b")
            await storage.close()

        asyncio.run(write())
        engine = self.engine()
        columns = "bot_id, chat_id, thread_id, business_connection_id, destiny, written_at, state"
        statement = (
            f"INSERT INTO {self.table} ({columns}, user_id, id, conversation) "
            f"SELECT {columns}, :user, :id, :id FROM {self.table} WHERE user_id = 100000"
        )
        users = range(100_001, 100_000 + number)
        with engine.begin() as connection:
            connection.execute(
                text(statement), [{"user": user, "id": f"42:1:{user}"} for user in users]
            )
        engine.dispose()

    def number(self) -> int:
        """Return how many rows there are."""
        engine = self.engine()
        with engine.connect() as connection:
            found = connection.scalar(text(f"SELECT count(*) FROM {self.table}"))
        engine.dispose()
        return int(found or 0)


Open = Callable[..., Shell]


@pytest.fixture
def open_shell(url_of: Callable[[Backend], URL]) -> Iterator[Open]:
    """Return a function that gives a shell on a backend, with or without a table."""
    opened: list[Shell] = []

    def open_shell(backend: Backend, *created: str) -> Shell:
        url = url_of(backend)
        url = url.set(drivername=f"{url.get_backend_name()}+{backend.driver}")
        shell = Shell(url, f"fsm_{uuid.uuid4().hex[:12]}")
        opened.append(shell)
        if created:
            shell.done("tables", "create", *created)
        return shell

    yield open_shell
    for shell in opened:
        engine = shell.engine()
        with engine.begin() as connection:
            connection.execute(text(f"DROP TABLE IF EXISTS {shell.table}"))
            connection.execute(text(f"DROP TABLE IF EXISTS {shell.table}_lock"))
        engine.dispose()


@pytest.fixture
def shell(open_shell: Open) -> Shell:
    """Return a shell on SQLite, with a table that has the columns."""
    return open_shell(SQLITE[0], "--columns")


def test_the_real_command_sees_and_steers_a_database_by_each_driver(
    backend: Backend, open_shell: Open
) -> None:
    shell = open_shell(backend)
    if backend.server == "sqlite":
        Path(str(shell.url.database)).touch()  # a database without tables
    missing = shell.run("tables", "check")
    assert missing.exit_code == 1
    assert missing.stderr.splitlines() == [
        f"table '{name}' is missing: create it with `hybrid-storage tables create`"
        for name in (shell.table, f"{shell.table}_lock")
    ]
    tables = [shell.table, f"{shell.table}_lock"]
    would = {"created": tables, "dry_run": True, "problems": []}
    assert shell.done("tables", "create", "--columns", "--dry-run") == would
    assert shell.done("tables", "create", "--columns") == {**would, "dry_run": False}
    assert shell.done("tables", "create", "--columns")["created"] == []
    assert shell.done("tables", "check", "--columns") == {"ok": True, "problems": []}

    changed = {"changed": 1, "dry_run": False}
    one = ("42:7:7", "--state", "order:cart", "--data", '{"n": "Ада"}')
    assert shell.done("set", *one, "--dry-run") == {"changed": 1, "dry_run": True}
    assert shell.done("show", "42:7:7")["state"] is None
    assert shell.done("set", *one) == changed
    assert shell.done("set", *one)["changed"] == 0
    assert shell.done("set", "42:-100:8:thread_id=5", "--state", "order:paid") == changed
    found = shell.lines("list", "--data")
    assert [each["key"] for each in found] == ["42:-100:8:thread_id=5", "42:7:7"]
    assert found[1] == shell.done("show", "42:7:7")
    assert TIME.fullmatch(found[1].pop("written_at"))
    assert found[1] == {
        "key": "42:7:7",
        "bot_id": 42,
        "chat_id": 7,
        "user_id": 7,
        "thread_id": None,
        "business_connection_id": None,
        "destiny": "default",
        "state": "order:cart",
        "data": {"n": "Ада"},
    }
    assert shell.lines("list", "--thread", "5", "--limit", "1")[0]["user_id"] == 8
    by_state = [{"state": "order:cart", "count": 1}, {"state": "order:paid", "count": 1}]
    assert shell.done("count") == {"total": 2, "states": by_state}

    for command in (
        ("rename", "order", "Order", "--group"),
        ("move-chat", "-100", "-200"),
        ("forget", "8"),
        ("clear", "--state", "Order:cart", "--idle-for", "0"),
    ):
        rows = 2 if "rename" in command else 1
        assert shell.done(*command, "--dry-run") == {"changed": rows, "dry_run": True}
        assert shell.done(*command, "--yes") == {"changed": rows, "dry_run": False}
        assert shell.done(*command, "--yes") == {"changed": 0, "dry_run": False}
    assert shell.number() == 0

    shell.done("set", "1:2:3", "--state", "a")
    time.sleep(0.01)
    assert shell.done("purge", "--expires-after", "3600", "--yes")["changed"] == 0
    assert shell.done("purge", "--expires-after", "0.001", "--dry-run")["changed"] == 1
    assert shell.number() == 1
    if backend in STARTED:
        with shell.start("purge", "--expires-after", "0.001", "--yes", "--json") as itself:
            out, errors = itself.communicate(timeout=PATIENCE)
        assert (itself.returncode, errors) == (0, "")
        assert json.loads(out) == changed
    else:
        assert shell.done("purge", "--expires-after", "0.001", "--yes") == changed
    assert shell.number() == 0


@pytest.mark.parametrize("backend", SQL.values(), ids=str)
def test_columns_that_were_added_later_are_filled(backend: Backend, open_shell: Open) -> None:
    shell = open_shell(backend, "--columns")
    engine = shell.engine()
    with engine.begin() as connection:
        connection.execute(
            text(f"INSERT INTO {shell.table} (id, state) VALUES ('42:7:7', 'a'), ('other', 'a')")
        )
    engine.dispose()
    assert shell.lines("list") == []
    assert shell.done("fill", "--dry-run")["changed"] == 1
    assert shell.lines("list") == []
    assert shell.done("fill")["changed"] == 1
    assert [each["written_at"] for each in shell.lines("list")] == [None]
    assert shell.done("fill")["changed"] == 0


def test_a_table_without_the_columns_is_told_so(open_shell: Open) -> None:
    shell = open_shell(SQLITE[0], "--no-columns", "--no-lock-table")
    assert shell.done("set", "42:7:7", "--state", "a")["changed"] == 1
    assert shell.done("show", "42:7:7")["state"] == "a"
    for command in (
        ["list"],
        ["count"],
        ["forget", "7", "--yes"],
        ["clear", "--bot", "1", "--yes"],
    ):
        result = shell.run(*command)
        assert result.exit_code == 1
        assert f"table '{shell.table}' lacks the columns to find conversations by" in result.stderr
        assert not result.stdout
    assert shell.done("clear", "42:7:7", "--yes")["changed"] == 1
    assert shell.run("tables", "check", "--no-lock-table").exit_code == 0
    assert shell.run("tables", "check").exit_code == 1
    lacking = shell.run("tables", "check", "--no-lock-table", "--columns", "--json")
    assert lacking.exit_code == 1
    assert "lacks the columns bot_id, " in json.loads(lacking.stdout)["problems"][0]


def test_a_conversation_is_cleared_with_its_scenes(shell: Shell) -> None:
    for key in ("1:2:3", "1:2:3:destiny=scenes_history", "1:2:4"):
        shell.done("set", key, "--data", '{"a": 1}')
    assert len(shell.lines("list")) == 2
    assert len(shell.lines("list", "--all-rows")) == 3
    assert shell.done("clear", "1:2:3", "--dry-run")["changed"] == 1
    assert shell.done("clear", "1:2:3", "--yes")["changed"] == 1
    assert [each["key"] for each in shell.lines("list", "--all-rows")] == ["1:2:4"]


def test_a_group_is_found_with_the_groups_in_it(shell: Shell) -> None:
    for number, state in enumerate(["Order:cart", "Order.Pay:card", "Orders:x"]):
        shell.done("set", f"1:1:{number}", "--state", state)
    assert shell.done("count", "--group", "Order")["total"] == 2
    assert shell.done("count", "--group", "Nothing")["total"] == 0
    assert shell.done("count", "--state", "Order:cart", "--state", "Orders:x")["total"] == 2


def test_set_changes_what_it_is_told_and_no_more(shell: Shell) -> None:
    for arguments, state, data in [
        (["--state", "a", "--data", '{"a": 1}'], "a", {"a": 1}),
        (["--state", "b"], "b", {"a": 1}),
        (["--no-state"], None, {"a": 1}),
        (["--data", "{}"], None, {}),
    ]:
        shell.done("set", "1:2:3", *arguments)
        shown = shell.done("show", "1:2:3")
        assert (shown["state"], shown["data"]) == (state, data)
    assert shell.number() == 0


def test_another_key_builder_is_taken_from_a_module(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "shop_bot.py").write_text(
        "from aiogram.fsm.storage.base import DefaultKeyBuilder\n"
        "builder = DefaultKeyBuilder(with_bot_id=True)\n"
    )
    by = ("--key-builder", "shop_bot:builder")
    shell.done("set", "42:7:7", "--state", "a", *by)
    shell.done("move-chat", "7", "-100", "--yes", *by)
    key = StorageKey(bot_id=42, chat_id=-100, user_id=-100)
    engine = shell.engine()
    with engine.connect() as connection:
        id = connection.scalar(text(f"SELECT id FROM {shell.table}"))
    engine.dispose()
    assert id == DefaultKeyBuilder(with_bot_id=True).build(key)[: len(str(id))]
    assert shell.run("show", "1:2:3", "--key-builder", "shop_bot:nothing").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "7"], "'7' is no key: write bot:chat:user"),
        (["set", "1:2:3"], "pass --state or --no-state"),
        (["set", "1:2:3", "--state", "a", "--no-state"], "pass --state or --no-state"),
        (["set", "1:2:3", "--data", "[]"], "--data is a JSON object, not []"),
        (["set", "1:2:3", "--data", "{"], "Expecting property name"),
        (["clear", "--yes"], "pass a KEY, or options"),
        (["clear", "1:2:3", "--bot", "1", "--yes"], "pass a KEY, or options"),
        (["count", "--state", "a", "--group", "b"], "pass --state or --group"),
        (["forget", "7"], "there is no terminal to ask on: pass --yes or --dry-run"),
        (["move-chat", "-1", "-1", "--yes"], "two different ids"),
        (["purge", "--expires-after", "0", "--yes"], "not in the range"),
        (["list", "--idle-for", "-1"], "not in the range"),
        (["count", "--url", "nonsense"], "not a database URL"),
        (["count", "--url", "mysql+mysqldb://h/x"], "needs the driver MySQLdb"),
        (
            ["count", "--url", "redis://h/0"],
            "Can't load plugin: sqlalchemy.dialects:redis: SQLAlchemy knows no",
        ),
        (["lost"], "No such command"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_wrong_usage_is_told_without_a_traceback(
    shell: Shell, arguments: list[str], said: str
) -> None:
    result = shell.run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_data_that_is_not_json_is_told(shell: Shell) -> None:
    shell.done("set", "1:2:3", "--data", '{"a": 1}')
    engine = shell.engine()
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {shell.table} SET data = '[]'"))
    engine.dispose()
    result = shell.run("show", "1:2:3")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    listed = shell.run("list", "--data", "--json")
    assert json.loads(listed.stdout)["data"] is None
    assert listed.stderr


PASSWORD = "s3cr%40t/pa%20ss"
SPELLED = ["s3cr", "t/pa", "pa%20ss", "pa ss", "pa+ss"]


@pytest.mark.parametrize(
    "url",
    [
        *(f"postgresql+{each}://u:{PASSWORD}@127.0.0.1:1/x" for each in ("psycopg", "asyncpg")),
        *(f"mysql+{each}://u:{PASSWORD}@127.0.0.1:1/x" for each in ("pymysql", "asyncmy")),
        f"postgresql://u:{PASSWORD}@127.0.0.1:port/x",
        f"postgresql://u:{PASSWORD} u@[x/x",
        f"mysql+pymysql://u@127.0.0.1:1/{PASSWORD}?password={PASSWORD}",
        f"sqlite:////nowhere/x.db?password={PASSWORD}",
        f"nothing://u:{PASSWORD}@h/x",
        f"mysql+mysqldb://u:{PASSWORD}@h/x",
        f"{PASSWORD}",
    ],
)
@pytest.mark.parametrize("more", [[], ["--debug"]], ids=["", "debug"])
def test_a_password_is_never_printed(
    url: str, more: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    result = CliRunner().invoke(app, ["count", *more], env={"HYBRID_STORAGE_URL": url})
    assert result.exit_code in (1, 2)
    assert result.stderr
    for spelled in SPELLED:
        assert spelled not in result.output + caplog.text
    if not more:
        assert "Traceback" not in result.output
        assert len(result.stderr.splitlines()) <= 4


def test_a_password_is_hidden_in_what_is_logged(shell: Shell) -> None:
    url = make_url("postgresql://u:s3cret@h/x")
    formatter = logging.Formatter()
    record = logging.makeLogRecord({"msg": "as s3cret", "levelno": 30})
    assert _cli_output.Secrets(url).hide(formatter.format(record)) == "as ***"


@pytest.mark.parametrize("password", ["table", "s"])
def test_a_password_that_is_a_word_is_not_told_by_its_gaps(
    postgres_database: URL, password: str
) -> None:
    url = postgres_database.set(password=password).render_as_string(hide_password=False)
    result = CliRunner().invoke(app, ["count"], env={"HYBRID_STORAGE_URL": url})
    assert "table 'aiogram_fsm_data' is missing: create it with `hybrid-" in result.stderr


def test_what_users_write_does_not_steer_the_terminal(shell: Shell) -> None:
    shell.done("set", "1:2:3", "--state", "\x1b[2J\x9b\n[red]", "--data", '{"\\u202e": 1}')
    for command in (["list", "--data"], ["count"], ["show", "1:2:3"]):
        printed = shell.run(*command).stdout
        assert "\x1b" not in printed
        assert "\x9b" not in printed
        assert "\u202e" not in printed
        assert "\\x1b[2J\\x9b\\n[red]" in printed


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql", "mysql", "mariadb"])
@pytest.mark.parametrize("columns", [[], ["--columns"]], ids=["", "columns"])
def test_the_sql_that_is_printed_creates_the_tables(
    dialect: str, columns: list[str], open_shell: Open
) -> None:
    backend = SQL["mariadb" if dialect == "mysql" else dialect]
    shell = open_shell(backend)
    printed = shell.run("tables", "sql", "--dialect", dialect, *columns)
    assert printed.exit_code == 0
    assert "hybrid" not in printed.stdout
    again = shell.run("tables", "sql", "--dialect", dialect, *columns, "--json")
    assert "\n\n".join(json.loads(again.stdout)["statements"]) + "\n" == printed.stdout
    engine = shell.engine()
    with engine.begin() as connection:
        for statement in printed.stdout.split(";\n"):
            if statement.strip():
                connection.execute(text(statement))
    engine.dispose()
    assert shell.done("tables", "check", *columns)["ok"]


@pytest.mark.parametrize("backend", [POSTGRESQL[0], POSTGRESQL[2]], ids=str)
def test_ctrl_c_leaves_whole_batches(backend: Backend, open_shell: Open) -> None:
    shell = open_shell(backend, "--columns")
    shell.insert(1200)
    engine = shell.engine()
    with engine.begin() as other:
        other.execute(text(f"SELECT 1 FROM {shell.table} WHERE id = '42:1:100700' FOR UPDATE"))
        with shell.start("clear", "--bot", "42", "--yes") as command:
            deadline = time.monotonic() + PATIENCE
            while shell.number() == 1200 and time.monotonic() < deadline:
                time.sleep(0.05)
            command.send_signal(signal.SIGINT)
            out, errors = command.communicate(timeout=PATIENCE)
    engine.dispose()
    assert (command.returncode, out) == (130, "")
    assert errors.splitlines() == ["deleted 500 conversations before that", "interrupted"]
    assert shell.number() == 700


def on_terminal(shell: Shell, *arguments: str, answer: str) -> tuple[int, str]:
    """Run the command in a terminal, and answer its question."""
    master, slave = pty.openpty()
    command = FORKED.Process(
        target=run_on_terminal,
        args=[os.ttyname(slave), shell.environment, [*arguments, "--table", shell.table]],
    )
    command.start()
    said = b""
    while b"begins" not in said:
        said += os.read(master, 4096)
    os.close(slave)
    while True:
        try:
            said += os.read(master, 4096)
        except OSError:  # it has ended
            break
        if answer and b"[y/N]" in said:
            if answer == CTRL_C:  # it is not the session's terminal
                time.sleep(0.5)  # a signal just before it reads would not end the read
                assert command.pid is not None
                os.kill(command.pid, signal.SIGINT)
                time.sleep(0.5)
                answer = "\n"  # so that it ends in any case: the answer is no
            os.write(master, answer.encode())
            answer = ""
    command.join(PATIENCE)
    os.close(master)
    assert command.exitcode is not None
    return command.exitcode, said.decode()


def test_a_table_of_the_former_package_is_moved(open_shell: Open) -> None:
    old = open_shell(SQLITE[0], "--no-columns", "--no-lock-table")
    new = open_shell(SQLITE[0], "--columns")
    engine = old.engine()
    with engine.begin() as connection:
        # The last one is no key.
        rows = "('fsm:7:7', 'a', '{\"n\": 1}'), ('fsm:-1:8', 'b', NULL), ('lost', 'a', NULL)"
        connection.execute(text(f"INSERT INTO {old.table} (id, state, data) VALUES {rows}"))
    engine.dispose()
    urls = [each.url.render_as_string() for each in (old, new)]
    command = ["migrate", *urls, "--source-table", old.table, "--bot", "42"]
    would = new.done(*command, "--dry-run")
    assert (would["found"], would["moved"], would["refused"]) == (3, 2, 1)
    assert new.number() == 0
    done = new.run(*command)
    assert done.exit_code == 1
    assert done.stdout.endswith(" Verified, but for those refused, which are NOT here\n")
    assert done.stderr.startswith("lost: ")
    assert [each["key"] for each in new.lines("list")] == ["42:-1:8", "42:7:7"]
    assert json.loads(new.run(*command, "--json").stdout)["same"] == 2
    new.done("set", "42:7:7", "--state", "changed")
    assert json.loads(new.run(*command, "--json").stdout)["different"] == 1
    missing = new.run("migrate", *urls, "--source-table", "nothing")
    assert (missing.exit_code, "table 'nothing' is missing" in missing.stderr) == (1, True)


def test_a_redis_that_is_away_is_told_without_its_password(shell: Shell) -> None:
    source = f"redis://:{PASSWORD}@127.0.0.1:1/0"
    result = shell.run("migrate", source, shell.url.render_as_string(), "--bot", "42")
    assert result.exit_code == 1
    assert "Connection" in result.stderr
    assert not any(spelled in result.output for spelled in SPELLED)


def test_on_a_terminal_it_asks_first_and_shows_tables(shell: Shell) -> None:
    shell.done("set", "1:2:3", "--state", "a:b")
    for answer in ("n\n", CTRL_C):
        code, said = on_terminal(shell, "forget", "3", answer=answer)
        assert "Delete 1 row? [y/N]" in said
        assert (code, "interrupted" in said) == (130, True)
        assert shell.number() == 1
    code, said = on_terminal(shell, "list", answer="")
    assert code == 0
    assert "│ 1:2:3" in said
    code, said = on_terminal(shell, "forget", "3", answer="y\n")
    assert code == 0
    assert "deleted 1 row" in said
    assert shell.number() == 0


def test_the_entry_point_is_the_command() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, where = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    assert name == "hybrid-storage"
    assert callable(resolve_name(where))


WITHOUT = """
import os, sys
import hybrid_storage

for library in sys.argv[1:]:
    if not os.fork():
        sys.modules[library] = None
        from hybrid_storage.__main__ import main
        main()
    print(library, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_a_missing_library_is_told_with_the_extra_that_brings_it() -> None:
    command = [sys.executable, "-c", WITHOUT, "click", "rich"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (0, "click 2\nrich 2\n")
    assert ended.stderr == "".join(
        f"hybrid-storage needs {library}, which the extra brings: "
        'pip install "aiogram-hybrid-storage[cli]"\n'
        for library in ("click", "rich")
    )


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    file = tmp_path / "typo.db"
    for command in (["list"], ["tables", "check"], ["show", "42:7:7"]):
        result = CliRunner().invoke(app, [*command, "--url", f"sqlite:///{file}"])
        assert result.exit_code == 1
        assert f"there is no file {file}" in result.stderr
        assert not file.exists()
    result = CliRunner().invoke(app, ["tables", "create", "--url", f"sqlite:///{file}"])
    assert result.exit_code == 0
    assert file.exists()
    result = CliRunner().invoke(app, ["show", "42:7:7", "--url", f"sqlite:///{file}"])
    assert "no such conversation" in result.stderr
    result = CliRunner().invoke(app, ["show", "7", "--url", f"sqlite:///{file}"])
    assert "write bot:chat:user" in result.stderr
    assert result.exit_code == 2
