"""Bots with a synchronous factory and isolation, whose handlers are at work until the end.

A line ``URL TABLE polling|PORT API`` on the standard input starts a bot. It says ``PID at work``
once its handler runs; ``PID ended STATUS`` is said of it afterwards. Bots are forked, because the
imports take longer than all the rest; each ends as any Python program does.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
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


def say(what: str, pid: int | None = None) -> None:
    sys.stdout.write(f"{pid or os.getpid()} {what}\n")
    sys.stdout.flush()


async def work(message: Message, state: FSMContext) -> None:
    await state.set_state("at work")
    say("at work")
    for number in range(10_000):
        await state.update_data(number=number)
        await asyncio.sleep(0.001)


def dispatcher(url: str, table: str) -> Dispatcher:
    storage = SQLAlchemyStorage(sessionmaker(create_engine(url)), table_name=table)
    dp = Dispatcher(storage=storage, events_isolation=storage.create_isolation())
    dp.startup.register(storage.create_table)
    dp.message.register(work)
    return dp


async def poll(dp: Dispatcher, bot: Bot) -> None:
    await dp.start_polling(bot)


def main(url: str, table: str, mode: str, api: str) -> None:
    faulthandler.register(signal.SIGUSR1)  # tells where a bot is that does not end
    dp = dispatcher(url, table)
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
    for line in sys.stdin:
        bot = os.fork()
        if not bot:
            main(*line.split())
            break
        say(f"ended {os.waitstatus_to_exitcode(os.waitpid(bot, 0)[1])}", bot)
