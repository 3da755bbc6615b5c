"""Tables of the results: for the terminal, and as Markdown for the documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from .goals import goals
from .results import PERCENTILES, Cell, Results

BASES = ("hybrid asyncpg", "hybrid sqlite3 (threads)", "hybrid asyncmy")
"""Whom to compare with, the first of them that is in a table."""

UPDATE_BASES = (
    "RedisStorage, RedisEventIsolation",
    "hybrid asyncpg, lease",
    "hybrid sqlite3 (threads), lease",
    "hybrid asyncmy, lease",
)

GROUPS = {
    "PostgreSQL": ("asyncpg", "psycopg", "Redis", "Memory", "one round trip"),
    "SQLite": ("sqlite",),
    "MariaDB": ("mysql", "asyncmy"),
}


REDIS_ISOLATED = "RedisStorage, RedisEventIsolation"
RATIOS = (", lease", ", lease, driver_statements")  # the contenders of the docs' one table


@dataclass(frozen=True)
class Table:
    """A table of text, with the names of its rows in the first column."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [self.columns, ["---"] + ["--:"] * (len(self.columns) - 1), *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])

    def show(self, console: Console) -> None:
        """Print it."""
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def tables(results: Results) -> Iterator[Table]:
    """Return all tables that the results are enough for."""
    yield from _updates(results)
    for tasks in results.settings("operations"):
        yield from _side_by_side(
            results,
            "operations",
            tasks,
            f"operations per second, {_tasks(tasks)}",
            lambda cell, name, base: results.times(cell, base, name),
            _per_second,
        )
    for tasks in results.settings("operations"):
        yield from _latencies(results, tasks)
    for delay in results.settings("network"):
        yield from _side_by_side(
            results,
            "network",
            delay,
            f"time of an operation with a network of {delay}, 1 task",
            results.times,
            _duration,
        )
    yield from _trips(results)
    yield from _costs(results)
    yield from _growth(results)
    yield from _sizes(results)
    yield Table(
        "Goals: the worst of an operation's medians",
        ["goal", "wanted", "measured", ""],
        [
            [goal.what, goal.wanted, f"{_number(goal.measured)}{goal.unit}", goal.verdict]
            for goal in goals(results)
        ],
    )
    failures = [
        [f"{name}, {cell.section} {cell.work}, {cell.setting}", figures.failure]
        for cell, contenders in results.cells.items()
        for name, figures in contenders.items()
        if figures.failure
    ]
    if failures:
        yield Table("What failed", ["contender and work", "with"], failures)


def _updates(results: Results) -> Iterator[Table]:
    works, settings = results.works("updates"), results.settings("updates")
    names = results.contenders("updates")
    base = next((name for name in UPDATE_BASES if name in names), "")
    for work in works if base else ():
        cells = [Cell("updates", work, setting) for setting in settings]
        rows = [[name, *(_number(results.times(cell, base, name)) for cell in cells)]
                for name in names]  # fmt: skip
        rows[names.index(base)][1:] = [
            _known(results.seconds(cell, base), _per_second) for cell in cells
        ]
        title = f"{work}: updates per second by network and users; {base} in figures"
        yield Table(f"{title}, others as ratios", ["", *settings], rows)
    for setting in settings:
        cells = [Cell("updates", work, setting) for work in works]
        rows = [[name, *(_known(results.cpu(cell, name), _duration) for cell in cells)]
                for name in names]  # fmt: skip
        rows = [row for row in rows if set(row[1:]) != {"-"}]
        yield Table(f"CPU time of an update, {setting}", ["", *works], rows)


def ratios(results: Results) -> Table:
    """Return how many times as fast as Redis whole updates are, isolated across processes."""
    settings = results.settings("updates")
    names = [name for name in results.contenders("updates") if name.endswith(RATIOS)]
    rows = []
    for bot in ("form bot", "scene bot"):
        cells = [Cell("updates", bot, setting) for setting in settings]
        rows += [
            [
                f"{bot}: {name}",
                *(_number(results.times(cell, REDIS_ISOLATED, name)) for cell in cells),
            ]
            for name in names
        ]
    title = "Updates, as many times as fast as by RedisStorage with RedisEventIsolation"
    return Table(f"{title}, by network and users", ["", *settings], rows)


def groups(contenders: list[str]) -> Iterator[tuple[str, list[str], str]]:
    """Return the contenders by kind of server, with whom to compare them."""
    for title, words in GROUPS.items():
        found = [name for name in contenders if any(word in name for word in words)]
        base = next((name for name in BASES if name in found), None)
        if base:
            yield title, found, base


def _side_by_side(
    results: Results,
    section: str,
    setting: str,
    what: str,
    ratio: Callable[[Cell, str, str], float],
    absolute: Callable[[float], str],
) -> Iterator[Table]:
    works = results.works(section)
    for title, contenders, base in groups(results.contenders(section)):
        rows = []
        for name in contenders:
            cells = [Cell(section, work, setting) for work in works]
            rows.append([name, *(_number(ratio(cell, name, base)) for cell in cells)])
            if name == base:
                rows[-1][1:] = [_known(results.seconds(cell, base), absolute) for cell in cells]
        yield Table(f"{title}: {what}; {base} in figures, others as ratios", ["", *works], rows)


def _latencies(results: Results, tasks: str) -> Iterator[Table]:
    works = results.works("operations")
    for title, contenders, base in groups(results.contenders("operations")):
        rows = []
        for name in contenders:
            row = [name]
            for work in works:
                cell = Cell("operations", work, tasks)
                own, others = results.figures(cell, name), results.figures(cell, base)
                if own is None or others is None:
                    row.append("-")
                elif name == base:
                    row.append(" / ".join(_duration(own.percentile(p)) for p in PERCENTILES))
                else:
                    ratios = [own.percentile(p) / others.percentile(p) for p in PERCENTILES]
                    row.append(" / ".join(map(_number, ratios)))
            rows.append(row)
        what = f"latencies, p50 / p95 / p99, {_tasks(tasks)}"
        yield Table(f"{title}: {what}; {base} in figures, others as ratios", ["", *works], rows)


def _trips(results: Results) -> Iterator[Table]:
    for what, is_bot in (("a user's updates", True), ("an operation", False)):
        counted = {
            name: {work: each for work, each in works.items() if work.endswith(" bot") == is_bot}
            for name, works in results.trips.items()
        }
        works = list(dict.fromkeys(work for each in counted.values() for work in each))
        rows = [
            [name, *("{:g} / {:g}".format(*each[work]) if work in each else "-" for work in works)]
            for name, each in counted.items()
            if each
        ]
        if rows:
            yield Table(f"Statements / round trips of {what}", ["", *works], rows)


def _costs(results: Results) -> Iterator[Table]:
    works = results.works("operations")
    rows = []
    for name in results.contenders("operations"):
        cpu = [results.cpu(Cell("operations", work, "1"), name) * 10_000 for work in works]
        memory = results.memory.get(name, {})
        kept = [f"{memory[kind]:,.0f}" if memory else "-"
                for kind in ("resident", "retained", "peak")]  # fmt: skip
        rows.append([name, *map(_number, cpu), *kept])
    if rows:
        title = (
            "CPU time in seconds for 10,000 operations; memory in KiB: what the process grew by "
            "for 10,000 operations, what Python's objects did, and the peak of these"
        )
        yield Table(title, ["", *works, "grown", "kept", "peak"], rows)


def _growth(results: Results) -> Iterator[Table]:
    sizes, works = results.settings("rows"), results.works("rows")
    rows = []
    for name in results.contenders("rows"):
        row = [name]
        for work in works:
            first = Cell("rows", work, sizes[0])
            row.append(_known(results.seconds(first, name), _duration))
            row += [_number(results.times(Cell("rows", work, size), name, name, first))
                    for size in sizes[1:]]  # fmt: skip
        rows.append(row)
    if rows:
        title = f"Growth with the table's rows: time with {sizes[0]} rows, others as ratios to it"
        yield Table(title, ["", *(f"{work}, {size}" for work in works for size in sizes)], rows)


def _sizes(results: Results) -> Iterator[Table]:
    works = results.works("data")
    for size in results.settings("data"):
        rows = [
            [name, *(_known(results.seconds(Cell("data", work, size), name), _duration)
                     for work in works)]
            for name in results.contenders("data")
        ]  # fmt: skip
        yield Table(f"Time of an operation on data of {size}, 1 task", ["", *works], rows)


def _tasks(tasks: str) -> str:
    return "1 task" if tasks == "1" else f"{tasks} tasks"


def _number(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.2f}" if number < 10 else f"{number:.1f}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 0.001 else f"{seconds * 1000:.1f} ms"


def _per_second(seconds: float) -> str:
    return f"{1 / seconds:,.0f}/s"


def _known(number: float, text: Callable[[float], str]) -> str:
    return "-" if math.isnan(number) else text(number)
