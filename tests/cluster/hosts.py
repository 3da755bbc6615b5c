"""Hosts on this machine: network namespaces on one bridge, whose cables can be pulled out.

It takes root, and the ``ip`` command. All that was started on a host is killed with it, by process
id; what a killed test run has left behind is removed by the next one.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from psutil import NoSuchProcess, Process, pid_exists

_NAME = "hs"  # names of interfaces have 15 characters at most
PATIENCE = 60
"""Seconds for what takes a few, and may not take for ever."""


@cache
def can_have_hosts() -> bool:
    """Tell whether network namespaces can be made here, which takes root and a willing kernel."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        with TemporaryDirectory() as folder, hosts(1, Path(folder)):
            return True
    except subprocess.CalledProcessError:
        return False


class Host:
    """A host with an address of its own."""

    def __init__(self, name: str, address: str, cable: str, folder: Path) -> None:
        """Store what has been made of it.

        :param name: of its network namespace
        :param address: its IP address
        :param cable: the interface that joins it to the others
        :param folder: for its files, which any user may enter
        """
        self.name = name
        self.address = address
        self.folder = folder
        self._cable = cable

    def start(self, *command: str, user: str = "root") -> subprocess.Popen[bytes]:
        """Start a program, whose output is appended to a file of its name in ``folder``.

        :param command: the program and its arguments
        :param user: the system's user to run it as
        :return: its process
        """
        with (self.folder / f"{Path(command[0]).name}.log").open("ab") as log:
            return subprocess.Popen(
                [*_inside(self.name, user), *command],
                cwd=self.folder,
                env={**os.environ, "HOME": pwd.getpwnam(user).pw_dir},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C at the terminal is not for the servers
            )

    def run(self, *command: str, user: str = "root") -> str:
        """Run a program to its end.

        :param command: the program and its arguments
        :param user: the system's user to run it as
        :return: what it printed
        """
        return _output(*_inside(self.name, user), *command)

    def processes(self, *names: str) -> list[Process]:
        """Return what runs on the host.

        :param names: of programs; all of them by default
        """
        processes: list[Process] = []
        for pid in _output("ip", "netns", "pids", self.name).split():
            with suppress(NoSuchProcess):  # it has ended meanwhile
                process = Process(int(pid))
                if not names or process.name() in names:
                    processes.append(process)
        return processes

    def signal(self, number: signal.Signals, *names: str) -> int:
        """Send a signal to all processes of some programs.

        :param number: the signal
        :param names: of programs; all of them by default
        :return: how many processes got it
        """
        processes = self.processes(*names)
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
        return len(processes)

    def kill(self, *names: str) -> None:
        """Kill programs with SIGKILL, and wait until they have ended.

        :param names: of programs; all of them by default
        """
        wait_for(lambda: not self.signal(signal.SIGKILL, *names), f"{self.name} is to be killed")

    @contextmanager
    def stopped(self, *names: str) -> Iterator[None]:
        """Stop programs with SIGSTOP until the end of the context.

        :param names: of programs; all of them by default
        """
        self.signal(signal.SIGSTOP, *names)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT, *names)

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Pull out the cable until the end of the context: nothing arrives, and nobody is told."""
        _ip("link", "set", self._cable, "down")
        try:
            yield
        finally:
            _ip("link", "set", self._cable, "up")


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """Make hosts that reach each other, and that this machine reaches.

    :param count: how many
    :param folder: for their files; each gets one of its own in it
    """
    _remove_those_of_the_dead()
    pid = os.getpid()
    # Runs that start at the same time begin at different numbers.
    taken = _output("ip", "address")
    nets = (1 + (pid + n) % 254 for n in range(254))
    net = next(n for n in nets if f"10.213.{n}." not in taken)
    bridge = f"{_NAME}-{pid}"
    names = [f"{bridge}-{n}" for n in range(1, count + 1)]
    made: list[Host] = []
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"10.213.{net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for n, name in enumerate(names, 1):
            made.append(_host(name, f"10.213.{net}.{n}", bridge, folder / f"host{n}"))
        yield made
    finally:
        for name in names:
            _remove(name)
        _ip("link", "delete", bridge)


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait until a condition holds.

    :param condition: asked again and again
    :param what: it is about, for the error
    :param seconds: to wait at most
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def _host(name: str, address: str, bridge: str, folder: Path) -> Host:
    folder.mkdir()
    folder.chmod(0o777)
    _ip("netns", "add", name)
    _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", name, "master", bridge, "up")
    _ip("-netns", name, "address", "add", f"{address}/24", "dev", "eth0")
    _ip("-netns", name, "link", "set", "eth0", "up")
    _ip("-netns", name, "link", "set", "lo", "up")
    return Host(name, address, name, folder)


def _remove(name: str) -> None:
    """Kill what runs in a namespace, and remove it with its cable."""
    if name not in _output("ip", "netns", "list"):
        return
    Host(name, "", name, Path()).kill()
    _ip("netns", "delete", name)


def _remove_those_of_the_dead() -> None:
    for line in _output("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(f"{_NAME}-") and not pid_exists(int(name.split("-")[1])):
            _remove(name)
    for line in _output("ip", "-oneline", "link", "show", "type", "bridge").splitlines():
        name = line.split()[1].rstrip(":")
        if name.startswith(f"{_NAME}-") and not pid_exists(int(name.split("-")[1])):
            _ip("link", "delete", name)


def _inside(name: str, user: str) -> list[str]:
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
    return ["ip", "netns", "exec", name, *become]


def _ip(*arguments: str) -> None:
    _output("ip", *arguments)


def _output(*command: str) -> str:
    printed: str = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return printed
