"""One storage in several event loops, one after another and at once, and in forked processes."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from aiogram.fsm.storage.base import StorageKey
from anyio import CapacityLimiter
from backends import POSTGRESQL, SERVERS, Backend
from blocking import PATIENCE
from sqlalchemy import URL, create_engine
from sqlalchemy.orm import sessionmaker

from hybrid_storage import SQLAlchemyStorage

LOOPS = 200
IN_THREADS = [each for each in SERVERS if not each.is_async]


def test_closed_event_loops_are_collected(tmp_path: Path, key: StorageKey) -> None:
    storage = SQLAlchemyStorage.from_url(f"sqlite:///{tmp_path}/fsm.db")
    asyncio.run(storage.create_table())

    def use_a_loop() -> weakref.ref[asyncio.AbstractEventLoop]:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(storage.get_state(key))
        loop.close()
        return weakref.ref(loop)

    loops = [use_a_loop() for _ in range(LOOPS)]
    threads = [each for each in threading.enumerate() if each.name.startswith("AnyIO")]
    while threads:
        threads.pop().join(PATIENCE)
    gc.collect()
    assert [each for each in loops if each() is not None] == []
    asyncio.run(storage.close())


def test_a_limiter_serves_storages_in_two_event_loops_at_once(
    tmp_path: Path, key: StorageKey
) -> None:
    storage = SQLAlchemyStorage.from_url(f"sqlite:///{tmp_path}/fsm.db", limiter=CapacityLimiter(1))
    asyncio.run(storage.create_table())
    errors: list[BaseException] = []

    async def use() -> None:
        await asyncio.gather(*(storage.update_data(key, {str(n): n}) for n in range(30)))

    def run() -> None:
        try:
            asyncio.run(asyncio.wait_for(use(), PATIENCE))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    asyncio.run(storage.close())


@pytest.mark.parametrize("backend", [POSTGRESQL[0]], ids=str)
def test_a_process_forked_from_a_busy_parent_works(
    backend: Backend, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    engine = create_engine(url_of(backend).set(drivername=f"postgresql+{backend.driver}"))
    storage = SQLAlchemyStorage(sessionmaker(engine), table_name="forked")
    asyncio.run(storage.create_table())

    async def busy() -> int:
        async def write(number: int) -> None:
            await storage.update_data(key, {str(number): number})

        writers = [asyncio.create_task(write(number)) for number in range(100)]
        await asyncio.sleep(0.05)
        child = os.fork()
        if child == 0:
            os._exit(in_child())
        await asyncio.gather(*writers)
        return child

    def in_child() -> int:
        engine.dispose(close=False)
        worked = threading.Event()

        def work() -> None:
            # In a thread of its own: the parent's loop counts as running in this one.
            asyncio.run(asyncio.wait_for(storage.set_state(key, "child"), PATIENCE))
            worked.set()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        return 0 if worked.is_set() else 1

    child = asyncio.run(busy())
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert asyncio.run(storage.get_state(key)) == "child"
    assert len(asyncio.run(storage.get_data(key))) == 100
    asyncio.run(storage.clear(key))
    storage.table.drop(engine)
    engine.dispose()
