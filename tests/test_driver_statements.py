"""The contract of units of work whose statements asyncpg runs: ``driver_statements=True``.

The tests are those of the other modules. What is added is what is different: errors get the form
that SQLAlchemy gives them, a transaction gets its statements by SQLAlchemy, listeners see nothing.
"""

from __future__ import annotations

import asyncio
from types import ModuleType
from typing import Any

import pytest
import test_unit_attacks
import test_unit_bots
import test_unit_of_work
import test_unit_transactions
from backends import BY_DRIVER, POSTGRESQL, Backend
from blocking import locked, statements
from conftest import Open, engine_of
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from units import KEY, Bot, outside, running

from hybrid_storage import SQLAlchemyStorage


def _tests_of(module: ModuleType) -> dict[str, Any]:
    """Return the tests of a module that have a bot on whatever backend there is."""
    return {
        name: test
        for name, test in vars(module).items()
        if name.startswith("test_")
        and "bot" in test.__code__.co_varnames[: test.__code__.co_argcount]
        and "bot" in test.__annotations__
    }


for _module in (test_unit_of_work, test_unit_transactions, test_unit_attacks, test_unit_bots):
    globals().update(_tests_of(_module))


@pytest.fixture
def backend() -> Backend:
    """Return asyncpg, which runs the statements itself."""
    return BY_DRIVER


async def update(bot: Bot, **data: Any) -> None:
    """Have an update change fields."""
    async with bot.update():
        await bot.storage.update_data(KEY, data)


async def test_listeners_see_no_statement_of_an_update(bot: Bot) -> None:
    with statements(bot.storage.table.name) as seen:
        async with bot.isolation.lock(KEY):
            await bot.storage.set_state(KEY, "Form:age")
    assert len(seen) <= 1  # reads, where no lock reads along
    assert (await bot.stored())[0] == "Form:age"


async def test_without_it_they_see_each(open_storage: Open) -> None:
    async with running(await open_storage(POSTGRESQL[2]), 30.0) as bot:
        with statements(bot.storage.table.name) as seen:
            await update(bot, age=36)
        assert len(seen) == 2


async def test_a_transaction_that_a_listener_has_begun_is_committed(bot: Bot) -> None:
    """SQLAlchemy carries out, and commits, what is in a transaction already."""
    engine = engine_of(bot.storage)

    def begin(connection: Any, *_: object) -> None:
        connection.cursor().execute("SELECT 1")

    event.listen(engine, "checkout", begin)
    try:
        await update(bot, age=36)
    finally:
        event.remove(engine, "checkout", begin)
    assert await bot.stored() == ("Form:name", {"name": "Ada", "seen": [1], "age": 36})


async def test_a_connection_that_was_cut_is_replaced(
    bot: Bot, caplog: pytest.LogCaptureFixture
) -> None:
    await update(bot, age=35)
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    engine = engine_of(bot.storage)
    async with bot.update():
        await bot.storage.update_data(KEY, {"age": 36})
        other: Any = POSTGRESQL[0].engine(engine.url)
        with other.connect() as connection:
            name = engine.url.database
            connection.execute(text(f"{cut} AND datname = :name"), {"name": name})
        other.dispose()
    assert await bot.stored() == ("Form:name", {"name": "Ada", "seen": [1], "age": 36})
    await bot.assert_free()
    assert "trying again" in caplog.text


async def test_an_error_of_the_server_has_the_form_that_sqlalchemy_gives_it(
    open_storage: Open, url_of: Any
) -> None:
    engine_options = {
        "connect_args": {"server_settings": {"lock_timeout": "300ms"}},
        "hide_parameters": True,
    }
    storage: SQLAlchemyStorage = await open_storage(
        BY_DRIVER, engine_options=engine_options, retry_for=0
    )
    async with running(storage, None, driver_statements=True) as bot:
        with (
            locked(BY_DRIVER, url_of(BY_DRIVER), storage, KEY),
            pytest.raises(DBAPIError, match="lock timeout") as caught,
        ):
            await update(bot, age=36)
        assert getattr(caught.value.orig, "sqlstate", None) == "55P03"
        assert "storage.using(session)" in str(caught.value)
        assert "Ada" not in str(caught.value)  # as the engine says
        await update(bot, age=37)
        assert (await bot.stored())[1]["age"] == 37


async def test_a_flush_that_waits_for_a_lock_can_be_cancelled(bot: Bot, url_of: Any) -> None:
    async def flush() -> None:
        async with bot.update():
            await bot.storage.update_data(KEY, {"age": 36})
            await asyncio.wait_for(bot.storage.flush(), 0.3)

    with locked(BY_DRIVER, url_of(BY_DRIVER), bot.storage, KEY) as lock:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(outside(flush()), 10)
        lock.release()
    await bot.assert_free()
    assert "age" not in (await bot.stored())[1]


async def test_it_needs_no_statements_that_the_driver_has_prepared(open_storage: Open) -> None:
    options = {"connect_args": {"statement_cache_size": 0, "prepared_statement_cache_size": 0}}
    storage = await open_storage(BY_DRIVER, engine_options=options)
    async with running(storage, 30.0, driver_statements=True) as bot:
        for age in range(3):
            await update(bot, age=age)
        assert (await bot.stored())[1]["age"] == 2
