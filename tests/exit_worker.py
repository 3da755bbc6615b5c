"""A bot with a synchronous factory and isolation, whose handler is at work until the end.

``python exit_worker.py URL polling|webhook API`` says ``at work`` once the handler runs.
"""

from __future__ import annotations

import asyncio
import sys

from aiogram import Bot, Dispatcher
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.fsm.context import FSMContext
from aiogram.types import Message
from aiogram.webhook.aiohttp_server import SimpleRequestHandler, setup_application
from aiohttp import web
from bot_api import TOKEN
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from hybrid_storage import SQLAlchemyStorage


async def work(message: Message, state: FSMContext) -> None:
    await state.set_state("at work")
    sys.stdout.write("at work\n")
    sys.stdout.flush()
    for number in range(10_000):
        await state.update_data(number=number)
        await asyncio.sleep(0.001)


def dispatcher(url: str) -> Dispatcher:
    storage = SQLAlchemyStorage(sessionmaker(create_engine(url)), table_name="exit_fsm")
    dp = Dispatcher(storage=storage, events_isolation=storage.create_isolation())
    dp.startup.register(storage.create_table)
    dp.message.register(work)
    return dp


async def poll(dp: Dispatcher, bot: Bot) -> None:
    await dp.start_polling(bot)


def main(url: str, mode: str, api: str) -> None:
    dp = dispatcher(url)
    if mode == "polling":

        async def run() -> None:
            session = AiohttpSession(api=TelegramAPIServer.from_base(api))
            await poll(dp, Bot(TOKEN, session=session))

        asyncio.run(run())
    else:
        app = web.Application()
        bot = Bot(TOKEN, session=AiohttpSession(api=TelegramAPIServer.from_base(api)))
        SimpleRequestHandler(dp, bot).register(app, path="/")
        setup_application(app, dp, bot=bot)
        web.run_app(app, host="127.0.0.1", port=int(mode), print=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
