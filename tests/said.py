"""Every statement that the storage sends, by what it is sent for. For ``test_dialects.py``."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from dataclasses import replace
from functools import partial
from typing import Any

from aiogram.fsm.storage.base import StorageKey
from anyio import to_thread
from backends import Backend
from sqlalchemy import URL, Engine, MetaData, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from hybrid_storage import SQLAlchemyStorage
from hybrid_storage._sql.leases import Fence, Leases
from hybrid_storage._sql.rows import Rows
from hybrid_storage.migration import TableSource, migrate

KEY = StorageKey(bot_id=42, chat_id=7, user_id=7)
OTHER = replace(KEY, user_id=8)
HISTORY = replace(KEY, destiny="scenes_history")

# What SQLAlchemy asks for itself: the version, the settings, which tables are there. Every engine
# that has a dialect of its own, or passes for PostgreSQL or MySQL, answers that.
_OF_SQLALCHEMY = re.compile(
    r"pg_catalog|standard_conforming_strings|current_schema|hstore|information_schema"
    r"|\bSHOW\b|DESCRIBE|@@transaction_isolation|@@tx_isolation|SELECT VERSION|SELECT DATABASE"
    r"|SELECT 'x'|SELECT CAST\('test|@@sql_mode|@@lower_case|^SELECT 1$|DROP TABLE",
    re.IGNORECASE,
)

Said = dict[str, set[str]]
"""The statements, by what they are sent for."""


class Recorder:
    """Notes each statement under the heading of the moment."""

    def __init__(self) -> None:
        self.said: Said = defaultdict(set)
        self._heading = ""

    @contextmanager
    def heading(self, name: str) -> Iterator[None]:
        self._heading = name
        try:
            yield
        finally:
            self._heading = ""

    def note(self, *arguments: Any) -> None:
        statement = arguments[2]
        if self._heading and not _OF_SQLALCHEMY.search(statement):
            self.said[self._heading].add(statement)


async def everything_said(backend: Backend, url: URL, name: str, kin: dict[str, Any]) -> Said:
    """Use all that there is, and return the statements.

    :param name: of the table
    :param kin: the attributes by which the dialect of another engine differs
    """
    engine = backend.engine(url)
    base = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    base.connect().close()  # it reads what the server is
    for attribute, value in kin.items():
        setattr(base.dialect, attribute, value)
    recorder = Recorder()
    event.listen(base, "before_cursor_execute", recorder.note)
    try:
        for expires_after in (None, 3600.0):
            storage = SQLAlchemyStorage(
                backend.factory(engine),
                MetaData(),
                table_name=name,
                columns=True,
                expires_after=expires_after,
            )
            await _use(storage, backend.factory(engine), recorder)
            await to_thread.run_sync(_drop, storage, base)
        return recorder.said
    finally:
        base.dispose()


def _drop(storage: SQLAlchemyStorage, engine: Engine) -> None:
    storage.metadata.drop_all(engine)


async def _use(storage: SQLAlchemyStorage, factory: Any, recorder: Recorder) -> None:
    parts: dict[str, Callable[[SQLAlchemyStorage], Awaitable[object]]] = {
        "create_table()": _tables,
        "calls": _calls,
        "transaction()": _transactions,
        "transaction() in a task of another": _nested,
        "find(), count(), changes": _conversations,
        "rename, move": _renames,
        "migrate()": partial(_migration, factory=factory),
    }
    for name, part in parts.items():
        with recorder.heading(name):
            await part(storage)
    isolations: dict[str, dict[str, Any]] = {
        "unit of work": {"lease": None, "unit_of_work": True},
        "lease": {"lease": 30.0, "unit_of_work": False},
        "unit of work with a lease": {"lease": 30.0, "unit_of_work": True},
    }
    for name, options in isolations.items():
        with recorder.heading(name):
            await _isolated(storage, **options)


async def _tables(storage: SQLAlchemyStorage) -> None:
    storage.create_isolation()
    await storage.create_table()


async def _calls(storage: SQLAlchemyStorage) -> None:
    for key in (KEY, HISTORY):
        await storage.get_state(key)
        await storage.set_state(key, "Order:cart")
        await storage.set_data(key, {"name": "Ada"})
        await storage.update_data(key, {"age": 36})
        await storage.get_data(key)
        await storage.set_state(key, None)
        await storage.set_data(key, {})
        await storage.update_data(key, {"age": 36})
        await storage.change_data(key, lambda data: {**data, "age": 37})
        await storage.remove_data(key, "age")
        await storage.clear(key)
        await storage.set_state(key, "Order:cart")


async def _transactions(storage: SQLAlchemyStorage) -> None:
    async with storage.transaction() as session:
        await storage.update_data(KEY, {"age": 38})
        async with storage.transaction():
            await storage.set_state(OTHER, "Order:cart")
        await storage.set_state(OTHER, None)
        assert session.in_transaction()


async def _nested(storage: SQLAlchemyStorage) -> None:
    async def other() -> None:
        async with storage.transaction():
            await storage.set_state(OTHER, "Order:cart")

    async with storage.transaction():
        await storage.get_state(KEY)
        await asyncio.ensure_future(other())


async def _conversations(storage: SQLAlchemyStorage) -> None:
    await storage.set_data(KEY, {"age": 36})
    every: list[dict[str, Any]] = [{}, {"chat_id": 7}, {"state": "Order:cart"}, {"idle_for": 0.0}]
    for filters in every:
        async for _ in storage.find(**filters):
            pass
        await storage.count(**filters)
        await storage.count_by_state(**filters)
    await storage.conversation(KEY)
    await storage.change_states("Order:paid", state="Order:cart")
    await storage.change_states(None, state="Order:paid", idle_for=0.0)
    await storage.fill_columns()
    with suppress(ValueError):  # nothing expires
        await storage.purge()
    await storage.clear_all(chat_id=7, idle_for=0.0)
    await storage.set_state(KEY, "Order:cart")
    await storage.forget_user(7)


async def _renames(storage: SQLAlchemyStorage) -> None:
    await storage.set_state(KEY, "Order:cart")
    await storage.set_data(HISTORY, {"history": [{"state": "Order:cart", "data": {}}]})
    await storage.rename_state("Order:cart", "Shop:cart")
    await storage.move_chat(7, 9)


async def _migration(storage: SQLAlchemyStorage, factory: Any) -> None:
    await storage.set_state(KEY, "Order:cart")
    name = f"{storage.table.name}_new"
    target = SQLAlchemyStorage(factory, MetaData(), table_name=name, columns=True)
    await target.create_table()
    await migrate(TableSource(storage), target)
    await storage.run_sync(lambda session: target.metadata.drop_all(session.connection()))


async def _isolated(storage: SQLAlchemyStorage, **options: Any) -> None:
    isolation = storage.create_isolation(**options)
    await storage.create_table()
    for _ in range(2):
        async with isolation.lock(KEY):
            await storage.set_state(KEY, "Order:cart")
            await storage.update_data(KEY, {"age": 36})
            await storage.set_data(HISTORY, {"history": []})
            await storage.flush()
            await storage.set_data(HISTORY, {})
            await storage.set_state(HISTORY, None)
    async with isolation.lock(KEY):
        if options["unit_of_work"]:
            await storage.get_state(KEY)
            await Context().run(asyncio.ensure_future, storage.set_state(KEY, "Order:paid"))
            await storage.set_state(KEY, "Order:sent")  # a conflict
    async with isolation.lock(KEY), storage.transaction():
        await storage.update_data(KEY, {"age": 37})
        await storage.set_data(HISTORY, {"history": []})
    await isolation.close()
    if options["lease"]:
        await storage.run_sync(partial(_renewed, storage))


def _renewed(storage: SQLAlchemyStorage, session: Session) -> None:
    """Do what happens to leases while a handler runs for long, and later."""
    locks = storage.metadata.tables[f"{storage.table.name}_lock"]
    leases, connection = Leases(locks, Rows(storage.table)), session.connection()
    taken = leases.acquire(connection, "row", "owner", 30.0, [])
    assert taken is not None
    fence = Fence("row", "owner", taken.version, 30.0)
    leases.renew(connection, ["row"], "owner", 30.0)
    leases.holds(connection, fence, frees=False)
    leases.look(connection, "row")
    leases.release_unlocked(connection, fence)
    leases.release(connection, "row", "owner")
    leases.purge(connection, -1.0, 10)
