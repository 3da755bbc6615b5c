"""A bot with a form. Its state is in the database of `SessionLocal`, and outlives the process.

BOT_TOKEN is the bot's token. BOT_API_URL and DATABASE_URL may name another Bot API server than
Telegram's and another database than a file here.
"""

import asyncio
import logging
import os

from aiogram import Bot, Dispatcher, F
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.filters import Command
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State, StatesGroup
from aiogram.types import Message
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, sessionmaker

from hybrid_storage import FlushMiddleware, SQLAlchemyStorage


class Base(DeclarativeBase):
    """The application's own tables; the storage's table joins them."""


url = os.getenv("DATABASE_URL")
SessionLocal = sessionmaker(create_engine(url or "sqlite:///form_bot.db"))
storage = SQLAlchemyStorage(SessionLocal, Base)
# One handler at a time per user; leave out lease=None if several processes run this bot.
isolation = storage.create_isolation(lease=None, unit_of_work=True)
dp = Dispatcher(storage=storage, events_isolation=isolation)
dp.startup.register(storage.create_table)


class Form(StatesGroup):
    name = State()
    age = State()
    city = State()


@dp.message(Command("start"))
async def start(message: Message, state: FSMContext) -> None:
    await state.set_data({})
    await state.set_state(Form.name)
    await message.answer("What is your name?")


@dp.message(Command("cancel"))
async def cancel(message: Message, state: FSMContext) -> None:
    await state.clear()
    await message.answer("Cancelled. /start begins again.")


@dp.message(Form.name, F.text.as_("name"))
async def take_name(message: Message, state: FSMContext, name: str) -> None:
    await state.update_data(name=name)
    await state.set_state(Form.age)
    await message.answer(f"How old are you, {name}?")


@dp.message(Form.age, F.text.as_("text"))
async def take_age(message: Message, state: FSMContext, text: str) -> None:
    if not text.isdecimal():
        await message.answer("Please send your age as a number.")
        return
    await state.update_data(age=int(text))
    await state.set_state(Form.city)
    await message.answer("Which city do you live in?")


@dp.message(Form.city, F.text.as_("city"))
async def take_city(message: Message, state: FSMContext, city: str) -> None:
    data = await state.get_data()
    await state.clear()
    await message.answer(f"Thank you: {data['name']}, {data['age']}, {city}.")


@dp.message()
async def explain(message: Message) -> None:
    await message.answer("/start begins the form, /cancel leaves it.")


async def main() -> None:
    server = TelegramAPIServer.from_base(os.getenv("BOT_API_URL", "https://api.telegram.org"))
    bot = Bot(os.environ["BOT_TOKEN"], session=AiohttpSession(api=server))
    # Writes before each answer: a user who reads a question can answer it, whatever happens to
    # this process.
    bot.session.middleware(FlushMiddleware(storage))
    await dp.start_polling(bot)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
