"""Conversations are moved from a Redis, also beside a bot and by processes that are killed."""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from aiogram.fsm.storage.redis import RedisStorage
from backends import FORKED, MARIADB, POSTGRESQL, REDIS_URL, SQLITE, Backend
from click.testing import CliRunner
from conftest import Open, rows
from former import Former, contents, conversations, fill, former
from migration_worker import Job, Steps, main
from sqlalchemy import URL
from test_readme import run_awaiting

from hybrid_storage import FullKeyBuilder, SQLAlchemyStorage
from hybrid_storage.cli import app
from hybrid_storage.migration import Conversation, RedisSource, Refused, Report, migrate

KEY = StorageKey(bot_id=42, chat_id=7, user_id=7)


@pytest.fixture
async def old(tmp_path: Path) -> AsyncIterator[Former]:
    """Return an empty RedisStorage, with keys that nobody else has."""
    async with former("redis", URL.create("sqlite")) as old:
        yield old


@pytest.fixture
def redis(old: Former) -> Any:
    """Return the client of the storage."""
    assert isinstance(old.storage, RedisStorage)
    return old.storage.redis


@pytest.fixture
def name(old: Former) -> str:
    """Return what a conversation is known by in Redis."""
    assert isinstance(old.storage, RedisStorage)
    return old.storage.key_builder.build(KEY)


@pytest.fixture
async def storage(open_storage: Open) -> SQLAlchemyStorage:
    """Return an empty storage of ours."""
    opened = await open_storage(SQLITE[0])
    assert isinstance(opened, SQLAlchemyStorage)
    return opened


async def test_all_keys_are_listed_each_conversation_once(
    old: Former, storage: SQLAlchemyStorage
) -> None:
    given = conversations(3000)
    await fill(old.storage, given)
    sizes: list[int] = []
    async for names in old.source.names(100):
        sizes.append(len(names))
    assert sum(sizes) == 3000
    assert max(sizes) < 300
    report = await migrate(old.source, storage)
    assert report.moved == 3000
    assert report.verified


async def test_what_has_expired_is_not_moved(
    old: Former, redis: Any, name: str, storage: SQLAlchemyStorage
) -> None:
    await redis.set(f"{name}:state", "Form:name", px=1)
    await redis.set(f"{name}:data", '{"a": 1}', ex=1000)
    await asyncio.sleep(0.01)
    assert (await migrate(old.source, storage)).verified
    assert await storage.get_state(KEY) is None
    assert await storage.get_data(KEY) == {"a": 1}


async def test_locks_and_keys_of_others_are_no_conversations(
    old: Former, redis: Any, name: str, storage: SQLAlchemyStorage
) -> None:
    await redis.set(f"{name}:lock", "x")
    await redis.set(f"{name}:other", "x")
    assert (await migrate(old.source, storage)).found == 0


async def test_what_is_no_conversation_is_refused_and_the_rest_is_moved(
    old: Former, redis: Any, name: str, storage: SQLAlchemyStorage
) -> None:
    start = name.removesuffix(":7:7:default")
    await redis.set(f"{start}:1:1:default:data", "{")
    await redis.set(f"{start}:2:2:default:data", "[1]")
    await redis.hset(f"{start}:3:3:default:data", "a", "b")
    await redis.set(f"{start}:4:4:default:state", b"\xff")
    await redis.set(f"{start}:5:default:state", "x")
    await redis.set(f"{start}:6:6:".encode() + b"\xff:state", b"x")
    await redis.set(f"{name}:state", "Form:name")
    report = await migrate(old.source, storage)
    assert (report.found, report.moved, report.refused) == (7, 1, 6)
    reasons = {each.name.removeprefix(start): each.reason for each in report.refusals}
    assert "JSON" in reasons[":1:1:default"] or "property name" in reasons[":1:1:default"]
    assert reasons[":2:2:default"] == "its data is a list, not an object"
    assert "WRONGTYPE" in reasons[":3:3:default"]
    assert "can't decode" in reasons[":4:4:default"]
    assert "does not have the parts" in reasons[":5:default"]
    assert "surrogate" in reasons[":6:6:\udcff"]
    assert report.verified


async def test_a_client_that_decodes_is_read_as_well(
    old: Former, storage: SQLAlchemyStorage
) -> None:
    assert isinstance(old.storage, RedisStorage)
    given = conversations(20)
    await fill(old.storage, given)
    decoding = RedisStorage.from_url(
        REDIS_URL, {"decode_responses": True}, key_builder=old.storage.key_builder
    )
    assert (await migrate(RedisSource(decoding), storage)).moved == 20
    assert await contents(storage, given) == given
    await decoding.close()


async def test_our_own_key_builder_may_have_built_the_keys() -> None:
    key = StorageKey(bot_id=42, chat_id=7, user_id=7, destiny=uuid.uuid4().hex)
    builder = FullKeyBuilder()
    old = RedisStorage.from_url(REDIS_URL, key_builder=builder)
    await old.set_data(key, {"a": 1})
    source = RedisSource(old)
    listed = [name async for names in source.names(1000) for name in names]
    assert builder.build(key) in listed
    expected = [Conversation(builder.build(key), key, None, {"a": 1})]
    assert await source.read([builder.build(key)]) == expected
    await old.set_data(key, {})
    assert await source.read([builder.build(key)]) == []
    await old.close()


async def test_letters_that_mean_something_to_redis_are_taken_as_they_are() -> None:
    prefix = f"f*[m]?\\{uuid.uuid4().hex}"
    async with former("redis", URL.create("sqlite"), DefaultKeyBuilder(prefix=prefix)) as old:
        assert isinstance(old.storage, RedisStorage)
        await old.storage.set_state(KEY, "Form:name")
        source = RedisSource(old.storage, bot_id=42)
        assert [name async for names in source.names(9) for name in names] == [f"{prefix}:7:7"]
        [found] = await source.read([f"{prefix}:7:7"])
        assert not isinstance(found, Refused)
        assert found.key == KEY
        await old.storage.set_state(KEY, None)


PAGE = (Path(__file__).parents[1] / "docs" / "coming-from" / "moving.md").read_text()
BLOCKS = re.findall(r"<!-- run: \w+ -->\n```python\n(.*?)```", PAGE, re.DOTALL)


async def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(BLOCKS) == PAGE.count("```python") > 0
    monkeypatch.chdir(tmp_path)
    prefix = f"fsm_{uuid.uuid4().hex}"
    made = f'RedisStorage.from_url("{REDIS_URL}", key_builder=builder)'
    names: dict[str, Any] = {"builder": DefaultKeyBuilder(prefix=prefix)}
    async with former("redis", URL.create("sqlite"), names["builder"]) as old:
        await old.storage.set_state(KEY, "Form:name")
        for block in BLOCKS:
            code = block.replace('RedisStorage.from_url("redis://localhost")', made)
            await run_awaiting(code, names)
        assert await names["storage"].get_state(KEY) == "Form:name"
        assert await old.storage.get_state(KEY) is None
    printed = capsys.readouterr().out.splitlines()
    assert [line.rpartition(". ")[2] for line in printed] == ["Nothing was written", "Verified"]
    await names["old"].close()
    names["SessionLocal"].kw["bind"].dispose()


# A bot that goes on meanwhile


# The drivers of a database differ in who waits for it, and that is all that matters here.
ONE_OF_EACH = [SQLITE[0], POSTGRESQL[0], POSTGRESQL[2], *MARIADB[1:]]
USERS = 150
KEYS = [StorageKey(bot_id=42, chat_id=user, user_id=user) for user in range(1, USERS + 1)]


async def begun(old: Former) -> dict[StorageKey, dict[str, Any]]:
    """Have all users begin with the former storage, and return their data."""
    data = {key: {"name": f"user {key.user_id}", "step": key.user_id} for key in KEYS}
    for key in KEYS:
        await old.storage.set_state(key, "Form:step")
        await old.storage.set_data(key, data[key])
    return data


class Users:
    """Users of a bot, each of whom goes on step by step, and begins anew at times."""

    def __init__(self, storage: SQLAlchemyStorage, data: dict[StorageKey, dict[str, Any]]) -> None:
        self._steps = Steps(storage)
        self.expected = data
        self.errors: list[str] = []
        self.done = 0
        self.are_over = False

    async def go_on(self, keys: list[StorageKey]) -> None:
        """Have some go on at once, each from some moment on, until all is over."""
        await asyncio.gather(*(self._goes_on(key) for key in keys))

    async def _goes_on(self, key: StorageKey) -> None:
        chance = random.Random(key.user_id)
        await asyncio.sleep(chance.random() * 2)
        while not self.are_over or self.expected[key].get("step") == key.user_id:
            async with self._steps.update(key):
                expected, found = self.expected[key], await self._steps.find(key)
                if found != expected:
                    self.errors.append(f"{key} has {found} and not {expected}")
                wanted = (
                    {} if chance.random() < 0.2 else {**found, "step": found.get("step", 0) + 1}
                )
                await self._steps.go_on(key, wanted)
            self.expected[key] = wanted
            self.done += 1
            await asyncio.sleep(chance.random() * 0.4)


def job_for(
    backend: Backend, url: URL, storage: SQLAlchemyStorage, old: Former, **more: Any
) -> Job:
    """Return what a process has to do."""
    assert isinstance(old.storage, RedisStorage)
    builder = old.storage.key_builder
    assert isinstance(builder, DefaultKeyBuilder)
    return Job(backend, url, storage.table.name, builder.prefix, **more)


@pytest.mark.parametrize("backend", ONE_OF_EACH, ids=str)
async def test_no_step_is_lost_while_the_bot_runs_and_migrations_are_killed(
    backend: Backend, open_storage: Open, url_of: Callable[[Backend], URL], old: Former
) -> None:
    storage = await open_storage(backend, fallback=old.storage)
    job = job_for(backend, url_of(backend), storage, old)
    users = Users(storage, await begun(old))
    away, here = KEYS[::5], [key for key in KEYS if key not in KEYS[::5]]
    bot = asyncio.ensure_future(users.go_on(here))
    chance = random.Random(backend.name)
    for _ in range(2):
        killed = replace(job, dies_after=chance.random() * 0.05)
        report, code = await asyncio.to_thread(migrated, killed)
        assert (code, report.found < USERS) == (-9, True)
    done = users.done
    last, code = await asyncio.to_thread(migrated, job)
    assert users.done > done > 0
    users.are_over = True
    await bot
    assert users.errors == []
    assert (code, last.verified) == (0, True), last
    report, code = await asyncio.to_thread(migrated, job)  # repeats harmlessly
    assert (code, report.verified) == (0, True), report
    assert (report.moved, report.different, report.refused) == (0, 0, 0)
    assert report.found == report.same == len(away)
    assert await contents(storage, KEYS) == {
        key: ("Form:step" if data else None, data) for key, data in users.expected.items()
    }
    assert len(await rows(storage)) == sum(map(bool, users.expected.values()))


@pytest.mark.parametrize("backend", ONE_OF_EACH, ids=str)
async def test_no_step_is_lost_when_the_bot_is_killed(
    backend: Backend, open_storage: Open, url_of: Callable[[Backend], URL], old: Former
) -> None:
    """And what it has cleared does not come back: at the next start it finds what it has done.

    What it was about to do when it was killed may be done or not.
    """
    storage = await open_storage(backend)
    job = job_for(backend, url_of(backend), storage, old, keys=KEYS[:40])
    possible = {key: [data] for key, data in (await begun(old)).items()}
    for _ in range(3):
        for what, key, data in await asyncio.to_thread(served_until_killed, job):
            if what == "wants":
                possible[key].append(data)
                continue
            if what == "found":
                assert data in possible[key], f"{key} has {data} and not one of {possible[key]}"
            possible[key] = [data]
    # As the bot finds it at its next start.
    last = await open_storage(backend, table_name=storage.model, fallback=old.storage)
    for key, data in possible.items():
        assert await last.get_data(key) in data
    assert (await migrate(old.source, storage)).found == 0


def served_until_killed(job: Job) -> list[Any]:
    """Serve users in a process, kill it after some time, and return what it has told."""
    process, told = started(job, "serve")
    heard = [told.recv()]
    process.join(0.1 + random.random() * 0.4)
    process.kill()
    process.join()
    assert process.exitcode == -9
    with suppress(EOFError, OSError):
        while True:
            heard.append(told.recv())
    told.close()
    return heard


def migrated(job: Job) -> tuple[Report, int]:
    """Run a migration, and return its last report and the exit code."""
    process, told = started(job, "move")
    report = None
    with suppress(EOFError, OSError):
        while True:
            report = told.recv()
    process.join()
    told.close()
    assert isinstance(report, Report)
    return report, process.exitcode


def started(job: Job, what: str) -> tuple[Any, Connection]:
    """Start a process, and return it and what it tells."""
    ours, theirs = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=main, args=[job, theirs, what])
    process.start()
    theirs.close()
    return process, ours


async def test_the_time_that_is_left_becomes_an_age(
    old: Former, redis: Any, open_storage: Open
) -> None:
    """In a table that has the columns to look by, which are filled."""
    assert isinstance(old.storage, RedisStorage)
    aging = RedisStorage(redis, old.storage.key_builder, state_ttl=86400, data_ttl=86400)
    await aging.set_state(KEY, "Form:name")
    await aging.set_data(KEY, {"a": 1})
    fresh = StorageKey(bot_id=42, chat_id=8, user_id=8)
    await aging.set_state(fresh, "Form:name")
    for part in ("state", "data"):
        await redis.expire(aging.key_builder.build(KEY, part), 86400 - 7200)
    storage = await open_storage(SQLITE[0], columns=True)
    assert (await migrate(RedisSource(aging), storage)).verified
    assert await storage.count(state="Form:name") == 2
    assert [found.key async for found in storage.find(idle_for=3600)] == [KEY]
    assert await storage.count(idle_for=3 * 3600) == 0


async def test_the_command_moves_what_is_in_redis(
    old: Former, url_of: Callable[[Backend], URL], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(old.storage, RedisStorage)
    await old.storage.set_state(KEY, "order:paid")
    await old.storage.set_data(KEY, {"n": 1})
    module = ModuleType("shop_keys")
    vars(module)["builder"] = old.storage.key_builder
    monkeypatch.setitem(sys.modules, "shop_keys", module)
    url = url_of(SQLITE[0]).render_as_string()

    async def command(*arguments: str) -> Any:
        result = await asyncio.to_thread(CliRunner().invoke, app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    await command("tables", "create", "--url", url)
    by = ("--source-key-builder", "shop_keys:builder")
    for more, verified in (["--dry-run"], False), ([], True):
        report = await command("migrate", REDIS_URL, url, *by, *more)
        assert (report["moved"], report["verified"]) == (1, verified)
    shown = await command("show", "42:7:7", "--url", url)
    assert (shown["state"], shown["data"]) == ("order:paid", {"n": 1})
