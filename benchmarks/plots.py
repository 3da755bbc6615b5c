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


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what there are results for; return the files."""
    return [
        *_throughput(results, folder),
        *_latencies(results, folder),
        *_network(results, folder),
        *_lines(results, folder, "rows", "get_state", "rows in the table"),
        *_lines(results, folder, "data", "update_data", "size of the data"),
    ]


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
