"""Patroni: three PostgreSQL nodes over three members of etcd, behind HAProxy."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from chaos.proxy import free_port
from chaos.servers import PGBOUNCER
from sqlalchemy import URL

from .haproxy import HAPROXY, haproxy
from .hosts import Host, can_have_hosts, hosts, wait_for

_POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
_NEEDED = {
    "patroni": shutil.which("patroni"),
    "etcd": shutil.which("etcd"),
    "haproxy": HAPROXY,
    "pgbouncer": PGBOUNCER,
    "postgresql": _POSTGRES,
    "iproute2, as root": can_have_hosts(),
}
MISSING = [name for name, found in _NEEDED.items() if not found]
"""What there has to be and is not."""

_USER = "postgres"
_REST, _SQL, _ETCD, _PEERS = 8008, 5432, 2379, 2380  # ports
CHECK = ["option httpchk OPTIONS /primary", "http-check expect status 200"]
"""By which HAProxy finds the leader."""
_SETTINGS = {
    "max_connections": 300,
    "shared_buffers": "32MB",
    "wal_keep_size": "256MB",
    "wal_receiver_timeout": "5s",
    "wal_sender_timeout": "5s",
}
_CONFIGURATION: dict[str, object] = {
    # Seconds, the shortest that Patroni documents. A lost leader is replaced after ttl.
    "ttl": 20,
    "loop_wait": 1,
    "retry_timeout": 3,
    "synchronous_mode": True,
    "postgresql": {"use_pg_rewind": True, "parameters": _SETTINGS},
}
_CLOSE = 1 << 20  # bytes that a replica may lag behind


class Patroni:
    """A cluster of three hosts, each with a member of etcd and a PostgreSQL node."""

    def __init__(self, members: list[Host], port: int) -> None:
        """Store where it runs.

        :param members: the hosts
        :param port: of HAProxy, which connects to the leader
        """
        self.hosts = members
        self.url = URL.create("postgresql+psycopg", _USER, None, "127.0.0.1", port, "postgres")
        """Of the leader, whichever it is."""
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, host: Host) -> None:
        """Start what does not run on a host: etcd, and Patroni with its PostgreSQL."""
        if not host.processes("etcd"):
            self._processes.append(host.start("etcd", *self._etcd_options(host), user=_USER))
        if not host.processes("patroni"):
            settings = host.folder / "patroni.yml"
            settings.write_text(json.dumps(self._settings(host)))  # JSON is YAML
            self._processes.append(host.start("patroni", str(settings), user=_USER))

    def stop(self, host: Host) -> None:
        """Shut a host's services down, as a reboot does, and wait until they have ended."""
        host.signal(signal.SIGTERM, "patroni")
        wait_for(lambda: not host.processes("patroni", "postgres"), f"{host.name} stops Patroni")
        host.signal(signal.SIGTERM, "etcd")
        wait_for(lambda: not host.processes("etcd"), f"{host.name} stops etcd")

    def reap(self) -> None:
        """Wait for all that has been killed."""
        for process in self._processes:
            process.wait()

    def leader(self) -> Host:
        """Return the host whose PostgreSQL takes writes."""
        found: list[Host] = []

        def find() -> bool:
            found[:] = [host for host in self.hosts if self._ask(host, "/primary") is not None]
            return len(found) == 1

        wait_for(find, "there is one leader")
        return found[0]

    def replicas(self) -> list[Host]:
        """Return the other hosts, a synchronous one first."""
        leader = self.leader()
        others = [host for host in self.hosts if host is not leader]
        return sorted(others, key=lambda host: self._ask(host, "/sync") is None)

    def switchover(self) -> None:
        """Hand the leadership over to another node, as planned."""
        leader = self.leader()
        asked = {"leader": self._name(leader), "candidate": self._name(self.replicas()[0])}
        assert self._ask(leader, "/switchover", asked, "POST") is not None, "it refuses"

    def configure(self, **settings: object) -> None:
        """Change settings of the whole cluster, and wait until it is whole again.

        :param settings: such as ``synchronous_mode``
        """
        assert self._ask(self.leader(), "/config", settings, "PATCH") is not None, "it refuses"
        self.wait_until_whole(bool(settings.get("synchronous_mode", True)))

    def wait_until_whole(self, synchronous: bool = True) -> None:
        """Wait until all nodes are there and follow the leader closely.

        :param synchronous: whether one of them has to be synchronous
        """
        roles = ["leader", "replica", "sync_standby" if synchronous else "replica"]

        def is_whole() -> bool:
            views = [_members(self._ask(host, "/cluster")) for host in self.hosts]
            return (
                views[1:] == views[:-1]
                and sorted(role for _, role, _ in views[0]) == roles
                and len({timeline for _, _, timeline in views[0]}) == 1
            )

        wait_for(is_whole, "all nodes follow the leader", 120)

    def _ask(
        self,
        host: Host,
        path: str,
        body: Mapping[str, object] | None = None,
        method: str = "GET",
    ) -> dict[str, Any] | None:
        """Return what the REST API of a node answers; None if it does not, or says no."""
        request = Request(
            f"http://{host.address}:{_REST}{path}",
            json.dumps(body).encode() if body is not None else None,
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urlopen(request, timeout=1 if method == "GET" else 60) as response:
                text = response.read().decode()
        except (OSError, HTTPException):
            return None
        answer: dict[str, Any] = json.loads(text) if text.startswith("{") else {"text": text}
        return answer

    def _name(self, host: Host) -> str:
        return f"node{self.hosts.index(host) + 1}"

    def _etcd_options(self, host: Host) -> list[str]:
        peers = [f"{self._name(each)}=http://{each.address}:{_PEERS}" for each in self.hosts]
        own, peer = f"http://{host.address}:{_ETCD}", f"http://{host.address}:{_PEERS}"
        options = {
            "name": self._name(host),
            "data-dir": host.folder / "etcd",
            "listen-client-urls": own,
            "advertise-client-urls": own,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": ",".join(peers),
            "enable-v2": "true",
        }
        return [f"--{name}={value}" for name, value in options.items()]

    def _settings(self, host: Host) -> dict[str, object]:
        return {
            "scope": "chaos",
            "name": self._name(host),
            "restapi": {
                "listen": f"{host.address}:{_REST}",
                "connect_address": f"{host.address}:{_REST}",
            },
            _api(): {"hosts": [f"{each.address}:{_ETCD}" for each in self.hosts]},
            "bootstrap": {
                "dcs": _CONFIGURATION,
                "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, {"auth": "trust"}],
            },
            "postgresql": {
                "listen": f"{host.address}:{_SQL}",
                "connect_address": f"{host.address}:{_SQL}",
                "data_dir": str(host.folder / "data"),
                "bin_dir": str(_POSTGRES[-1].parent),
                "pgpass": str(host.folder / "pgpass"),
                "parameters": {"unix_socket_directories": str(host.folder)},
                "pg_hba": [
                    "local all all trust",
                    "host all all 0.0.0.0/0 trust",
                    "host replication all 0.0.0.0/0 trust",
                ],
                "authentication": {
                    "superuser": {"username": _USER},
                    "replication": {"username": "replicator"},
                    "rewind": {"username": _USER},
                },
            },
        }


@cache
def _api() -> str:
    """Return which version of etcd's API to use.

    Over version 3, Patroni before 3.0.3 overwrites the leader's key without a look at whose it is
    (https://github.com/patroni/patroni/pull/2689): an old leader whose cable is plugged in again
    became the leader beside the new one here, and what that had acknowledged was lost.
    """
    printed = subprocess.run(["patroni", "--version"], check=True, capture_output=True, text=True)
    version = tuple(int(number) for number in re.findall(r"\d+", printed.stdout))
    return "etcd3" if version >= (3, 0, 3) else "etcd"


def _members(answer: Mapping[str, Any] | None) -> list[tuple[str, str, int]]:
    """Return name, role and timeline of those members that run and are close to the leader."""
    members = answer["members"] if answer else []
    return [
        (member["name"], member["role"], member.get("timeline", 0))
        for member in members
        if member["state"] in ("running", "streaming")
        and isinstance(lag := member.get("lag", 0), int)
        and lag < _CLOSE
    ]


@contextmanager
def patroni(folder: Path) -> Iterator[Patroni]:
    """Run a cluster in synchronous mode until the end of the context.

    :param folder: an empty folder for its files, which any user may enter
    """
    cluster: Patroni | None = None
    try:
        with hosts(3, folder) as members:
            port = free_port()
            cluster = Patroni(members, port)
            for host in members:
                cluster.start(host)
            servers = [f"{host.address}:{_SQL}" for host in members]
            with haproxy(folder, {port: servers}, CHECK, f"port {_REST}"):
                cluster.wait_until_whole()
                yield cluster
    finally:
        if cluster is not None:
            cluster.reap()
