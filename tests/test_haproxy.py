"""HAProxy closes idle connections of a pool: no error comes of it."""

from __future__ import annotations

import asyncio
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import POSTGRESQL, Backend
from chaos.proxy import free_port
from chaos.servers import Server, postgres
from conftest import dispose

from hybrid_storage import SQLAlchemyStorage

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


@pytest.mark.parametrize(
    "options", [{}, {"pool_pre_ping": True}, {"pool_recycle": 0}], ids=["plain", "ping", "recycle"]
)
@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_idle_connections_are_closed_without_an_error(
    behind_haproxy: Server, backend: Backend, options: dict[str, int], key: StorageKey
) -> None:
    engine = backend.engine(behind_haproxy.url, **options)
    storage = SQLAlchemyStorage(backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}")
    await storage.create_table()
    for number in range(2):
        await asyncio.gather(*(storage.update_data(key, {str(number): 1}) for _ in range(4)))
        await asyncio.sleep(1.5)
        assert len(await storage.get_data(key)) == number + 1
    if options:  # which find out before your own transactions do
        await asyncio.sleep(1.5)
        async with storage.transaction():
            await storage.set_state(key, "kept")
    await dispose(engine)
