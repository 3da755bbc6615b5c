"""Conversations are moved from a Redis, also beside a bot and by processes that are killed."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from aiogram.fsm.storage.redis import RedisStorage
from backends import FORKED, REDIS_URL, SERVERS, SQLITE, Backend
from conftest import Open, rows
from former import Former, contents, conversations, fill, former
from migration_worker import Job, main
from sqlalchemy import URL

from hybrid_storage import FullKeyBuilder, SQLAlchemyStorage
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


# A bot that goes on meanwhile


USERS = 150


class Users:
    """Users of a bot, each of whom goes on step by step, and some of whom begin anew."""

    def __init__(self, storage: SQLAlchemyStorage, isolation: Any) -> None:
        self._storage = storage
        self._isolation = isolation
        self.keys = [StorageKey(bot_id=42, chat_id=n, user_id=n) for n in range(1, USERS + 1)]
        self.expected: dict[StorageKey, dict[str, Any]] = {}
        self.errors: list[str] = []
        self.steps = 0
        self.are_over = False

    async def begin(self, old: RedisStorage) -> None:
        """Have been here before."""
        for key in self.keys:
            self.expected[key] = {"name": f"user {key.user_id}", "step": key.user_id}
            await old.set_state(key, "Form:step")
            await old.set_data(key, self.expected[key])

    async def all_go_on(self) -> None:
        """Have two of three go on at once, each from some moment on, until all is over."""
        await asyncio.gather(*(self._goes_on(key) for key in self.keys if key.user_id % 3))

    async def _goes_on(self, key: StorageKey) -> None:
        chance = random.Random(key.user_id)
        await asyncio.sleep(chance.random() * 2)
        while not self.are_over or self.expected[key].get("step") == key.user_id:
            self.steps += 1
            if self._isolation is None:
                await self._step(key, chance)
            else:
                async with self._isolation.lock(key):
                    await self._step(key, chance)
            await asyncio.sleep(chance.random() * 0.4)

    async def _step(self, key: StorageKey, chance: random.Random) -> None:
        expected = self.expected[key]
        state, data = await self._storage.get_state(key), await self._storage.get_data(key)
        if (state, data) != ("Form:step" if expected else None, expected):
            self.errors.append(f"{key} has {state}, {data} and not {expected}")
        if expected and chance.random() < 0.2:
            await self._storage.clear(key)
            self.expected[key] = {}
        else:
            step = data.get("step", 0) + 1
            self.expected[key] = {**expected, "step": step}
            await self._storage.update_data(key, {"step": step})
            await self._storage.set_state(key, "Form:step")


@pytest.mark.parametrize("unit_of_work", [None, True], ids=["calls", "units"])
@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_no_step_is_lost_while_the_bot_runs_and_migrations_are_killed(
    backend: Backend,
    unit_of_work: bool | None,
    open_storage: Open,
    url_of: Callable[[Backend], URL],
    old: Former,
) -> None:
    assert isinstance(old.storage, RedisStorage)
    builder = old.storage.key_builder
    assert isinstance(builder, DefaultKeyBuilder)
    storage = await open_storage(backend, fallback=old.storage)
    isolation = (
        None
        if unit_of_work is None
        else storage.create_isolation(unit_of_work=unit_of_work, lease=None)
    )
    users = Users(storage, isolation)
    await users.begin(old.storage)
    job = Job(backend, url_of(backend), storage.table.name, builder.prefix, batch=5)

    bot = asyncio.ensure_future(users.all_go_on())
    chance = random.Random(backend.name)
    for _ in range(2):
        killed = await asyncio.to_thread(killed_half_way, job, chance.random() * 0.05)
        assert killed.found < USERS
    steps = users.steps
    last = await asyncio.to_thread(run_to_its_end, job)
    assert users.steps > steps > 0
    users.are_over = True
    await bot
    assert users.errors == []
    assert last.verified, last
    report = await asyncio.to_thread(run_to_its_end, job)  # repeats harmlessly
    assert report.verified, report
    assert (report.moved, report.different, report.refused) == (0, 0, 0)
    assert report.found == report.same == USERS // 3  # who have not been here since
    for key, data in users.expected.items():
        assert await storage.get_data(key) == data
        assert await storage.get_state(key) == ("Form:step" if data else None)
    assert len(await rows(storage)) == sum(map(bool, users.expected.values()))
    if isolation is not None:
        await isolation.close()


def killed_half_way(job: Job, seconds: float) -> Report:
    """Run a migration, kill it some time after its first batch, and return its last report."""
    process, told = started(job)
    report = told.recv()
    while report.found < 25:
        report = told.recv()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -9
    told.close()
    assert isinstance(report, Report)
    return report


def run_to_its_end(job: Job) -> Report:
    """Run a migration, and return its last report."""
    process, told = started(job)
    report = None
    while True:
        try:
            report = told.recv()
        except EOFError:
            break
    process.join()
    assert process.exitcode == 0
    told.close()
    assert isinstance(report, Report)
    return report


def started(job: Job) -> tuple[Any, Connection]:
    """Start a migration, and return its process and what it tells."""
    ours, theirs = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=main, args=[job, theirs])
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
