"""The bot: a form that begins anew when it is filled in, and counts the steps.

Each handler reads the conversation, takes its time, and writes what follows from what it has read:
it goes wrong where two run at once for a user. All of it is ordinary aiogram.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiogram import Dispatcher
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.memory import DisabledEventIsolation
from aiogram.methods import SendMessage
from aiogram.types import Message, TelegramObject, Update
from sqlalchemy.orm import Session

from hybrid_storage import SessionMiddleware, SQLAlchemyStorage

from .tables import Base, SessionLocal, Step, engine

storage: SQLAlchemyStorage[Session] = SQLAlchemyStorage(SessionLocal, Base)
isolation = storage.create_isolation(unit_of_work=True)

# Only to show what it is good for.
is_isolated = os.getenv("ISOLATION") != "off"
dp = Dispatcher(
    storage=storage, events_isolation=isolation if is_isolated else DisabledEventIsolation()
)
dp.startup.register(storage.create_table)
dp.shutdown.register(engine.dispose)


async def only_once(
    handler: Callable[[TelegramObject, dict[str, Any]], Awaitable[Any]],
    event: TelegramObject,
    data: dict[str, Any],
) -> Any:
    """Leave out an update that has been dealt with: its answer did not reach Telegram.

    This is asked inside of the user's lock and in the transaction in which the step is booked: no
    other process is at it, and it has not been done by half.
    """
    assert isinstance(event, Update)
    if await storage.run_sync(Session.get, Step, event.update_id) is None:
        return await handler(event, data)
    return None


# In this order, both inside of the user's lock.
dp.update.outer_middleware(SessionMiddleware(storage))
dp.update.outer_middleware(only_once)


class Form(StatesGroup):
    name = State()
    age = State()
    city = State()


NEXT = {Form.name: Form.age, Form.age: Form.city, Form.city: Form.name}


@dp.message()
async def answer(
    message: Message, state: FSMContext, event_update: Update, raw_state: str | None
) -> SendMessage:
    """Book the answer to one question, and ask the next."""
    began = time.monotonic()
    question = next((each for each in NEXT if each.state == raw_state), Form.name)
    number = await state.get_value("steps", 0) + 1
    await asyncio.sleep(random.uniform(0, 0.01))  # somebody else's API
    await state.update_data(steps=number)
    await state.set_state(NEXT[question])
    step = Step(
        update_id=event_update.update_id,
        user_id=message.chat.id,
        number=number,
        question=question._state,
        worker=os.getpid(),
        began=began,
        ended=time.monotonic(),
    )
    await storage.run_sync(Session.add, step)
    # Returned rather than awaited: the answer to the webhook takes it along.
    return message.answer(f"{number}: what is your {NEXT[question]._state}?")
