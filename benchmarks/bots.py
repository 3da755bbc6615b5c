"""Four bots, and users who talk to them: updates pass a real dispatcher, answers go nowhere."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from aiogram import Bot, Dispatcher, F
from aiogram.client.session.base import BaseSession
from aiogram.dispatcher.event.bases import UNHANDLED
from aiogram.filters import Command, StateFilter
from aiogram.fsm.context import FSMContext
from aiogram.fsm.scene import Scene, SceneRegistry, on
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import BaseEventIsolation, BaseStorage, StorageKey
from aiogram.methods import AnswerCallbackQuery, TelegramMethod
from aiogram.methods.base import TelegramType
from aiogram.types import CallbackQuery, Message, Update
from aiogram_dialog import Dialog, DialogManager, StartMode, Window, setup_dialogs
from aiogram_dialog.widgets.kbd import Back, Button
from aiogram_dialog.widgets.text import Const, Format

DATE = 1_700_000_000
BOT = {"id": 42, "is_bot": True, "first_name": "Bot"}

_numbers = itertools.count(1)


class Telegram(BaseSession):
    """Answers requests as the Bot API does, and remembers each chat's latest message."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: dict[int, dict[str, Any]] = {}

    async def make_request(
        self, bot: Bot, method: TelegramMethod[TelegramType], timeout: int | None = None
    ) -> TelegramType:
        if isinstance(method, AnswerCallbackQuery):
            return cast("TelegramType", True)
        request: Any = method
        message = {
            "message_id": getattr(request, "message_id", None) or next(_numbers),
            "date": DATE,
            "chat": {"id": request.chat_id, "type": "private"},
            "from": BOT,
            "text": getattr(request, "text", None) or "the text from before",
        }
        if request.reply_markup is not None:
            message["reply_markup"] = request.reply_markup.model_dump(exclude_none=True)
        self.latest[request.chat_id] = message
        return cast("TelegramType", Message.model_validate(message, context={"bot": bot}))

    async def close(self) -> None:
        pass

    async def stream_content(self, *args: Any, **kwargs: Any) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError
        yield b""


class NameScene(Scene, state="name"):
    """Asks for the name."""

    @on.message.enter()
    async def ask(self, message: Message) -> None:
        await message.answer("What is your name?")

    @on.message(F.text)
    async def take(self, message: Message) -> None:
        await self.wizard.update_data(name=message.text)
        await self.wizard.goto(AgeScene)


class AgeScene(Scene, state="age"):
    """Asks for the age."""

    @on.message.enter()
    async def ask(self, message: Message) -> None:
        await message.answer(f"How old are you, {await self.wizard.get_value('name')}?")

    @on.message(F.text == "back")
    async def go_back(self, message: Message) -> None:
        await self.wizard.back()

    @on.message(F.text)
    async def take(self, message: Message) -> None:
        await message.answer(f"{await self.wizard.get_data()}, {message.text}")
        await self.wizard.clear_data()
        await self.wizard.exit()


class Form(StatesGroup):
    """The questions of the form."""

    name = State()
    age = State()
    city = State()
    drink = State()


FORM: dict[str | None, State | None] = {
    None: Form.name,
    "Form:name": Form.age,
    "Form:age": Form.city,
    "Form:city": Form.drink,
    "Form:drink": None,
}
"""What comes after a state."""


class Order(StatesGroup):
    """The windows of the dialog."""

    drink = State()
    confirm = State()


async def _choose(query: CallbackQuery, button: Button, manager: DialogManager) -> None:
    manager.dialog_data["drink"] = button.widget_id
    await manager.next()


async def _order(query: CallbackQuery, button: Button, manager: DialogManager) -> None:
    await manager.done()


async def _start(message: Message, dialog_manager: DialogManager) -> None:
    await dialog_manager.start(Order.drink, mode=StartMode.RESET_STACK)


@dataclass(frozen=True)
class Bots:
    """A contender's bots: all work on one storage, with one isolation."""

    storage: BaseStorage
    isolation: BaseEventIsolation
    _users: dict[str, Users] = field(default_factory=dict)

    def users_of(self, build: Callable[[Bots], Dispatcher]) -> Users:
        """Return those who talk to the bot that a function builds."""
        users = self._users.get(build.__name__)
        if users is None:
            users = self._users[build.__name__] = Users(build(self))
        return users

    def dispatcher(self) -> Dispatcher:
        """Return a new dispatcher."""
        return Dispatcher(storage=self.storage, events_isolation=self.isolation)


def _step_bot(bots: Bots) -> Dispatcher:
    dispatcher = bots.dispatcher()

    async def count(message: Message, state: FSMContext) -> None:
        seen = (await state.get_data()).get("seen", 0)
        await state.update_data(seen=seen + 1)
        await state.set_state(Form.name)

    dispatcher.message.register(count)
    return dispatcher


def _form_bot(bots: Bots) -> Dispatcher:
    dispatcher = bots.dispatcher()

    async def take(message: Message, state: FSMContext, raw_state: str | None) -> None:
        await state.update_data({str(raw_state): message.text})
        await state.set_state(FORM[raw_state])
        await message.answer("Thank you. And?")

    for each in (None, Form.name, Form.age, Form.city, Form.drink):
        dispatcher.message.register(take, StateFilter(each))
    return dispatcher


def _scene_bot(bots: Bots) -> Dispatcher:
    dispatcher = bots.dispatcher()
    dispatcher.message.register(NameScene.as_handler(), Command("start"))
    SceneRegistry(dispatcher).add(NameScene, AgeScene)
    return dispatcher


def _dialog_bot(bots: Bots) -> Dispatcher:
    dispatcher = bots.dispatcher()
    dispatcher.message.register(_start, Command("start"))
    drinks = Window(
        Const("What would you like?"),
        Button(Const("Tea"), id="tea", on_click=_choose),
        state=Order.drink,
    )
    confirm = Window(
        Format("A {dialog_data[drink]}?"),
        Button(Const("Yes"), id="yes", on_click=_order),
        Back(Const("Back")),
        state=Order.confirm,
    )
    dispatcher.include_router(Dialog(drinks, confirm))
    setup_dialogs(dispatcher, events_isolation=bots.isolation)
    return dispatcher


class Users:
    """Those who talk to one bot."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._telegram = Telegram()
        self._bot = Bot("42:TOKEN", session=self._telegram)

    async def say(self, key: StorageKey, text: str) -> None:
        """Have a user send a message."""
        user = {"id": key.user_id, "is_bot": False, "first_name": "Ada"}
        chat = {"id": key.chat_id, "type": "private"}
        message = {"message_id": next(_numbers), "date": DATE, "text": text}
        await self._feed(message={**message, "chat": chat, "from": user})

    async def click(self, key: StorageKey, label: str) -> None:
        """Have a user click on a button of the chat's latest message."""
        message = self._telegram.latest[key.chat_id]
        buttons = itertools.chain(*message["reply_markup"]["inline_keyboard"])
        data = next(each["callback_data"] for each in buttons if each["text"] == label)
        user = {"id": key.user_id, "is_bot": False, "first_name": "Ada"}
        query = {"id": str(next(_numbers)), "chat_instance": "1", "data": data}
        await self._feed(callback_query={**query, "message": message, "from": user})

    async def _feed(self, **content: object) -> None:
        raw = {"update_id": next(_numbers), **content}
        update = Update.model_validate(raw, context={"bot": self._bot})
        answer = await self._dispatcher.feed_update(self._bot, update)
        assert answer is not UNHANDLED


async def talk_to_step_bot(bots: Bots, key: StorageKey) -> None:
    """Send one message."""
    await bots.users_of(_step_bot).say(_own(key, 1), "Hello")


async def talk_to_form_bot(bots: Bots, key: StorageKey) -> None:
    """Fill in the form in five messages."""
    users, key = bots.users_of(_form_bot), _own(key, 2)
    for _ in range(5):
        await users.say(key, f"Ada {next(_numbers)}")


async def talk_to_scene_bot(bots: Bots, key: StorageKey) -> None:
    """Go through the scenes in five messages."""
    users, key = bots.users_of(_scene_bot), _own(key, 3)
    for text in ("/start", "Ada", "back", "Eve", "36"):
        await users.say(key, text)


async def talk_to_dialog_bot(bots: Bots, key: StorageKey) -> None:
    """Go through the dialog in one message and four clicks."""
    users, key = bots.users_of(_dialog_bot), _own(key, 4)
    await users.say(key, "/start")
    for label in ("Tea", "Back", "Tea", "Yes"):
        await users.click(key, label)


def _own(key: StorageKey, bot: int) -> StorageKey:
    """Return a key that the other bots do not share."""
    number = 10 * key.user_id + bot
    return replace(key, chat_id=number, user_id=number)
