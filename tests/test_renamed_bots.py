"""Bots go on where they were after a rename of states, and after a group became a supergroup."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from aiogram import Bot as TelegramBot
from aiogram import Dispatcher, F
from aiogram.filters import Command
from aiogram.fsm.context import FSMContext
from aiogram.fsm.scene import Scene, SceneRegistry, on
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import StorageKey
from aiogram.types import CallbackQuery, Message, Update
from aiogram_dialog import Dialog, DialogManager, StartMode, Window, setup_dialogs
from aiogram_dialog.widgets.kbd import Button, Next
from aiogram_dialog.widgets.text import Const, Format
from backends import MARIADB, POSTGRESQL, SQLITE, Backend
from conftest import Open
from test_scenes_and_dialogs import DATE, Conversation, Telegram

from hybrid_storage import SQLAlchemyEventIsolation, SQLAlchemyStorage

pytestmark = pytest.mark.parametrize("backend", [SQLITE[0], POSTGRESQL[2], *MARIADB[:1]], ids=str)


class Order(StatesGroup):
    """The dialog's windows in the former version."""

    drink = State()
    confirm = State()


class Purchase(StatesGroup):
    """The same in the new version."""

    drink = State()
    confirm = State()


@pytest.fixture
async def storage(backend: Backend, open_storage: Open) -> SQLAlchemyStorage:
    opened: SQLAlchemyStorage = await open_storage(backend, columns=True)
    return opened


def isolation_of(storage: SQLAlchemyStorage) -> SQLAlchemyEventIsolation:
    return storage.create_isolation(unit_of_work=True, lease=None)


def dialog_bot(storage: SQLAlchemyStorage, group: Any) -> Dispatcher:
    isolation = isolation_of(storage)
    dispatcher = Dispatcher(storage=storage, events_isolation=isolation)

    @dispatcher.message(Command("start"))
    async def start(message: Message, dialog_manager: DialogManager) -> None:
        await dialog_manager.start(group.drink, {"table": 5}, mode=StartMode.RESET_STACK)

    async def finish(query: CallbackQuery, button: Button, manager: DialogManager) -> None:
        assert isinstance(query.message, Message)
        given: Any = manager.start_data
        await query.message.answer(f"For table {given['table']}")
        await manager.done()

    dispatcher.include_router(
        Dialog(
            Window(Const("What would you like?"), Next(Const("Tea")), state=group.drink),
            Window(
                Format("Tea for table {start_data[table]}?"),
                Button(Const("Yes"), id="yes", on_click=finish),
                state=group.confirm,
            ),
        )
    )
    setup_dialogs(dispatcher, events_isolation=isolation)
    return dispatcher


async def test_a_dialog_goes_on_in_the_renamed_group(storage: SQLAlchemyStorage) -> None:
    group: Any = Order

    async def start() -> Dispatcher:
        return dialog_bot(storage, group)

    user = Conversation(start, restarts=True)
    assert await user.say("/start") == ["What would you like?"]
    assert await user.click("Tea") == ["Tea for table 5?"]
    assert await storage.rename_state(Order, Purchase) > 0
    group = Purchase
    assert await user.click("Yes") == ["For table 5"]


def scene_bot(storage: SQLAlchemyStorage, first: str, second: str) -> Dispatcher:
    class Name(Scene, state=first):
        @on.message.enter()
        async def ask(self, message: Message) -> None:
            await message.answer("What is your name?")

        @on.message(F.text)
        async def take(self, message: Message) -> None:
            await self.wizard.update_data(name=message.text)
            await self.wizard.goto(second)

    class Age(Scene, state=second):
        @on.message.enter()
        async def ask(self, message: Message) -> None:
            await message.answer(f"How old are you, {await self.wizard.get_value('name')}?")

        @on.message(F.text == "back")
        async def go_back(self, message: Message) -> None:
            await self.wizard.back()

        @on.message(F.text)
        async def take(self, message: Message) -> None:
            await message.answer(f"{message.text} years")

    dispatcher = Dispatcher(storage=storage, events_isolation=isolation_of(storage))
    dispatcher.message.register(Name.as_handler(), Command("start"))
    SceneRegistry(dispatcher).add(Name, Age)
    return dispatcher


async def test_scenes_go_on_and_back_under_new_names(storage: SQLAlchemyStorage) -> None:
    names = ("name", "age")

    async def start() -> Dispatcher:
        return scene_bot(storage, *names)

    user = Conversation(start, restarts=True)
    assert await user.say("/start") == ["What is your name?"]
    assert await user.say("Ada") == ["How old are you, Ada?"]
    for old, new in [("name", "first name"), ("age", "years")]:
        assert await storage.rename_state(old, new) == 1
    names = ("first name", "years")
    assert await user.say("36") == ["36 years"]
    assert await user.say("back") == ["What is your name?"]


@pytest.mark.parametrize("order", ["to first", "from first", "to only", "from only", "twice"])
async def test_a_group_that_becomes_a_supergroup_keeps_its_conversations(
    storage: SQLAlchemyStorage, order: str
) -> None:
    old, new = -7, -1007
    group = StorageKey(bot_id=42, chat_id=old, user_id=7)
    dispatcher = Dispatcher(storage=storage, events_isolation=isolation_of(storage))
    dispatcher.message.register(storage.follow_chat, F.migrate_to_chat_id | F.migrate_from_chat_id)

    @dispatcher.message()
    async def handle(message: Message, state: FSMContext) -> None:
        await state.update_data(said=message.text)

    bot = TelegramBot("42:TOKEN", session=Telegram())

    async def feed(chat: int, **content: Any) -> None:
        raw = {
            "update_id": 1,
            "message": {
                "message_id": 1,
                "date": DATE,
                "chat": {"id": chat, "type": "group", "title": "Friends"},
                "from": {"id": 7, "is_bot": False, "first_name": "Ada"},
                **content,
            },
        }
        await dispatcher.feed_update(bot, Update.model_validate(raw, context={"bot": bot}))

    await feed(old, text="hello")
    await storage.set_state(replace(group, destiny="other"), "kept")
    to = {"chat": old, "migrate_to_chat_id": new}
    from_ = {"chat": new, "migrate_from_chat_id": old}
    messages = {
        "to first": [to, from_],
        "from first": [from_, to],
        "to only": [to],
        "from only": [from_],
        "twice": [to, to, from_, from_],
    }[order]
    for service_message in messages:
        await feed(**service_message)
    moved = replace(group, chat_id=new)
    assert await storage.get_data(moved) == {"said": "hello"}
    assert await storage.get_state(replace(moved, destiny="other")) == "kept"
    assert await storage.count(chat_id=old, destiny=None) == 0
    await feed(new, text="again")
    assert await storage.get_data(moved) == {"said": "again"}
