"""``on_idle()``: each idle conversation is handed to an action, once across processes."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import Backend
from blocking import until
from conftest import Open, engine_of
from sqlalchemy import update
from sqlalchemy.orm import Session

from hybrid_storage import FoundConversation, SQLAlchemyEventIsolation, SQLAlchemyStorage

HOUR, DAY = 3600.0, 86400.0
USERS = range(1, 7)


def key_of(user: int, **fields: Any) -> StorageKey:
    return StorageKey(bot_id=42, chat_id=user, user_id=user, **fields)


class Reminders:
    """Counts what it is handed."""

    def __init__(self) -> None:
        self.seen: list[FoundConversation] = []

    async def __call__(self, conversation: FoundConversation) -> None:
        self.seen.append(conversation)
        await anyio.sleep(0.01)

    @property
    def users(self) -> list[int]:
        return sorted(each.key.user_id for each in self.seen)


@pytest.fixture
async def bot(
    backend: Backend, open_storage: Open
) -> tuple[SQLAlchemyStorage, SQLAlchemyEventIsolation]:
    """Return a storage with conversations, and its isolation."""
    storage: SQLAlchemyStorage = await open_storage(backend, columns=True)
    isolation = storage.create_isolation(unit_of_work=True, poll=0.05)
    await storage.create_table()
    for user in USERS:
        await storage.set_state(key_of(user), "Order:payment")
        await storage.set_data(key_of(user), {"user": user})
    return storage, isolation


@pytest.fixture(autouse=True)
async def _locks_are_dropped(bot: Any) -> Any:
    yield
    storage, isolation = bot
    await isolation.close()
    locks = storage.metadata.tables[f"{storage.table.name}_lock"]
    await storage.run_sync(lambda session: locks.drop(session.connection()))


async def age(storage: SQLAlchemyStorage, seconds: float) -> None:
    table = storage.table

    def older(session: Session) -> None:
        values = {"written_at": table.c.written_at - seconds, "idle_handled": table.c.idle_handled}
        session.connection().execute(update(table).values(values))

    await storage.run_sync(older)


async def test_each_idle_conversation_is_handed_out_once(bot: Any) -> None:
    storage, isolation = bot
    remind = Reminders()
    once = {"after": HOUR, "isolation": isolation, "every": None}
    assert await storage.on_idle(action=remind, **once) == 0
    await age(storage, DAY / 2)
    await storage.set_state(key_of(2), "Order:payment")  # is active
    await storage.set_data(key_of(7, destiny="aiogd:context:abc"), {"id": "abc"})
    await age(storage, HOUR / 2)
    assert await storage.on_idle(action=remind, **once) == 5
    assert remind.users == [1, 3, 4, 5, 6]
    assert {each.data["user"] for each in remind.seen} == {1, 3, 4, 5, 6}
    assert await storage.on_idle(action=remind, **once) == 0
    await age(storage, HOUR)
    assert await storage.on_idle(action=remind, **once) == 2
    assert remind.users == [1, 2, 3, 4, 5, 6, 7]  # a dialog alone is a conversation, too


async def test_it_is_handed_out_again_after_a_write_and_for_a_longer_time(bot: Any) -> None:
    storage, isolation = bot
    first, second = Reminders(), Reminders()
    once = {"isolation": isolation, "every": None, "state": "Order:payment"}
    await age(storage, 2 * HOUR)
    await storage.on_idle(after=HOUR, action=first, **once)
    assert await storage.on_idle(after=DAY, action=second, **once) == 0
    await storage.set_state(key_of(1), "Order:payment")
    await age(storage, DAY)
    assert await storage.on_idle(after=HOUR, action=first, **once) == 1
    assert await storage.on_idle(after=DAY, action=second, **once) == 6
    assert await storage.on_idle(after=HOUR, action=first, **once) == 0
    assert first.users == [1, 1, 2, 3, 4, 5, 6]


async def test_several_processes_hand_out_each_once(bot: Any, backend: Backend) -> None:
    storage, isolation = bot
    await age(storage, DAY)
    engines = [backend.engine(engine_of(storage).url) for _ in range(2)]
    remind = Reminders()
    others = []
    for engine in engines:
        other: SQLAlchemyStorage[Any, Any] = SQLAlchemyStorage(
            backend.factory(engine), table_name=storage.table.name, columns=True
        )
        others.append((other, other.create_isolation(unit_of_work=True, poll=0.02)))
    async with anyio.create_task_group() as group:
        for other, its in [(storage, isolation), *others]:
            group.start_soon(hand_out, other, its, remind)
    for _, its in others:
        await its.close()
    for engine in engines:
        disposed = engine.dispose()
        if disposed is not None:
            await disposed
    assert remind.users == list(USERS)


async def hand_out(
    storage: SQLAlchemyStorage, isolation: SQLAlchemyEventIsolation, action: Any
) -> None:
    await storage.on_idle(after=HOUR, action=action, isolation=isolation, every=None, at_once=2)


async def test_what_an_action_does_is_written_and_does_not_count_as_activity(bot: Any) -> None:
    storage, isolation = bot
    await age(storage, DAY)

    async def cancel(conversation: FoundConversation) -> None:
        await storage.set_state(conversation.key, "Order:cancelled")
        await storage.update_data(conversation.key, {"reminded": True})

    once = {"after": HOUR, "isolation": isolation, "every": None}
    assert await storage.on_idle(action=cancel, **once) == 6
    assert await storage.count(state="Order:cancelled") == 6
    assert (await storage.get_data(key_of(3))) == {"user": 3, "reminded": True}
    assert await storage.on_idle(action=cancel, **once) == 0


async def test_an_action_that_fails_or_is_killed_is_called_again(
    bot: Any, caplog: pytest.LogCaptureFixture
) -> None:
    storage, isolation = bot
    await age(storage, DAY)
    tried: list[int] = []

    async def fail(conversation: FoundConversation) -> None:
        tried.append(conversation.key.user_id)
        await storage.set_state(conversation.key, "half done")
        if conversation.key.user_id == 3:
            raise RuntimeError("Telegram is away")
        if conversation.key.user_id == 5:
            await anyio.sleep_forever()  # until the process is killed

    once = {"after": HOUR, "isolation": isolation, "every": None}
    with caplog.at_level(logging.INFO, "hybrid_storage"), suppress(asyncio.TimeoutError):
        await asyncio.wait_for(storage.on_idle(action=fail, **once), 1)
    assert "failed for" in caplog.text
    assert "Telegram is away" in caplog.text
    remind = Reminders()
    assert await storage.get_state(key_of(3)) == "Order:payment"  # nothing of it is written
    await storage.on_idle(action=remind, **once)
    assert set(remind.users) == set(USERS) - (set(tried) - {3, 5})


async def test_no_handler_runs_meanwhile_and_no_more_than_asked_at_once(bot: Any) -> None:
    storage, isolation = bot
    await age(storage, DAY)
    running, most = 0, 0
    order: list[str] = []

    async def slow(conversation: FoundConversation) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.append(f"action of {conversation.key.user_id}")
        await anyio.sleep(0.1)
        order.append(f"end of {conversation.key.user_id}")
        running -= 1

    async def handle() -> None:
        await until(lambda: "action of 4" in order)
        async with isolation.lock(key_of(4)):
            order.append("handler of 4")

    async with anyio.create_task_group() as group:
        group.start_soon(handle)
        await storage.on_idle(after=HOUR, action=slow, isolation=isolation, every=None, at_once=2)
    assert most == 2
    assert order.index("handler of 4") > order.index("end of 4")


async def test_it_looks_again_until_it_is_cancelled(bot: Any) -> None:
    storage, isolation = bot
    remind = Reminders()
    looking = asyncio.create_task(
        storage.on_idle(after=HOUR, action=remind, isolation=isolation, every=0.05)
    )
    await anyio.sleep(0.1)
    await age(storage, DAY)
    await until(lambda: len(remind.seen) == len(USERS))
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert remind.users == list(USERS)


async def test_wrong_arguments_are_told(bot: Any) -> None:
    storage, isolation = bot
    good: dict[str, Any] = {"after": HOUR, "action": Reminders(), "isolation": isolation}
    for wrong, text in [
        ({"after": "1 day"}, "seconds"),
        ({"action": "remind"}, "function"),
        ({"isolation": storage}, "create_isolation"),
        ({"idle_for": 3}, "after="),
        ({"every": "1 minute"}, "every"),
    ]:
        with pytest.raises(TypeError, match=text):
            await storage.on_idle(**{**good, **wrong})
    for name, value in [("at_once", 0), ("every", -1.0), ("at_once", 0.5), ("after", 0)]:
        with pytest.raises(ValueError, match=name):
            await storage.on_idle(**{**good, name: value})


async def test_an_action_that_is_not_asynchronous_is_told_at_once(bot: Any) -> None:
    storage, isolation = bot
    await age(storage, DAY)
    sent: list[Any] = []
    action: Any = sent.append
    for every in (None, 60.0):
        with pytest.raises(TypeError, match="async function"):
            await storage.on_idle(after=HOUR, action=action, isolation=isolation, every=every)
    assert len(sent) == 2  # once each time, and not for every user
