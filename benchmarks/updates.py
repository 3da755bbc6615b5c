"""What is measured of whole updates: isolated and not, with and without a network in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from functools import partial

from aiogram.fsm.storage.base import BaseEventIsolation, BaseStorage
from aiogram.fsm.storage.memory import DisabledEventIsolation, SimpleEventIsolation
from aiogram.fsm.storage.redis import RedisStorage
from sqlalchemy import create_engine

from hybrid_storage import SQLAlchemyStorage

from .bots import (
    Bots,
    talk_to_dialog_bot,
    talk_to_form_bot,
    talk_to_scene_bot,
    talk_to_step_bot,
)
from .measure import Run
from .proxy import proxy
from .results import Cell
from .turns import Turn, counted, take_turns
from .work import Work

BOTS = [
    Work("step bot", talk_to_step_bot),
    Work("form bot", talk_to_form_bot, units=5),
    Work("scene bot", talk_to_scene_bot, units=5),
    Work("dialog bot", talk_to_dialog_bot, units=5),
]
COUNTED = ("postgresql", "mysql", "redis")
NO_WAIT = "synchronous_commit=off"
# Not all drivers: each has a pool, and a server takes no more than 100 connections by default.
ALSO_WITHOUT_WAITING = ("hybrid asyncpg",)


async def updates(run: Run) -> None:
    """Measure updates that pass a dispatcher to a bot, and count their round trips."""
    await _trips(run)
    with _with_a_database_that_does_not_wait(run) as everything:
        for delay in run.scale.update_delays:
            await _at_delay(everything, delay)


async def _at_delay(run: Run, delay: float) -> None:
    turns = [
        Turn(
            Cell("updates", work.name, f"{delay * 1000:.0f} ms, {tasks}"),
            work,
            tasks,
            max(tasks, run.scale.updates),
        )
        for tasks in run.scale.tasks
        for work in BOTS
    ]
    measured = [each for each in run.compared() if not (each.is_bare or each.is_raito)]
    async with AsyncExitStack() as stack:
        servers = run.servers
        if delay:
            servers = run.behind_proxies(stack, delay)
            measured = [each for each in measured if each.server in servers]
        storages = await run.open(stack, measured, servers, f"_updates{delay * 1000:.0f}")
        opened = dict(_all_bots(storages))
        await take_turns(run.results, opened, turns, run.scale.update_rounds, run.advance)


@contextmanager
def _with_a_database_that_does_not_wait(run: Run) -> Iterator[Run]:
    """Have some contenders take part a second time, on a database of another setting."""
    again = [
        replace(each, name=f"{each.name}, {NO_WAIT}", server=NO_WAIT)
        for each in run.compared("postgresql")
        if each.name in ALSO_WITHOUT_WAITING
    ]
    if not again:
        yield run
        return
    url = run.servers["postgresql"]
    engine = create_engine(url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    name = f"benchmark_{os.getpid()}"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
    try:
        servers = {**run.servers, NO_WAIT: url.set(database=name)}
        yield replace(run, servers=servers, contenders=[*run.contenders, *again])
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        engine.dispose()


async def _trips(run: Run) -> None:
    for server in COUNTED:
        if not (measured := run.compared(server)):
            continue
        with proxy(run.servers[server]) as between:
            servers = {server: between.in_front_of(run.servers[server])}
            async with AsyncExitStack() as stack:
                storages = await run.open(
                    stack, [each for each in measured if not each.is_bare], servers, "_trips"
                )
                for name, bots in _all_bots(storages):
                    run.advance(f"round trips of updates: {name}")
                    for work in BOTS:
                        run.results.trips[name][work.name] = await counted(
                            between.counts, bots, work, 3
                        )


def _all_bots(storages: dict[str, BaseStorage]) -> Iterator[tuple[str, Bots]]:
    for name, storage in storages.items():
        isolations = _isolations(storage)
        if name.startswith("hybrid asyncpg"):
            isolations |= _by_the_driver(storage)
        for kind, isolation in isolations.items():
            yield f"{name}, {kind}", Bots(storage, isolation)


def _by_the_driver(storage: BaseStorage) -> dict[str, BaseEventIsolation]:
    assert isinstance(storage, SQLAlchemyStorage)
    make = partial(storage.create_isolation, unit_of_work=True, driver_statements=True)
    return {"lease, driver_statements": make(), "lease=None, driver_statements": make(lease=None)}


def _isolations(storage: BaseStorage) -> dict[str, BaseEventIsolation]:
    if isinstance(storage, SQLAlchemyStorage):
        return {
            "lease": storage.create_isolation(unit_of_work=True),
            "lease=None": storage.create_isolation(unit_of_work=True, lease=None),
            "not isolated": DisabledEventIsolation(),
        }
    if isinstance(storage, RedisStorage):
        return {
            "RedisEventIsolation": storage.create_isolation(),
            "SimpleEventIsolation": SimpleEventIsolation(),
            "not isolated": DisabledEventIsolation(),
        }
    return {"SimpleEventIsolation": SimpleEventIsolation()}
