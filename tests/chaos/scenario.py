"""Crews of processes whose work is judged, and the table of what was measured: fixtures."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from sqlalchemy import URL

from .crew import Crew
from .outcome import Outcome

WIDTH = 56
TITLES = pytest.StashKey[list[str]]()
PAGES = [Path(__file__).parents[2] / "docs" / name for name in ("reliability.md", "clusters.md")]
WRITES_DOCS = bool(os.environ.get("HYBRID_STORAGE_WRITE_DOCS"))
"""Whether the lines replace those of the same name in the documentation's tables."""
Report = Callable[..., None]


class Scenario(Crew):
    """A crew whose work is judged, and reported as a line of the table."""

    def __init__(self, folder: Path, name: str, report: Report) -> None:
        """Start with nobody.

        :param folder: where to keep the journals
        :param name: what to call it in the table
        :param report: prints a line
        """
        super().__init__(folder, f"chaos_{uuid.uuid4().hex}")
        self.name = name
        self._report = report

    def judge(
        self, url: URL, faults: int | None = None, may_lose: bool = False, **figures: object
    ) -> Outcome:
        """Print the figures, and fail if anything went wrong.

        :param url: the database, with a synchronous driver
        :param faults: how many there were; by default the calls that were cancelled
        :param may_lose: whether what was acknowledged, locks included, may be lost
        :param figures: more to print
        :return: what came of it
        """
        outcome = self.outcome(url)
        faults = outcome.cut if faults is None else faults
        self._report(
            self.name,
            **{
                "writes acknowledged": outcome.acknowledged,
                "of them updates": outcome.updates,
                "faults": faults,
                "calls made again": outcome.retried,
                "lost": len(set(outcome.lost)),  # one that is missed is missed at every look
                "half": len(outcome.halves),
                "two holders": len(outcome.overlaps),
                "locks lost": outcome.fenced,
                "errors": len(outcome.errors),
                "longest wait, s": round(outcome.longest, 2),
                **figures,
            },
        )
        assert may_lose or outcome.lost == [], outcome.lost
        assert outcome.halves == []
        assert may_lose or outcome.overlaps == []
        assert outcome.errors == [], outcome.errors
        assert outcome.left == []
        assert outcome.acknowledged > 0
        assert faults > 0
        return outcome


def write_line(name: str, figures: dict[str, object]) -> None:
    """Replace the figures of a line in the documentation.

    :param name: of the line, its first cell
    :param figures: its other cells
    :raises ValueError: if no page has such a line
    """
    line = f"| {name} | {' | '.join(str(figure) for figure in figures.values())} |"
    for page in PAGES:
        text = page.read_text()
        written, found = re.subn(
            rf"^\| {re.escape(name)} \|.*$", lambda _: line, text, flags=re.MULTILINE
        )
        if found:
            page.write_text(written)
            return
    raise ValueError(f"no page has a line for {name!r}; add: {line}")


@pytest.fixture
def report(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Report:
    """Return a function that prints a line of figures, past what captures the output."""
    terminal = request.config.get_terminal_writer()
    printed = request.config.stash.setdefault(TITLES, [])

    def report(name: str, **figures: object) -> None:
        with capsys.disabled():
            if printed != list(figures):
                printed[:] = figures
                titles = "".join(f"{title:>20}" for title in figures)
                terminal.write("\n" + " " * WIDTH + titles)
            line = "".join(f"{figure:>20}" for figure in figures.values())
            terminal.write(f"\n{name:<{WIDTH}}{line} ", flush=True)
        if WRITES_DOCS:
            write_line(name, figures)

    return report


@pytest.fixture
def scenario(request: pytest.FixtureRequest, report: Report) -> Iterator[Scenario]:
    """Return a crew without members; none is left at the end."""
    name = request.node.name.removeprefix("test_").replace("_", " ")
    with TemporaryDirectory(prefix="chaos-") as folder:
        scenario = Scenario(Path(folder), name, report)
        with scenario:
            yield scenario
