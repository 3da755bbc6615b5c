"""HAProxy on this machine, before a cluster: it connects to the nodes that pass its check."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from .hosts import wait_for

HAPROXY = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")

_SETTINGS = """\
defaults
    mode tcp
    maxconn 1000
    retries 1
    timeout connect 1s
    timeout check 1s
    timeout client 1h
    timeout server 1h
    option clitcpka
    option srvtcpka
"""
_LISTEN = """
listen port{port}
    bind 127.0.0.1:{port}
    {check}
    default-server inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions
"""


@contextmanager
def haproxy(
    folder: Path, ports: Mapping[int, Sequence[str]], check: Sequence[str], of_each: str = ""
) -> Iterator[None]:
    """Run HAProxy until the end of the context.

    A server that fails its check twice, half a second apart, is taken out, and the connections to
    it are closed: clients that wait for a host without a cable are told by that.

    :param folder: an empty folder for its settings and its log
    :param ports: of this machine, and for each the servers behind it as ``address:port``
    :param check: lines that say how to check a server, such as ``option httpchk``
    :param of_each: what to add to each server's line, such as ``port 8008``, where it is checked
    """
    assert HAPROXY is not None, "HAProxy is not installed"
    settings = folder / "haproxy.cfg"
    text = _SETTINGS
    for port, servers in ports.items():
        text += _LISTEN.format(port=port, check="\n    ".join(check))
        for n, server in enumerate(servers, 1):
            text += f"    server node{n} {server} check {of_each}\n"
    settings.write_text(text)
    with (folder / "haproxy.log").open("ab") as log:
        process = subprocess.Popen(
            # On no host of its own, it is not found by the next run if this one is killed.
            ["setpriv", "--pdeathsig", "KILL", HAPROXY, "-db", "-f", str(settings)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C at the terminal is not for the servers
        )
    try:
        for port in ports:
            wait_for(partial(_listens, port), f"HAProxy is to listen on {port}")
        yield
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
