"""The example bot from end to end: a form goes on where it was after the bot's process was killed.

The bot is a process of its own, real aiogram, and polls a local stand-in of the Bot API over HTTP.
In a terminal you chat with it; elsewhere `CONVERSATION` is played, and every answer is checked.
With BOT_TOKEN in the environment, the same bot file talks to Telegram instead.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from bot_api import BOT_ID, TOKEN, USER_ID, BotAPI, serve
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

T = TypeVar("T")

PATIENCE = 60  # seconds to wait for the bot before it counts as a failure

#: what the user types, and what must come back
CONVERSATION = [
    ("/start", "What is your name?"),
    ("Ada", "How old are you, Ada?"),
    ("/restart", "a new process"),
    ("thirty-six", "Please send your age as a number."),
    ("36", "Which city do you live in?"),
    ("/state", "Form:city {'name': 'Ada', 'age': 36}"),
    ("London", "Thank you: Ada, 36, London."),
    ("/state", "None {}"),
]

WELCOME = """
Type, and the bot answers. Two commands are the demo's own, at any point of the form:
  /restart  kill the bot's process and start a new one
  /state    read your state by plain synchronous code, with an ordinary Session
Ctrl-D ends the chat. Begin with /start.
"""


class DemoError(Exception):
    """The bot did not do what the demo is there to show."""


def show(who: str, text: str) -> None:
    print(f"{who + '>':6}{text}", flush=True)


def read_state(database: Path) -> tuple[str | None, dict[str, Any]]:
    """Read the user's state and data as a web view or a cron job would: no bot, no event loop."""
    # Not at the top: aiogram takes its time to be imported, and the bot need not wait for that.
    from aiogram.fsm.storage.base import StorageKey

    from hybrid_storage import SQLAlchemyStorage

    key = StorageKey(bot_id=BOT_ID, chat_id=USER_ID, user_id=USER_ID)
    engine = create_engine(f"sqlite:///{database}")
    operations = SQLAlchemyStorage(sessionmaker(engine)).operations
    try:
        with Session(engine) as session:
            return operations.get_state(session, key), operations.get_data(session, key)
    finally:
        engine.dispose()


class Demo:
    """The bot's process, and the user's side of the chat with it.

    :param bot: the bot's file
    :param driver: what its database URL begins with
    :param folder: where its database and its log go
    :param api: the stand-in that it polls
    :param portal: the way into the event loop of `api`
    """

    def __init__(
        self, bot: Path, driver: str, folder: Path, api: BotAPI, portal: BlockingPortal
    ) -> None:
        self.database = folder / "form_bot.db"
        self.log = folder / "form_bot.log"
        self._command = [sys.executable, str(bot)]
        self._environment = {
            **os.environ,
            "BOT_TOKEN": TOKEN,
            "BOT_API_URL": api.url,
            "DATABASE_URL": f"{driver}:///{self.database}",
        }
        self._api = api
        self._portal = portal
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        """The bot's present process."""
        return self._process.pid

    def wait_until_it_polls(self) -> None:
        """Wait until the bot is up for the first time; its table is there then.

        :raises DemoError: if it does not come up
        """
        self._wait_for(self._api.polled)

    def stop(self) -> int:
        """Ask the bot's process to end, and see that it does.

        :return: its exit code
        """
        self._process.terminate()
        try:
            return self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()

    def say(self, line: str) -> str:
        """Carry out one line of the chat, and show what comes of it.

        :param line: a text for the bot, or one of the demo's own commands
        :return: the answer
        :raises DemoError: if there is none
        """
        if line == "/restart":
            self._restart()
            return "a new process"
        if line == "/state":
            state, data = read_state(self.database)
            answer = f"{state} {data}"
            show("sync", answer)
        else:
            self._portal.call(self._api.send, line)
            answer = self._wait_for(self._api.reply)
            show("bot", answer)
        return answer

    def _restart(self) -> None:
        # A message that the bot has answered but not yet confirmed would be handed out again.
        self._wait_for(self._api.confirmed)
        self._process.kill()
        show("demo", f"process {self.pid} is killed, exit code {self._process.wait()}")
        self._process = self._start()
        show("demo", f"the bot is process {self.pid}")

    def _wait_for(self, event: Callable[[], Awaitable[T]]) -> T:
        """Wait for something that the bot's process must do, as long as it can still do it."""
        outcome = self._portal.start_task_soon(event)
        for _ in range(PATIENCE):
            if wait([outcome], timeout=1).done:
                return outcome.result()
            if self._process.poll() is not None:
                raise DemoError(f"the bot's process ended, exit code {self._process.returncode}")
        raise DemoError(f"the bot has done nothing for {PATIENCE} seconds")


@contextmanager
def running(bot: Path, driver: str) -> Generator[Demo]:
    """Run a bot against a stand-in of its own, and leave neither process nor file behind.

    :param bot: the bot's file
    :param driver: what its database URL begins with
    """
    with (
        tempfile.TemporaryDirectory(prefix="form_bot_") as folder,
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(serve()) as api,
    ):
        demo = Demo(bot, driver, Path(folder), api, portal)
        try:
            print(f"{bot.name}, a Bot API at {api.url}, state in {folder}", flush=True)
            show("demo", f"the bot is process {demo.pid}")
            demo.wait_until_it_polls()
            yield demo
        except DemoError:
            sys.stderr.write(demo.log.read_text())
            raise
        finally:
            demo.stop()


def play(demo: Demo) -> None:
    """Play `CONVERSATION`.

    :raises DemoError: at the first answer that is not the recorded one
    """
    for line, expected in CONVERSATION:
        show("you", line)
        answer = demo.say(line)
        if answer != expected:
            raise DemoError(f"to {line!r} the answer is {answer!r}, not {expected!r}")
    if code := demo.stop():
        raise DemoError(f"the bot did not stop in order, exit code {code}")
    show("demo", "the bot has stopped in order; every answer was the expected one")


def chat(demo: Demo) -> None:
    """Let the user type, until end of file."""
    print(WELCOME)
    while True:
        try:
            line = input("you>  ").strip()
        except EOFError:
            print()
            return
        if line:
            demo.say(line)


def main() -> None:
    """Choose the bot and the chat by the command line, the environment and the terminal."""
    parser = argparse.ArgumentParser(description="Run the example bot from end to end.")
    parser.add_argument(
        "--async", dest="asynchronous", action="store_true", help="run the async variant"
    )
    asynchronous = parser.parse_args().asynchronous
    name = "form_bot_async.py" if asynchronous else "form_bot.py"
    driver = "sqlite+aiosqlite" if asynchronous else "sqlite"
    bot = Path(__file__).with_name(name)

    if "BOT_TOKEN" in os.environ:
        print(f"BOT_TOKEN is set: {name} talks to Telegram. Ctrl-C stops it.", flush=True)
        os.execv(sys.executable, [sys.executable, str(bot)])

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        with running(bot, driver) as demo:
            (chat if sys.stdin.isatty() and sys.stdout.isatty() else play)(demo)
    except (DemoError, subprocess.TimeoutExpired) as error:
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    main()
