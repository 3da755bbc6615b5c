"""The goals, and whether a run met them: each by medians of ratios measured side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .measure import ROUND_TRIP
from .results import Cell, Results, worst

READS = ("get_state", "get_data")
WRITES = ("set_state", "set_data")
ASYNC, THREADS, SQLITE = "hybrid asyncpg", "hybrid psycopg (threads)", "hybrid sqlite3 (threads)"
FLOORS = {
    ASYNC: "floor asyncpg",
    THREADS: "floor psycopg (threads)",
    SQLITE: "floor sqlite3 (threads)",
}
NOISE = 1.25  # by how much more than the bare driver's an operation's time may grow


@dataclass(frozen=True)
class Goal:
    """A goal, and what was measured: the worst of its operations."""

    what: str
    asked: str
    measured: float
    met: bool
    unit: str = "x"

    @property
    def verdict(self) -> str:
        """Whether it is met."""
        return "not measured" if math.isnan(self.measured) else "met" if self.met else "not met"


def goals(results: Results) -> list[Goal]:
    """Return all goals."""
    return [
        *_against_the_replaced(results),
        *_against_the_floor(results),
        *_trips(results),
        *_network(results),
        *_growth(results),
    ]


def _at_least(what: str, bound: float, measured: float) -> Goal:
    return Goal(what, f"≥ {bound:g}x", measured, measured >= bound)


def _at_most(what: str, bound: float, measured: float, unit: str = "x") -> Goal:
    return Goal(what, f"≤ {bound:g}{unit}", measured, measured <= bound, unit)


def _few(results: Results) -> list[str]:
    return [tasks for tasks in results.settings("operations") if int(tasks) <= 16]


def _against_the_replaced(results: Results) -> Iterator[Goal]:
    pairs = [(ASYNC, "replaced asyncpg", 5), (THREADS, "replaced asyncpg", 5)]
    for ours, replaced, clear in [*pairs, (SQLITE, "replaced aiosqlite", 4)]:
        bounds = {READS: 2.5, WRITES: 4, ("step",): 4, ("FSMContext.clear",): clear}
        for works, bound in bounds.items():
            for tasks in _few(results):
                times = [
                    results.times(Cell("operations", work, tasks), replaced, ours) for work in works
                ]
                what = f"{ours}: {_kind(works)} as fast as {replaced}, {_tasks(tasks)}"
                yield _at_least(what, bound, worst(times, high=False))


def _against_the_floor(results: Results) -> Iterator[Goal]:
    for ours in (ASYNC, THREADS):
        floor = FLOORS[ours]
        for works in (READS, WRITES, ("update_data",), ("step",), ("FSMContext.clear",)):
            for tasks in _few(results):
                times = [
                    results.times(Cell("operations", work, tasks), ours, floor) for work in works
                ]
                what = f"{ours}: time of a {_kind(works)}, {floor} = 1, {_tasks(tasks)}"
                yield _at_most(what, 1.5, worst(times, high=True))


def _trips(results: Results) -> Iterator[Goal]:
    bounds = {
        READS: 1, WRITES: 1, ("update_data",): 2, ("step",): 5, ("FSMContext.clear",): 3,
        ("storage.clear",): 1,
    }  # fmt: skip
    for ours in (ASYNC, THREADS):
        for works, bound in bounds.items():
            counted = [results.trips.get(ours, {}).get(work, (0, math.nan))[1] for work in works]
            what = f"{ours}: round trips of a {_kind(works)}"
            yield _at_most(what, bound, worst(counted, high=True), "")


def _network(results: Results) -> Iterator[Goal]:
    for delay in results.settings("network")[1:]:
        for ours in (ASYNC, THREADS):
            for work in ("get_state", "set_state"):
                times = results.times(Cell("network", work, delay), ours, ROUND_TRIP)
                what = f"{ours}: time of {work} with {delay} network, {ROUND_TRIP} = 1"
                yield _at_most(what, 1.1, times)


def _growth(results: Results) -> Iterator[Goal]:
    sizes = results.settings("rows")
    for ours in (ASYNC, THREADS, SQLITE) if sizes else ():
        for work in ("get_state", "set_state"):
            small, large = Cell("rows", work, sizes[0]), Cell("rows", work, sizes[-1])
            growth, index = (
                results.times(large, name, name, small) for name in (ours, FLOORS[ours])
            )
            what = (
                f"{ours}: growth of {work} from {sizes[0]} rows to {sizes[-1]}, {FLOORS[ours]} = 1"
            )
            yield _at_most(what, NOISE, growth / index)


def _kind(works: tuple[str, ...]) -> str:
    return "get" if works == READS else "set" if works == WRITES else works[0]


def _tasks(tasks: str) -> str:
    return "1 task" if tasks == "1" else f"{tasks} tasks"
