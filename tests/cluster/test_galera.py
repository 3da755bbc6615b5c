"""What Galera has acknowledged is there, whole and not overtaken, whichever node fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from chaos.drivers import DRIVERS, TIMEOUTS
from chaos.outcome import Outcome
from chaos.scenario import Scenario
from sqlalchemy import URL

from .conftest import PAUSE, SHORT
from .galera import PORT, Galera, Node, url
from .probe import Probe

WAITS = "SET SESSION wsrep_sync_wait = 7"
"""A read (1), an UPDATE or DELETE (2), an INSERT (4) waits for what has been committed before."""
LEASE = 60.0  # seconds, longer than any outage
_OUTAGE = 8.0  # seconds, longer than Galera waits for a node that says nothing: 5
_ONE, _ALL = "one writer", "all nodes"  # that HAProxy sends clients to
Fault = Callable[[Galera, Node], None]


@pytest.fixture
def cluster(galera_cluster: Galera) -> Galera:
    """Return the cluster by a shorter name."""
    return galera_cluster


def killed(cluster: Galera, node: Node) -> None:
    node.kill()
    time.sleep(1)


def stopped(cluster: Galera, node: Node) -> None:
    with node.host.stopped("mariadbd"):
        time.sleep(_OUTAGE)


def cut_off(cluster: Galera, node: Node) -> None:
    with node.host.cut_off():
        time.sleep(_OUTAGE)


def shut_down(cluster: Galera, node: Node) -> None:
    node.shut_down()


def donor(cluster: Galera, node: Node) -> None:
    """Have another node copy all that the node has, which is desynced meanwhile."""
    other = cluster.others(node)[-1]
    other.shut_down()
    other.forget()
    other.start(f"--wsrep-sst-donor={node.host.name}")


def rolling_restart(cluster: Galera, _: Node) -> None:
    for node in cluster.nodes:
        node.shut_down()
        cluster.heal()


def all_killed(cluster: Galera, _: Node) -> None:
    for node in cluster.nodes:
        node.kill()


def hire(scenario: Scenario, url: URL, lease: float = LEASE) -> None:
    """Hire two processes for each driver."""
    for driver in 2 * DRIVERS["mysql"]:
        scenario.hire(
            url.set(drivername=f"mysql+{driver}"),
            lease=lease,
            pause=PAUSE,
            connect_args={**TIMEOUTS[driver], "init_command": WAITS},
        )


def entry(cluster: Galera, layout: str) -> URL:
    return url(cluster.one_writer if layout == _ONE else cluster.all_nodes)


def judge(scenario: Scenario, cluster: Galera, faults: int, **figures: Any) -> Outcome:
    """Judge by what one of the nodes holds, and see that all hold the same."""
    node = cluster.nodes[-1]
    at_node = url(PORT, node.address).set(query={"init_command": WAITS})
    outcome = scenario.judge(at_node, faults, **figures)
    assert len({node.checksum(scenario.table) for node in cluster.nodes}) == 1
    return outcome


def endure(
    scenario: Scenario, cluster: Galera, layout: str, inject: Callable[[], None], **options: float
) -> Outcome:
    """Write through faults, beside a plain client that tells how long the cluster itself was away.

    :param inject: one fault, after which all nodes are started again
    :param options: of :func:`hire`
    """
    faults = 0
    with Probe(entry(cluster, layout), TIMEOUTS["pymysql"]) as probe:
        hire(scenario, entry(cluster, layout), **options)
        for _ in scenario.at_work():
            for _ in range(1 if SHORT else 2):
                inject()
                faults += 1
                cluster.heal()
                probe.wait()
    return judge(scenario, cluster, faults, **{"Galera's own, s": round(probe.longest, 2)})


_LAYOUTS = {
    killed: [_ONE] if SHORT else [_ONE, _ALL],
    stopped: [_ONE] if SHORT else [_ONE, _ALL],
    cut_off: [_ALL] if SHORT else [_ONE, _ALL],
    shut_down: [] if SHORT else [_ONE, _ALL],
    donor: [_ALL] if SHORT else [_ONE, _ALL],
    rolling_restart: [_ONE] if SHORT else [_ONE, _ALL],
    all_killed: [_ONE],
}


@pytest.mark.parametrize(
    ("fault", "layout"),
    [
        pytest.param(fault, layout, id=f"{fault.__name__.replace('_', ' ')}, {layout}")
        for fault, layouts in _LAYOUTS.items()
        for layout in layouts
    ],
)
def test_galera(scenario: Scenario, cluster: Galera, fault: Fault, layout: str) -> None:
    """The node that is written to fails, or the first of three that are, or all."""
    endure(scenario, cluster, layout, lambda: fault(cluster, cluster.writer()))


@pytest.mark.parametrize("fault", [stopped] if SHORT else [killed, stopped, cut_off])
def test_galera_other_node(scenario: Scenario, cluster: Galera, fault: Fault) -> None:
    """One that is not written to fails: Galera waits for it, since it acknowledges write sets."""
    endure(scenario, cluster, _ONE, lambda: fault(cluster, cluster.others(cluster.writer())[0]))


def test_galera_conflicts(scenario: Scenario, cluster: Galera) -> None:
    """All nodes are written to, on the same rows. The faults are the transactions that lost."""
    before = sum(node.conflicts() for node in cluster.nodes)
    hire(scenario, entry(cluster, _ALL))
    for _ in scenario.at_work():
        time.sleep(1)
    judge(scenario, cluster, sum(node.conflicts() for node in cluster.nodes) - before)


@pytest.mark.parametrize("layout", [_ALL] if SHORT else [_ONE, _ALL])
def test_galera_short_lease(scenario: Scenario, cluster: Galera, layout: str) -> None:
    """Locks are lost in an outage, and who has lost one writes nothing."""
    endure(scenario, cluster, layout, lambda: stopped(cluster, cluster.writer()), lease=2)
