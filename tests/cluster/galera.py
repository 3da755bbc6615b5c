"""MariaDB Galera: three nodes, each on a host of its own, from the distribution's packages."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

import pymysql
from chaos.proxy import free_port
from sqlalchemy import URL

from .haproxy import HAPROXY, haproxy
from .hosts import PATIENCE, Host, can_have_hosts, hosts, wait_for

_MARIADBD = shutil.which("mariadbd")
_INSTALL = shutil.which("mariadb-install-db")
_PROVIDERS = [
    Path("/usr/lib/galera/libgalera_smm.so"),  # Debian
    Path("/usr/lib64/galera-4/libgalera_smm.so"),  # Red Hat
]
_PROVIDER = next((path for path in _PROVIDERS if path.exists()), None)
_CHECK = Path(__file__).with_name("galera_check.py")
_NEEDED = {
    "mariadbd": _MARIADBD,
    "mariadb-install-db": _INSTALL,
    "galera-4": _PROVIDER,
    "rsync": shutil.which("rsync"),
    "haproxy": HAPROXY,
    "root and the ip command": can_have_hosts(),
}
MISSING = [name for name, found in _NEEDED.items() if not found]
"""What a cluster would take and is not here."""
PORT = 3306
CHECK_PORT = 9200
"""Where a node says by HTTP whether it can be written to; the usual port for that."""
DATABASE = "test"
_ROOT = "root"  # of the database
_USER = "mysql"  # of the system: rsync's daemon gives up what root may do
_NAME = "mariadbd"  # as the system knows it
_POSITION = re.compile(r"Recovered position: \S+:(-?\d+)")


class Node:
    """A MariaDB server that is part of a cluster."""

    def __init__(self, host: Host, others: Sequence[Host], **options: str) -> None:
        """Store how to run it.

        :param host: where
        :param others: the hosts of all nodes
        :param options: more of the server's options
        """
        self.host = host
        self.address = host.address
        self._data = host.folder / "data"
        self._process: Popen[bytes] | None = None
        addresses = ",".join(other.address for other in others)
        self._options = {
            "datadir": str(self._data),
            "socket": str(host.folder / "socket"),
            "port": str(PORT),
            "bind-address": "0.0.0.0",
            "user": _USER,
            "innodb-buffer-pool-size": "32M",
            "innodb-log-file-size": "16M",
            "innodb-autoinc-lock-mode": "2",
            "innodb-flush-log-at-trx-commit": "1",
            "max-connections": "200",
            "binlog-format": "ROW",
            "wsrep-on": "ON",
            "wsrep-provider": str(_PROVIDER),
            "wsrep-cluster-address": f"gcomm://{addresses}",
            "wsrep-node-address": host.address,
            "wsrep-node-name": host.name,
            "wsrep-sst-method": "rsync",
            "wsrep-provider-options": "gcache.size=32M",
            **{name.replace("_", "-"): value for name, value in options.items()},
        }

    def _install(self) -> None:
        """Make an empty database, whose ``root`` needs no password."""
        assert _INSTALL is not None
        self.forget()
        self.host.run(
            _INSTALL,
            "--no-defaults",
            f"--datadir={self._data}",
            f"--user={_USER}",
            "--auth-root-authentication-method=normal",
            "--skip-name-resolve",
            "--innodb-log-file-size=16M",
        )
        # "root" may come from elsewhere.
        script = self.host.folder / "init.sql"
        script.write_text(
            f"CREATE OR REPLACE USER root@'%'; GRANT ALL ON *.* TO root@'%' WITH GRANT OPTION; "
            f"CREATE DATABASE IF NOT EXISTS {DATABASE};\n".replace("; ", ";\n")
        )

    def start(self, *options: str, first: bool = False) -> None:
        """Start it, without waiting for it.

        :param options: more of the server's options
        :param first: whether to begin the cluster, as the others are to join it
        """
        new = ["--wsrep-new-cluster"] * first
        self._process = self.host.start(*self._command(), *new, *options, user=_USER)

    def start_new(self) -> None:
        """Begin a cluster with an empty database."""
        self._install()
        self.start(f"--init-file={self.host.folder / 'init.sql'}", first=True)

    def forget(self) -> None:
        """Throw away all data: the node has to copy a donor's."""
        if self._data.exists():
            shutil.rmtree(self._data)
        self._data.mkdir()
        shutil.chown(self._data, _USER)

    def shut_down(self) -> None:
        """End it in good order, and wait until it has ended."""
        self.host.signal(signal.SIGTERM, _NAME)
        self._wait()

    def kill(self) -> None:
        """End it with SIGKILL, and wait until it has ended."""
        self.host.kill(_NAME)
        self._wait()

    def position(self) -> int:
        """Return up to which write set a server that has been killed has all."""
        command = f"{' '.join(self._command())} --wsrep-recover 2>&1 || true"
        log = self.host.run("sh", "-c", command, user=_USER)
        found = _POSITION.findall(log)
        return int(found[-1]) if found else -1

    def lets_bootstrap(self) -> None:
        """Have it begin a cluster although it was not the last to leave."""
        state = self._data / "grastate.dat"
        state.write_text(state.read_text().replace("safe_to_bootstrap: 0", "safe_to_bootstrap: 1"))

    def status(self, name: str) -> str:
        """Return one of the server's status variables, an empty string if it does not answer."""
        row = None
        with suppress(pymysql.Error, OSError):
            row = self.read("SHOW GLOBAL STATUS LIKE %s", name)
        return str(row[1]) if row else ""

    def conflicts(self) -> int:
        """Return how many of its transactions lost to those of other nodes."""
        names = "wsrep_local_cert_failures", "wsrep_local_bf_aborts"
        return sum(int(self.status(name)) for name in names)

    def checksum(self, table: str) -> object:
        """Return a sum of what a table holds, once all is there that others have committed."""
        # CHECKSUM TABLE would not wait.
        sums = "COUNT(*), SUM(CRC32(CONCAT_WS(' ', id, state, data)))"
        wait = "SET SESSION wsrep_sync_wait = 1"
        return self.read(f"SELECT {sums} FROM {DATABASE}.{table}", init_command=wait)

    def is_running(self) -> bool:
        """Tell whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def is_synced(self) -> bool:
        """Tell whether it is part of the cluster, and has all that it is to have."""
        return (
            self.status("wsrep_local_state_comment") == "Synced"
            and self.status("wsrep_cluster_status") == "Primary"
        )

    def read(self, statement: str, *parameters: str, **options: Any) -> tuple[Any, ...] | None:
        """Return the first row of an answer."""
        with closing(self.connection(**options)) as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            row: tuple[Any, ...] | None = cursor.fetchone()
            return row

    def connection(self, **options: Any) -> pymysql.Connection:
        """Connect to this node alone."""
        timeouts = {"connect_timeout": 2, "read_timeout": 2, "write_timeout": 2}
        return pymysql.connect(
            **{"host": self.address, "port": PORT, "user": _ROOT, **timeouts, **options}
        )

    def _wait(self) -> None:
        if self._process is not None:
            self._process.wait(PATIENCE)
            self._process = None

    def _command(self) -> list[str]:
        assert _MARIADBD is not None
        options = [f"--{name}={value}" for name, value in self._options.items()]
        return [_MARIADBD, "--no-defaults", "--skip-name-resolve", *options]


class Galera:
    """A cluster of three nodes, and HAProxy before it."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        """Store on which hosts to run it."""
        self.nodes = [Node(host, hosts) for host in hosts]
        self.one_writer = free_port()
        """The port of this machine behind which one node is written to, others only after it."""
        self.all_nodes = free_port()
        """The port behind which all nodes are written to, in turn."""

    @contextmanager
    def running(self, folder: Path) -> Iterator[Galera]:
        """Run it until the end of the context, HAProxy in an empty folder."""
        checks: list[Popen[bytes]] = []
        try:
            for node in self.nodes:
                checks.append(
                    node.host.start(sys.executable, str(_CHECK), str(CHECK_PORT), str(PORT))
                )
            self._begin()
            with haproxy(folder, self._ports(), ["option httpchk"], f"port {CHECK_PORT}"):
                yield self
        finally:
            for node in self.nodes:
                node.kill()
            for process in checks:
                process.kill()
                process.wait()

    def _begin(self) -> None:
        first, *others = self.nodes
        first.start_new()
        wait_for(first.is_synced, "the first node begins a cluster")
        for node in others:
            node.forget()
            node.start()
            wait_for(node.is_synced, f"{node.address} joins")

    def _ports(self) -> dict[int, list[str]]:
        first, *others = [f"{node.address}:{PORT}" for node in self.nodes]
        return {
            # Once the first node is back, nobody is to go on at another.
            self.one_writer: [
                f"{first} on-marked-up shutdown-backup-sessions",
                *(f"{address} backup" for address in others),
            ],
            self.all_nodes: [first, *others],
        }

    def writer(self) -> Node:
        """Return the node that is written to behind the port of one writer."""
        connection = pymysql.connect(host="127.0.0.1", port=self.one_writer, user=_ROOT)
        with closing(connection), connection.cursor() as cursor:
            cursor.execute("SELECT @@wsrep_node_address")
            (address,) = cursor.fetchone() or ("",)
        return next(node for node in self.nodes if node.address == address)

    def others(self, node: Node) -> list[Node]:
        """Return all nodes but one."""
        return [each for each in self.nodes if each is not node]

    def heal(self) -> None:
        """Start what has ended, and wait until all nodes are synced."""
        if not any(node.is_running() for node in self.nodes):
            self._recover()
        for node in self.nodes:
            if not node.is_running():
                node.start()
        # One that was stopped believes to be a member until it hears from the others.
        wait_for(lambda: all(map(self._is_whole, self.nodes)), "all nodes come back")

    def _is_whole(self, node: Node) -> bool:
        return node.is_synced() and node.status("wsrep_cluster_size") == str(len(self.nodes))

    def _recover(self) -> None:
        # One that began with less would have the others throw away what was acknowledged.
        first = max(self.nodes, key=Node.position)
        first.lets_bootstrap()
        first.start(first=True)
        wait_for(first.is_synced, "the most advanced node begins a cluster")


@contextmanager
def galera(folder: Path) -> Iterator[Galera]:
    """Run a cluster until the end of the context.

    :param folder: an empty folder for its files, which any user may enter
    """
    with hosts(3, folder) as three, Galera(three).running(folder) as cluster:
        yield cluster


def url(port: int, address: str = "127.0.0.1") -> URL:
    """Return the URL of the tests' database."""
    return URL.create("mysql+pymysql", _ROOT, None, address, port, DATABASE)
