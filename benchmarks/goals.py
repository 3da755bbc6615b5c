"""The goals, and whether a run met them: each by medians of ratios measured side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from .measure import ROUND_TRIP
from .results import Cell, Results, worst

READS = ("get_state", "get_data")
WRITES = ("set_state", "set_data")
ASYNCPG, PSYCOPG, SQLITE = "hybrid asyncpg", "hybrid psycopg (threads)", "hybrid sqlite3 (threads)"
REPLACED = {
    ASYNCPG: "replaced asyncpg",
    PSYCOPG: "replaced asyncpg",
    SQLITE: "replaced aiosqlite",
}
TIMES_AS_FAST = {READS: 1.8, WRITES: 2.4, ("step",): 2.2, ("FSMContext.clear",): 3}
MOST_TASKS = 16
ROUND_TRIPS = {
    READS: 1, WRITES: 1, ("update_data",): 2, ("step",): 5, ("FSMContext.clear",): 3,
    ("storage.clear",): 1,
}  # fmt: skip
UPDATES = {"form bot": 10, "scene bot": 12, "dialog bot": 15}  # round trips of five
REDIS = {
    "lease": "RedisStorage, RedisEventIsolation",
    "lease=None": "RedisStorage, SimpleEventIsolation",
}
BY_DRIVER = ", driver_statements"
BESIDE_REDIS = {
    ("lease", "0 ms"): (1.0, 1.0),
    ("lease", "1 ms"): (2.0, 1.5),
    ("lease", "5 ms"): (2.5, 2.0),
    ("lease=None", "0 ms"): (0.9, 0.9),
    ("lease=None", "1 ms"): (1.5, 1.2),
    ("lease=None", "5 ms"): (1.8, 1.5),
}
"""How many times as fast as Redis, by isolation and network: one user, and 16."""
GROWTH = 1.5  # of an operation's time, from the smallest table to the largest: the index is deeper


@dataclass(frozen=True)
class Goal:
    """A goal, and what was measured: the worst of its operations."""

    what: str
    wanted: str
    measured: float
    met: bool
    unit: str = "x"

    @property
    def verdict(self) -> str:
        """Whether it is met."""
        return "not measured" if math.isnan(self.measured) else "met" if self.met else "not met"


def goals(results: Results) -> list[Goal]:
    """Return the goals of the contenders and sections that took part in a run."""
    return [
        *_updates(results),
        *_beside_redis(results),
        *_against_the_replaced(results),
        *_round_trips(results),
        *_network(results),
        *_growth(results),
    ]


def _at_least(what: str, bound: float, measured: float) -> Goal:
    return Goal(what, f"≥ {bound:g}x", measured, measured >= bound)


def _at_most(what: str, bound: float, measured: float, unit: str = "x") -> Goal:
    return Goal(what, f"≤ {bound:g}{unit}", measured, measured <= bound, unit)


def _updates(results: Results) -> Iterator[Goal]:
    for ours in (f"{driver}, {kind}" for driver in (ASYNCPG, PSYCOPG) for kind in REDIS):
        for bot, bound in UPDATES.items() if ours in results.trips else ():
            _, trips = results.trips[ours].get(bot, (0, math.nan))
            yield _at_most(f"{ours}: round trips of five updates, {bot}", bound, trips, "")


def _beside_redis(results: Results) -> Iterator[Goal]:
    settings, present = results.settings("updates"), results.contenders("updates")
    for (kind, delay), bounds in BESIDE_REDIS.items():
        redis = REDIS[kind]
        for way, (users, bound) in product(("", BY_DRIVER), zip(("1", "16"), bounds, strict=True)):
            ours, setting = f"{ASYNCPG}, {kind}{way}", f"{delay}, {users}"
            if setting in settings and {ours, redis} <= set(present):
                for bot in ("form bot", "scene bot"):
                    times = results.times(Cell("updates", bot, setting), redis, ours)
                    yield _at_least(f"{ours}: {bot}, {setting}, as fast as {redis}", bound, times)


def _against_the_replaced(results: Results) -> Iterator[Goal]:
    present = results.contenders("operations")
    for ours, replaced in REPLACED.items():
        if ours not in present or replaced not in present:
            continue
        for works, bound in TIMES_AS_FAST.items():
            for tasks in results.settings("operations"):
                if int(tasks) > MOST_TASKS:
                    continue
                times = [
                    results.times(Cell("operations", work, tasks), replaced, ours) for work in works
                ]
                what = f"{ours}: {_kind(works)} as fast as {replaced}, {_tasks(tasks)}"
                yield _at_least(what, bound, worst(times, high=False))


def _round_trips(results: Results) -> Iterator[Goal]:
    for ours in (ASYNCPG, PSYCOPG):
        if ours not in results.trips:
            continue
        for works, bound in ROUND_TRIPS.items():
            counted = [results.trips[ours].get(work, (0, math.nan))[1] for work in works]
            what = f"{ours}: round trips of a {_kind(works)}"
            yield _at_most(what, bound, worst(counted, high=True), "")


def _network(results: Results) -> Iterator[Goal]:
    present = results.contenders("network")
    for delay in results.settings("network")[1:]:
        for ours in (ASYNCPG, PSYCOPG):
            for work in ("get_state", "set_state") if ours in present else ():
                times = results.times(Cell("network", work, delay), ours, ROUND_TRIP)
                what = f"{ours}: time of {work} with {delay} network, {ROUND_TRIP} = 1"
                yield _at_most(what, 1.1, times)


def _growth(results: Results) -> Iterator[Goal]:
    sizes, present = results.settings("rows"), results.contenders("rows")
    for ours in (ASYNCPG, PSYCOPG, SQLITE):
        for work in ("get_state", "set_state") if ours in present else ():
            small, large = Cell("rows", work, sizes[0]), Cell("rows", work, sizes[-1])
            what = f"{ours}: time of {work} with {sizes[-1]} rows, with {sizes[0]} = 1"
            yield _at_most(what, GROWTH, results.times(large, ours, ours, small))


def _kind(works: tuple[str, ...]) -> str:
    return "get" if works == READS else "set" if works == WRITES else works[0]


def _tasks(tasks: str) -> str:
    return "1 task" if tasks == "1" else f"{tasks} tasks"
