"""Thousands of calls at once, and what they cost in memory and in the event loop's patience."""

from __future__ import annotations

import gc
import resource
import sys
import time
from multiprocessing.connection import Connection

import anyio
from aiogram.fsm.storage.base import BaseStorage, StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from anyio.lowlevel import checkpoint

from hybrid_storage import SQLAlchemyStorage

_TICK = 0.005  # seconds


async def ten_calls_each(storage: BaseStorage, conversations: int) -> None:
    """Make ten calls in each of many conversations, all at once: eight of them read.

    :param storage: the storage
    :param conversations: how many conversations
    """
    async with anyio.create_task_group() as calls:
        for turn in range(10):
            for n in range(conversations):
                if n % 10 == 0:
                    await checkpoint()  # to start ten thousand tasks in a row is a stall by itself
                key = StorageKey(bot_id=1, chat_id=n, user_id=n)
                if turn == 0:
                    calls.start_soon(storage.update_data, key, {"name": "Ada"})
                elif turn == 1:
                    calls.start_soon(storage.set_state, key, "state")
                elif turn % 2:
                    calls.start_soon(storage.get_state, key)
                else:
                    calls.start_soon(storage.get_data, key)


def measure(url: str | None, table: str, conversations: int, result: Connection) -> None:
    """Send figures of the load. A process's main function.

    :param url: the database; None measures aiogram's ``MemoryStorage``
    :param table: the table to use
    :param conversations: how many, with ten calls in each
    :param result: where to send the figures
    """
    result.send(anyio.run(_measure, url, table, conversations))


async def _measure(url: str | None, table: str, conversations: int) -> dict[str, object]:
    storage: BaseStorage = MemoryStorage()
    if url is not None:
        storage = SQLAlchemyStorage.from_url(url, table_name=table)
        await storage.create_table()
    await ten_calls_each(storage, 10)  # imports and compiles what there is
    before = _peak()
    stalls: list[float] = []
    ours: list[float] = []
    began = time.monotonic()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_tick, stalls, ours)
        await ten_calls_each(storage, conversations)
        tasks.cancel_scope.cancel()
    seconds = time.monotonic() - began
    once = _peak()
    await ten_calls_each(storage, conversations)
    again = _peak()
    await storage.close()
    return {
        "calls": 10 * conversations,
        "seconds": f"{seconds:.1f}",
        "stall_ms": f"{max(stalls) * 1000:.0f}",
        "without_gc_ms": f"{max(ours) * 1000:.0f}",
        "growth_MB": f"{once - before:.1f}",
        "then_MB": f"{again - once:.1f}",
    }


async def _tick(stalls: list[float], ours: list[float]) -> None:
    """Note the event loop's stalls, and what is left of them without garbage collections.

    Those walk all objects there are: aiogram's alone take as long as thousands of calls'.
    """
    collecting = 0.0

    def note(phase: str, _: object) -> None:
        nonlocal collecting
        collecting += time.monotonic() * (-1 if phase == "start" else 1)

    gc.callbacks.append(note)
    try:
        while True:
            began, collected = time.monotonic(), collecting
            try:
                await anyio.sleep(_TICK)
            finally:
                late = time.monotonic() - began - _TICK
                stalls.append(max(late, 0))
                ours.append(max(late - (collecting - collected), 0))
    finally:
        gc.callbacks.remove(note)


def _peak() -> float:
    """Return how much memory the process has had at most, in megabytes."""
    unit = 1024 if sys.platform != "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
