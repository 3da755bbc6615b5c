"""Servers to kill, crews of writing processes, and the table of what was measured."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from sqlalchemy import URL

from .crew import SECONDS, Crew, Outcome
from .servers import MARIADBD, PGBOUNCER, Server, mariadb, pgbouncer, postgres

WIDTH = 48
TITLES = pytest.StashKey[list[str]]()
Report = Callable[..., None]


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [
        f"chaos: {SECONDS:g} s of faults in each scenario",
        "MariaDB to kill: "
        + (MARIADBD[0] or "mariadbd is not installed, its scenarios are left out"),
        "PgBouncer: " + (PGBOUNCER or "not installed, its scenario is left out"),
    ]


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Return a folder for all data, which is removed at the end."""
    with TemporaryDirectory(prefix="chaos-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def postgresql_server(folder: Path) -> Iterator[Server]:
    """Return a PostgreSQL server that may be killed, but has to be left running."""
    (folder / "postgresql").mkdir()
    with postgres(folder / "postgresql").running() as server:
        yield server


@pytest.fixture(scope="session")
def mysql_server(folder: Path) -> Iterator[Server]:
    """Return a MariaDB server that may be killed, but has to be left running."""
    (folder / "mariadb").mkdir()
    with mariadb(folder / "mariadb").running() as server:
        yield server


@pytest.fixture(scope="session")
def pgbouncer_server(folder: Path, postgresql_server: Server) -> Iterator[Server]:
    """Return a PgBouncer before the PostgreSQL server that may be killed."""
    (folder / "pgbouncer").mkdir()
    with pgbouncer(folder / "pgbouncer", postgresql_server).running() as server:
        yield server


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Server:
    """Return a server by its kind."""
    server = request.getfixturevalue(f"{request.param}_server")
    assert isinstance(server, Server)
    return server


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """Return the URL of a database by its kind."""
    if request.param == "sqlite":
        return URL.create("sqlite", database=str(tmp_path / "chaos.db"))
    server = request.getfixturevalue(f"{request.param}_server")
    assert isinstance(server, Server)
    return server.url


class Scenario(Crew):
    """A crew whose work is judged, and reported as a line of the table."""

    def __init__(self, folder: Path, name: str, report: Report) -> None:
        """Start with nobody.

        :param folder: where to keep the journals
        :param name: what to call it in the table
        :param report: prints a line
        """
        super().__init__(folder, f"chaos_{uuid.uuid4().hex}")
        self._name = name
        self._report = report

    def judge(self, url: URL, faults: int | None = None) -> Outcome:
        """Print the figures, and fail if anything went wrong.

        :param url: the database, with a synchronous driver
        :param faults: how many there were; by default the calls that were cancelled
        :return: what came of it
        """
        outcome = self.outcome(url)
        faults = outcome.cut if faults is None else faults
        self._report(
            self._name,
            acknowledged=outcome.acknowledged,
            faults=faults,
            retried=outcome.retried,
            lost=len(outcome.lost),
            errors=len(outcome.errors),
            longest_s=round(outcome.longest, 2),
        )
        assert outcome.lost == []
        assert outcome.errors == []
        assert outcome.left == []
        assert outcome.acknowledged > 0
        assert faults > 0
        return outcome


@pytest.fixture
def report(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Report:
    """Return a function that prints a line of figures, past what captures the output."""
    terminal = request.config.get_terminal_writer()
    printed = request.config.stash.setdefault(TITLES, [])

    def report(name: str, **figures: object) -> None:
        with capsys.disabled():
            if printed != list(figures):
                printed[:] = figures
                terminal.write("\n" + " " * WIDTH + "".join(f"{title:>14}" for title in figures))
            line = "".join(f"{figure:>14}" for figure in figures.values())
            terminal.write(f"\n{name:<{WIDTH}}{line} ", flush=True)

    return report


@pytest.fixture
def scenario(request: pytest.FixtureRequest, report: Report) -> Iterator[Scenario]:
    """Return a crew without members; none is left at the end."""
    name = request.node.name.removeprefix("test_").replace("_", " ")
    with TemporaryDirectory(prefix="chaos-") as folder:
        scenario = Scenario(Path(folder), name, report)
        with scenario:
            yield scenario
