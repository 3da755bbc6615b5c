"""Has contenders take turns: round by round, in random order, at the same work."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import Generic, TypeAlias

from aiogram.fsm.storage.base import StorageKey

from .results import Cell, Results
from .work import Act, Subject, Work, conversation

TIMEOUT = 60.0  # seconds for the work of one turn

Advance: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Turn(Generic[Subject]):
    """A cell, and how the contenders fill it."""

    cell: Cell
    work: Work[Subject]
    tasks: int
    operations: int
    key: Callable[[int], StorageKey] = conversation
    suits: Callable[[str], bool] = lambda name: True
    """Tells of a contender's name whether it takes part."""


async def take_turns(
    results: Results,
    opened: Mapping[str, Subject],
    turns: list[Turn[Subject]],
    rounds: int,
    advance: Advance,
) -> None:
    """Have each contender do each turn's work once a round, and note the figures.

    :param results: where to note them
    :param opened: the contenders by name; what follows a slash in it is not noted
    :param turns: the work
    :param rounds: how many rounds, one to warm up not counted
    :param advance: is told what is going on
    """
    names = list(opened)
    # In a fixed order, some would always find the server warm from the one before.
    order = random.Random(1)
    gc.collect()
    gc.freeze()
    for number in range(-1, rounds):  # the first one warms up
        for turn in turns:
            for name in names if number < 0 else order.sample(names, len(names)):
                if turn.suits(name):
                    advance(f"{turn.cell.section}: {turn.cell.work}, {turn.cell.setting}")
                    own_name = name.partition("/")[0]
                    await _take(results, turn, own_name, opened[name], warms_up=number < 0)
    gc.unfreeze()


async def _take(
    results: Results, turn: Turn[Subject], name: str, subject: Subject, *, warms_up: bool
) -> None:
    figures = results.cells[turn.cell][name]
    if figures.failure or not turn.work.suits(subject):
        return
    keys = [turn.key(number) for number in range(turn.operations)]
    try:
        if turn.work.prepare is not None:
            await share(turn.work.prepare, subject, keys, turn.tasks)
        cpu, began = time.process_time(), time.perf_counter()
        latencies = await share(turn.work.act, subject, keys, turn.tasks)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    except Exception as error:
        figures.failure = in_short(error)
        return
    if not warms_up:
        units = len(keys) * turn.work.units
        figures.seconds.append(seconds / units)
        figures.cpu.append(cpu / units)
        figures.latencies += latencies


async def share(
    act: Act[Subject], subject: Subject, keys: list[StorageKey], tasks: int
) -> list[float]:
    """Do the work for all keys in some tasks; return how long each took."""
    latencies = []
    left = iter(keys)

    async def work() -> None:
        for key in left:
            began = time.perf_counter()
            await act(subject, key)
            latencies.append(time.perf_counter() - began)

    ends = asyncio.gather(*(work() for _ in range(tasks)), return_exceptions=True)
    for end in await asyncio.wait_for(ends, TIMEOUT):
        if end is not None:
            raise end
    return latencies


async def counted(
    counts: Callable[[], tuple[int, int]], subject: Subject, work: Work[Subject], times: int = 4
) -> tuple[float, float]:
    """Return how many statements and round trips the work takes, once all is prepared."""
    keys = [conversation(number) for number in range(times)]

    async def prepare() -> None:
        if work.prepare is not None:
            await share(work.prepare, subject, keys, 1)

    for _ in range(times):  # until the drivers have prepared their statements
        await prepare()
        await share(work.act, subject, keys, 1)
    await prepare()
    each = []
    for key in keys:
        statements, trips = counts()
        await share(work.act, subject, [key], 1)
        more_statements, more_trips = counts()
        each.append((more_statements - statements, more_trips - trips))
    # Not the mean: what runs in the background once a minute may fall into one of them.
    return median_low(one[0] for one in each), median_low(one[1] for one in each)


def in_short(error: Exception) -> str:
    """Return an error's type and first line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
