"""What was acknowledged is there, whole and not overtaken, whatever fails meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from .drivers import BEHIND_PGBOUNCER, DRIVERS, TIMEOUTS, Options
from .proxy import Proxy
from .scenario import Scenario
from .servers import PGBOUNCER, PREPARING_PGBOUNCER, SERVERS, Server
from .writer import CLIENTS


def hire(
    scenario: Scenario,
    url: URL,
    *,
    connect_args: Options | None = None,
    cancels: bool = False,
    lease: float | None = 30,
) -> None:
    """Hire a process for each driver."""
    backend = url.get_backend_name()
    for driver in DRIVERS[backend]:
        arguments = (connect_args or {}).get(driver, {})
        scenario.hire(
            url.set(drivername=f"{backend}+{driver}"), cancels, lease, connect_args=arguments
        )


@pytest.mark.parametrize("server", SERVERS, indirect=True)
def test_server_killed(scenario: Scenario, server: Server) -> None:
    """As by kill -9, and started again."""
    hire(scenario, server.url)
    faults = 0
    for _ in scenario.at_work():
        faults += 1
        server.crash()
        time.sleep(random.uniform(0, 1))
        server.start()
    outcome = scenario.judge(server.url, faults)
    assert outcome.retried > 0


@pytest.mark.parametrize("server", SERVERS, indirect=True)
def test_connections_killed(scenario: Scenario, server: Server) -> None:
    """One by one, by the server."""
    if server.url.get_backend_name() == "postgresql":
        others = (
            "SELECT pid FROM pg_stat_activity WHERE client_port > 0 AND pid <> pg_backend_pid()"
        )
        kill = "SELECT pg_terminate_backend({})"
    else:
        others = "SELECT id FROM information_schema.processlist WHERE id <> connection_id()"
        kill = "KILL {}"
    hire(scenario, server.url)
    killed = 0
    engine = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for _ in scenario.at_work():
            for victim in connection.scalars(text(others)).all():
                with suppress(OperationalError):  # it has gone by itself
                    connection.execute(text(kill.format(victim)))
                    killed += 1
                time.sleep(0.02)
    outcome = scenario.judge(server.url, killed)
    assert outcome.retried > 0


def hangs(proxy: Proxy) -> int:
    with proxy.hanging():
        time.sleep(3)
    return 1


def loses_power(proxy: Proxy) -> int:
    with proxy.gone():
        time.sleep(4)
    return 1


def resets(proxy: Proxy) -> int:
    time.sleep(0.1)
    return proxy.reset()


def crawls(proxy: Proxy) -> int:
    with proxy.crawling(0.005):
        time.sleep(2)
    return 1


@pytest.mark.parametrize("server", SERVERS, indirect=True)
@pytest.mark.parametrize("fault", [hangs, loses_power, resets, crawls])
def test_network(scenario: Scenario, server: Server, fault: Callable[[Proxy], int]) -> None:
    """Between the processes and the server, with the drivers' time-outs set."""
    assert server.url.port is not None
    with Proxy(("127.0.0.1", server.url.port)) as proxy:
        hire(scenario, server.url.set(port=proxy.port), connect_args=TIMEOUTS)
        faults = sum(fault(proxy) for _ in scenario.at_work())
        outcome = scenario.judge(server.url, faults)
    assert outcome.retried > 0 or fault is crawls


@pytest.mark.parametrize("url", ["sqlite", *SERVERS], indirect=True)
def test_writers_killed(scenario: Scenario, url: URL) -> None:
    """In mid-operation, and replaced. Others wait for a killed one's locks until these expire."""
    hire(scenario, url, lease=2)
    faults = 0
    for _ in scenario.at_work():
        faults += 1
        time.sleep(random.uniform(0, 0.2))
        scenario.kill_one()
    scenario.judge(url, faults)


@pytest.mark.parametrize("url", ["sqlite", *SERVERS], indirect=True)
def test_calls_cancelled(scenario: Scenario, url: URL) -> None:
    """By their tasks, once and twice, by timeouts and by scopes."""
    hire(scenario, url, cancels=True)
    for _ in scenario.at_work():
        time.sleep(0.2)
    scenario.judge(url)


@pytest.mark.parametrize(
    ("server", "connect_args"),
    [
        *[pytest.param("pgbouncer", BEHIND_PGBOUNCER, id="pgbouncer")] * bool(PGBOUNCER),
        *[pytest.param("preparing_pgbouncer", {}, id="pgbouncer that prepares")]
        * bool(PREPARING_PGBOUNCER),
    ],
    indirect=["server"],
)
def test_pooler_killed(
    scenario: Scenario, server: Server, connect_args: Options, postgresql_server: Server
) -> None:
    """PgBouncer in transaction mode, where statements of a client meet different servers."""
    hire(scenario, server.url, connect_args=connect_args)
    faults = 0
    for _ in scenario.at_work():
        faults += 1
        server.crash()
        time.sleep(random.uniform(0, 0.5))
        server.start()
    outcome = scenario.judge(postgresql_server.url, faults)
    assert outcome.retried > 0


@pytest.mark.parametrize("server", ["pgbouncer"] * bool(PGBOUNCER), indirect=True)
def test_pooler_mixes_statements(
    scenario: Scenario, server: Server, postgresql_server: Server
) -> None:
    """Without a fault: SQLAlchemy prepares a statement on one server and runs it on another.

    Not the storage: it has found out about the pooler, and wraps statements into transactions.
    """
    url = server.url.set(drivername="postgresql+asyncpg")
    by_sqlalchemy = {"logging_token": "chaos"}  # what the application sets for the engine
    for _ in range(3):
        scenario.hire(
            url,
            connect_args=BEHIND_PGBOUNCER["asyncpg"],
            execution_options=by_sqlalchemy,
        )
    for _ in scenario.at_work():
        time.sleep(0.2)
    outcome = scenario.judge(postgresql_server.url, faults=1)
    assert outcome.retried <= 3 * CLIENTS


@pytest.mark.parametrize("server", ["pgbouncer"] * bool(PGBOUNCER), indirect=True)
def test_pooler_forgets_statements(
    scenario: Scenario, server: Server, postgresql_server: Server
) -> None:
    """As the one before, by a psycopg that has not been told of the pooler: it is told at once."""
    scenario.hire(server.url.set(drivername="postgresql+psycopg"))
    scenario.hire(server.url.set(drivername="postgresql+psycopg"))
    asyncpg = server.url.set(drivername="postgresql+asyncpg")
    scenario.hire(asyncpg, connect_args=BEHIND_PGBOUNCER["asyncpg"])
    for _ in scenario.at_work():
        time.sleep(0.2)
    outcome = scenario.judge(postgresql_server.url, faults=1)
    assert outcome.retried < outcome.acknowledged / 20
