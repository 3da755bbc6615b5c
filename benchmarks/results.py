"""The figures of a run, and their way into a JSON file and back."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PERCENTILES = (50, 95, 99)


class Cell(NamedTuple):
    """One thing measured, by all contenders in turn."""

    section: str
    work: str
    setting: str
    """The number of tasks, the delay, the number of rows, ..."""


@dataclass
class Figures:
    """What a contender did in a cell, a number for each round."""

    seconds: list[float] = field(default_factory=list)
    """For an operation, by the clock."""
    cpu: list[float] = field(default_factory=list)
    """For an operation, of this process."""
    latencies: list[float] = field(default_factory=list)
    """Of single operations; of an earlier run there are only their percentiles."""
    percentiles: list[float] = field(default_factory=list)
    failure: str | None = None

    def percentile(self, percent: int) -> float:
        """Return the latency that so many percent of the operations kept to."""
        if self.percentiles:
            return self.percentiles[PERCENTILES.index(percent)]
        if not self.latencies:
            return math.nan
        ordered = sorted(self.latencies)
        return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


class Results:
    """All figures of a run."""

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self.cells: dict[Cell, dict[str, Figures]] = defaultdict(lambda: defaultdict(Figures))
        self.trips: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
        """By contender and work: statements and round trips of an operation."""
        self.memory: dict[str, dict[str, float]] = {}
        """By contender, in KiB."""
        self.scaling: dict[str, dict[str, dict[str, float]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        """By kind of measurement, then by what it was made of."""

    def settings(self, section: str) -> list[str]:
        """Return the settings that a section was measured in."""
        return list(dict.fromkeys(cell.setting for cell in self.cells if cell.section == section))

    def works(self, section: str) -> list[str]:
        """Return the works that a section has."""
        return list(dict.fromkeys(cell.work for cell in self.cells if cell.section == section))

    def contenders(self, section: str) -> list[str]:
        """Return the contenders that took part in a section."""
        cells = (self.cells[cell] for cell in self.cells if cell.section == section)
        return list(dict.fromkeys(name for cell in cells for name in cell))

    def figures(self, cell: Cell, contender: str) -> Figures | None:
        """Return what a contender did in a cell, None if it was not there or failed."""
        figures = self.cells.get(cell, {}).get(contender)
        return figures if figures and figures.seconds and not figures.failure else None

    def seconds(self, cell: Cell, contender: str) -> float:
        """Return the median time of an operation."""
        figures = self.figures(cell, contender)
        return statistics.median(figures.seconds) if figures else math.nan

    def cpu(self, cell: Cell, contender: str) -> float:
        """Return the median CPU time of an operation."""
        figures = self.figures(cell, contender)
        return statistics.median(figures.cpu) if figures else math.nan

    def times(self, cell: Cell, contender: str, base: str, base_cell: Cell | None = None) -> float:
        """Return how many times as long as another a contender takes: the median of the rounds'.

        :param base: the other contender
        :param base_cell: where to compare with another cell
        """
        own = self.figures(cell, contender)
        others = self.figures(base_cell or cell, base)
        if own is None or others is None:
            return math.nan
        return statistics.median(a / b for a, b in zip(own.seconds, others.seconds, strict=False))

    def save(self, path: Path) -> None:
        """Write them to a file."""
        records: list[dict[str, Any]] = []
        for cell, contenders in self.cells.items():
            for name, figures in contenders.items():
                record = asdict(figures)
                if record.pop("latencies"):
                    record["percentiles"] = [figures.percentile(each) for each in PERCENTILES]
                records.append({**cell._asdict(), "contender": name, **_rounded(record)})
        content = {
            "environment": self.environment,
            "cells": records,
            "trips": self.trips,
            "memory": self.memory,
            "scaling": self.scaling,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read them from a file."""
        content = json.loads(path.read_text())
        results = cls()
        results.environment = content["environment"]
        results.trips.update(
            {
                name: {work: (s, t) for work, (s, t) in works.items()}
                for name, works in content["trips"].items()
            }
        )
        results.memory = content["memory"]
        for kind, measured in content.get("scaling", {}).items():
            results.scaling[kind].update(measured)
        for record in content["cells"]:
            cell = Cell(record.pop("section"), record.pop("work"), record.pop("setting"))
            name = record.pop("contender")
            results.cells[cell][name] = Figures(**record)
        return results


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [float(f"{number:.4g}") for number in value] if isinstance(value, list) else value
        for name, value in record.items()
    }


def worst(numbers: Iterable[float], *, high: bool) -> float:
    """Return the greatest, or the least, of the numbers that are there."""
    known = [number for number in numbers if not math.isnan(number)]
    return (max if high else min)(known) if known else math.nan
