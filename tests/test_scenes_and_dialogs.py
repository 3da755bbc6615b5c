"""Bots with scenes and with aiogram-dialog, driven by updates through a real dispatcher.

Both keep what they know beside a user's own state, under keys of their own making (destinies).
Neither bot configures anything for that.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, cast

import pytest
from aiogram import Bot, Dispatcher, F
from aiogram.client.session.base import BaseSession
from aiogram.dispatcher.event.bases import UNHANDLED
from aiogram.filters import Command
from aiogram.fsm.scene import Scene, SceneRegistry, on
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import StorageKey
from aiogram.methods import (
    AnswerCallbackQuery,
    EditMessageReplyMarkup,
    EditMessageText,
    SendMessage,
    TelegramMethod,
)
from aiogram.methods.base import TelegramType
from aiogram.types import CallbackQuery, Message, Update
from aiogram_dialog import Dialog, DialogManager, StartMode, Window, setup_dialogs
from aiogram_dialog.widgets.kbd import Back, Button, SwitchTo
from aiogram_dialog.widgets.text import Const, Format
from backends import SERVERS, Backend
from conftest import Open, rows

from hybrid_storage import SQLAlchemyEventIsolation, SQLAlchemyStorage

USER = 7
GROUP = -1001234567890
DATE = 1_700_000_000

one_backend_of_each_kind = pytest.mark.parametrize(
    "backend",
    {(backend.server, backend.is_async): backend for backend in SERVERS}.values(),
    ids=str,
)
with_and_without_restarts = pytest.mark.parametrize(
    "restarts", [False, True], ids=["one process", "a restart before each update"]
)


class Telegram(BaseSession):
    """Answers every request as the Bot API does, but from here, and keeps the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = itertools.count(1)
        self.requests: list[TelegramMethod[Any]] = []
        self.sent: list[dict[str, Any]] = []

    async def make_request(
        self, bot: Bot, method: TelegramMethod[TelegramType], timeout: int | None = None
    ) -> TelegramType:
        self.requests.append(method)
        content = json.dumps({"ok": True, "result": self._result(bot, method)})
        return cast("TelegramType", self.check_response(bot, method, 200, content).result)

    def _result(self, bot: Bot, method: TelegramMethod[Any]) -> object:
        if isinstance(method, AnswerCallbackQuery):
            return True
        assert isinstance(method, (SendMessage, EditMessageText, EditMessageReplyMarkup))
        markup = method.reply_markup
        message = {
            "message_id": getattr(method, "message_id", None) or next(self.ids),
            "date": DATE,
            "chat": {"id": method.chat_id, "type": "private"},
            "from": {"id": bot.id, "is_bot": True, "first_name": "Bot"},
            "text": getattr(method, "text", None),
            "reply_markup": markup.model_dump(mode="json", exclude_none=True) if markup else None,
        }
        self.sent.append(message)
        return message

    async def close(self) -> None:
        pass

    async def stream_content(self, *args: Any, **kwargs: Any) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError
        yield b""


class Conversation:
    """A user who talks to bots in a chat.

    :param start: starts the bots' program: makes a dispatcher
    :param restarts: whether to restart that program before each update
    :param chat_id: the chat
    """

    def __init__(
        self, start: Callable[[], Awaitable[Dispatcher]], *, restarts: bool, chat_id: int = USER
    ) -> None:
        self._start = start
        self._restarts = restarts
        self._dispatcher: Dispatcher | None = None
        self._telegram = Telegram()
        self._user = {"id": USER, "is_bot": False, "first_name": "Ada"}
        self._chat: dict[str, Any] = {"id": chat_id, "type": "private"}
        if chat_id != USER:
            self._chat.update(type="supergroup", title="Group")

    async def say(self, text: str, *, bot_id: int = 42) -> list[str]:
        """Send a message; return the texts that the bot answers."""
        message = {"message_id": next(self._telegram.ids), "date": DATE, "text": text}
        message.update({"chat": self._chat, "from": self._user})
        return await self._feed(bot_id, message=message)

    async def click(self, label: str, *, bot_id: int = 42) -> list[str]:
        """Click on a button of the latest message; return the texts that the bot answers."""
        message = self._telegram.sent[-1]
        buttons = itertools.chain(*message["reply_markup"]["inline_keyboard"])
        [data] = [each["callback_data"] for each in buttons if each["text"] == label]
        query = {"id": f"{next(self._telegram.ids)}", "chat_instance": "1", "data": data}
        query.update({"message": {**message, "chat": self._chat}, "from": self._user})
        answers = await self._feed(bot_id, callback_query=query)
        assert any(isinstance(each, AnswerCallbackQuery) for each in self._telegram.requests)
        return answers

    async def _feed(self, bot_id: int, **content: object) -> list[str]:
        bot = Bot(f"{bot_id}:TOKEN", session=self._telegram)
        if self._dispatcher is None or self._restarts:
            if self._dispatcher is not None:
                await self._dispatcher.emit_shutdown(bot=bot)
            self._dispatcher = await self._start()
            await self._dispatcher.emit_startup(bot=bot)
        self._telegram.requests.clear()
        self._telegram.sent.clear()
        raw = {"update_id": next(self._telegram.ids), **content}
        update = Update.model_validate(raw, context={"bot": bot})
        assert await self._dispatcher.feed_update(bot, update) is not UNHANDLED
        return [each["text"] for each in self._telegram.sent if each["text"] is not None]


# Scenes


class NameScene(Scene, state="name"):
    @on.message.enter()
    async def ask(self, message: Message) -> None:
        await message.answer("What is your name?")

    @on.message(F.text)
    async def take(self, message: Message) -> None:
        await self.wizard.update_data(name=message.text)
        await self.wizard.goto(AgeScene)


class AgeScene(Scene, state="age"):
    @on.message.enter()
    async def ask(self, message: Message) -> None:
        name = await self.wizard.get_value("name")
        await message.answer(f"How old are you, {name}?")

    @on.message(F.text == "back")
    async def go_back(self, message: Message) -> None:
        await self.wizard.back()

    @on.message(F.text)
    async def take(self, message: Message) -> None:
        await self.wizard.update_data({"age": message.text})
        await self.wizard.goto(CityScene)


class CityScene(Scene, state="city"):
    @on.message.enter()
    async def ask(self, message: Message) -> None:
        data = await self.wizard.get_data()
        await message.answer(f"Where do you live, {data['name']}, {data['age']}?")

    @on.message(F.text == "back")
    async def go_back(self, message: Message) -> None:
        await self.wizard.back()

    @on.message(F.text)
    async def take(self, message: Message) -> None:
        await message.answer(f"{await self.wizard.get_data()}, {message.text}")
        await self.wizard.clear_data()
        await self.wizard.exit()


def scene_bot(
    storage: SQLAlchemyStorage, isolation: SQLAlchemyEventIsolation | None = None
) -> Dispatcher:
    dispatcher = Dispatcher(storage=storage, events_isolation=isolation)
    dispatcher.startup.register(storage.create_table)
    dispatcher.message.register(NameScene.as_handler(), Command("start"))
    SceneRegistry(dispatcher).add(NameScene, AgeScene, CityScene)
    return dispatcher


def starter(
    build: Callable[[SQLAlchemyStorage], Dispatcher],
    first: SQLAlchemyStorage,
    backend: Backend,
    opener: Open,
) -> Callable[[], Awaitable[Dispatcher]]:
    """Return a function that starts the bots' program, each time with an engine of its own."""

    async def start() -> Dispatcher:
        return build(await opener(backend, table_name=first.table.name))

    return start


@one_backend_of_each_kind
@with_and_without_restarts
async def test_a_conversation_goes_through_scenes_and_back(
    storage: SQLAlchemyStorage, backend: Backend, open_storage: Open, restarts: bool
) -> None:
    key = StorageKey(bot_id=42, chat_id=USER, user_id=USER)
    history = StorageKey(bot_id=42, chat_id=USER, user_id=USER, destiny="scenes_history")
    user = Conversation(starter(scene_bot, storage, backend, open_storage), restarts=restarts)

    assert await user.say("/start") == ["What is your name?"]
    assert await storage.get_state(key) == "name"
    assert await storage.get_data(history) == {}

    assert await user.say("Ada") == ["How old are you, Ada?"]
    assert await storage.get_state(key) == "age"
    at_name = {"state": "name", "data": {"name": "Ada"}}
    assert await storage.get_data(history) == {"history": [at_name]}

    assert await user.say("36") == ["Where do you live, Ada, 36?"]
    assert await storage.get_state(key) == "city"
    at_age = {"state": "age", "data": {"name": "Ada", "age": "36"}}
    assert await storage.get_data(history) == {"history": [at_name, at_age]}

    assert await user.say("back") == ["How old are you, Ada?"]
    assert await storage.get_state(key) == "age"
    assert await storage.get_data(history) == {"history": [at_name]}

    assert await user.say("back") == ["What is your name?"]
    assert await storage.get_data(key) == {"name": "Ada"}
    assert [row[0] for row in await rows(storage)] == ["42:7:7"]

    assert await user.say("Eve") == ["How old are you, Eve?"]
    assert await user.say("63") == ["Where do you live, Eve, 63?"]
    assert await user.say("London") == ["{'name': 'Eve', 'age': '63'}, London"]
    assert await rows(storage) == []


@one_backend_of_each_kind
async def test_two_bots_in_one_chat_have_a_conversation_each(
    storage: SQLAlchemyStorage, backend: Backend, open_storage: Open
) -> None:
    user = Conversation(starter(scene_bot, storage, backend, open_storage), restarts=False)
    assert await user.say("/start", bot_id=42) == ["What is your name?"]
    assert await user.say("Ada", bot_id=42) == ["How old are you, Ada?"]
    assert await user.say("/start", bot_id=43) == ["What is your name?"]
    assert await user.say("Eve", bot_id=43) == ["How old are you, Eve?"]
    assert await user.say("36", bot_id=42) == ["Where do you live, Ada, 36?"]
    assert await user.say("back", bot_id=43) == ["What is your name?"]
    assert await user.say("back", bot_id=42) == ["How old are you, Ada?"]
    assert [(row[0], row[1]) for row in await rows(storage)] == [
        ("42:7:7", "age"),
        ("42:7:7:destiny=scenes_history", None),
        ("43:7:7", "name"),
    ]


# aiogram-dialog


class Order(StatesGroup):
    drink = State()
    confirm = State()


async def choose(query: CallbackQuery, button: Button, manager: DialogManager) -> None:
    manager.dialog_data["drink"] = button.widget_id
    manager.dialog_data.setdefault("seen", []).append(button.widget_id)
    await manager.next()


async def order(query: CallbackQuery, button: Button, manager: DialogManager) -> None:
    assert isinstance(query.message, Message)
    await query.message.answer(f"Seen {manager.dialog_data['seen']}: {manager.start_data}")
    await manager.done()


def dialog_bot(
    storage: SQLAlchemyStorage, isolation: SQLAlchemyEventIsolation | None = None
) -> Dispatcher:
    dispatcher = Dispatcher(storage=storage, events_isolation=isolation)
    dispatcher.startup.register(storage.create_table)

    @dispatcher.message(Command("start"))
    async def start(message: Message, dialog_manager: DialogManager) -> None:
        await dialog_manager.start(Order.drink, {"table": 5}, mode=StartMode.RESET_STACK)

    dispatcher.include_router(
        Dialog(
            Window(
                Const("What would you like?"),
                Button(Const("Tea"), id="tea", on_click=choose),
                Button(Const("Coffee"), id="coffee", on_click=choose),
                state=Order.drink,
            ),
            Window(
                Format("A {dialog_data[drink]} for table {start_data[table]}?"),
                Button(Const("Yes"), id="yes", on_click=order),
                Back(Const("Back")),
                SwitchTo(Const("Something else"), id="other", state=Order.drink),
                state=Order.confirm,
            ),
        )
    )
    setup_dialogs(dispatcher, events_isolation=isolation)
    return dispatcher


@one_backend_of_each_kind
@pytest.mark.parametrize(
    ("chat_id", "stack", "restarts"),
    [
        pytest.param(USER, "", False, id="private chat"),
        pytest.param(USER, "", True, id="private chat, a restart before each update"),
        pytest.param(GROUP, "%3C7%3E", True, id="group, a restart before each update"),
    ],
)
async def test_a_dialog_goes_through_its_windows(
    storage: SQLAlchemyStorage,
    backend: Backend,
    open_storage: Open,
    chat_id: int,
    stack: str,
    restarts: bool,
) -> None:
    user = Conversation(
        starter(dialog_bot, storage, backend, open_storage), restarts=restarts, chat_id=chat_id
    )

    assert await user.say("/start") == ["What would you like?"]
    context, own_stack = (row[0] for row in await rows(storage))
    assert context.startswith(f"42:{chat_id}:{chat_id}:destiny=aiogd%3Acontext%3A")
    assert own_stack == f"42:{chat_id}:{chat_id}:destiny=aiogd%3Astack%3A{stack}"

    assert await user.click("Tea") == ["A tea for table 5?"]
    assert await user.click("Something else") == ["What would you like?"]
    assert await user.click("Tea") == ["A tea for table 5?"]
    assert await user.click("Back") == ["What would you like?"]
    assert await user.click("Coffee") == ["A coffee for table 5?"]
    [(row, state, data), _] = await rows(storage)
    assert (row, state) == (context, None)
    assert json.loads(data)["state"] == "Order:confirm"
    assert json.loads(data)["dialog_data"] == {"drink": "coffee", "seen": ["tea", "tea", "coffee"]}

    assert await user.click("Yes") == ["Seen ['tea', 'tea', 'coffee']: {'table': 5}"]
    assert await rows(storage) == []


@one_backend_of_each_kind
async def test_a_dialog_that_is_started_anew_forgets_the_last(
    storage: SQLAlchemyStorage, backend: Backend, open_storage: Open
) -> None:
    user = Conversation(starter(dialog_bot, storage, backend, open_storage), restarts=True)
    assert await user.say("/start") == ["What would you like?"]
    assert await user.click("Tea") == ["A tea for table 5?"]
    assert await user.say("/start") == ["What would you like?"]
    assert await user.click("Coffee") == ["A coffee for table 5?"]
    assert len(await rows(storage)) == 2
    assert await user.click("Yes") == ["Seen ['coffee']: {'table': 5}"]
    assert await rows(storage) == []
