"""What was acknowledged is there, whole and not overtaken, whichever node of Galera fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from chaos.drivers import DRIVERS, TIMEOUTS
from chaos.scenario import Scenario, report, scenario
from sqlalchemy import URL

from .galera import CAN_RUN, PORT, Galera, Node, url
from .hosts import hosts
from .probe import Probe

__all__ = ["report", "scenario"]  # fixtures

IS_SHORT = os.environ.get("HYBRID_STORAGE_CLUSTER") == "short"
WAITS = "SET SESSION wsrep_sync_wait = 7"
"""Before a read (1), an UPDATE or DELETE (2), an INSERT (4): wait for what others have committed."""
LEASE = 60.0  # seconds, longer than any outage


@pytest.fixture(scope="module")
def galera() -> Iterator[Galera]:
    """Return a cluster of which any node may be killed; at the end of a test all have to be up."""
    with TemporaryDirectory(prefix="galera-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with hosts(3, folder) as three, Galera(three).running(folder) as galera:
            yield galera


def hire(scenario: Scenario, url: URL, init: str = WAITS, lease: float = LEASE) -> None:
    """Hire two processes for each driver."""
    for driver in 2 * DRIVERS["mysql"]:
        scenario.hire(
            url.set(drivername=f"mysql+{driver}"),
            lease=lease,
            connect_args={**TIMEOUTS[driver], "init_command": init},
        )


def anywhere(node: Node) -> URL:
    return url(PORT, node.address).set(query={"init_command": WAITS})


def killed(galera: Galera, node: Node) -> int:
    node.kill()
    time.sleep(1)
    galera.heal()
    return 1


def stopped(galera: Galera, node: Node) -> int:
    with node.host.stopped("mariadbd"):
        time.sleep(10)
    galera.heal()
    return 1


def cut_off(galera: Galera, node: Node) -> int:
    with node.host.cut_off():
        time.sleep(10)
    galera.heal()
    return 1


def shut_down(galera: Galera, node: Node) -> int:
    node.shut_down()
    galera.heal()
    return 1


def copies_anew(galera: Galera, node: Node) -> int:
    node.shut_down()
    node.forget()
    galera.heal()
    return 1


Fault = Callable[[Galera, Node], int]


@pytest.mark.parametrize("layout", ["one writer", "all nodes"] * CAN_RUN)
@pytest.mark.parametrize("fault", [killed, stopped, cut_off, shut_down, copies_anew])
def test_galera_writer(scenario: Scenario, galera: Galera, layout: str, fault: Fault) -> None:
    """The node that is written to fails."""
    address = url(galera.one_writer if layout == "one writer" else galera.all_nodes)
    with Probe(address, TIMEOUTS["pymysql"]) as probe:
        hire(scenario, address)
        faults = 0
        for _ in scenario.at_work():
            faults += fault(galera, galera.writer())
        scenario.judge(
            anywhere(galera.nodes[1]), faults, **{"engine's own, s": round(probe.longest, 2)}
        )
