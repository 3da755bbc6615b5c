"""A call that waits for the database for long says so, once, and says what to do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import SERVERS, Backend
from blocking import locked
from conftest import Open
from sqlalchemy import URL


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_a_write_behind_a_lock_warns_once_with_the_key_and_the_remedy(
    backend: Backend,
    open_storage: Open,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = await open_storage(backend, slow_after=0.2)
    await storage.set_state(key, "before")
    assert warnings(caplog) == []
    with locked(backend, url_of(backend), storage, key) as lock:
        write = asyncio.create_task(storage.set_state(key, "after"))
        await asyncio.sleep(0.5)  # twice as long, and a little more
        lock.release()
        await write
    (warning,) = warnings(caplog)
    assert "42:-1001234567890:7" in warning
    assert "storage.using(session)" in warning


@pytest.mark.parametrize("backend", SERVERS[:1], ids=str)
async def test_a_function_that_takes_long_warns_with_its_name(
    backend: Backend, open_storage: Open, caplog: pytest.LogCaptureFixture
) -> None:
    storage = await open_storage(backend, slow_after=0.0)

    def monthly_report(session: object) -> None:
        """Take its time."""

    await storage.run_sync(monthly_report)
    assert any("monthly_report" in each for each in warnings(caplog))


@pytest.mark.parametrize("slow_after", [-1.0])
async def test_a_negative_limit_is_refused(open_storage: Open, slow_after: float) -> None:
    with pytest.raises(ValueError, match="slow_after"):
        await open_storage(SERVERS[0], slow_after=slow_after)
