"""Servers to kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from sqlalchemy import URL

from .crew import SECONDS
from .scenario import report, scenario
from .servers import (
    MARIADBD,
    PGBOUNCER,
    PREPARING,
    PREPARING_PGBOUNCER,
    Server,
    mariadb,
    pgbouncer,
    postgres,
)

__all__ = ["report", "scenario"]  # fixtures


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [
        f"chaos: {SECONDS:g} s of faults in each scenario",
        "MariaDB to kill: "
        + (MARIADBD[0] or "mariadbd is not installed, its scenarios are left out"),
        "PgBouncer: " + (PGBOUNCER or "not installed, its scenarios are left out"),
        "PgBouncer that prepares statements: "
        + (PREPARING_PGBOUNCER or "not found, its scenario is left out; see install_pgbouncer.sh"),
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


@pytest.fixture(scope="session")
def preparing_pgbouncer_server(folder: Path, postgresql_server: Server) -> Iterator[Server]:
    """Return a PgBouncer that knows prepared statements, and may be killed."""
    inner = folder / "preparing_pgbouncer"
    inner.mkdir()
    with pgbouncer(inner, postgresql_server, PREPARING_PGBOUNCER, **PREPARING).running() as server:
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
