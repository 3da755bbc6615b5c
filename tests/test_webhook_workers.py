"""The example of a bot on webhooks: two processes, many updates at once, deaths in between."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from backends import MARIADB, POSTGRESQL, SQLITE, Backend
from sqlalchemy import URL, create_engine, text
from sqlalchemy.orm import Session
from webhook_workers.__main__ import Telegram, Verdict, judge, updates
from webhook_workers.tables import Base

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SYNCHRONOUS = [SQLITE[0], POSTGRESQL[0], *MARIADB[:1]]
USERS, UPDATES = 8, 6  # of each

REPORT = re.compile(
    r"(?P<updates>\d+) updates of (?P<users>\d+) users at once, [\d.]+ s; "
    r"both workers had updates of (?P<shared>\d+) users; (?P<resent>\d+) sent again\n"
    r"isolation (?P<isolation>on|off): (?P<lost>\d+) lost, (?P<doubled>\d+) doubled, "
    r"(?P<overlapping>\d+) overlapping, (?P<out_of_order>\d+) out of order\n"
)


@pytest.fixture(params=SYNCHRONOUS, ids=str)
def database_url(
    request: pytest.FixtureRequest, url_of: Callable[[Backend], URL]
) -> Iterator[dict[str, str]]:
    """Return the environment of the example: each time a database of its own."""
    backend: Backend = request.param
    url = url_of(backend).set(drivername=f"{url_of(backend).get_backend_name()}+{backend.driver}")
    if backend.server == "sqlite":
        yield environment(url)
        return
    name = f"webhook_{uuid.uuid4().hex}"
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        yield environment(url.set(database=name))
        force = " WITH (FORCE)" if backend.server == "postgresql" else ""
        connection.execute(text(f"DROP DATABASE {name}{force}"))
    engine.dispose()


def environment(url: URL) -> dict[str, str]:
    """Return an environment in which the example uses a database."""
    return {
        **os.environ,
        "DATABASE_URL": url.render_as_string(hide_password=False),
        "PYTHONPATH": str(EXAMPLES),
    }


def run(environment: dict[str, str], *arguments: str) -> dict[str, int | str]:
    """Run the example by its own command, and return what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "webhook_workers", *arguments],
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = REPORT.fullmatch(done.stdout)
    assert said, done.stdout + done.stderr
    return {name: int(v) if v.isdecimal() else v for name, v in said.groupdict().items()}


def test_every_step_is_made_once_in_order_and_alone(database_url: dict[str, str]) -> None:
    said = run(database_url, "--users", str(USERS), "--updates", str(UPDATES))
    assert said["updates"] == USERS * UPDATES
    assert said["shared"] == said["users"] == USERS
    assert [said[what] for what in ("lost", "doubled", "overlapping", "out_of_order")] == [0] * 4


@pytest.mark.parametrize("database_url", POSTGRESQL[:1], ids=str, indirect=True)
def test_without_isolation_steps_are_doubled(database_url: dict[str, str]) -> None:
    said = run(database_url, "--without-isolation", "--users", str(USERS), "--updates", "5")
    assert said["isolation"] == "off"
    assert int(said["doubled"]) > 0
    assert int(said["overlapping"]) > 0


SHORT_LEASES = """
from functools import partialmethod
from hybrid_storage import SQLAlchemyStorage

SQLAlchemyStorage.create_isolation = partialmethod(SQLAlchemyStorage.create_isolation, lease=5)

from webhook_workers.worker import main

main()
"""


@contextmanager
def worker(environment: dict[str, str]) -> Generator[subprocess.Popen[str]]:
    """Run a worker of the example, whose leases end sooner once it is dead."""
    with subprocess.Popen(
        [sys.executable, "-c", SHORT_LEASES],
        cwd=EXAMPLES,
        env={"BOT_TOKEN": "42:stand-in", **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


async def post_all(
    posts: list[dict[str, Any]], urls: list[str], meanwhile: Callable[[], None] | None = None
) -> Telegram:
    """Post updates at once to workers."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        telegram = Telegram(client, urls)
        posting = asyncio.gather(*[telegram.post(update) for update in posts])
        if meanwhile is not None:
            await asyncio.sleep(0.3)
            assert not posting.done()
            meanwhile()
        await posting
    return telegram


def verdict(environment: dict[str, str], posted: list[dict[str, Any]]) -> Verdict:
    """Return what the booked steps tell."""
    engine = create_engine(environment["DATABASE_URL"])
    with Session(engine) as session:
        found = judge(session, posted)
    engine.dispose()
    return found


def create_tables(environment: dict[str, str]) -> None:
    """Create the application's tables."""
    engine = create_engine(environment["DATABASE_URL"])
    Base.metadata.create_all(engine)
    engine.dispose()


@pytest.mark.parametrize("database_url", POSTGRESQL[:1], ids=str, indirect=True)
async def test_neither_updates_sent_again_nor_a_killed_worker_lose_or_double_a_step(
    database_url: dict[str, str],
) -> None:
    """The other worker has the updates of the killed one, once the dead one's leases have ended."""
    create_tables(database_url)
    once = updates(users=5, each=4)
    posted = updates(users=20, each=5)
    with worker(database_url) as doomed, worker(database_url) as other:
        assert doomed.stdout is not None
        assert other.stdout is not None
        urls = [doomed.stdout.readline().strip(), other.stdout.readline().strip()]
        await post_all([*once, *reversed(once)], urls)
        found = verdict(database_url, once)
        assert (found.lost, found.doubled, found.overlapping, found.out_of_order) == (0, 0, 0, 0)
        telegram = await post_all(posted, urls, doomed.kill)
    assert telegram.resent > 0
    found = verdict(database_url, posted)
    assert (found.lost, found.doubled, found.out_of_order) == (0, 0, 0)
