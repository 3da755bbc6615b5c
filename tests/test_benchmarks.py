"""The benchmark runs, and counts the round trips that are promised. No times are asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import Results

ROOT = Path(__file__).parents[1]
SECTIONS = {"updates", "operations", "network", "rows", "data"}
ROUND_TRIPS = {
    "get_state": 1,
    "get_data": 1,
    "set_state": 1,
    "set_data": 1,
    "update_data": 2,
    "step": 5,
    "FSMContext.clear": 3,
    "storage.clear": 1,
}


UPDATES = {"step bot": 2, "form bot": 10, "scene bot": 12, "dialog bot": 15}


def run(*arguments: str) -> str:
    """Run the benchmark's command, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names(tables: Path) -> list[str]:
    """Return the titles of tables, and the names of their rows."""
    return [line.split(" | ")[0] for line in tables.read_text().splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that a run of everything has written to: one run, since it takes long."""
    folder = tmp_path_factory.mktemp("benchmarks")
    contenders = ["hybrid", "bare", "Storage", "replaced asyncpg"]  # each way to open one
    sections = [*SECTIONS, "trips", "memory", "scaling"]
    printed = run(
        *("--smoke", "--out", str(folder), "--only", *sections, "--contenders", *contenders)
    )
    assert "Extrapolated" in printed
    return folder


def test_every_section_is_measured_and_nothing_of_ours_fails(out: Path) -> None:
    results = Results.load(out / "results.json")
    assert {cell.section for cell in results.cells} == SECTIONS
    assert set(results.memory) > {"hybrid asyncpg", "hybrid psycopg (threads)"}
    failed = {
        (name, cell, figures.failure)
        for cell, contenders in results.cells.items()
        for name, figures in contenders.items()
        if figures.failure and name.startswith(("hybrid", "bare"))
    }
    assert failed == set()


@pytest.mark.parametrize(
    "contender", ["hybrid asyncpg", "hybrid psycopg (threads)", "hybrid psycopg (async)"]
)
def test_an_operation_takes_the_round_trips_that_are_promised(out: Path, contender: str) -> None:
    counted = Results.load(out / "results.json").trips[contender]
    assert {work: trips for work, (_, trips) in counted.items()} == ROUND_TRIPS


@pytest.mark.parametrize("isolation", ["lease", "lease=None"])
@pytest.mark.parametrize(
    "contender", ["hybrid asyncpg", "hybrid psycopg (threads)", "hybrid psycopg (async)"]
)
def test_five_updates_take_no_more_round_trips_than_are_promised(
    out: Path, contender: str, isolation: str
) -> None:
    counted = Results.load(out / "results.json").trips[f"{contender}, {isolation}"]
    assert counted.keys() == UPDATES.keys()
    assert {work: trips for work, (_, trips) in counted.items() if trips > UPDATES[work]} == {}


def test_tables_and_plots_are_written(out: Path) -> None:
    tables = (out / "tables.md").read_text()
    assert "Goals" in tables
    assert "Statements / round trips" in tables
    plots = list(out.glob("*.svg"))
    assert {"network.svg", "rows.svg", "data.svg"} <= {plot.name for plot in plots}
    assert all("</svg>" in plot.read_text() for plot in plots)


def test_the_figures_of_an_earlier_run_are_shown_again(out: Path, tmp_path: Path) -> None:
    printed = run("--read", str(out / "results.json"), "--out", str(tmp_path))
    assert "Goals" in printed
    assert "Extrapolated" in printed
    # The file holds four digits, so that a last digit may differ: not what is shown, though.
    assert names(tmp_path / "tables.md") == names(out / "tables.md")


def test_a_part_can_be_measured_alone(tmp_path: Path) -> None:
    run("--smoke", "--only", "sqlite", "operations", "--tasks", "1", "--out", str(tmp_path))
    results = Results.load(tmp_path / "results.json")
    assert {cell.section for cell in results.cells} == {"operations"}
    assert results.settings("operations") == ["1"]
    assert all("sqlite" in name for name in results.contenders("operations"))
    assert not results.scaling


def test_what_scaling_costs_is_measured_where_it_is_named(out: Path) -> None:
    scaling = Results.load(out / "results.json").scaling
    assert set(scaling) == {"storage", "growth", "plans", "processes", "setting"}
    assert list(scaling["processes"]) == ["1", "2"]
    assert [row["connections"] for row in scaling["processes"].values()] == [2, 4]
    # Bytes and HOT updates don't depend on the machine; with no index but the key's, they are HOT.
    storage = scaling["storage"]
    assert storage["fillfactor 50, autovacuum tuned"]["conversations: HOT"] > 0.9
    assert storage["fillfactor 50, columns=True"]["conversations: HOT"] < 0.1
    assert all(100 < row["wal"] < 20_000 for row in storage.values())
