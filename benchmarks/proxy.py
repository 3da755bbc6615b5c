"""A TCP proxy that delays what clients send, and counts statements and round trips.

It runs in a process of its own, so as not to take time from what is measured. A round trip is a
flight of bytes from the client that the server answers; statements are read off the protocol.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sqlalchemy import URL


class Counts(NamedTuple):
    """What has gone through a proxy so far."""

    statements: int
    trips: int


class Proxy:
    """A running proxy, from the side of who measures."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin = process.stdin
        self._stdout = process.stdout
        self.port = int(self._stdout.readline())

    def counts(self) -> Counts:
        """Return what has gone through so far."""
        self._stdin.write("\n")
        self._stdin.flush()
        statements, trips = map(int, self._stdout.readline().split())
        return Counts(statements, trips)

    def in_front_of(self, url: URL) -> URL:
        """Return the URL to use in place of the server's."""
        query = {name: value for name, value in url.query.items() if name not in ("host", "port")}
        return url.set(host="127.0.0.1", port=self.port, query=query)


@contextmanager
def proxy(url: URL, delay: float = 0.0) -> Iterator[Proxy]:
    """Run a proxy before a server.

    :param url: the server's
    :param delay: how many seconds later than sent the server gets what a client sends
    """
    protocol = url.get_backend_name()
    host = str(url.query.get("host") or url.host or "127.0.0.1")
    port = str(url.port or {"postgresql": 5432, "mysql": 3306, "redis": 6379}[protocol])
    command = [sys.executable, "-m", "benchmarks.proxy", protocol, host, port, str(delay)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield Proxy(process)
        assert process.stdin is not None
        process.stdin.close()  # which ends it, as the end of this process would


class _Reader:
    """Counts the statements in what a client sends, which arrives in pieces."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, piece: bytes) -> int:
        """Return how many statements a piece completes."""
        self._pending += piece
        statements = 0
        while (length := self._length(self._pending)) and len(self._pending) >= length:
            message, self._pending = self._pending[:length], self._pending[length:]
            statements += self._is_statement(message)
        return statements

    def _length(self, pending: bytes) -> int:
        raise NotImplementedError

    def _is_statement(self, message: bytes) -> bool:
        raise NotImplementedError


class _Postgresql(_Reader):
    _started = False

    def _length(self, pending: bytes) -> int:
        if not self._started:  # the first messages have no type before their length
            return int.from_bytes(pending[:4], "big") if len(pending) >= 4 else 0
        return 1 + int.from_bytes(pending[1:5], "big") if len(pending) >= 5 else 0

    def _is_statement(self, message: bytes) -> bool:
        if not self._started:
            self._started = message[4:8] == b"\0\3\0\0"  # rather than a request for encryption
            return False
        return message[:1] in (b"Q", b"E")  # Query, Execute


class _Mysql(_Reader):
    def _length(self, pending: bytes) -> int:
        return 4 + int.from_bytes(pending[:3], "little") if len(pending) >= 4 else 0

    def _is_statement(self, message: bytes) -> bool:
        return message[3:5] in (b"\0\3", b"\0\x17")  # COM_QUERY, COM_STMT_EXECUTE


class _Redis(_Reader):
    def feed(self, piece: bytes) -> int:
        return piece.startswith(b"*") + piece.count(b"\r\n*")


READERS: dict[str, Callable[[], _Reader]] = {
    "postgresql": _Postgresql,
    "mysql": _Mysql,
    "redis": _Redis,
}


class _Server:
    """The proxy itself."""

    def __init__(self, protocol: str, host: str, port: str, delay: float) -> None:
        self._reader = READERS[protocol]
        self._host, self._port, self._delay = host, port, delay
        self._statements = self._trips = 0

    async def serve(self) -> None:
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(None, sys.stdin.readline):
            print(self._statements, self._trips, flush=True)

    async def _relay(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        if self._host.startswith("/"):
            path = f"{self._host}/.s.PGSQL.{self._port}"
            server, requests = await asyncio.open_unix_connection(path)
        else:
            server, requests = await asyncio.open_connection(self._host, int(self._port))
        reader = self._reader()
        asked = False
        loop = asyncio.get_running_loop()

        async def forth() -> None:
            nonlocal asked
            while piece := await client.read(1 << 16):
                asked = True
                self._statements += reader.feed(piece)
                if self._delay:
                    loop.call_later(self._delay, requests.write, piece)
                else:
                    requests.write(piece)
            loop.call_later(self._delay, requests.close)

        async def back() -> None:
            nonlocal asked
            while piece := await server.read(1 << 16):
                self._trips += asked
                asked = False
                answers.write(piece)
            answers.close()

        with suppress(asyncio.CancelledError):  # at the end of the proxy
            await asyncio.gather(forth(), back(), return_exceptions=True)


if __name__ == "__main__":
    _, protocol, host, port, delay = sys.argv
    asyncio.run(_Server(protocol, host, port, float(delay)).serve())
