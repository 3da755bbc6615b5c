"""What a synchronous cluster has acknowledged is there, whichever node is lost.

And what an asynchronous one has acknowledged may be gone.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from chaos.drivers import BEHIND_PGBOUNCER, DRIVERS, TIMEOUTS, Options
from chaos.outcome import Outcome
from chaos.scenario import Scenario
from chaos.servers import PREPARING, PREPARING_PGBOUNCER, Server, pgbouncer
from sqlalchemy import URL

from .conftest import PAUSE, SHORT
from .patroni import Patroni
from .probe import Probe

Fault = Callable[[Patroni, Probe], None]
SECONDS = 1 if SHORT else 40
"""For how long a scenario goes on to inject faults: once, or twice where a leader is lost."""
LEASE = 60
"""Seconds: longer than any failover."""
RETRY_FOR = 60
"""Seconds for outages that last as long as Patroni's ttl of 20, and those that follow it."""


@pytest.fixture
def cluster(patroni_cluster: Patroni) -> Patroni:
    """Return the cluster by a shorter name."""
    return patroni_cluster


@pytest.fixture
def asynchronous(cluster: Patroni) -> Iterator[None]:
    """Have the leader acknowledge what no replica has, until the end of the test."""
    cluster.configure(synchronous_mode=False, maximum_lag_on_failover=1 << 26)
    yield
    cluster.configure(synchronous_mode=True, maximum_lag_on_failover=1 << 20)


@pytest.fixture
def pooler(cluster: Patroni, tmp_path: Path) -> Iterator[Server]:
    """Return a PgBouncer in transaction mode before the leader."""
    with pgbouncer(tmp_path, leader_of(cluster)).running() as server:
        yield server


@pytest.fixture
def preparing_pooler(cluster: Patroni, tmp_path: Path) -> Iterator[Server]:
    """Return a PgBouncer that prepares statements itself."""
    leader = leader_of(cluster)
    with pgbouncer(tmp_path, leader, PREPARING_PGBOUNCER, **PREPARING).running() as server:
        yield server


def leader_of(cluster: Patroni) -> Server:
    """Return the leader, whichever it is, as a server that runs already."""
    return Server(cluster.url, [], None, signal.SIGKILL)


def switchover(cluster: Patroni, probe: Probe) -> None:
    cluster.switchover()


def leader_killed(cluster: Patroni, probe: Probe) -> None:
    leader = cluster.leader()
    leader.kill("patroni", "postgres")
    probe.wait()
    cluster.start(leader)


def leader_stopped(cluster: Patroni, probe: Probe) -> None:
    with cluster.leader().stopped():
        probe.wait()


def leader_cut_off(cluster: Patroni, probe: Probe) -> None:
    with cluster.leader().cut_off():
        probe.wait()


def replica_lost(cluster: Patroni, probe: Probe) -> None:
    synchronous = cluster.replicas()[0]
    synchronous.kill()
    probe.wait()
    cluster.start(synchronous)


def rolling_restart(cluster: Patroni, probe: Probe) -> None:
    for host in [*cluster.replicas(), cluster.leader()]:
        cluster.stop(host)
        probe.wait()
        cluster.start(host)
        cluster.wait_until_whole()


def etcd_without_majority(cluster: Patroni, probe: Probe) -> None:
    replicas = cluster.replicas()
    for host in replicas:
        host.kill("etcd")
    time.sleep(10)
    for host in replicas:
        cluster.start(host)


def leader_lost_before_it_could_replicate(
    cluster: Patroni, probe: Probe, seconds: float = 1.5
) -> None:
    """As when a rack loses its network, and then its power."""
    leader = cluster.leader()
    with ExitStack() as plugged_in_later:
        with ExitStack() as cables:
            for host in cluster.replicas():
                cables.enter_context(host.cut_off())
            time.sleep(seconds)  # less than Patroni's retry_timeout, after which it gives up
            plugged_in_later.enter_context(leader.cut_off())
            leader.kill()  # whatever the kernel has yet to send does not arrive any more
        probe.wait()
    cluster.start(leader)


def run(
    scenario: Scenario,
    cluster: Patroni,
    fault: Fault,
    *,
    url: URL | None = None,
    connect_args: Options | None = None,
    lease: float = LEASE,
    may_lose: bool = False,
    synchronous: bool = True,
    **options: Any,
) -> Outcome:
    """Inject a fault while a process for each driver writes.

    :param url: of what stands before the cluster
    :param options: the storage's
    """
    for driver in DRIVERS["postgresql"]:
        scenario.hire(
            (url or cluster.url).set(drivername=f"postgresql+{driver}"),
            lease=lease,
            pause=PAUSE,
            connect_args=(connect_args or {}).get(driver, {}),
            **options,
        )
    faults = 0
    with Probe(cluster.url, TIMEOUTS["psycopg"]) as probe:
        for _ in scenario.at_work(SECONDS):
            faults += 1
            fault(cluster, probe)
            probe.wait()
            cluster.wait_until_whole(synchronous)
    outage = round(probe.longest, 2)
    return scenario.judge(cluster.url, faults, may_lose, **{"outage itself, s": outage})


@pytest.mark.parametrize("fault", [switchover, replica_lost, rolling_restart])
def test_patroni(scenario: Scenario, cluster: Patroni, fault: Fault) -> None:
    """What is planned, or should not matter: with the defaults of storage and drivers."""
    run(scenario, cluster, fault)


@pytest.mark.parametrize(
    "fault", [leader_killed, leader_stopped, leader_cut_off, etcd_without_majority]
)
def test_patroni_loses(scenario: Scenario, cluster: Patroni, fault: Fault) -> None:
    """The leader is lost, or may not lead: with time-outs, as the network goes silent."""
    outcome = run(scenario, cluster, fault, connect_args=TIMEOUTS, retry_for=RETRY_FOR)
    assert outcome.fenced == 0, outcome.told
    assert outcome.retried > 0


def test_patroni_lease_runs_out(scenario: Scenario, cluster: Patroni) -> None:
    """It runs out during the outage: handlers are told, and no two of them held the lock."""
    run(scenario, cluster, leader_killed, lease=5, retry_for=RETRY_FOR)


def test_patroni_synchronous(scenario: Scenario, cluster: Patroni) -> None:
    """The leader is lost while nothing is replicated: so it has acknowledged nothing."""
    run(scenario, cluster, leader_lost_before_it_could_replicate, retry_for=RETRY_FOR)


def test_patroni_synchronous_and_impatient(scenario: Scenario, cluster: Patroni) -> None:
    """The same, while asyncpg's command_timeout cancels commits that wait for a replica.

    PostgreSQL cancels the wait, and not the commit: it is seen, and is on the leader alone. The
    storage does not take it as written until a replica has it.
    """
    impatient = {**TIMEOUTS, "asyncpg": {"timeout": 2, "command_timeout": 0.5}}
    fault = partial(leader_lost_before_it_could_replicate, seconds=2.8)
    run(scenario, cluster, fault, connect_args=impatient, retry_for=RETRY_FOR)


@pytest.mark.usefixtures("asynchronous")
def test_patroni_asynchronous(scenario: Scenario, cluster: Patroni) -> None:
    """The same without synchronous mode: what was acknowledged is lost, as nobody promised."""
    outcome = run(
        scenario,
        cluster,
        leader_lost_before_it_could_replicate,
        connect_args=TIMEOUTS,
        may_lose=True,
        synchronous=False,
        retry_for=RETRY_FOR,
    )
    assert outcome.lost


@pytest.mark.parametrize("fault", [switchover, leader_killed])
def test_patroni_behind_pgbouncer(
    scenario: Scenario, cluster: Patroni, pooler: Server, fault: Fault
) -> None:
    """PgBouncer in transaction mode before the leader."""
    run(
        scenario,
        cluster,
        fault,
        url=pooler.url,
        connect_args=BEHIND_PGBOUNCER,
        retry_for=RETRY_FOR,
    )


@pytest.mark.parametrize("fault", [switchover] * bool(PREPARING_PGBOUNCER))
def test_patroni_behind_preparing_pgbouncer(
    scenario: Scenario, cluster: Patroni, preparing_pooler: Server, fault: Fault
) -> None:
    """Nobody is told of the pooler, which prepares all statements on the new leader as well."""
    run(scenario, cluster, fault, url=preparing_pooler.url, retry_for=RETRY_FOR)
