"""Whole bots whose updates are units of work: scenes, dialogs, middlewares, error handlers."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

import pytest
from aiogram import Bot as TelegramBot
from aiogram import Dispatcher, F
from aiogram.dispatcher.event.bases import SkipHandler
from aiogram.fsm.context import FSMContext
from aiogram.methods import GetMe, GetUpdates, TelegramMethod
from aiogram.methods.base import TelegramType
from aiogram.types import ErrorEvent, Message, Update
from aiogram_dialog import Dialog, DialogManager, StartMode, Window, setup_dialogs
from aiogram_dialog.widgets.text import Format
from backends import SERVERS, Backend
from blocking import PATIENCE, statements, until
from conftest import rows
from test_isolation import update
from test_scenes_and_dialogs import (
    DATE,
    USER,
    Conversation,
    Order,
    Telegram,
    dialog_bot,
    scene_bot,
)
from units import BEFORE, HISTORY, KEY, Bot, outside, writes

from hybrid_storage import FlushMiddleware, SessionMiddleware

pytestmark = pytest.mark.parametrize(
    "backend",
    {(backend.server, backend.is_async): backend for backend in SERVERS}.values(),
    ids=str,
)


def telling(dispatcher: Dispatcher) -> Conversation:
    """Return a user who talks to a bot."""

    async def start() -> Dispatcher:
        return dispatcher

    return Conversation(start, restarts=False)


def dispatcher_of(bot: Bot) -> Dispatcher:
    """Return a dispatcher without handlers."""
    return Dispatcher(storage=bot.storage, events_isolation=bot.isolation)


# Scenes and dialogs


async def test_scenes_write_each_row_once_an_update(bot: Bot) -> None:
    await bot.storage.clear(KEY)
    user = telling(scene_bot(bot.storage, bot.isolation))
    steps = {
        "/start": ["What is your name?"],
        "Ada": ["How old are you, Ada?"],
        "36": ["Where do you live, Ada, 36?"],
        "back": ["How old are you, Ada?"],
        "37": ["Where do you live, Ada, 37?"],
        "London": ["{'name': 'Ada', 'age': '37'}, London"],
    }
    for text, answers in steps.items():
        with statements(bot.storage.table.name) as seen:
            assert await user.say(text) == answers
        assert writes(bot.storage, seen) <= 2  # rows: the user's own, and the history
        if text == "37":
            at_name = {"state": "name", "data": {"name": "Ada"}}
            at_age = {"state": "age", "data": {"name": "Ada", "age": "37"}}
            assert await bot.stored(HISTORY) == (None, {"history": [at_name, at_age]})
    assert await rows(bot.storage) == []


async def test_a_dialog_goes_through_its_windows(bot: Bot) -> None:
    await bot.storage.clear(KEY)
    user = telling(dialog_bot(bot.storage, bot.isolation))
    assert await user.say("/start") == ["What would you like?"]
    assert await user.click("Tea") == ["A tea for table 5?"]
    assert await user.click("Back") == ["What would you like?"]
    assert await user.click("Coffee") == ["A coffee for table 5?"]
    with statements(bot.storage.table.name) as seen:
        assert await user.click("Yes") == ["Seen ['tea', 'coffee']: {'table': 5}"]
    assert writes(bot.storage, seen) <= 4  # the stack and the context are gone
    assert await rows(bot.storage) == []


@pytest.mark.parametrize("in_transaction", [False, True], ids=["", "SessionMiddleware"])
async def test_a_dialog_is_changed_in_the_background_and_from_the_foreground(
    bot: Bot, backend: Backend, in_transaction: bool
) -> None:
    has_lease = f"{bot.storage.table.name}_lock" in bot.storage.metadata.tables
    # In SQLite a transaction that asks for a lock holds the file's write lock, without which the
    # lock's holder cannot free it: docs/guides/unit-of-work.md warns of it.
    in_transaction = in_transaction and not (has_lease and backend.server == "sqlite")
    dispatcher = dispatcher_of(bot)
    if in_transaction:
        dispatcher.update.outer_middleware(SessionMiddleware(bot.storage))
    shown: list[str] = []
    changed = asyncio.Event()

    async def show(dialog_manager: DialogManager, **_: Any) -> dict[str, Any]:
        shown.append(dialog_manager.dialog_data.get("drink", "nothing"))
        if shown[-1] == "coffee":
            changed.set()
        return {"drink": shown[-1]}

    @dispatcher.message(F.text == "/start")
    async def start(message: Message, dialog_manager: DialogManager, state: FSMContext) -> None:
        await state.update_data(started=True)
        await dialog_manager.start(Order.drink, mode=StartMode.RESET_STACK)
        if not in_transaction:  # which another update would not see before its commit
            await dialog_manager.bg().update({"drink": "coffee"})  # another update of this user's
        await state.update_data(finished=True)

    @dispatcher.message(F.text == "/coffee")
    async def coffee(message: Message, dialog_manager: DialogManager, state: FSMContext) -> None:
        await dialog_manager.bg().update({"drink": "coffee"})

    dispatcher.include_router(Dialog(Window(Format("{drink}"), state=Order.drink, getter=show)))
    background = setup_dialogs(dispatcher, events_isolation=bot.isolation)
    telegram = Telegram()
    telegram_bot = TelegramBot("42:TOKEN", session=telegram)
    earlier = asyncio.all_tasks()
    for text in ["/start", "/coffee"][: 1 + in_transaction]:
        raw = {
            "update_id": 1,
            "message": {
                "message_id": 1,
                "date": DATE,
                "text": text,
                "chat": {"id": USER, "type": "private"},
                "from": {"id": USER, "is_bot": False, "first_name": "Ada"},
            },
        }
        message = Update.model_validate(raw, context={"bot": telegram_bot})
        feeding = dispatcher.feed_update(telegram_bot, message)
        await asyncio.wait_for(outside(feeding), PATIENCE)
    await asyncio.wait_for(changed.wait(), PATIENCE)
    await until(lambda: asyncio.all_tasks() <= earlier)  # the other update, and its commit

    async def foreground() -> None:
        manager = background.bg(telegram_bot, USER, USER)
        async with manager.fg() as dialog:
            assert dialog.dialog_data == {"drink": "coffee"}
            dialog.dialog_data["drink"] = "tea"

    await asyncio.wait_for(outside(foreground()), PATIENCE)
    await until(lambda: asyncio.all_tasks() <= earlier)
    assert shown[0] == "nothing"
    assert shown[-1] in ("coffee", "tea")
    assert await bot.stored() == ("Form:name", {**BEFORE[1], "started": True, "finished": True})
    [data] = [row[2] for row in await rows(bot.storage) if "context" in row[0]]
    assert '"drink": "tea"' in data


# Polling


class Updates(Telegram):
    """Gives a bot some updates, and then no more."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = [
            update(each).model_dump(mode="json", exclude_none=True) for each in range(number)
        ]

    def _result(self, bot: TelegramBot, method: TelegramMethod[Any]) -> object:
        if isinstance(method, GetMe):
            return {"id": bot.id, "is_bot": True, "first_name": "Bot", "username": "bot"}
        if isinstance(method, GetUpdates):
            given, self.left = self.left, []
            return given
        return super()._result(bot, method)

    async def make_request(
        self, bot: TelegramBot, method: TelegramMethod[TelegramType], timeout: int | None = None
    ) -> TelegramType:
        is_polled: bool = isinstance(method, GetUpdates)
        if is_polled and not self.left:
            await asyncio.sleep(0.01)
        return await super().make_request(bot, method, timeout)


@pytest.mark.parametrize("handle_as_tasks", [True, False])
async def test_a_polling_bot_loses_no_step(bot: Bot, handle_as_tasks: bool) -> None:
    number = 10
    dispatcher = dispatcher_of(bot)
    ends = itertools.count(1)

    @dispatcher.message()
    async def step(message: Message, state: FSMContext) -> None:
        count = await state.get_value("count", 0)
        await asyncio.sleep(0.002)
        await state.update_data(count=count + 1)
        if next(ends) == number:
            asyncio.ensure_future(stop())  # noqa: RUF006

    async def stop() -> None:
        await until(lambda: not bot.isolation.still_held(KEY))
        await dispatcher.stop_polling()

    polling = dispatcher.start_polling(
        TelegramBot("42:TOKEN", session=Updates(number)),
        handle_as_tasks=handle_as_tasks,
        handle_signals=False,
    )
    await asyncio.wait_for(polling, PATIENCE)
    assert await bot.stored() == ("Form:name", {**BEFORE[1], "count": number})


# Failures and decisions


async def test_an_error_handler_finds_what_was_before_and_writes_at_once(bot: Bot) -> None:
    dispatcher = dispatcher_of(bot)

    @dispatcher.message()
    async def fail(message: Message, state: FSMContext) -> None:
        await state.set_state("failed")
        await state.update_data(failed=True)
        raise LookupError

    @dispatcher.errors()
    async def mend(event: ErrorEvent, state: FSMContext) -> None:
        assert await state.get_state() == "Form:name"
        await state.set_state("mended")
        assert await bot.stored() == ("mended", BEFORE[1])

    await dispatcher.feed_update(TelegramBot("42:TOKEN"), update(1))
    assert await bot.stored() == ("mended", BEFORE[1])


@pytest.mark.parametrize("in_transaction", [False, True], ids=["", "SessionMiddleware"])
async def test_a_handler_that_skips_leaves_what_it_did_to_the_next(
    bot: Bot, in_transaction: bool
) -> None:
    dispatcher = dispatcher_of(bot)
    if in_transaction:
        dispatcher.update.outer_middleware(SessionMiddleware(bot.storage))

    @dispatcher.message()
    async def skip(message: Message, state: FSMContext) -> None:
        await state.update_data(skipped=True)
        raise SkipHandler

    @dispatcher.message()
    async def take(message: Message, state: FSMContext) -> None:
        assert await state.get_value("skipped")
        await state.update_data(taken=True)

    await dispatcher.feed_update(TelegramBot("42:TOKEN"), update(1))
    assert await bot.stored() == ("Form:name", {**BEFORE[1], "skipped": True, "taken": True})


async def test_with_session_middleware_state_and_rows_are_there_together_or_not_at_all(
    bot: Bot,
) -> None:
    dispatcher = dispatcher_of(bot)
    dispatcher.update.outer_middleware(SessionMiddleware(bot.storage))

    @dispatcher.message()
    async def step(message: Message, state: FSMContext) -> None:
        await state.update_data({f"{message.message_id}": 1})
        await bot.storage.run_sync(
            lambda session: bot.storage.operations.update_data(session, HISTORY, {"row": 1})
        )
        if message.message_id == 1:
            raise LookupError

    with pytest.raises(LookupError):
        await dispatcher.feed_update(TelegramBot("42:TOKEN"), update(1))
    assert await bot.stored() == BEFORE
    assert await bot.stored(HISTORY) == (None, {})
    await dispatcher.feed_update(TelegramBot("42:TOKEN"), update(2))
    assert await bot.stored() == ("Form:name", {**BEFORE[1], "2": 1})
    assert await bot.stored(HISTORY) == (None, {"row": 1})


@pytest.mark.parametrize("in_transaction", [False, True], ids=["", "SessionMiddleware"])
async def test_no_message_goes_out_before_its_state_is_written(
    bot: Bot, in_transaction: bool, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = dispatcher_of(bot)
    if in_transaction:
        dispatcher.update.outer_middleware(SessionMiddleware(bot.storage))
    states: list[str | None] = []
    user = bot

    class Watching(Telegram):
        async def make_request(
            self,
            bot: TelegramBot,
            method: TelegramMethod[TelegramType],
            timeout: int | None = None,
        ) -> TelegramType:
            states.append((await user.stored())[0])
            return await super().make_request(bot, method, timeout)

    @dispatcher.message()
    async def step(message: Message, state: FSMContext, bot: TelegramBot) -> None:
        for name in ("first", "second"):
            await state.set_state(name)
            await bot.send_message(USER, name)

    telegram_bot = TelegramBot("42:TOKEN", session=Watching())
    telegram_bot.session.middleware(FlushMiddleware(bot.storage))
    await dispatcher.feed_update(telegram_bot, update(1))
    assert states == (["Form:name"] * 2 if in_transaction else ["first", "second"])
    assert await bot.stored() == ("second", BEFORE[1])
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert len([each for each in warnings if "inside a transaction" in each]) == in_transaction
