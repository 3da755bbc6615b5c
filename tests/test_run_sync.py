"""The application's functions run where they belong: in the caller's task, or in a thread."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import SERVERS, Backend
from conftest import Open, checked_out, engine_of
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.ext.asyncio import AsyncEngine, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session

from hybrid_storage import SQLAlchemyStorage

ASYNC = [each for each in SERVERS if each.is_async]


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_a_function_runs_in_a_thread_or_in_the_callers_task(
    backend: Backend, open_storage: Open
) -> None:
    storage: SQLAlchemyStorage = await open_storage(backend)

    def where(session: Session) -> tuple[Any, threading.Thread]:
        try:
            task = asyncio.current_task()
        except RuntimeError:
            task = None
        return task, threading.current_thread()

    for inside in (False, True):
        if inside:
            async with storage.transaction():
                task, thread = await storage.run_sync(where)
        else:
            task, thread = await storage.run_sync(where)
        assert (task is asyncio.current_task()) is backend.is_async
        assert (thread is threading.current_thread()) is backend.is_async


@pytest.mark.parametrize("backend", ASYNC, ids=str)
async def test_an_async_scoped_session_is_the_callers_in_run_sync(
    backend: Backend, open_storage: Open
) -> None:
    storage: SQLAlchemyStorage = await open_storage(backend)
    engine = engine_of(storage)
    registered = async_scoped_session(
        async_sessionmaker(AsyncEngine(engine)), scopefunc=asyncio.current_task
    )
    mine = registered()
    for _ in range(20):
        assert await storage.run_sync(lambda session: registered()) is mine
    await registered.remove()
    assert len(registered.registry.registry) == 0
    assert checked_out(engine) == 0


class Counting(SQLiteDialect_pysqlite):
    """A dialect that executes statements its own way, as those of proxies and tracers do."""

    supports_statement_cache = True
    executed: list[str]

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        type(self).executed.append(statement)
        super().do_execute(cursor, statement, parameters, context)  # type: ignore[no-untyped-call]


async def test_a_dialects_own_way_to_execute_is_used(tmp_path: Any, key: StorageKey) -> None:
    Counting.executed = []
    registry.register("sqlite.counting", __name__, "Counting")
    storage = SQLAlchemyStorage.from_url(f"sqlite+counting:///{tmp_path}/fsm.db")
    await storage.create_table()
    await storage.set_state(key, "waiting")
    assert await storage.get_state(key) == "waiting"
    assert sum(storage.table.name in each for each in Counting.executed) >= 3
    await storage.close()
