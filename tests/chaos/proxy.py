"""A TCP proxy on loopback that fails as networks and peers do."""

from __future__ import annotations

import asyncio
import ctypes
import random
import socket
import struct
from asyncio.trsock import TransportSocket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from anyio.from_thread import start_blocking_portal

Address = tuple[str, int] | str
"""A host and a port, or the path of a Unix socket."""

_MUCH, _LITTLE = 65536, 128  # bytes
_ATTACH_FILTER, _DETACH_FILTER = 26, 27  # of Linux, for setsockopt()
_DROP = struct.pack("HBBI", 6, 0, 0, 0)  # a socket filter of one instruction: "return 0 bytes"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: what is not sent yet is not sent, but a RST is


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


class Proxy:
    """Forwards connections to a server, except while told otherwise.

    It has an event loop of its own in a thread, and is a context manager.
    """

    def __init__(self, target: Address) -> None:
        """Choose a port; nobody listens there before the context begins.

        :param target: the server
        """
        self.port = free_port()
        self._target = target
        self._stack = ExitStack()
        self._listener: asyncio.Server | None = None
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._flowing = asyncio.Event()
        self._pause = 0.0
        self._loss = 0.0
        self.lost = 0  # answers

    def __enter__(self) -> Proxy:
        self._portal = self._stack.enter_context(start_blocking_portal())
        self._portal.call(self._open)
        return self

    def __exit__(self, *_: object) -> None:
        self._portal.call(self._close)
        self._stack.close()

    def reset(self) -> int:
        """Reset all connections.

        :return: how many there were
        """
        return self._portal.call(self._reset)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Refuse connections until the end of the context, and reset those there are."""
        self._portal.call(self._close)
        try:
            yield
        finally:
            self._portal.call(self._open)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Take connections and data, and pass nothing on before the end of the context."""
        self._portal.call(self._flowing.clear)
        try:
            yield
        finally:
            self._portal.call(self._flowing.set)

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Lose every packet, as if the host had no power; at the end, reset who was connected."""
        with self.hanging():
            self._portal.call(self._deafen)
            try:
                yield
            finally:
                self._portal.call(self._close)
                self._portal.call(self._open)

    @contextmanager
    def crawling(self, pause: float) -> Iterator[None]:
        """Pass a few bytes at a time.

        :param pause: the seconds from one time to the next
        """
        self._pause = pause
        try:
            yield
        finally:
            self._pause = 0.0

    @contextmanager
    def forgetting(self, share: float) -> Iterator[None]:
        """Lose answers: the server has done what it was told, and the client is cut off.

        :param share: how many of them, from 0 to 1
        """
        self._loss = share
        try:
            yield
        finally:
            self._loss = 0.0

    async def _open(self) -> None:
        listening = socket.create_server(("127.0.0.1", self.port))
        self._listener = await asyncio.start_server(self._accept, sock=listening)
        self._flowing.set()

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            await asyncio.sleep(0)  # who was accepted already is among the clients by then
        await self._reset()

    async def _reset(self) -> int:
        links = list(self._clients)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        return len(links)

    def _deafen(self) -> None:
        assert self._listener is not None
        program = ctypes.create_string_buffer(_DROP)
        drop = struct.pack("HP", 1, ctypes.addressof(program))
        sockets: list[TransportSocket | socket.socket] = [*self._listener.sockets]
        for each in [*sockets, *map(_socket, self._clients.values())]:
            each.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, drop)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.ensure_future(self._link(reader, writer))
        self._clients[link] = writer
        link.add_done_callback(self._clients.pop)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            await self._flowing.wait()
            if isinstance(self._target, str):
                answers, server = await asyncio.open_unix_connection(self._target)
            else:
                answers, server = await asyncio.open_connection(*self._target)
            writers.append(server)
            pumps = [
                asyncio.ensure_future(self._pump(reader, server)),
                asyncio.ensure_future(self._pump(answers, writer, answers=True)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
            for each in writers:  # one side has closed
                each.close()
        except (OSError, asyncio.CancelledError):
            for each in writers:
                with suppress(OSError):
                    _socket(each).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                each.transport.abort()
        for each in writers:
            with suppress(OSError):
                await each.wait_closed()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False
    ) -> None:
        while data := await reader.read(_LITTLE if self._pause else _MUCH):
            await self._flowing.wait()
            if answers and random.random() < self._loss:
                self.lost += 1
                return
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(self._pause)


def _socket(writer: asyncio.StreamWriter) -> TransportSocket:
    used = writer.get_extra_info("socket")
    assert isinstance(used, TransportSocket)
    return used
