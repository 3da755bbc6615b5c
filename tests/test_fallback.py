"""The storage used before: its conversations are moved here when they are first asked for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiogram.fsm.storage.base import BaseStorage, DefaultKeyBuilder, StateType, StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from backends import BACKENDS, SQLITE, Backend
from conftest import Open, new_session, rows
from units import KEY, LEASES

from hybrid_storage import SQLAlchemyStorage

STATE, DATA = "Form:name", {"name": "Ada", "seen": [1]}
ANOTHER = replace(KEY, chat_id=8, user_id=8)


class Old(MemoryStorage):
    """A storage used before, which counts how often it is asked, and fails or waits if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.fails_to_remove = False
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.waits = asyncio.Event()

    async def get_state(self, key: StorageKey) -> str | None:
        self.asked += 1
        return await super().get_state(key)

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        found = await super().get_data(key)
        if not self.goes_on.is_set():
            self.waits.set()
            await self.goes_on.wait()
        return found

    async def set_state(self, key: StorageKey, state: StateType = None) -> None:
        if self.fails_to_remove:
            raise ConnectionError("gone")
        await super().set_state(key, state)

    async def holds(self, key: StorageKey = KEY) -> bool:
        return (await MemoryStorage.get_state(self, key)) is not None or bool(
            await MemoryStorage.get_data(self, key)
        )


@pytest.fixture
async def old() -> Old:
    """Return the storage used before, with a conversation."""
    old = Old()
    await old.set_state(KEY, STATE)
    await old.set_data(KEY, DATA)
    return old


@pytest.fixture
async def storage(backend: Backend, open_storage: Open, old: Old) -> SQLAlchemyStorage:
    """Return a storage that has another to fall back to."""
    opened = await open_storage(backend, fallback=old)
    assert isinstance(opened, SQLAlchemyStorage)
    return opened


OpenAnother = Callable[..., Any]


@pytest.fixture
def open_another(backend: Backend, open_storage: Open, old: Old, storage: SQLAlchemyStorage) -> Any:
    """Return a function that makes another storage on the table, as another process has it."""

    async def open_another(fallback: BaseStorage = old) -> SQLAlchemyStorage:
        opened = await open_storage(backend, table_name=storage.model, fallback=fallback)
        assert isinstance(opened, SQLAlchemyStorage)
        return opened

    return open_another


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
async def test_a_conversation_is_moved_when_it_is_first_read(
    storage: SQLAlchemyStorage, old: Old
) -> None:
    assert await storage.get_state(KEY) == STATE
    assert not await old.holds()
    assert await storage.get_data(KEY) == DATA
    assert len(await rows(storage)) == 1


async def test_a_conversation_is_moved_before_it_is_first_written(
    storage: SQLAlchemyStorage, old: Old
) -> None:
    assert await storage.update_data(KEY, {"age": 36}) == {**DATA, "age": 36}
    assert await storage.get_state(KEY) == STATE
    assert not await old.holds()


async def test_a_conversation_that_is_nowhere_is_asked_for_once(
    storage: SQLAlchemyStorage, old: Old
) -> None:
    for _ in range(2):
        assert await storage.get_state(ANOTHER) is None
        await storage.set_data(ANOTHER, {"a": 1})
        await storage.clear(ANOTHER)
    assert old.asked == 1
    assert await rows(storage) == []


async def test_once_moved_the_former_storage_is_not_asked_again(
    storage: SQLAlchemyStorage, old: Old
) -> None:
    await storage.get_state(KEY)
    asked = old.asked
    await storage.set_state(KEY, "other")
    await storage.clear(KEY)
    assert await storage.get_data(KEY) == {}
    assert old.asked == asked


async def test_a_conversation_that_was_cleared_does_not_come_back(
    storage: SQLAlchemyStorage, open_another: OpenAnother
) -> None:
    await storage.clear(KEY)
    for each in (storage, await open_another()):
        assert await each.get_state(KEY) is None
        assert await each.get_data(KEY) == {}
    assert await rows(storage) == []


async def test_neither_does_one_whose_state_and_data_were_removed(
    storage: SQLAlchemyStorage, open_another: OpenAnother
) -> None:
    await storage.set_state(KEY, None)
    await storage.set_data(KEY, {})
    assert await (await open_another()).get_data(KEY) == {}
    assert await rows(storage) == []


async def test_what_is_here_counts_more_than_what_is_there(
    storage: SQLAlchemyStorage, old: Old, open_another: OpenAnother
) -> None:
    before = await open_another(Old())
    await before.set_state(KEY, "here")
    assert await storage.get_state(KEY) == "here"
    assert await storage.get_data(KEY) == {}
    assert not await old.holds()


async def test_a_process_that_dies_before_the_removal_leaves_it_to_the_next(
    storage: SQLAlchemyStorage, old: Old, open_another: OpenAnother
) -> None:
    old.fails_to_remove = True
    with pytest.raises(ConnectionError):
        await storage.get_state(KEY)
    assert [each[:2] for each in await rows(storage)] == [("42:7:7", STATE)]
    with pytest.raises(ConnectionError):  # or it would come back
        await storage.clear(KEY)
    assert len(await rows(storage)) == 1

    old.fails_to_remove = False
    another = await open_another()
    await another.clear(KEY)
    assert not await old.holds()
    assert await storage.get_state(KEY) is None


async def test_who_has_read_it_before_another_moved_and_cleared_it_does_not_bring_it_back(
    storage: SQLAlchemyStorage, old: Old, open_another: OpenAnother
) -> None:
    another = await open_another()
    old.goes_on.clear()
    late = asyncio.ensure_future(storage.get_state(KEY))
    await old.waits.wait()
    fast = Old()
    fast.storage = old.storage  # the same, and does not wait
    await (await open_another(fast)).clear(KEY)
    old.goes_on.set()
    assert await late is None
    assert await another.get_data(KEY) == {}
    assert await rows(storage) == []


async def test_writers_that_come_at_once_lose_nothing(
    storage: SQLAlchemyStorage, open_another: OpenAnother
) -> None:
    storages = [storage, await open_another()]
    fields = {f"field {number}": number for number in range(20)}
    await asyncio.gather(
        *(storages[number % 2].update_data(KEY, {name: number}) for name, number in fields.items())
    )
    assert await storage.get_data(KEY) == {**DATA, **fields}
    assert await storage.get_state(KEY) == STATE


# Units of work


@pytest.fixture(params=list(LEASES.values()), ids=list(LEASES))
async def isolation(
    request: pytest.FixtureRequest, storage: SQLAlchemyStorage
) -> AsyncIterator[Any]:
    """Return isolation with a unit of work, with a lease and without."""
    isolation = storage.create_isolation(unit_of_work=True, lease=request.param)
    await storage.create_table()
    yield isolation
    await isolation.close()
    locks = storage.metadata.tables.get(f"{storage.table.name}_lock")
    if locks is not None:
        await storage.run_sync(lambda session: locks.drop(session.connection()))


HISTORY = replace(KEY, destiny="scenes_history")


async def test_an_update_that_is_a_unit_of_work_finds_it(
    storage: SQLAlchemyStorage, isolation: Any, old: Old, open_another: OpenAnother
) -> None:
    await old.set_data(HISTORY, {"history": [1]})
    async with isolation.lock(KEY):
        assert await storage.get_state(KEY) == STATE
        assert await storage.update_data(KEY, {"age": 36}) == {**DATA, "age": 36}
        assert await storage.get_data(HISTORY) == {"history": [1]}
        await storage.set_data(HISTORY, {})
    another = await open_another()
    assert await another.get_data(KEY) == {**DATA, "age": 36}
    assert await another.get_data(HISTORY) == {}
    assert not await old.holds()
    assert len(await rows(storage)) == 1


async def test_an_update_that_clears_it_keeps_it_cleared(
    storage: SQLAlchemyStorage, isolation: Any, open_another: OpenAnother
) -> None:
    async with isolation.lock(KEY):
        await storage.clear(KEY)
    assert await (await open_another()).get_state(KEY) is None
    assert await rows(storage) == []


async def test_an_update_that_fails_leaves_it_as_it_was(
    storage: SQLAlchemyStorage, isolation: Any, open_another: OpenAnother
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with isolation.lock(KEY):
            await storage.clear(KEY)
            raise ZeroDivisionError
    another = await open_another()
    assert await another.get_state(KEY) == STATE
    assert await another.get_data(KEY) == DATA


async def test_a_transaction_of_an_update_that_clears_it_keeps_it_cleared(
    storage: SQLAlchemyStorage, isolation: Any, open_another: OpenAnother
) -> None:
    async with isolation.lock(KEY), storage.transaction():
        assert await storage.get_state(KEY) == STATE
        await storage.clear(KEY)
        await storage.set_state(KEY, "again")
        await storage.clear(KEY)
        assert await storage.get_state(KEY) is None
    another = await open_another()
    assert await another.get_state(KEY) is None
    assert await another.get_data(KEY) == {}
    assert await rows(storage) == []


async def test_a_transaction_of_an_update_that_fails_leaves_it_as_it_was(
    storage: SQLAlchemyStorage, isolation: Any, open_another: OpenAnother
) -> None:
    async with isolation.lock(KEY):
        with pytest.raises(ZeroDivisionError):
            async with storage.transaction():
                await storage.set_data(KEY, {"lost": True})
                raise ZeroDivisionError
        assert await storage.get_data(KEY) == DATA
        await storage.update_data(KEY, {"age": 36})
    assert await (await open_another()).get_data(KEY) == {**DATA, "age": 36}


# Transactions


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
async def test_a_transaction_finds_and_changes_it(
    storage: SQLAlchemyStorage, old: Old, open_another: OpenAnother
) -> None:
    async with storage.transaction():
        assert await storage.get_state(KEY) == STATE
        assert await storage.update_data(KEY, {"age": 36}) == {**DATA, "age": 36}
    assert await storage.get_data(KEY) == {**DATA, "age": 36}
    assert not await old.holds()
    assert await (await open_another()).get_data(KEY) == {**DATA, "age": 36}


async def test_a_transaction_that_rolls_back_leaves_it_there(
    storage: SQLAlchemyStorage, old: Old
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with storage.transaction():
            await storage.clear(KEY)
            assert await storage.get_state(KEY) is None
            raise ZeroDivisionError
    assert await old.holds()
    assert await storage.get_data(KEY) == DATA


async def test_what_a_nested_transaction_has_moved_and_rolled_back_is_not_lost(
    storage: SQLAlchemyStorage, old: Old, open_another: OpenAnother
) -> None:
    async with storage.transaction():
        with pytest.raises(ZeroDivisionError):
            async with storage.transaction():
                assert await storage.get_state(KEY) == STATE
                raise ZeroDivisionError
    assert not await old.holds()
    assert await (await open_another()).get_data(KEY) == DATA


async def test_a_nested_transaction_that_rolls_back_leaves_it_to_the_outer_one(
    storage: SQLAlchemyStorage,
) -> None:
    async with storage.transaction():
        with pytest.raises(ZeroDivisionError):
            async with storage.transaction():
                await storage.clear(KEY)
                raise ZeroDivisionError
        assert await storage.update_data(KEY, {"age": 36}) == {**DATA, "age": 36}
    assert await storage.get_state(KEY) == STATE


async def test_a_transaction_that_clears_it_keeps_it_cleared(
    storage: SQLAlchemyStorage, old: Old, open_another: OpenAnother
) -> None:
    async with storage.transaction():
        await storage.clear(KEY)
        assert await storage.get_state(KEY) is None
        assert await old.holds()  # it may be rolled back
    assert not await old.holds()
    assert await rows(storage) == []
    asked = old.asked
    assert await storage.get_state(KEY) is None
    assert old.asked == asked
    another = await open_another()
    assert await another.get_state(KEY) is None


async def test_a_process_that_dies_after_the_commit_of_a_transaction_leaves_the_rest_to_the_next(
    storage: SQLAlchemyStorage, old: Old, open_another: OpenAnother, caplog: Any
) -> None:
    old.fails_to_remove = True
    async with storage.transaction():
        await storage.clear(KEY)
    [record] = [each for each in caplog.records if each.name == "hybrid_storage"]
    assert record.getMessage() == (
        "'42:7:7' is here, and is not yet removed there: ConnectionError: gone"
    )
    assert await old.holds()
    old.fails_to_remove = False
    another = await open_another()
    assert await another.get_state(KEY) is None
    assert await another.get_data(KEY) == {}
    assert not await old.holds()
    assert await rows(storage) == []


async def test_a_session_of_the_applications_that_clears_it_keeps_it_cleared(
    storage: SQLAlchemyStorage, backend: Backend, open_another: OpenAnother
) -> None:
    session = new_session(storage)
    async with storage.using(session):
        assert await storage.get_data(KEY) == DATA
        await storage.clear(KEY)
    if backend.is_async:
        await session.commit()
        await session.close()
    else:
        await asyncio.to_thread(session.commit)
        await asyncio.to_thread(session.close)
    assert await (await open_another()).get_data(KEY) == {}
    assert await rows(storage) == []


# Former storages


async def test_keys_that_the_former_storage_could_not_build_are_not_there(
    open_storage: Open,
) -> None:
    """RedisStorage and others refuse a destiny unless their key builder was told to take it."""

    class Builds(Old):
        key_builder = DefaultKeyBuilder()

        async def get_state(self, key: StorageKey) -> str | None:
            self.key_builder.build(key)
            return await super().get_state(key)

    storage = await open_storage(SQLITE[0], fallback=Builds())
    await storage.set_data(HISTORY, {"history": [1]})
    assert await storage.get_data(HISTORY) == {"history": [1]}


async def test_it_may_be_a_storage_of_ours_with_another_key_builder_on_the_same_table(
    backend: Backend, open_storage: Open
) -> None:
    former = await open_storage(backend, key_builder=DefaultKeyBuilder())
    await former.set_state(KEY, STATE)
    await former.set_data(KEY, DATA)
    ours = await open_storage(backend, table_name=former.model, fallback=former)
    assert await ours.get_state(KEY) == STATE
    assert [row[0] for row in await rows(ours)] == ["42:7:7"]
    await former.set_state(ANOTHER, STATE)
    async with ours.transaction():
        assert await ours.get_state(ANOTHER) == STATE
        await ours.clear(ANOTHER)
    assert await ours.get_state(ANOTHER) is None
    assert [row[0] for row in await rows(ours)] == ["42:7:7"]


async def test_data_that_cannot_be_stored_are_refused_and_stay_there(
    open_storage: Open, old: Old
) -> None:
    await old.set_data(KEY, {"when": object()})
    storage = await open_storage(SQLITE[0], fallback=old)
    with pytest.raises(TypeError, match="in field 'when' of the data"):
        await storage.get_state(KEY)
    assert await old.holds()


@pytest.mark.parametrize("wrong", ["redis://localhost", MemoryStorage, 7], ids=repr)
async def test_something_that_is_no_storage_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(repr(wrong))):
        SQLAlchemyStorage.from_url("sqlite://", fallback=wrong)


async def test_a_bulk_change_says_that_it_does_not_reach_the_former_storage(
    old: Old, open_storage: Open, caplog: pytest.LogCaptureFixture
) -> None:
    storage = await open_storage(SQLITE[0], columns=True, fallback=old)
    assert await storage.forget_user(KEY.user_id) == 0
    assert "migrate()" in caplog.text
    assert await storage.get_state(KEY) == STATE
    assert await storage.forget_user(KEY.user_id) == 1
    assert await storage.get_state(KEY) is None
