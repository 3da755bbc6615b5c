"""Clusters to break."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from chaos.scenario import report, scenario

from . import galera
from .patroni import MISSING, Patroni, patroni

__all__ = ["report", "scenario"]  # fixtures

SHORT = os.environ.get("HYBRID_STORAGE_CLUSTER") == "short"
PAUSE = 0.05 if SHORT else 0.0
"""Seconds between two writes of a client, so that a short run leaves others some of the machine."""

# Left out, rather than skipped, where something is missing.
collect_ignore = ["test_patroni.py"] if MISSING else []
collect_ignore += ["test_galera.py", "test_galera_lag.py"] if galera.MISSING else []


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [
        "cluster: " + ("one fault of each kind" if SHORT else "several faults of each kind"),
        "Patroni: "
        + (
            f"{', '.join(MISSING)} not found, its scenarios are left out; see install.sh"
            if MISSING
            else "installed"
        ),
        "Galera: "
        + (
            f"{', '.join(galera.MISSING)} not found, its scenarios are left out; see install.sh"
            if galera.MISSING
            else "installed"
        ),
    ]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Let a short run pass where nothing is installed: its header says what is left out."""
    if SHORT and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Return a folder for all data, which is removed at the end."""
    with TemporaryDirectory(prefix="cluster-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the servers run as users of their own
        yield folder


@pytest.fixture(scope="session")
def patroni_cluster(folder: Path) -> Iterator[Patroni]:
    """Return a PostgreSQL cluster, which has to be left whole and in synchronous mode."""
    (folder / "patroni").mkdir()
    with patroni(folder / "patroni") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def galera_cluster(folder: Path) -> Iterator[galera.Galera]:
    """Return a MariaDB cluster, of which all nodes have to be left running."""
    (folder / "galera").mkdir(mode=0o755)
    with galera.galera(folder / "galera") as cluster:
        yield cluster
