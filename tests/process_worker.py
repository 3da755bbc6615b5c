"""Processes that write: a command at a time, for ``test_processes.py``, or once, and are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import warnings
from multiprocessing.connection import Connection
from typing import Any

from aiogram.fsm.storage.base import StorageKey
from backends import SERVERS
from blocking import sqlite_without_fsync
from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.orm import sessionmaker

from hybrid_storage import SQLAlchemyStorage

KEY = StorageKey(bot_id=42, chat_id=-1001234567890, user_id=7)


async def carry_out(command: dict[str, Any], url: URL) -> None:
    """Set fields of a conversation's data; create the table first if so told."""
    backend = next(each for each in SERVERS if each.name == command["backend"])
    engine = backend.engine(url)
    storage = SQLAlchemyStorage(backend.factory(engine), table_name=command["table"])
    if command["create"]:
        await storage.create_table()
    await asyncio.gather(*(storage.update_data(KEY, {name: name}) for name in command["fields"]))
    if isinstance(engine, Engine):
        engine.dispose()
    else:
        await engine.dispose()


def main(commands: Connection) -> None:
    """Carry out one command after the other; answer each with what went wrong, or nothing.

    :param commands: where they come from, and the answers go to; None is the last
    """
    warnings.simplefilter("error")
    commands.send("")  # ready
    with sqlite_without_fsync():
        for command in iter(commands.recv, None):
            try:
                asyncio.run(carry_out(command, make_url(command["url"])))
            except Exception as error:
                commands.send(repr(error))
            else:
                commands.send("")


def order_and_die(told: Connection, url: str, table: str, orders: str) -> None:
    """Write a state and an order in one transaction, and be killed before it is committed."""
    asyncio.run(_order_and_die(told, url, table, orders))


async def _order_and_die(told: Connection, url: str, table: str, orders: str) -> None:
    storage = SQLAlchemyStorage(sessionmaker(create_engine(url)), table_name=table)
    async with storage.transaction():
        await storage.set_state(KEY, "paid")
        insert = text(f"INSERT INTO {orders} (product) VALUES ('tea')")
        await storage.run_sync(lambda session: session.execute(insert))
        told.send("written")
        os.kill(os.getpid(), signal.SIGKILL)
