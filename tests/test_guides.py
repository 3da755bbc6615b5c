"""Guides whose examples are files and commands: they are run as a reader would run them."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from sqlalchemy import URL

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
