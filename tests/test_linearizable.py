"""Clients that use a conversation at once see what they would see if they took turns.

They write and read at random, and some of their calls are cancelled. Then a search tells whether
there is an order of all calls that agrees with every result, and in which no call comes before one
that had ended when it began (Wing and Gong, 1993).
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import anyio
import pytest
from aiogram.fsm.storage.base import BaseStorage, StorageKey
from backends import SQLITE, Backend
from conftest import Open
from sqlalchemy import URL

from hybrid_storage import SQLAlchemyStorage

ROUNDS, CONVERSATIONS, CLIENTS, CALLS = 5, 4, 4, 5
UNKNOWN: Any = object()  # the result of a call that was cancelled: it may have happened or not


@dataclass(frozen=True)
class Row:
    """What a conversation holds."""

    state: str | None = None
    data: tuple[tuple[str, int], ...] = ()

    def after(self, method: str, argument: Any) -> tuple[Row, Any]:
        """Return what a call makes of it, and what the call has to return."""
        match method:
            case "get_state":
                return self, self.state
            case "get_data":
                return self, dict(self.data)
            case "set_state":
                return replace(self, state=argument), None
            case "set_data":
                return replace(self, data=tuple(sorted(argument.items()))), None
            case "update_data":
                data = {**dict(self.data), **argument}
                return replace(self, data=tuple(sorted(data.items()))), data
            case _:
                return Row(), None


@dataclass(frozen=True)
class Call:
    """A call, what it returned, and when it began and ended."""

    method: str
    argument: Any
    result: Any
    began: int
    ended: int


def is_linearizable(history: list[Call]) -> bool:
    """Tell whether a conversation, empty at first, could have answered so one call at a time.

    A call that was cancelled may have had its effect before it ended, or never.

    :param history: all calls
    """
    seen: set[tuple[frozenset[int], Row]] = set()
    todo = [(frozenset(range(len(history))), Row())]
    while todo:
        left, row = todo.pop()
        certain = [history[n].ended for n in left if history[n].result is not UNKNOWN]
        if not certain:
            return True
        for n in left:
            call = history[n]
            if call.began > min(certain):
                continue  # it began after the end of another that has to come first
            new, result = row.after(call.method, call.argument)
            if call.result is not UNKNOWN and call.result != result:
                continue
            still = left - {n} - {m for m in left if history[m].ended < call.began}
            if (still, new) not in seen:
                seen.add((still, new))
                todo.append((still, new))
    return False


class Recorder:
    """Uses a conversation, and keeps the history."""

    def __init__(self, storages: list[SQLAlchemyStorage], key: StorageKey, seed: int) -> None:
        self.history: list[Call] = []
        self._storages = storages
        self._key = key
        self._random = random.Random(seed)
        self._clock = itertools.count()

    async def run(self) -> None:
        """Run all clients."""
        async with anyio.create_task_group() as clients:
            for _ in range(CLIENTS):
                clients.start_soon(self._client)

    async def _client(self) -> None:
        for _ in range(CALLS):
            method, *arguments = self._any_call()
            call = getattr(self._random.choice(self._storages), method)
            began = next(self._clock)
            if self._random.random() < 0.3:
                cut = self._random.choice([cut_by_its_task, cut_by_a_scope])
                result = await cut(lambda: call(self._key, *arguments), self._random.random() / 200)  # noqa: B023
            else:
                result = await call(self._key, *arguments)
            ended = next(self._clock)
            self.history.append(
                Call(method, arguments[0] if arguments else None, result, began, ended)
            )

    def _any_call(self) -> tuple[Any, ...]:
        new = next(self._clock)  # never written before
        return self._random.choices(
            [
                ("get_state",),
                ("get_data",),
                ("set_state", str(new)),
                ("set_state", None),
                ("set_data", {self._random.choice("ab"): new}),
                ("set_data", {}),
                ("update_data", {self._random.choice("ab"): new}),
                ("clear",),
            ],
            weights=[4, 4, 3, 1, 2, 1, 6, 1],
        )[0]


Unbegun = Callable[[], Coroutine[Any, Any, Any]]


async def cut_by_its_task(call: Unbegun, seconds: float) -> Any:
    """Cancel the call's task after a time; return what it returns all the same."""
    task = asyncio.ensure_future(call())
    await asyncio.wait([task], timeout=seconds)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return UNKNOWN


async def cut_by_a_scope(call: Unbegun, seconds: float) -> Any:
    """Cancel the scope that the call is in after a time."""
    with anyio.move_on_after(seconds):
        return await call()
    return UNKNOWN


async def histories(storages: list[SQLAlchemyStorage], seed: int) -> list[list[Call]]:
    """Use several conversations at once, and return what happened in each."""
    recorders = [
        Recorder(storages, StorageKey(bot_id=seed, chat_id=n, user_id=n), seed * 1000 + n)
        for n in range(CONVERSATIONS)
    ]
    async with anyio.create_task_group() as conversations:
        for recorder in recorders:
            conversations.start_soon(recorder.run)
    return [recorder.history for recorder in recorders]


async def test_concurrent_clients_could_have_taken_turns(
    backend: Backend, open_storage: Open
) -> None:
    """Clients of one storage and of two, on engines of their own; one is opened anew each time."""
    options = {"connect_args": backend.without_tls}
    storage = await open_storage(backend, engine_options=options)
    for seed in range(ROUNDS):
        other = await open_storage(backend, table_name=storage.model, engine_options=options)
        for history in await histories([storage, other], seed):
            assert is_linearizable(history), f"seed {seed}: {history}"
        await other.close()


class ReadsAndWrites(SQLAlchemyStorage):
    """Updates as storages without a way of their own do: it loses what others write meanwhile."""

    async def update_data(self, key: StorageKey, data: Any) -> dict[str, Any]:
        return await BaseStorage.update_data(self, key, data)


async def test_an_update_lost_by_a_storage_is_noticed(url_of: Callable[[Backend], URL]) -> None:
    [backend, *_] = SQLITE
    engine: Any = backend.engine(url_of(backend))
    storage = ReadsAndWrites(backend.factory(engine))
    await storage.create_table()
    for seed in itertools.count():
        if not all(map(is_linearizable, await histories([storage], seed))):
            break
        assert seed < 100, "nothing was noticed"
    engine.dispose()


POSSIBLE = {
    "one after the other": [
        Call("set_state", "a", None, 0, 1),
        Call("set_data", {"x": 1}, None, 2, 3),
        Call("update_data", {"y": 2}, {"x": 1, "y": 2}, 4, 5),
        Call("get_state", None, "a", 6, 7),
        Call("clear", None, None, 8, 9),
        Call("get_data", None, {}, 10, 11),
    ],
    "a write that is seen while it goes on, and before": [
        Call("set_state", "a", None, 0, 9),
        Call("get_state", None, None, 1, 2),
        Call("get_state", None, "a", 3, 4),
    ],
    "updates at once, of which each keeps the other's": [
        Call("update_data", {"x": 1}, {"x": 1, "y": 2}, 0, 3),
        Call("update_data", {"y": 2}, {"y": 2}, 1, 2),
    ],
    "a write that was cancelled and happened": [
        Call("set_state", "a", UNKNOWN, 0, 1),
        Call("get_state", None, "a", 2, 3),
    ],
    "a write that was cancelled and did not happen": [
        Call("set_state", "a", UNKNOWN, 0, 1),
        Call("get_state", None, None, 2, 3),
    ],
}
IMPOSSIBLE = {
    "what nobody wrote": [Call("get_state", None, "a", 0, 1)],
    "a lost write": [
        Call("set_state", "a", None, 0, 1),
        Call("get_state", None, None, 2, 3),
    ],
    "half a write": [
        Call("set_data", {"x": 1, "y": 1}, None, 0, 3),
        Call("get_data", None, {"x": 1}, 1, 2),
    ],
    "an old value after a new one": [
        Call("set_state", "a", None, 0, 9),
        Call("set_state", "b", None, 1, 8),
        Call("get_state", None, "a", 2, 3),
        Call("get_state", None, "b", 4, 5),
        Call("get_state", None, "a", 6, 7),
    ],
    "an update that loses another": [
        Call("update_data", {"x": 1}, {"x": 1}, 0, 3),
        Call("update_data", {"y": 2}, {"y": 2}, 1, 2),
    ],
    "a cancelled write that lands after its end": [
        Call("set_state", "a", UNKNOWN, 0, 1),
        Call("set_state", "b", None, 2, 3),
        Call("get_state", None, "a", 4, 5),
    ],
    "a cancelled write that is undone": [
        Call("set_state", "a", UNKNOWN, 0, 1),
        Call("get_state", None, "a", 2, 3),
        Call("get_state", None, None, 4, 5),
    ],
}


@pytest.mark.parametrize("history", POSSIBLE.values(), ids=POSSIBLE)
def test_a_history_that_turns_explain_is_accepted(history: list[Call]) -> None:
    assert is_linearizable(history)


@pytest.mark.parametrize("history", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_history_that_no_turns_explain_is_rejected(history: list[Call]) -> None:
    assert not is_linearizable(history)
