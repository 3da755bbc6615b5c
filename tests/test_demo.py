"""The examples: what the demo shows, the two variants of its bot, its stand-in of the Bot API."""

from __future__ import annotations

import difflib
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import anyio
import pytest

if TYPE_CHECKING:
    from bot_api import BotAPI

    Call = Callable[..., Coroutine[Any, Any, dict[str, Any]]]

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO = [sys.executable, str(EXAMPLES / "demo.py")]
PATIENCE = 120  # seconds: a hanging demo is to fail the test, not to stop the run

# The demo's processes import what this process imports, and talk to nothing that it could reach.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in {"BOT_TOKEN", "BOT_API_URL", "DATABASE_URL"}
} | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture(autouse=True)
def examples_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests import what the examples import from their own folder."""
    monkeypatch.syspath_prepend(EXAMPLES)


def is_alive(pid: int) -> bool:
    """Tell whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# The demo


def test_without_a_terminal_the_recorded_conversation_survives_a_kill() -> None:
    """The form goes on in a new process, and plain synchronous code sees it half filled in."""
    demo = subprocess.run(
        DEMO,
        check=False,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )

    assert (demo.returncode, demo.stderr) == (0, "")
    banner, *lines = demo.stdout.splitlines()
    first, second = re.findall(r"the bot is process (\d+)", demo.stdout)
    assert first != second
    assert lines == [
        f"demo> the bot is process {first}",
        "you>  /start",
        "bot>  What is your name?",
        "you>  Ada",
        "bot>  How old are you, Ada?",
        "you>  /restart",
        f"demo> process {first} is killed, exit code -9",
        f"demo> the bot is process {second}",
        "you>  thirty-six",
        "bot>  Please send your age as a number.",
        "you>  36",
        "bot>  Which city do you live in?",
        "you>  /state",
        "sync> Form:city {'name': 'Ada', 'age': 36}",
        "you>  London",
        "bot>  Thank you: Ada, 36, London.",
        "you>  /state",
        "sync> None {}",
        "demo> the bot has stopped in order; every answer was the expected one",
    ]
    assert banner.startswith("form_bot.py")
    assert not Path(banner.split()[-1]).exists()
    assert not is_alive(int(second))


class Terminal:
    """A demo at the other end of a pseudo-terminal.

    :param master: the terminal's end of it
    """

    def __init__(self, master: int) -> None:
        self._master = master
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, pattern: str) -> re.Match[str]:
        """Read on, past the next match of `pattern`."""
        while (match := re.search(pattern, self._unread)) is None:
            self._unread += self._read(f"no {pattern!r} in {self._unread!r}")
        self._unread = self._unread[match.end() :]
        return match

    def _read(self, complaint: str) -> str:
        readable, _, _ = select.select([self._master], [], [], PATIENCE)
        assert readable, complaint
        try:
            return os.read(self._master, 4096).decode()
        except OSError as error:  # the demo has ended
            raise AssertionError(complaint) from error


@contextmanager
def demo_in_a_terminal(
    *options: str,
) -> Generator[tuple[subprocess.Popen[bytes], Terminal]]:
    """Start the demo in a new pseudo-terminal, and end both."""
    master, slave = pty.openpty()
    try:
        demo = subprocess.Popen(
            [*DEMO, *options], env=ENVIRONMENT, stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        with demo:
            try:
                yield demo, Terminal(master)
            finally:
                demo.terminate()
    finally:
        os.close(master)


def test_in_a_terminal_it_is_a_chat_that_goes_on_in_a_new_process() -> None:
    """With the asynchronous variant of the bot: the recorded conversation takes the other one."""
    with demo_in_a_terminal("--async") as (demo, terminal):
        terminal.expect("form_bot_async.py")
        bot = int(terminal.expect(r"the bot is process (\d+)\r")[1])
        terminal.expect("Ctrl-D ends the chat")
        terminal.type("/state\n")
        terminal.expect("sync> None {}")
        terminal.type("hello\n")
        terminal.expect("bot>  /start begins the form")
        terminal.type("/start\n")
        terminal.expect("bot>  What is your name")
        terminal.type("Grace\n")
        terminal.expect("bot>  How old are you, Grace")
        terminal.type("/restart\n")
        terminal.expect(f"process {bot} is killed")
        assert not is_alive(bot)
        bot = int(terminal.expect(r"the bot is process (\d+)\r")[1])
        terminal.type("85\n")
        terminal.expect("bot>  Which city")
        terminal.type("/state\n")
        terminal.expect("sync> Form:city {'name': 'Grace', 'age': 85}")
        terminal.type("/cancel\n")
        terminal.expect("bot>  Cancelled")
        terminal.type("/state\n")
        terminal.expect("sync> None {}")
        terminal.type("\x04")

        assert demo.wait(PATIENCE) == 0
        assert not is_alive(bot)


@pytest.mark.parametrize(
    ("number", "send"),
    [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill), (signal.SIGHUP, os.kill)],
    ids=["Ctrl-C", "terminated", "hung up"],
)
def test_a_signal_ends_the_bot_too(
    number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    """Ctrl-C reaches every process of the terminal's group, the other signals the demo alone."""
    with subprocess.Popen(
        DEMO, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as demo:  # fmt: skip
        assert demo.stdout is not None
        folder = Path(demo.stdout.readline().split()[-1])
        bot = int(demo.stdout.readline().split()[-1])
        send(demo.pid, number)
        _, errors = demo.communicate(timeout=PATIENCE)

    assert (demo.returncode, errors) == (128 + number, "")
    assert not is_alive(bot)
    assert not folder.exists()


POLLS_ONCE = """
import os, urllib.request
urllib.request.urlopen("{BOT_API_URL}/bot{BOT_TOKEN}/getUpdates?timeout=60".format(**os.environ))
"""


def test_an_unexpected_answer_is_a_failure(tmp_path: Path) -> None:
    bot = tmp_path / "bot.py"
    bot.write_text(POLLS_ONCE)
    program = (
        "import demo; running = demo.running;"
        f"demo.running = lambda _, driver: running(demo.Path({str(bot)!r}), driver);"
        "demo.CONVERSATION = [('/restart', 'nothing new')]; demo.main()"
    )
    demo = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=EXAMPLES,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )

    assert demo.returncode == 1
    assert "demo: to '/restart' the answer is 'a new process', not 'nothing new'" in demo.stderr


def test_a_bot_that_ends_by_itself_is_a_failure_that_shows_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from demo import DemoError, running

    bot = tmp_path / "bot.py"
    bot.write_text("import sys\nprint('no more paper', flush=True)\nsys.exit(3)\n")

    with pytest.raises(DemoError, match="ended, exit code 3"), running(bot, "sqlite") as demo:
        pytest.fail(f"process {demo.pid} is up")
    assert "no more paper" in capfd.readouterr().err


async def test_with_a_token_the_same_file_talks_to_the_api_it_is_given(
    api: BotAPI, tmp_path: Path
) -> None:
    from bot_api import TOKEN

    async with await anyio.open_process(
        DEMO,
        cwd=tmp_path,
        env=ENVIRONMENT | {"BOT_TOKEN": TOKEN, "BOT_API_URL": api.url},
        stdin=subprocess.DEVNULL,
        stdout=None,
        stderr=None,
    ) as bot:
        await api.send("/start")
        with anyio.fail_after(PATIENCE):
            assert await api.reply() == "What is your name?"
        bot.terminate()
        assert await bot.wait() == 0
    assert (tmp_path / "form_bot.db").exists()


def test_the_async_variant_differs_by_the_factory_alone() -> None:
    sync, asynchronous = (
        (EXAMPLES / name).read_text().splitlines() for name in ("form_bot.py", "form_bot_async.py")
    )

    changes = [line for line in difflib.ndiff(sync, asynchronous) if line[0] in "+-"]

    factory = 'async_sessionmaker(create_async_engine(url or "sqlite+aiosqlite:///form_bot.db"))'
    assert sorted(changes) == [
        f"+ SessionLocal = {factory}",
        "+ from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine",
        "+ from sqlalchemy.orm import DeclarativeBase",
        '- SessionLocal = sessionmaker(create_engine(url or "sqlite:///form_bot.db"))',
        "- from sqlalchemy import create_engine",
        "- from sqlalchemy.orm import DeclarativeBase, sessionmaker",
    ]


# The stand-in of the Bot API


@pytest.fixture
async def api() -> AsyncIterator[BotAPI]:
    """Serve a stand-in."""
    from bot_api import serve

    async with serve() as api:
        yield api


@pytest.fixture
async def call(api: BotAPI) -> AsyncIterator[Call]:
    """Call a method of the stand-in as any HTTP client would."""
    from bot_api import TOKEN

    async with aiohttp.ClientSession() as client:

        async def call(method: str, token: str = TOKEN, **params: str | int) -> dict[str, Any]:
            async with client.post(f"{api.url}/bot{token}/{method}", data=params) as response:
                answer: dict[str, Any] = await response.json()
            assert response.status == answer.get("error_code", 200)
            return answer

        yield call


def texts(updates: dict[str, Any]) -> list[str]:
    """Return what the user wrote in the updates of an answer."""
    return [update["message"]["text"] for update in updates["result"]]


async def test_an_update_comes_again_until_an_offset_confirms_it(api: BotAPI, call: Call) -> None:
    await api.send("one")
    await api.send("two")

    assert texts(await call("getUpdates")) == ["one", "two"]
    updates = await call("getUpdates")
    assert texts(updates) == ["one", "two"]
    first, second = (update["update_id"] for update in updates["result"])
    assert texts(await call("getUpdates", offset=first)) == ["one", "two"]
    assert texts(await call("getUpdates", offset=second)) == ["two"]
    assert texts(await call("getUpdates")) == ["two"]
    assert texts(await call("getUpdates", offset=second + 1)) == []
    await api.confirmed()


async def test_updates_can_be_limited_counted_from_the_end_and_dropped(
    api: BotAPI, call: Call
) -> None:
    for text in ("one", "two", "three"):
        await api.send(text)

    assert texts(await call("getUpdates", limit=1)) == ["one"]
    assert texts(await call("getUpdates", offset=-2)) == ["two", "three"]
    assert texts(await call("getUpdates")) == ["two", "three"]
    assert (await call("deleteWebhook"))["result"] is True
    assert texts(await call("getUpdates")) == ["two", "three"]
    await call("deleteWebhook", drop_pending_updates="true")
    assert texts(await call("getUpdates")) == []


async def test_a_long_poll_waits_for_the_next_update(api: BotAPI, call: Call) -> None:
    polled: list[str] = []

    async def poll() -> None:
        polled.extend(texts(await call("getUpdates", timeout=PATIENCE)))

    async with anyio.create_task_group() as group:
        group.start_soon(poll)
        await call("getMe")  # by now the poll has been answered, or waits
        assert polled == []
        await api.send("hello")
    assert polled == ["hello"]


async def test_a_long_poll_ends_empty_handed(call: Call) -> None:
    assert await call("getUpdates", timeout=1) == {"ok": True, "result": []}


async def test_a_message_reaches_the_user(api: BotAPI, call: Call) -> None:
    from bot_api import USER_ID

    sent = await call("sendMessage", chat_id=USER_ID, text="hello")

    assert sent["result"]["text"] == await api.reply() == "hello"
    assert sent["result"]["from"] == (await call("GETME"))["result"]


@pytest.mark.parametrize(
    ("method", "params", "code", "description"),
    [
        ("getNothing", {}, 404, "Not Found"),
        ("getMe", {"token": "42:other"}, 401, "Unauthorized"),
        ("sendMessage", {"chat_id": 1, "text": "hello"}, 400, "Bad Request: chat not found"),
        ("sendMessage", {"chat_id": 7}, 400, "Bad Request: message text is empty"),
    ],
)
async def test_an_error_is_answered_as_the_bot_api_does(
    call: Call, method: str, params: dict[str, Any], code: int, description: str
) -> None:
    assert await call(method, **params) == {
        "ok": False,
        "error_code": code,
        "description": description,
    }
