"""PostgreSQL plans the statements of a unit of work once for a connection, and not for each update.

It keeps to planning for the parameters at hand if that looks much cheaper than a plan for any.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import BY_DRIVER, POSTGRESQL, Backend
from conftest import Open
from sqlalchemy import text
from sqlalchemy.orm import Session
from units import KEY, Bot, running

TABLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "columns": {"columns": True},
    "expiry": {"columns": True, "expires_after": 3600.0},
}
SPARE = 5
"""For so many executions PostgreSQL makes a plan for the parameters, to compare with."""
UPDATES = 20
_ROW = "INSERT INTO {0} ({1}) SELECT 'other:' || i, 'Form', '{{}}'{2}"
_LOCK = "INSERT INTO {0}_lock SELECT 'other:' || i, '', 0, 1"
_MANY = " FROM generate_series(1, 3000) AS i"
_PLANS = (
    "SELECT statement, generic_plans, custom_plans FROM pg_prepared_statements"
    " WHERE strpos(statement, :table) > 0 AND strpos(statement, 'pg_prepared_statements') = 0"
)


@pytest.fixture(params=[POSTGRESQL[2], BY_DRIVER], ids=str)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return asyncpg, which prepares every statement."""
    assert isinstance(request.param, Backend)
    return request.param


@pytest.fixture(params=list(TABLES))
async def bot(
    request: pytest.FixtureRequest, backend: Backend, open_storage: Open
) -> AsyncIterator[Bot]:
    """Return a bot with thousands of conversations, and a pool of one connection."""
    storage = await open_storage(
        backend,
        engine_options={"pool_size": 1, "max_overflow": 0},
        **TABLES[request.param],
    )
    async with running(storage, 30.0, driver_statements=backend.driver_statements) as bot:
        name = storage.table.name

        def fill(session: Session) -> None:
            names, values = "id, state, data", ""
            if request.param != "plain":
                names, values = f"{names}, conversation, written_at", ", 'other:' || i, 1"
            for each in (_ROW, _LOCK):
                session.execute(text((each + _MANY).format(name, names, values)))
            session.execute(text(f"ANALYZE {name}, {name}_lock"))
            session.commit()

        await storage.run_sync(fill)
        yield bot


class Plans(NamedTuple):
    """A prepared statement, and how often it was executed by a plan for any parameters, or not."""

    statement: str
    generic: int
    custom: int


async def prepared(bot: Bot) -> list[Plans]:
    """Return what the connection has prepared. A text may be there twice, by SQLAlchemy as well."""

    def read(session: Session) -> list[Plans]:
        found = session.execute(text(_PLANS), {"table": bot.storage.table.name})
        return [Plans(*row) for row in found]

    plans: list[Plans] = await bot.storage.run_sync(read)
    return plans


async def assert_planned_once(bot: Bot, *, statements: int) -> None:
    """Check the statements that were executed often."""
    often = [each for each in await prepared(bot) if each.generic + each.custom >= UPDATES]
    assert len(often) == statements
    for each in often:
        assert each.custom <= SPARE, each
        assert each.generic >= UPDATES - SPARE, each


async def test_an_update_of_one_row(bot: Bot) -> None:
    for number in range(UPDATES):
        async with bot.update():
            assert await bot.storage.get_state(KEY) == "Form:name"
            await bot.storage.update_data(KEY, {"number": number})
    await assert_planned_once(bot, statements=2)


@pytest.mark.parametrize("rows", [2, 3, 5])
async def test_an_update_of_several_rows(bot: Bot, rows: int) -> None:
    keys = [replace(KEY, destiny=f"window {number}") for number in range(rows)]
    for number in range(UPDATES + 2):  # the first ones find out which rows are read together
        async with bot.update():
            for key in keys:
                await bot.storage.update_data(key, {"number": number})
    await assert_planned_once(bot, statements=2)


async def test_updates_that_make_a_row_and_remove_it(bot: Bot) -> None:
    key: StorageKey = replace(KEY, chat_id=9, user_id=9)
    for _ in range(UPDATES):
        async with bot.update(key):
            await bot.storage.set_state(key, "Form:name")
        async with bot.update(key):
            await bot.storage.set_state(key, None)
    texts = [each.statement for each in await prepared(bot) if each.generic]
    assert sum("INSERT INTO" in each and "held" in each for each in texts) == 1
    assert sum("DELETE FROM" in each and "held" in each for each in texts) == 1
    sweeps = any(each.startswith("DELETE FROM") for each in texts)  # what has expired
    await assert_planned_once(bot, statements=3 + sweeps)
