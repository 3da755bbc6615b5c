"""Whatever updates, transactions, failures and other writers do, the database has what a dict has.

Each example is a list of updates at random, of two users at once. An update is a list of steps:
writes of the handler's, by itself or in a task, flushes, transactions in transactions that may
fail, and writes that synchronous code commits meanwhile. It returns, fails, or is cancelled.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import pytest
from aiogram.fsm.storage.base import StorageKey
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import StaticPool
from units import LEASES, outside

from hybrid_storage import SQLAlchemyEventIsolation, SQLAlchemyStorage

Write: TypeAlias = tuple[str, Any]
Row: TypeAlias = tuple[str | None, dict[str, int]]
DESTINIES = ["default", "history"]
EMPTY: Row = (None, {})


class Failure(Exception):
    """What a handler or a transaction raises."""


@dataclass(frozen=True)
class Own:
    """A write of the handler's."""

    destiny: str
    write: Write
    in_task: bool


@dataclass(frozen=True)
class Other:
    """A write that synchronous code commits meanwhile."""

    destiny: str
    write: Write


@dataclass(frozen=True)
class Transaction:
    """Steps in a transaction."""

    steps: Sequence[Any]
    fails: bool


@dataclass(frozen=True)
class Update:
    """Steps of a handler, and how it ends."""

    steps: Sequence[Any]
    ends_with: type[BaseException] | None


FLUSH = "flush"
destinies = st.sampled_from(DESTINIES)
fields = st.dictionaries(st.sampled_from("abc"), st.integers(0, 2), max_size=2)
writes = st.one_of(
    st.tuples(st.just("set_state"), st.sampled_from([None, "one", "two"])),
    st.tuples(st.sampled_from(["set_data", "update_data", "update_data"]), fields),
    st.just(("clear", None)),
)
own = st.builds(Own, destinies, writes, st.booleans())
inner = st.one_of(own, own, st.just(FLUSH))
transactions = st.recursive(
    st.builds(Transaction, st.lists(inner, max_size=3), st.booleans()),
    lambda nested: st.builds(
        Transaction, st.lists(st.one_of(inner, nested), max_size=3), st.booleans()
    ),
    max_leaves=3,
)
other = st.builds(Other, destinies, writes)
steps = st.lists(st.one_of(own, own, other, st.just(FLUSH), transactions), max_size=6)
ends = st.sampled_from([None, None, None, Failure, asyncio.CancelledError])
runs = st.lists(st.builds(Update, steps, ends), max_size=3)


def after(row: Row, writes: Sequence[Write]) -> Row:
    """Return what a row holds after some writes."""
    for name, value in writes:
        state, data = row
        if name == "set_state":
            row = value, data
        elif name == "set_data":
            row = state, dict(value)
        elif name == "update_data":
            row = state, {**data, **value}
        else:
            row = EMPTY
    return row


class Model:
    """What is stored, and what an update has read of it and written since."""

    def __init__(self) -> None:
        self.stored: dict[str, Row] = dict.fromkeys(DESTINIES, EMPTY)
        self.begin()

    def begin(self) -> None:
        """Begin an update, which reads both rows."""
        self.found = dict(self.stored)
        self.pending: dict[str, list[Write]] = {destiny: [] for destiny in DESTINIES}

    def now(self, destiny: str) -> Row:
        """Return what the update has of a row."""
        return after(self.found[destiny], self.pending[destiny])

    def write(self) -> None:
        """Apply what changes something to what is stored by now."""
        for destiny, pending in self.pending.items():
            if json.dumps(self.now(destiny)) != json.dumps(self.found[destiny]):
                self.stored[destiny] = after(self.stored[destiny], pending)
                self.found[destiny] = self.stored[destiny]
            self.pending[destiny] = []  # of no effect, and so it is not applied later


class User:
    """One user, whose updates are handled one after another; compares at each step."""

    def __init__(
        self, storage: SQLAlchemyStorage, isolation: SQLAlchemyEventIsolation, number: int
    ) -> None:
        self._storage = storage
        self._isolation = isolation
        self._key = StorageKey(bot_id=42, chat_id=number, user_id=number)
        self._model = Model()

    async def handle(self, updates: Sequence[Update]) -> None:
        """Have some updates handled."""
        for each in updates:
            if each.ends_with is None:
                await self._update(each)
            else:
                with pytest.raises(each.ends_with):
                    await self._update(each)
            for destiny in DESTINIES:
                assert await outside(self._row(destiny)) == self._model.stored[destiny]
            assert not self._isolation.still_held(self._key)

    async def _update(self, update: Update) -> None:
        model = self._model
        async with self._isolation.lock(self._key):
            model.begin()
            await self._compare()
            await self._go_through(update.steps)
            if update.ends_with is not None:
                raise update.ends_with
        model.write()

    async def _go_through(self, steps: Sequence[Any]) -> None:
        for step in steps:
            if isinstance(step, Transaction):
                await self._in_transaction(step)
            elif isinstance(step, Own):
                call = self._call(step.destiny, step.write)
                await (asyncio.ensure_future(call) if step.in_task else call)
                self._model.pending[step.destiny].append(step.write)
            elif isinstance(step, Other):
                await self._other(step)
            else:
                await self._storage.flush()
                self._model.write()
            await self._compare()

    async def _in_transaction(self, transaction: Transaction, *, is_nested: bool = False) -> None:
        before = copy.deepcopy(self._model.__dict__)
        try:
            async with self._storage.transaction():
                for step in transaction.steps:
                    if isinstance(step, Transaction):
                        await self._in_transaction(step, is_nested=True)
                    else:
                        await self._go_through([step])
                if transaction.fails:
                    raise Failure
        except Failure:
            self._model.__dict__ = before
        else:
            if not is_nested:
                self._model.write()

    async def _other(self, other: Other) -> None:
        name, value = other.write
        key = replace(self._key, destiny=other.destiny)
        arguments = (key,) if name == "clear" else (key, value)

        def write(session: Session) -> None:
            getattr(self._storage.operations, name)(session, *arguments)

        await outside(self._storage.run_sync(write))
        stored = self._model.stored
        stored[other.destiny] = after(stored[other.destiny], [other.write])

    async def _call(self, destiny: str, write: Write) -> None:
        name, value = write
        key = replace(self._key, destiny=destiny)
        arguments = (key,) if name == "clear" else (key, value)
        await getattr(self._storage, name)(*arguments)

    async def _compare(self) -> None:
        for destiny in DESTINIES:
            assert await self._row(destiny) == self._model.now(destiny)

    async def _row(self, destiny: str) -> Row:
        key = replace(self._key, destiny=destiny)
        return await self._storage.get_state(key), await self._storage.get_data(key)


@pytest.mark.parametrize("lease", LEASES.values(), ids=LEASES)
@settings(max_examples=25, deadline=None)
@given(first=runs, second=runs)
def test_the_database_has_what_a_dict_has(
    lease: float | None, first: list[Update], second: list[Update]
) -> None:
    async def run() -> None:
        engine = create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        storage: SQLAlchemyStorage = SQLAlchemyStorage(sessionmaker(engine))
        isolation = storage.create_isolation(unit_of_work=True, lease=lease)
        await storage.create_table()
        users = [User(storage, isolation, number) for number in (1, 2)]
        await asyncio.gather(users[0].handle(first), users[1].handle(second))
        await isolation.close()
        engine.dispose()

    asyncio.run(run())
