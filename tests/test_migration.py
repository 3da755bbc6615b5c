"""Conversations are moved from other storages: all of them, none twice, and none overwritten."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiogram.fsm.storage.base import DefaultKeyBuilder, KeyBuilder, StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from backends import POSTGRESQL, SQLITE, Backend
from conftest import Open, rows
from former import KINDS, Former, contents, conversations, fill, former
from sqlalchemy import URL
from sqlalchemy import text as sql
from sqlalchemy.orm import Session

from hybrid_storage import SQLAlchemyStorage
from hybrid_storage.migration import (
    Conversation,
    RaitoSource,
    Refused,
    TableSource,
    migrate,
)

KEY = StorageKey(bot_id=42, chat_id=7, user_id=7)
COUNT = 30


@pytest.fixture(params=KINDS)
async def old(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Former]:
    """Return a storage that was used before, of each kind."""
    url = URL.create("sqlite", database=str(tmp_path / "former.db"))
    async with former(request.param, url) as old:
        yield old


class Given:
    """A source of conversations that a test makes up, and may change between two reads."""

    def __init__(self, *found: Conversation | Refused) -> None:
        self.found = {each.name: each for each in found}
        self.before_read: list[Callable[[], Any]] = []

    async def names(self, batch: int) -> AsyncIterator[Sequence[str]]:
        names = list(self.found)
        for first in range(0, len(names), batch):
            yield names[first : first + batch]

    async def read(self, names: Sequence[str]) -> Sequence[Conversation | Refused]:
        if self.before_read:
            await self.before_read.pop(0)()
        return [self.found[name] for name in names if name in self.found]


async def nothing() -> None:
    pass


# All of them


async def test_every_conversation_is_moved(storage: SQLAlchemyStorage, old: Former) -> None:
    given = conversations(COUNT)
    await fill(old.storage, given)
    seen: list[int] = []
    report = await migrate(
        old.source, storage, batch=7, on_progress=lambda report: seen.append(report.found)
    )
    assert await contents(storage, given) == given
    assert len(await rows(storage)) == COUNT
    assert (report.found, report.moved, report.refused) == (COUNT, COUNT, 0), report.refusals
    assert report.verified
    assert report.checksum == report.target_checksum != f"{0:032x}"
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert str(report) == (
        f"{COUNT} found: {COUNT} moved, 0 here already, 0 kept because they differ here, "
        "0 refused. Verified"
    )
    assert await contents(old.storage, given) == given  # nothing is removed there


async def test_a_second_run_changes_nothing(storage: SQLAlchemyStorage, old: Former) -> None:
    await fill(old.storage, conversations(COUNT))
    first = await migrate(old.source, storage)
    before = await rows(storage)
    again = await migrate(old.source, storage)
    assert await rows(storage) == before
    assert (again.found, again.moved, again.same) == (COUNT, 0, COUNT)
    assert again.verified
    assert again.checksum == first.checksum


async def test_what_is_here_already_is_kept(storage: SQLAlchemyStorage, old: Former) -> None:
    given = conversations(COUNT)
    await fill(old.storage, given)
    changed, same = list(given)[:2]
    await storage.set_data(changed, {"since": "then"})
    await storage.set_state(same, given[same][0])
    await storage.set_data(same, given[same][1])
    report = await migrate(old.source, storage)
    assert (report.moved, report.same, report.different) == (COUNT - 2, 1, 1)
    assert report.verified
    assert await storage.get_data(changed) == {"since": "then"}
    assert await storage.get_state(changed) is None


async def test_a_dry_run_counts_and_writes_nothing(storage: SQLAlchemyStorage, old: Former) -> None:
    given = conversations(COUNT)
    await fill(old.storage, given)
    await storage.set_state(next(iter(given)), "here")
    report = await migrate(old.source, storage, dry_run=True, batch=7)
    assert (report.found, report.moved, report.different) == (COUNT, COUNT - 1, 1)
    assert not report.verified
    assert str(report).endswith("0 refused. Nothing was written")
    assert f"{COUNT - 1} to move" in str(report)
    assert len(await rows(storage)) == 1


async def test_several_may_run_at_once(
    backend: Backend, storage: SQLAlchemyStorage, open_storage: Open, old: Former
) -> None:
    given = conversations(COUNT)
    await fill(old.storage, given)
    another = await open_storage(backend, table_name=storage.model)
    reports = await asyncio.gather(
        *(migrate(old.source, each, batch=5) for each in (storage, another, storage))
    )
    assert sum(report.moved for report in reports) == COUNT
    assert all(report.verified for report in reports)
    assert await contents(storage, given) == given


async def test_without_conversations_there_is_nothing_to_do(
    storage: SQLAlchemyStorage, old: Former
) -> None:
    report = await migrate(old.source, storage)
    assert (report.found, report.verified) == (0, True)


@pytest.mark.parametrize("backend", [SQLITE[0], POSTGRESQL[2]], ids=str)
async def test_data_of_any_size_are_moved(storage: SQLAlchemyStorage, old: Former) -> None:
    given: dict[StorageKey, tuple[str | None, dict[str, Any]]] = {
        replace(KEY, chat_id=number): (None, {"text": "x" * size})
        for number, size in enumerate([1, 90_000, 90_000, 300_000, 1], 1)
    }
    await fill(old.storage, given)
    assert (await migrate(old.source, storage)).verified
    assert await contents(storage, given) == given


# Keys


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(
    "fields",
    [{}, {"thread_id": 5}, {"chat_id": -1001234567890, "thread_id": 5}],
    ids=["private", "topic of a private chat", "topic"],
)
async def test_the_keys_of_aiograms_default_builder_need_the_bot(
    kind: str,
    fields: dict[str, Any],
    tmp_path: Path,
    open_storage: Open,
) -> None:
    storage = await open_storage(SQLITE[0])
    key, url = replace(KEY, **fields), URL.create("sqlite", database=str(tmp_path / "former.db"))
    builder = DefaultKeyBuilder(prefix=f"fsm_{tmp_path.name}")
    async with former(kind, url, builder) as old:
        await old.storage.set_state(key, "Form:name")
        report = await migrate(old.source, storage)
        assert report.refused == 1
        assert "with_bot_id=False): pass bot_id" in report.refusals[0].reason
        assert report.refusals[0].name == builder.build(key)
        assert report.verified
        assert await rows(storage) == []
    async with former(kind, url, builder, bot_id=42) as old:
        await old.storage.set_state(key, "Form:name")
        assert (await migrate(old.source, storage)).moved == 1
    assert await storage.get_state(key) == "Form:name"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_builder_of_the_users_needs_a_function_that_parses(
    kind: str, tmp_path: Path, open_storage: Open
) -> None:
    class Builder(KeyBuilder):
        def build(self, key: StorageKey, part: str | None = None) -> str:
            return f"{tmp_path.name}/{key.user_id}" + ("" if part is None else f"/{part}")

    def parse(name: str) -> StorageKey:
        user = int(name.rpartition("/")[2])
        return StorageKey(bot_id=42, chat_id=user, user_id=user)

    url = URL.create("sqlite", database=str(tmp_path / "former.db"))
    with pytest.raises(TypeError, match="cannot read keys of Builder: pass parse="):
        async with former(kind, url, Builder()):
            pass
    storage = await open_storage(SQLITE[0])
    async with former(kind, url, Builder(), parse=parse) as old:
        await old.storage.set_state(KEY, "Form:name")
        [[name], *_] = (
            [each async for each in old.source.names(1)]
            if kind != "redis"
            else [[Builder().build(KEY)]]
        )
        assert await old.source.read([name]) == [Conversation(name, KEY, "Form:name", {})]
        if kind != "redis":  # where it lists the keys of others, too
            assert (await migrate(old.source, storage)).moved == 1
        await old.storage.set_state(KEY, None)


async def test_a_table_gets_another_key_builder(backend: Backend, open_storage: Open) -> None:
    former = await open_storage(backend, key_builder=DefaultKeyBuilder())
    await former.set_state(KEY, "Form:name")
    storage = await open_storage(backend)
    report = await migrate(TableSource(former, bot_id=42), storage)
    assert report.moved == 1
    assert report.verified
    assert await storage.get_state(KEY) == "Form:name"


async def test_two_conversations_of_one_row_are_not_mixed(open_storage: Open) -> None:
    storage = await open_storage(SQLITE[0], key_builder=DefaultKeyBuilder())
    source = Given(
        Conversation("one", KEY, "one", {}),
        Conversation("two", replace(KEY, bot_id=43), "two", {}),
    )
    report = await migrate(source, storage)
    assert (report.moved, report.different) == (1, 1)
    assert report.verified
    assert await storage.get_state(KEY) == "one"


# What cannot be moved


async def test_what_the_target_cannot_hold_is_refused_and_the_rest_is_moved(
    open_storage: Open,
) -> None:
    storage = await open_storage(POSTGRESQL[0], key_builder=DefaultKeyBuilder())
    source = Given(
        Conversation("a scene", replace(KEY, destiny="scene"), "one", {}),
        Conversation("a NUL", replace(KEY, chat_id=8), "\0", {}),
        Conversation("no JSON", replace(KEY, chat_id=9), None, {"when": object()}),
        Refused("read wrong", "for a reason"),
        Conversation("fine", KEY, "Form:name", {}),
    )
    report = await migrate(source, storage)
    assert (report.found, report.moved, report.refused) == (5, 1, 4)
    reasons = {each.name: each.reason for each in report.refusals}
    assert "with_destiny=True" in reasons["a scene"]
    assert "NUL" in reasons["a NUL"]
    assert "in field 'when' of the data" in reasons["no JSON"]
    assert reasons["read wrong"] == "for a reason"
    assert report.verified
    assert await storage.get_state(KEY) == "Form:name"


async def test_what_the_targets_json_dumps_refuses_with_any_error_is_refused(
    open_storage: Open,
) -> None:
    def dumps(data: Any) -> str:
        if data["number"] > 2**63:
            raise OverflowError
        return json.dumps(data)

    given = [
        Conversation(str(user), StorageKey(42, 7, user), None, {"number": number})
        for user, number in enumerate((1, 2**64), start=1)
    ]
    storage = await open_storage(SQLITE[0], json_dumps=dumps)
    report = await migrate(Given(*given), storage)
    assert (report.found, report.moved, report.refused) == (2, 1, 1)
    assert report.refusals == [Refused("2", "OverflowError()")]
    assert report.verified


async def test_a_report_lists_a_thousand_refused_keys(open_storage: Open) -> None:
    source = Given(*(Refused(str(number), "for a reason") for number in range(1500)))
    report = await migrate(source, await open_storage(SQLITE[0]))
    assert report.refused == report.found == 1500
    assert len(report.refusals) == 1000


@pytest.mark.parametrize("kind", ["ours", "package"])
@pytest.mark.parametrize("text", ["[1]", "{", "7"])
async def test_data_that_are_no_object_are_refused(
    kind: str, text: str, tmp_path: Path, open_storage: Open
) -> None:
    url = URL.create("sqlite", database=str(tmp_path / "former.db"))
    async with former(kind, url) as old:
        assert isinstance(old.source, TableSource)
        await old.storage.set_state(KEY, "Form:name")
        ours = old.source.storage

        def spoil(session: Session) -> None:
            session.execute(ours.table.update().values(data=text))

        await ours.run_sync(spoil)
        report = await migrate(old.source, await open_storage(SQLITE[0]))
    assert report.refused == 1
    assert "cannot be read" in report.refusals[0].reason


async def test_a_batch_is_of_one_or_more(open_storage: Open) -> None:
    with pytest.raises(ValueError, match="batch is a number of conversations, 1 or more, not 0"):
        await migrate(Given(), await open_storage(SQLITE[0]), batch=0)


# Beside a bot


async def test_what_has_left_the_source_since_it_was_read_is_not_moved(
    storage: SQLAlchemyStorage,
) -> None:
    """A bot with a fallback has moved it, and cleared it."""
    source = Given(
        Conversation("one", KEY, "one", {}),
        Conversation("two", replace(KEY, chat_id=8), "two", {}),
    )

    async def leave() -> None:
        del source.found["one"]

    source.before_read = [nothing, leave]
    report = await migrate(source, storage)
    assert (report.found, report.moved) == (1, 1)
    assert await storage.get_state(KEY) is None
    assert len(await rows(storage)) == 1


async def test_what_has_changed_in_the_source_since_it_was_read_is_moved_as_it_is_now(
    storage: SQLAlchemyStorage,
) -> None:
    source = Given(Conversation("one", KEY, "one", {}))

    async def change() -> None:
        source.found["one"] = Conversation("one", KEY, "changed", {})

    source.before_read = [nothing, change]
    report = await migrate(source, storage)
    assert (report.found, report.moved, report.verified) == (1, 1, True)
    assert await storage.get_state(KEY) == "changed"


@pytest.mark.parametrize("backend", [SQLITE[0], POSTGRESQL[2]], ids=str)
async def test_what_was_lost_or_changed_before_the_second_look_is_told(
    storage: SQLAlchemyStorage,
) -> None:
    other = replace(KEY, chat_id=8)
    source = Given(Conversation("one", KEY, "one", {}), Conversation("two", other, "two", {}))

    async def lose() -> None:
        await storage.clear(KEY)
        await storage.set_state(other, "changed")

    source.before_read = [nothing, nothing, lose]
    report = await migrate(source, storage)
    assert (report.moved, report.missing, report.changed) == (2, 1, 1)
    assert not report.verified
    assert report.checksum != report.target_checksum
    assert str(report).endswith("NOT verified: 1 missing, 1 changed since")


@pytest.mark.parametrize("backend", [SQLITE[0], POSTGRESQL[2]], ids=str)
async def test_what_a_bot_removes_from_the_source_after_the_second_look_is_no_loss(
    storage: SQLAlchemyStorage,
) -> None:
    source = Given(Conversation("one", KEY, "one", {}))

    async def clear() -> None:
        await storage.clear(KEY)

    async def leave() -> None:
        source.found.clear()

    source.before_read = [nothing, nothing, clear, nothing, leave]
    assert (await migrate(source, storage)).verified


# raito


RAITO = (
    "CREATE TABLE {table} (id INTEGER NOT NULL PRIMARY KEY, "
    "{key} VARCHAR(255) NOT NULL UNIQUE, state VARCHAR(255), data JSON NOT NULL)"
)


@pytest.fixture
async def raito(storage: SQLAlchemyStorage, backend: Backend) -> AsyncIterator[Any]:
    """Return a function that puts rows into a table as raito's storage makes it."""
    table = f"{storage.table.name}_raito"
    quoted = "`key`" if backend.server == "mariadb" else "key"

    def create(session: Session) -> None:
        session.execute(sql(RAITO.format(table=table, key=quoted)))

    async def insert(number: int, key: str, state: str | None, data: dict[str, Any]) -> None:
        statement = sql(f"INSERT INTO {table} VALUES (:id, :key, :state, :data)")
        values = {"id": number, "key": key, "state": state, "data": json.dumps(data)}
        await storage.run_sync(lambda session: session.execute(statement, values).close())

    await storage.run_sync(create)
    yield insert
    await storage.run_sync(lambda session: session.execute(sql(f"DROP TABLE {table}")).close())


async def test_conversations_of_raitos_storage_are_moved(
    storage: SQLAlchemyStorage, raito: Any
) -> None:
    await raito(1, "42:7:7:default", "Form:name", {"name": "Ada"})
    await raito(2, "42:-100:5:7:default", None, {"a": [1]})
    await raito(3, "42:8:8:scenes_history", None, {"history": []})
    await raito(4, "42:9:9:default", None, {})
    await raito(5, "42:7:7:Ab_1:default", "Form:name", {})
    await raito(6, "7:default", "Form:name", {})
    report = await migrate(
        RaitoSource(storage, table_name=f"{storage.table.name}_raito"), storage, batch=2
    )
    assert (report.found, report.moved, report.refused) == (5, 3, 2)
    assert report.verified
    assert await storage.get_state(KEY) == "Form:name"
    assert await storage.get_data(KEY) == {"name": "Ada"}
    topic = StorageKey(bot_id=42, chat_id=-100, user_id=5, thread_id=7)
    assert await storage.get_data(topic) == {"a": [1]}
    scene = StorageKey(bot_id=42, chat_id=8, user_id=8, destiny="scenes_history")
    assert await storage.get_data(scene) == {"history": []}
    reasons = {each.name: each.reason for each in report.refusals}
    assert "may be a key with a business connection" in reasons["42:7:7:Ab_1:default"]
    assert "does not begin with the numbers" in reasons["7:default"]


async def test_what_is_no_source_and_no_target_is_told() -> None:
    storage = SQLAlchemyStorage.from_url("sqlite://")
    wrong: Any = MemoryStorage()
    with pytest.raises(TypeError, match="RedisSource"):
        await migrate(wrong, storage)
    with pytest.raises(TypeError, match="target is a SQLAlchemyStorage"):
        await migrate(TableSource(storage), wrong)
    await storage.close()
