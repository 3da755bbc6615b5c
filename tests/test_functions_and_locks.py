"""What a failing commit must not hide, and what synchronous code must not wait for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from aiogram.types import TelegramObject
from backends import POSTGRESQL, SQLITE, Backend
from conftest import Open, engine_of
from sqlalchemy.exc import InvalidRequestError

from hybrid_storage import SessionMiddleware, SQLAlchemyStorage

pytestmark = pytest.mark.parametrize("backend", [SQLITE[0], POSTGRESQL[0]], ids=str)


async def test_a_commit_that_fails_leaves_error_handlers_a_session_that_says_so(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    data: dict[str, Any] = {}

    async def handler(event: TelegramObject, data: dict[str, Any]) -> None:
        model: Any = storage.model
        data["session"].add_all([model(id="twice"), model(id="twice")])

    with pytest.raises(Exception, match=r"(?i)unique|conflict|identity|duplicate"):
        await SessionMiddleware(storage)(handler, TelegramObject(), data)
    with pytest.raises(InvalidRequestError, match="rolled back"):
        data["session"].get(storage.model, "twice")


async def test_synchronous_code_does_not_wait_for_the_handler_that_calls_it(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    isolation = storage.create_isolation(unit_of_work=True)
    await storage.create_table()

    def locks() -> bool:
        with isolation.lock_sync(key):
            held: bool = isolation.still_held(key)
        assert not isolation.still_held(key)
        return held

    async with isolation.lock(key):
        with pytest.raises(RuntimeError, match="wait for its own handler"):
            await storage.run_sync(lambda session: locks())
    with pytest.raises(RuntimeError, match="blocks its thread"):
        locks()
    assert await asyncio.to_thread(locks)
    storage.metadata.drop_all(engine_of(storage))
