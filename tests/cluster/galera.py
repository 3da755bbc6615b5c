"""MariaDB Galera: three nodes, each on a host of its own, from the distribution's packages."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pymysql
from sqlalchemy import URL

from .hosts import PATIENCE, Host, can_have_hosts, wait_for

_MARIADBD = shutil.which("mariadbd")
_INSTALL = shutil.which("mariadb-install-db")
_PROVIDER = next(
    (
        path
        for path in (Path("/usr/lib/galera/libgalera_smm.so"), Path("/usr/lib64/galera-4/libgalera_smm.so"))
        if path.exists()
    ),
    None,
)
IS_INSTALLED = bool(_MARIADBD and _INSTALL and _PROVIDER and shutil.which("rsync"))
PORT = 3306
CHECK_PORT = 9200
"""Where a node says by HTTP whether it can be written to; the usual port for that."""
DATABASE = "test"
_ROOT = "root"
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
        addresses = ",".join(other.address for other in others)
        self._options = {
            "datadir": str(self._data),
            "socket": str(host.folder / "socket"),
            "port": str(PORT),
            "bind-address": "0.0.0.0",
            "user": _ROOT,
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
            "wsrep-slave-threads": "4",
            "wsrep-provider-options": "gcache.size=32M",
            **{name.replace("_", "-"): value for name, value in options.items()},
        }

    def install(self) -> None:
        """Make an empty database, whose ``root`` needs no password."""
        assert _INSTALL is not None
        self.host.run(
            _INSTALL,
            "--no-defaults",
            f"--datadir={self._data}",
            f"--user={_ROOT}",
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
        self.host.start(*self._command(), *new, *options)

    def start_new(self) -> None:
        """Begin a cluster with an empty database."""
        self.install()
        self.start(f"--init-file={self.host.folder / 'init.sql'}", first=True)

    def forget(self) -> None:
        """Throw away all data: the node has to copy a donor's."""
        shutil.rmtree(self._data)
        self._data.mkdir()

    def shut_down(self) -> None:
        """End it in good order, and wait until it has ended."""
        self.host.signal(signal.SIGTERM, _NAME)
        wait_for(lambda: not self.host.processes(_NAME), f"{self.address} shuts down")

    def kill(self) -> None:
        """End it with SIGKILL, and wait until it has ended."""
        self.host.kill(_NAME)

    def position(self) -> int:
        """Return up to which write set a server that has been killed has all."""
        log = self.host.run("sh", "-c", f"{' '.join(self._command())} --wsrep-recover 2>&1 || true")
        found = _POSITION.findall(log)
        return int(found[-1]) if found else -1

    def lets_bootstrap(self) -> None:
        """Have it begin a cluster although it was not the last to leave."""
        state = self._data / "grastate.dat"
        state.write_text(state.read_text().replace("safe_to_bootstrap: 0", "safe_to_bootstrap: 1"))

    def status(self, name: str) -> str:
        """Return one of the server's status variables, an empty string if it does not answer."""
        with suppress(pymysql.Error, OSError), closing(self.connection()) as connection:
            with connection.cursor() as cursor:
                cursor.execute("SHOW GLOBAL STATUS LIKE %s", (name,))
                row = cursor.fetchone()
                return str(row[1]) if row else ""
        return ""

    def is_synced(self) -> bool:
        """Tell whether it is part of the cluster, and has all that it is to have."""
        return (
            self.status("wsrep_local_state_comment") == "Synced"
            and self.status("wsrep_cluster_status") == "Primary"
        )

    def connection(self, **options: object) -> pymysql.Connection:
        """Connect to this node alone."""
        timeouts = {"connect_timeout": 2, "read_timeout": 2, "write_timeout": 2}
        return pymysql.connect(
            **{"host": self.address, "port": PORT, "user": _ROOT, **timeouts, **options}
        )

    def _command(self) -> list[str]:
        assert _MARIADBD is not None
        options = [f"--{name}={value}" for name, value in self._options.items()]
        return [_MARIADBD, "--no-defaults", "--skip-name-resolve", *options]
