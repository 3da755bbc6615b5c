"""Processes end: one Ctrl-C or SIGTERM is enough, whatever a synchronous factory's threads do."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from anyio import create_task_group, open_process
from anyio.streams.text import TextReceiveStream
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
ENDS_WITHIN = 5.0  # seconds
UPDATE = {
    "update_id": 1,
    "message": {"message_id": 1, "from": USER, "chat": CHAT, "date": 1, "text": "work"},
}


async def start(*arguments: str) -> anyio.abc.Process:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "examples"), str(TESTS.parent)])
    return await open_process(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path}, stderr=None
    )


async def said(output: TextReceiveStream, text: str) -> None:
    """Wait until a process has printed a text."""
    seen = ""
    with anyio.fail_after(PATIENCE):
        async for part in output:
            seen += part
            if text in seen:
                return
    pytest.fail(f"the process has ended, having said {seen!r}")


async def ended_in_time(process: anyio.abc.Process, which: signal.Signals) -> None:
    """Send one signal, and check that the process ends."""
    process.send_signal(which)
    try:
        with anyio.fail_after(ENDS_WITHIN):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()


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


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize(("mode", "which"), ENDS if RUNS > 1 else ENDS[:2])
@pytest.mark.parametrize("backend", IN_THREADS, ids=str)
async def test_a_bot_with_a_handler_at_work_ends_at_one_signal(
    backend: Backend,
    mode: str,
    which: signal.Signals,
    run: int,
    url_of: Callable[[Backend], URL],
) -> None:
    url = url_of(backend)
    dsn = url.set(drivername=f"{url.get_backend_name()}+{backend.driver}")
    port = free_port()
    async with serve() as api:
        process = await start(
            str(TESTS / "exit_worker.py"),
            dsn.render_as_string(hide_password=False),
            mode if mode == "polling" else str(port),
            api.url,
        )
        assert process.stdout is not None
        async with process, create_task_group() as tasks:
            if mode == "polling":
                await api.send("work")
            else:
                tasks.start_soon(post, port)
            await said(TextReceiveStream(process.stdout), "at work")
            await ended_in_time(process, which)


LATE_CALL = """
import asyncio, sys
from aiogram.fsm.storage.base import StorageKey
from hybrid_storage import SQLAlchemyStorage

key = StorageKey(42, 7, 7)

async def main():
    storage = SQLAlchemyStorage.from_url(sys.argv[2])
    isolation = storage.create_isolation()
    await storage.create_table()

    async def lock():
        async with isolation.lock(key):
            await asyncio.sleep(60)

    async def cleanup():
        try:
            await asyncio.sleep(60)
        finally:
            await storage.set_state(key, None)

    async def transaction():
        async with storage.transaction():
            await storage.set_state(key, "x")
            await asyncio.sleep(60)

    task = asyncio.create_task({f.__name__: f for f in (lock, cleanup, transaction)}[sys.argv[1]]())
    await asyncio.sleep(0.3)

asyncio.run(main())
"""


@pytest.mark.parametrize("what", ["lock", "cleanup", "transaction"])
async def test_a_call_that_a_task_makes_while_the_loop_ends_does_not_keep_the_process(
    what: str, tmp_path: Path
) -> None:
    process = await start("-c", LATE_CALL, what, f"sqlite:///{tmp_path}/late.db")
    with anyio.fail_after(PATIENCE):
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


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_one_ctrl_c_ends_a_bot_that_waits_for_a_lock(
    backend: Backend, open_storage: Open, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    storage: SQLAlchemyStorage = await open_storage(backend)
    await storage.set_state(key, "before")
    url = engine_of(storage).url.render_as_string(hide_password=False)
    with locked(backend, url_of(backend), storage, key) as lock:
        process = await start("-c", WAITS, url, storage.table.name)
        assert process.stdout is not None
        async with process:
            await said(TextReceiveStream(process.stdout), "waits")
            began = time.monotonic()
            while not lock.connection.exec_driver_sql(
                "SELECT count(*) FROM pg_locks WHERE NOT granted"
                " AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
            ).scalar():
                assert time.monotonic() - began < PATIENCE
                await asyncio.sleep(0.02)
            await ended_in_time(process, signal.SIGINT)
        lock.release()
    assert await storage.get_state(key) == "before"
