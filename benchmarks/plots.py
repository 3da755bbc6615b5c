"""Plots of the results, as small SVG files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import groups
from .results import PERCENTILES, Cell, Results

mpl.rcParams.update(
    {
        "svg.fonttype": "none",  # text as text: small files
        "svg.hashsalt": "benchmarks",  # the same figures, the same file
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "x",
        "grid.alpha": 0.3,
    }
)

OURS, OTHERS = "#2563eb", "#9ca3af"

SHOWN = {
    "hybrid asyncpg, lease": ("this package, asyncpg", "#2563eb", "o-"),
    "hybrid asyncpg, lease, driver_statements": ("the same, driver_statements", "#60a5fa", "o--"),
    "hybrid psycopg (threads), lease": ("this package, psycopg in threads", "#7c3aed", "s-"),
    "RedisStorage, RedisEventIsolation": ("RedisStorage, RedisEventIsolation", "#dc2626", "^-"),
    "replaced asyncpg, SimpleEventIsolation": ("aiogram-sqlalchemy-storage", "#6b7280", "v-"),
}
"""The contenders of the plots in the docs: their labels, colors and lines."""
BOT, DELAY = "form bot", "1 ms"


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what there are results for; return the files."""
    return [
        *draw_updates(results, folder),
        *_throughput(results, folder),
        *_latencies(results, folder),
        *_network(results, folder),
        *_lines(results, folder, "rows", "get_state", "rows in the table"),
        *_lines(results, folder, "data", "update_data", "size of the data"),
    ]


def draw_updates(results: Results, folder: Path) -> list[Path]:
    """Draw whole updates, for the docs; return the files."""
    if not results.settings("updates"):
        return []
    return [*_by_delay(results, folder), *_by_users(results, folder), *_by_trips(results, folder)]


def _settings(results: Results) -> tuple[list[str], list[str]]:
    pairs = [setting.split(", ") for setting in results.settings("updates")]
    delays, users = zip(*pairs, strict=True)
    return list(dict.fromkeys(delays)), list(dict.fromkeys(users))


def _by_delay(results: Results, folder: Path) -> Iterator[Path]:
    delays, users = _settings(results)
    file = folder / "updates-by-network.svg"
    with _figure(file, 9, 3.2, 2) as columns:
        for axes, bot in zip(columns, (BOT, "scene bot"), strict=True):
            for name, (label, color, line) in SHOWN.items():
                cells = [Cell("updates", bot, f"{delay}, {users[0]}") for delay in delays]
                times = [results.seconds(cell, name) * 1000 for cell in cells]
                axes.plot(delays, times, line, color=color, label=label, markersize=4)
            axes.set(xlabel="delay of a round trip", ylabel="ms per update", title=f"{bot}, 1 user")
            axes.set_ylim(bottom=0)
        columns[0].legend(fontsize=7)
    yield file


def _by_users(results: Results, folder: Path) -> Iterator[Path]:
    delays, users = _settings(results)
    delay = DELAY if DELAY in delays else delays[0]
    file = folder / "updates-by-users.svg"
    with _figure(file, 9, 3.2, 2) as columns:
        for axes, bot in zip(columns, (BOT, "scene bot"), strict=True):
            for name, (label, color, line) in SHOWN.items():
                cells = [Cell("updates", bot, f"{delay}, {each}") for each in users]
                rates = [1 / results.seconds(cell, name) for cell in cells]
                axes.plot(users, rates, line, color=color, label=label, markersize=4)
            axes.set(
                xlabel="users at a time",
                ylabel="updates per second",
                title=f"{bot}, network {delay}",
            )
            axes.set_ylim(bottom=0)
        columns[0].legend(fontsize=7)
    yield file


def _by_trips(results: Results, folder: Path) -> Iterator[Path]:
    bots = [bot for bot in results.works("updates") if bot != "step bot"]
    file = folder / "updates-round-trips.svg"
    shown = {name: each for name, each in SHOWN.items() if name in results.trips}
    with _figure(file, 9, 2.4, len(bots)) as columns:
        for axes, bot in zip(columns, bots, strict=True):
            trips = [results.trips[name].get(bot, (0, math.nan))[1] for name in reversed(shown)]
            labels = [label for label, _, _ in reversed(shown.values())]
            colors = [color for _, color, _ in reversed(shown.values())]
            axes.barh(labels, trips, color=colors)
            axes.set(xlabel="round trips", title=f"{bot}: five updates")
            if axes is not columns[0]:
                axes.set_yticklabels([])
    yield file


@contextmanager
def _figure(file: Path, width: float, height: float, columns: int) -> Iterator[list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    yield list(axes)
    figure.savefig(file, metadata={"Date": None})


def _bars(axes: Axes, values: dict[str, float], title: str) -> None:
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    names = list(reversed(known))
    colors = [OURS if name.startswith("hybrid") else OTHERS for name in names]
    axes.barh(names, [known[name] for name in names], color=colors)
    axes.set_title(title, loc="left")


def _throughput(results: Results, folder: Path) -> Iterator[Path]:
    settings = results.settings("operations")
    contenders = [name for name in results.contenders("operations") if name != "MemoryStorage"]
    for group, names, _ in groups(contenders):
        file = folder / f"steps-{group.lower()}.svg"
        width, height = 4 * len(settings), 0.8 + 0.25 * len(names)
        with _figure(file, width, height, len(settings)) as columns:
            for axes, tasks in zip(columns, settings, strict=True):
                cell = Cell("operations", "step", tasks)
                values = {name: 1 / results.seconds(cell, name) for name in names}
                _bars(axes, values, f"steps per second, tasks: {tasks}")
        yield file


def _latencies(results: Results, folder: Path) -> Iterator[Path]:
    settings = results.settings("operations")
    for group, names, _ in groups(results.contenders("operations")[:]):
        file = folder / f"latencies-{group.lower()}.svg"
        width, height = 4 * len(settings), 0.8 + 0.3 * len(names)
        with _figure(file, width, height, len(settings)) as columns:
            for axes, tasks in zip(columns, settings, strict=True):
                for name in reversed(names):
                    figures = results.figures(Cell("operations", "step", tasks), name)
                    if figures:
                        ms = [figures.percentile(percent) * 1000 for percent in PERCENTILES]
                        color = OURS if name.startswith("hybrid") else OTHERS
                        axes.plot(ms, [name] * len(ms), "o-", color=color, markersize=4)
                axes.set_xscale("log")
                axes.set_title(f"step: p50, p95, p99 in ms, tasks: {tasks}", loc="left")
        yield file


def _network(results: Results, folder: Path) -> Iterator[Path]:
    delays, works = results.settings("network"), results.works("network")
    if delays:
        file, names = folder / "network.svg", results.contenders("network")
        with _figure(file, 4 * len(works), 0.8 + 0.25 * len(names), len(works)) as columns:
            for axes, work in zip(columns, works, strict=True):
                cell = Cell("network", work, delays[-1])
                values = {name: results.seconds(cell, name) * 1000 for name in names}
                _bars(axes, values, f"{work} with {delays[-1]} network, ms")
        yield file


def _lines(results: Results, folder: Path, section: str, work: str, label: str) -> Iterator[Path]:
    settings = results.settings(section)
    if settings:
        file = folder / f"{section}.svg"
        with _figure(file, 7, 3, 1) as [axes]:
            for name in results.contenders(section):
                times = [
                    results.seconds(Cell(section, work, setting), name) * 1000
                    for setting in settings
                ]
                axes.plot(settings, times, "o-", label=name, markersize=4)
            axes.set_yscale("log")
            axes.set_xlabel(label)
            axes.set_title(f"{work}, ms, 1 task", loc="left")
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        yield file
