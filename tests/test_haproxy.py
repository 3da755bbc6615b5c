"""HAProxy: connections that it closes, and servers that its checks find."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import strings
from aiogram.fsm.storage.base import StorageKey
from backends import POSTGRESQL, Backend
from chaos.proxy import free_port
from chaos.servers import GALERA, MARIADBD, Server, galera_node_at, postgres
from cluster.hosts import wait_for
from cluster.patroni import CHECK
from conftest import dispose
from sqlalchemy import URL, create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool
from test_connection_strings import Pair, pair

from hybrid_storage import SQLAlchemyStorage

postgres_pair = pair


@pytest.fixture
def galera_node() -> Iterator[URL]:
    """Return the URL of a node that is a cluster by itself."""
    with TemporaryDirectory() as folder, galera_node_at(Path(folder)).running() as server:
        yield server.url


SETTINGS = """
defaults
    mode tcp
    timeout connect 1s
    timeout client 1s
    timeout server 1s
listen postgresql
    bind 127.0.0.1:{port}
    server one 127.0.0.1:{server}
"""


@pytest.fixture(scope="module")
def behind_haproxy() -> Iterator[Server]:
    """Return HAProxy before a PostgreSQL server."""
    with TemporaryDirectory() as folder, postgres(Path(folder) / "data").running() as server:
        port, settings = free_port(), Path(folder) / "haproxy.cfg"
        settings.write_text(SETTINGS.format(port=port, server=server.url.port))
        command = [str(shutil.which("haproxy")), "-db", "-f", str(settings)]
        with Server(server.url.set(port=port), command, None, signal.SIGKILL).running() as haproxy:
            yield haproxy


def is_retried(caplog: pytest.LogCaptureFixture) -> bool:
    """Tell whether the storage has said that it tries again."""
    return any("trying again" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("options", "meets_closed_ones"),
    [({}, True), ({"pool_pre_ping": True}, False), ({"pool_recycle": 0.75}, False)],
    ids=["plain", "ping", "recycle below the time-out"],
)
@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_idle_connections_are_closed_without_an_error(
    behind_haproxy: Server,
    backend: Backend,
    options: dict[str, Any],
    meets_closed_ones: bool,
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are closed after a second. A call that meets one is made again, and says so."""
    engine = backend.engine(behind_haproxy.url, **options)
    storage = SQLAlchemyStorage(backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}")
    await storage.create_table()
    for number in range(2):
        await asyncio.gather(*(storage.update_data(key, {str(number): 1}) for _ in range(4)))
        await asyncio.sleep(1.5)
        assert len(await storage.get_data(key)) == number + 1
    assert is_retried(caplog) is meets_closed_ones
    if options:  # which find out before your own transactions do
        await asyncio.sleep(1.5)
        async with storage.transaction():
            await storage.set_state(key, "kept")
    await dispose(engine)


# What the checks find


class Check(BaseHTTPRequestHandler):
    """Answers as Patroni's ``/primary`` does, on a standby."""

    def do_OPTIONS(self) -> None:
        """Say that this is not the leader."""
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


class CheckOfLeader(Check):
    """Answers as Patroni's ``/primary`` does, on the leader."""

    def do_OPTIONS(self) -> None:
        """Say that this is the leader, if that is what is asked."""
        self.send_response(200 if self.path == "/primary" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def answering(check: type[Check]) -> Iterator[int]:
    """Run a check by HTTP, and return its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), check) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def haproxy(folder: Path, url: URL, listen: str) -> Iterator[Server]:
    """Run HAProxy with a block of settings, in which ``*:PORT`` is where it listens."""
    port, settings = free_port(), folder / "haproxy.cfg"
    defaults, _ = SETTINGS.split("listen")
    settings.write_text(defaults + re.sub(r"\*:\d+", f"127.0.0.1:{port}", listen))
    command = [str(shutil.which("haproxy")), "-db", "-f", str(settings)]
    with Server(url.set(port=port), command, None, signal.SIGKILL).running() as server:
        yield server


def servers_behind(server: Server, ask: str) -> set[object]:
    """Return what the servers answer that connections through HAProxy reach."""
    engine = create_engine(server.url, poolclass=NullPool)
    found: set[object] = set()
    for _ in range(6):
        with engine.connect() as connection:
            found.add(connection.exec_driver_sql(ask).scalar())
    return found


def reaches(server: Server) -> bool:
    """Tell whether HAProxy knows of a server that it may send connections to."""
    try:
        return servers_behind(server, "SELECT 1") == {1}
    except OperationalError:
        return False


def test_a_tcp_check_reaches_a_standby_and_the_printed_one_only_the_leader(
    postgres_pair: Pair, tmp_path: Path
) -> None:
    primary, standby = postgres_pair.primary.url, postgres_pair.standby.url
    with answering(Check) as no, answering(CheckOfLeader) as yes:
        listen = (
            strings.block("haproxy: postgresql")
            .replace("10.0.0.1:5432 check port 8008", f"127.0.0.1:{standby.port} check port {no}")
            .replace("10.0.0.2:5432 check port 8008", f"127.0.0.1:{primary.port} check port {yes}")
        )
        assert "10.0" not in listen
        by_tcp = re.sub(r"    (option|http-check) .*\n|(?<=check) port \d+", "", listen)
        with haproxy(tmp_path, primary, by_tcp) as server:
            assert servers_behind(server, "SELECT pg_is_in_recovery()") == {False, True}
        with haproxy(tmp_path, primary, listen) as server:
            ask = "SELECT pg_is_in_recovery()"
            wait_for(lambda: servers_behind(server, ask) == {False}, "the leader alone is reached")


def test_the_printed_check_is_the_one_of_the_patroni_clusters() -> None:
    assert "\n    ".join(CHECK) in strings.block("haproxy: postgresql")


@pytest.mark.parametrize("galera_node", [None] * bool(GALERA and all(MARIADBD)), indirect=True)
def test_a_tcp_check_reaches_a_node_that_copies_and_the_printed_one_the_next(
    galera_node: URL, tmp_path: Path
) -> None:
    """The first is a donor. The next is the same server here, and its check is not asked."""
    check_port = free_port()
    root = create_engine(galera_node, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    listen = re.sub(
        r"10\.0\.0\.\d:3306 check port 9200",
        f"127.0.0.1:{galera_node.port} check port {check_port}",
        strings.block("haproxy: galera"),
    )
    program = Path(__file__).parent / "cluster" / "galera_check.py"
    command = [sys.executable, str(program), str(check_port), str(galera_node.port)]
    by_tcp = re.sub(r"    (option|http-check) .*\n|(?<=check) port \d+", "", listen)
    checks = subprocess.Popen(command)
    try:
        with haproxy(tmp_path, galera_node, listen) as server:
            # Its first checks may come before there is who answers them.
            wait_for(lambda: reaches(server), "the checks find the node")
            with root.connect() as connection:
                connection.exec_driver_sql("SET GLOBAL wsrep_desync = ON")
            wait_for(lambda: not reaches(server), "the checks find that it is a donor")
        with haproxy(tmp_path, galera_node, by_tcp) as server:
            time.sleep(3)  # for the checks
            assert reaches(server)
    finally:
        checks.kill()
        checks.wait()
