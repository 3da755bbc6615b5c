"""A pooler in transaction mode forgets what a driver has prepared: the storage's calls go on."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import POSTGRESQL, Backend
from conftest import Open, engine_of
from sqlalchemy import event

FORGET = "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"  # drivers notice a plain DEALLOCATE

NO_CACHES = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_calls_go_on_where_prepared_statements_are_forgotten(
    backend: Backend, open_storage: Open, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    storage = await open_storage(
        backend,
        engine_options={
            "pool_size": 1,
            "max_overflow": 0,
            "connect_args": NO_CACHES if backend.driver == "asyncpg" else {},
        },
    )

    def forget(connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute(FORGET)
        cursor.close()
        connection.commit()

    event.listen(engine_of(storage).pool, "checkout", forget)
    for number in range(20):
        await storage.update_data(key, {str(number): number})
        assert len(await storage.get_data(key)) == number + 1
    failed = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert len(failed) <= 4  # at first, not with every call
