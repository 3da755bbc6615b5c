"""Whatever the calls and their order, the answers are those of aiogram's own storage."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from aiogram.fsm.storage.base import BaseStorage, StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from backends import Backend
from conftest import Open, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_storage import FullKeyBuilder, SQLAlchemyStorage

KEY = StorageKey(bot_id=42, chat_id=-1001234567890, user_id=7)
KEYS = [KEY, replace(KEY, user_id=8), replace(KEY, destiny="Scène 🚀 ")]

# Few names, so that programs meet a field again. PostgreSQL has no NUL in a text: a state with
# one is refused there, and has its own tests. In data JSON escapes it.
names = st.sampled_from(["a", "A", "a ", "b", "", "имя", "\0"])
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
states = st.none() | st.sampled_from(["form:name", ""]) | texts
numbers = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | numbers | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(names | numbers, inner, max_size=3)
    ),
    max_leaves=8,
)
data: st.SearchStrategy[dict[Any, Any]] = st.just({}) | st.dictionaries(
    names | st.integers(0, 1), values, max_size=4
)


@dataclass(frozen=True)
class Call:
    """A call of one of a storage's methods."""

    method: str
    key: StorageKey
    arguments: tuple[Any, ...]
    writer: int
    """Which of two storages on the same table makes it."""

    async def on(self, storage: BaseStorage) -> str:
        """Make the call, and return the answer as JSON: for Python True is equal to 1."""
        return json.dumps(await getattr(storage, self.method)(self.key, *self.arguments))

    async def on_oracle(self, oracle: MemoryStorage) -> str:
        """Make the call on aiogram's own storage, which has no ``clear`` and keeps any object."""
        if self.method == "clear":
            await oracle.set_state(self.key, None)
            return await replace(self, method="set_data", arguments=({},)).on(oracle)
        return await replace(self, arguments=json.loads(json.dumps(self.arguments))).on(oracle)


def calls(method: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Call]:
    """Return the calls of a method."""
    return st.builds(
        Call, st.just(method), st.sampled_from(KEYS), st.tuples(*arguments), st.integers(0, 1)
    )


programs = st.lists(
    st.one_of(
        calls("get_state"),
        calls("set_state", states),
        calls("get_data"),
        calls("set_data", data),
        calls("get_value", names),
        calls("get_value", names, values),
        calls("update_data", data),
        calls("clear"),
    ),
    min_size=1,
    max_size=15,
)


@pytest.fixture
async def writers(
    backend: Backend, open_storage: Open, storage: SQLAlchemyStorage
) -> tuple[SQLAlchemyStorage, SQLAlchemyStorage]:
    """Return two storages on one table: JSON leaves open how letters are written."""
    unescaped = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
    return storage, await open_storage(backend, table_name=storage.model, json_dumps=unescaped)


@settings(
    deadline=None,
    max_examples=50,  # on each backend
    # The examples share a table, each of them empties it first. How fast they are is no matter.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(program=programs)
async def test_any_program_of_calls_gets_the_answers_of_aiograms_own_storage(
    writers: tuple[SQLAlchemyStorage, SQLAlchemyStorage], program: list[Call]
) -> None:
    """And at the end there is a row for each key that has a state or data, and no other row."""
    for key in KEYS:
        await writers[0].clear(key)

    oracle = MemoryStorage()
    for call in program:
        assert await call.on(writers[call.writer]) == await call.on_oracle(oracle), call

    left = {
        FullKeyBuilder().build(key): (record.state, record.data)
        for key, record in oracle.storage.items()
        if record.state is not None or record.data
    }
    found = {row: (state, json.loads(text or "{}")) for row, state, text in await rows(writers[0])}
    assert found == left
