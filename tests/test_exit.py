"""Processes end: one Ctrl-C or SIGTERM is enough, whatever a synchronous factory's threads do."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from anyio import create_task_group, open_process
from anyio.streams.text import TextReceiveStream, TextSendStream
from backends import MARIADB, POSTGRESQL, SQLITE, Backend
from blocking import PATIENCE, locked
from bot_api import CHAT, USER, serve
from conftest import Open, engine_of
from sqlalchemy import URL

from hybrid_storage import SQLAlchemyStorage

TESTS = Path(__file__).parent
RUNS = int(os.environ.get("HYBRID_STORAGE_EXIT_RUNS", "1"))
IN_THREADS = [each for each in (*SQLITE, *POSTGRESQL, *MARIADB) if not each.is_async]
ENDS = [
    ("polling", signal.SIGINT),
    ("webhook", signal.SIGTERM),
    ("polling", signal.SIGTERM),
    ("webhook", signal.SIGINT),
]
STARTS_WITHIN = 120.0  # seconds, nearly all for imports, where other processes want the cores
ENDS_WITHIN = 5.0  # seconds
# A short run takes both ways on one server only.
CASES = [
    (each, *end)
    for each in IN_THREADS
    for end in (ENDS if RUNS > 1 else ENDS[: 2 if each.server == "postgresql" else 1])
]
UPDATE = {
    "update_id": 1,
    "message": {"message_id": 1, "from": USER, "chat": CHAT, "date": 1, "text": "work"},
}


async def start(*arguments: str) -> anyio.abc.Process:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "examples"), str(TESTS.parent)])
    return await open_process(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path}, stderr=None
    )


class Said:
    """The lines that a process prints."""

    def __init__(self, process: anyio.abc.Process) -> None:
        assert process.stdout is not None
        self._output = TextReceiveStream(process.stdout)
        self._rest = ""

    async def line(self, text: str) -> str:
        """Wait for the next line that has a text in it."""
        while True:
            line, end, rest = self._rest.partition("\n")
            if not end:
                self._rest += await self._output.receive()
                continue
            self._rest = rest
            if text in line:
                return line


def waited_for_core(pid: int) -> float:
    """Return for how many seconds a process could have run, but others did; where Linux tells."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


async def ended_in_time(bot: int, said: Said) -> None:
    """Check that a bot ends, and wait a little longer where other processes hold it up."""
    began, before = time.monotonic(), waited_for_core(bot)
    left = ENDS_WITHIN
    while left > 0:
        with anyio.move_on_after(left):
            assert await said.line(f"{bot} ended") == f"{bot} ended 0"
            return
        left = ENDS_WITHIN - (time.monotonic() - began) + waited_for_core(bot) - before
    os.kill(bot, signal.SIGUSR1)  # where its threads are
    await asyncio.sleep(1)
    os.kill(bot, signal.SIGKILL)
    pytest.fail(f"the bot has not ended within {ENDS_WITHIN} s")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def post(port: int) -> None:
    async with aiohttp.ClientSession() as client:
        while True:
            try:
                await client.post(f"http://127.0.0.1:{port}/", json=UPDATE)
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.05)
            else:
                return


@pytest.fixture(scope="module")
async def bots(anyio_backend: str) -> AsyncIterator[tuple[TextSendStream, Said]]:
    """Return what starts bots, one process for all of them, and what is said of them."""
    async with await start(str(TESTS / "exit_worker.py")) as process:
        assert process.stdin is not None
        yield TextSendStream(process.stdin), Said(process)
        await process.stdin.aclose()


@pytest.mark.parametrize(("backend", "mode", "which"), CASES, ids=str)
async def test_a_bot_with_a_handler_at_work_ends_at_one_signal(
    backend: Backend,
    mode: str,
    which: signal.Signals,
    open_storage: Open,
    bots: tuple[TextSendStream, Said],
) -> None:
    begin, said = bots
    for _ in range(RUNS):
        storage: SQLAlchemyStorage = await open_storage(backend)
        storage.create_isolation()  # its table is dropped, too
        url = engine_of(storage).url.render_as_string(hide_password=False)
        port = free_port()
        async with serve() as api, create_task_group() as tasks:
            with anyio.fail_after(STARTS_WITHIN):
                to = mode if mode == "polling" else port
                await begin.send(f"{url} {storage.table.name} {to} {api.url}\n")
                if mode == "polling":
                    await api.send("work")
                else:
                    tasks.start_soon(post, port)
                bot = int((await said.line(" at work")).split()[0])
            os.kill(bot, which)
            await ended_in_time(bot, said)
        storage.metadata.drop_all(engine_of(storage))


LATE_CALL = """
import asyncio, sys
from aiogram.fsm.storage.base import StorageKey
from hybrid_storage import SQLAlchemyStorage

key = StorageKey(42, 7, 7)

async def lock(storage, at_work):
    async with storage.create_isolation().lock(key):
        at_work()
        await asyncio.sleep(60)

async def cleanup(storage, at_work):
    at_work()
    try:
        await asyncio.sleep(60)
    finally:
        await storage.set_state(key, None)

async def transaction(storage, at_work):
    async with storage.transaction():
        await storage.set_state(key, "x")
        at_work()
        await asyncio.sleep(60)

async def start(work):
    storage = SQLAlchemyStorage.from_url(f"sqlite:///{sys.argv[1]}/{work.__name__}.db")
    storage.create_isolation()
    await storage.create_table()
    at_work = asyncio.Event()
    task = asyncio.create_task(work(storage, at_work.set))
    await at_work.wait()
    return task

for works in ([lock], [cleanup], [transaction], [lock, cleanup, transaction]):
    async def main():
        tasks = [await start(work) for work in works]

    asyncio.run(main())
"""


async def test_a_call_that_a_task_makes_while_the_loop_ends_does_not_keep_the_process(
    tmp_path: Path,
) -> None:
    process = await start("-c", LATE_CALL, str(tmp_path))
    with anyio.fail_after(STARTS_WITHIN):
        async with process:
            assert await process.wait() == 0


WAITS = """
import asyncio, sys
from aiogram.fsm.storage.base import StorageKey
from hybrid_storage import SQLAlchemyStorage

async def main():
    storage = SQLAlchemyStorage.from_url(sys.argv[1], table_name=sys.argv[2])
    print("waits", flush=True)
    await storage.set_state(StorageKey(42, -1001234567890, 7), "never")

asyncio.run(main())
"""


@pytest.mark.parametrize("backend", [POSTGRESQL[0], POSTGRESQL[2]], ids=str)
async def test_one_ctrl_c_ends_a_bot_that_waits_for_a_lock(
    backend: Backend, open_storage: Open, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    storage: SQLAlchemyStorage = await open_storage(backend)
    await storage.set_state(key, "before")
    url = engine_of(storage).url.render_as_string(hide_password=False)
    with locked(backend, url_of(backend), storage, key) as lock:
        process = await start("-c", WAITS, url, storage.table.name)
        async with process:
            with anyio.fail_after(STARTS_WITHIN):
                await Said(process).line("waits")
            began = time.monotonic()
            while not lock.connection.exec_driver_sql(
                "SELECT count(*) FROM pg_locks WHERE NOT granted"
                " AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
            ).scalar():
                assert time.monotonic() - began < PATIENCE
                await asyncio.sleep(0.02)
            process.send_signal(signal.SIGINT)
            try:
                with anyio.fail_after(ENDS_WITHIN):
                    await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
        lock.release()
    assert await storage.get_state(key) == "before"
