"""What is measured of whole updates: isolated and not, with and without a network in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack

from aiogram.fsm.storage.base import BaseEventIsolation, BaseStorage
from aiogram.fsm.storage.memory import DisabledEventIsolation, SimpleEventIsolation
from aiogram.fsm.storage.redis import RedisStorage

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
NETWORKED = ("postgresql", "postgresql-async", "mysql", "redis")


async def updates(run: Run) -> None:
    """Measure updates that pass a dispatcher to a bot, and count their round trips."""
    measured = [each for each in run.compared() if not (each.is_bare or each.is_raito)]
    far = [each for each in measured if each.server in NETWORKED]
    await _trips(run)
    for delay in run.scale.update_delays:
        async with AsyncExitStack() as stack:
            servers = run.behind_proxies(stack, delay) if delay else run.servers
            storages = await run.open(
                stack, far if delay else measured, servers, f"_updates{delay * 1000:.0f}"
            )
            opened = dict(_all_bots(storages))
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
            await take_turns(run.results, opened, turns, run.scale.update_rounds, run.advance)


async def _trips(run: Run) -> None:
    for server in NETWORKED:
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
                            between.counts, bots, work, 2
                        )


def _all_bots(storages: dict[str, BaseStorage]) -> Iterator[tuple[str, Bots]]:
    for name, storage in storages.items():
        for kind, isolation in _isolations(storage).items():
            yield f"{name}, {kind}", Bots(storage, isolation)


def _isolations(storage: BaseStorage) -> dict[str, BaseEventIsolation]:
    if isinstance(storage, SQLAlchemyStorage):
        return {
            "lease": storage.create_isolation(unit_of_work=True),
            "lease=None": storage.create_isolation(unit_of_work=True, lease=None),
            "not isolated": DisabledEventIsolation(),
        }
    local = {"one process": SimpleEventIsolation(), "not isolated": DisabledEventIsolation()}
    if isinstance(storage, RedisStorage):
        return {"lock": storage.create_isolation(), **local}
    return local
