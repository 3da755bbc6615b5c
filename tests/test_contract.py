"""aiogram's storage contract, sentence by sentence, on every backend; then what only ours adds."""

from __future__ import annotations

import copy
import json
from collections import ChainMap, OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import Enum
from types import MappingProxyType
from typing import Any, TypedDict

import orjson
import pytest
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import (
    BaseStorage,
    DefaultKeyBuilder,
    KeyBuilder,
    StateType,
    StorageKey,
)
from backends import Backend
from conftest import Open, rows

from hybrid_storage import SQLAlchemyStorage

ROW = "42:-1001234567890:7"  # the id of the row of the key that the tests use


class Form(StatesGroup):
    name = State()

    class Address(StatesGroup):
        city = State()


class Step(str, Enum):
    first = "step:first"


class Answers(TypedDict, total=False):
    name: str
    age: int


# States


async def test_a_state_is_read_back_and_removed(any_storage: BaseStorage, key: StorageKey) -> None:
    assert await any_storage.get_state(key) is None
    await any_storage.set_state(key, "form:name")
    assert await any_storage.get_state(key) == "form:name"
    await any_storage.set_state(key, None)
    assert await any_storage.get_state(key) is None


STATES: list[tuple[StateType, str | None]] = [
    ("form:name", "form:name"),
    (Form.name, "Form:name"),
    (Form.Address.city, "Form.Address:city"),
    (State("alone"), "@:alone"),
    (State("name", group_name="group"), "group:name"),
    (State("*"), "*"),
    ("", ""),
    (Step.first, "step:first"),
    (" Spaced \t\n", " Spaced \t\n"),
    ("%s %(x)s :x ? \\ ' \" ` \\' --", "%s %(x)s :x ? \\ ' \" ` \\' --"),
    ("шаг 🚀 \U0010ffff", "шаг 🚀 \U0010ffff"),
    ("long " * 2000, "long " * 2000),
    (State(), None),
    ("last", "last"),
    (None, None),
]


async def test_a_state_is_read_back_as_its_name(any_storage: BaseStorage, key: StorageKey) -> None:
    """Be it a state, one of a group, of a nested group or of none, or text of any kind."""
    for state, name in STATES:
        await any_storage.set_state(key, state)
        assert await any_storage.get_state(key) == name


async def test_a_state_is_removed_by_default(any_storage: BaseStorage, key: StorageKey) -> None:
    await any_storage.set_state(key=key, state="form:name")
    await any_storage.set_state(key=key)
    assert await any_storage.get_state(key=key) is None


async def test_states_that_differ_in_case_or_in_trailing_blanks_are_different(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    for state in ["name", "Name", "name ", "náme", "name"]:
        await any_storage.set_state(key, state)
        assert await any_storage.get_state(key) == state


# Data


async def test_data_is_empty_until_it_is_set(any_storage: BaseStorage, key: StorageKey) -> None:
    assert await any_storage.get_data(key) == {}
    await any_storage.set_data(key, {"name": "Ada"})
    assert await any_storage.get_data(key) == {"name": "Ada"}
    await any_storage.set_data(key, {})
    assert await any_storage.get_data(key) == {}


async def test_set_data_replaces_all_fields(any_storage: BaseStorage, key: StorageKey) -> None:
    await any_storage.set_data(key, {"name": "Ada", "age": 36})
    await any_storage.set_data(key, {"city": "London"})
    assert await any_storage.get_data(key) == {"city": "London"}


async def test_get_value_returns_a_field_or_the_default(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    assert await any_storage.get_value(key, "name") is None
    assert await any_storage.get_value(key, "name", "nobody") == "nobody"
    await any_storage.set_data(key, {"name": "Ada", "pet": None, "seen": [1, 2]})
    assert await any_storage.get_value(storage_key=key, dict_key="name") == "Ada"
    assert await any_storage.get_value(storage_key=key, dict_key="name", default="x") == "Ada"
    assert await any_storage.get_value(key, "seen") == [1, 2]
    assert await any_storage.get_value(key, "age") is None
    assert await any_storage.get_value(key, "age", 18) == 18


async def test_get_value_returns_a_none_that_is_there_in_place_of_the_default(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    await any_storage.set_data(key, {"pet": None})
    assert await any_storage.get_value(key, "pet", "a cat") is None


async def test_update_data_changes_the_given_fields_and_returns_all(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    assert await any_storage.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
    assert await any_storage.update_data(key=key, data={"age": 36}) == {"name": "Ada", "age": 36}
    assert await any_storage.get_data(key) == {"name": "Ada", "age": 36}
    assert await any_storage.update_data(key, {"name": "Bob"}) == {"name": "Bob", "age": 36}
    assert await any_storage.get_data(key) == {"name": "Bob", "age": 36}


async def test_an_empty_update_changes_nothing_and_returns_all(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    assert await any_storage.update_data(key, {}) == {}
    await any_storage.set_data(key, {"name": "Ada"})
    assert await any_storage.update_data(key, {}) == {"name": "Ada"}
    assert await any_storage.get_data(key) == {"name": "Ada"}


async def test_the_same_update_twice_is_the_same_as_once(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    for _ in range(2):
        assert await any_storage.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
    assert await any_storage.get_data(key) == {"name": "Ada"}


async def test_an_update_replaces_nested_fields_as_a_whole(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    await any_storage.set_data(key, {"form": {"name": "Ada", "age": 36}, "seen": [1]})
    await any_storage.update_data(key, {"form": {"name": "Bob"}, "seen": None})
    assert await any_storage.get_data(key) == {"form": {"name": "Bob"}, "seen": None}


async def test_fields_keep_their_order(any_storage: BaseStorage, key: StorageKey) -> None:
    await any_storage.set_data(key, {"z": 1, "a": 2})
    assert list(await any_storage.update_data(key, {"m": 3, "z": 4})) == ["z", "a", "m"]
    assert list(await any_storage.get_data(key)) == ["z", "a", "m"]


async def test_a_typed_dict_is_data(any_storage: BaseStorage, key: StorageKey) -> None:
    await any_storage.set_data(key, Answers(name="Ada"))
    assert await any_storage.get_data(key) == {"name": "Ada"}
    assert await any_storage.update_data(key, Answers(age=36)) == {"name": "Ada", "age": 36}


VALUES: list[Any] = [
    "",
    "🚀 👩‍👩‍👧 é ñ 日本 ‏עברית \u2028 \U0010ffff",
    "a\0b",
    "%s %(x)s :x ? \\ ' \" ` \\u0041 \r\n\t",
    [None, True, False, 0, 1, -1, 2**53 + 1, 10**40, 0.1, -0.0, 1e308, 5e-324],
    [float("nan"), float("inf"), float("-inf")],
    [],
    {},
    {"": {"": [{}, [], [[{"deep": [1, {"er": None}]}]]]}},
    {"a\0b": 1, "ключ": 2, " ": 3, "'\"\\": 4},
]


async def test_every_json_value_is_read_back_as_it_was(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    """NaN, NUL and emoji too. As text, for NaN is not equal to itself and True is equal to 1."""
    for value in VALUES:
        written = json.dumps({"value": value})
        await any_storage.set_data(key, {"value": value})
        assert json.dumps(await any_storage.get_data(key)) == written
        assert json.dumps({"value": await any_storage.get_value(key, "value")}) == written
        assert json.dumps(await any_storage.update_data(key, {"value": value})) == written


async def test_a_megabyte_of_data_is_data(any_storage: BaseStorage, key: StorageKey) -> None:
    text = "0123456789abcdef" * 2**16
    await any_storage.set_data(key, {"text": text})
    assert await any_storage.get_data(key) == {"text": text}
    assert await any_storage.update_data(key, {"more": 1}) == {"text": text, "more": 1}
    assert await any_storage.get_data(key) == {"text": text, "more": 1}


async def test_state_and_data_do_not_touch_each_other(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    async def both() -> tuple[str | None, dict[str, Any]]:
        return await any_storage.get_state(key), await any_storage.get_data(key)

    await any_storage.set_state(key, "form:name")
    await any_storage.set_data(key, {"name": "Ada"})
    assert await both() == ("form:name", {"name": "Ada"})
    await any_storage.set_state(key, "form:age")
    assert await both() == ("form:age", {"name": "Ada"})
    await any_storage.update_data(key, {"age": 36})
    assert await both() == ("form:age", {"name": "Ada", "age": 36})
    await any_storage.set_state(key, None)
    assert await both() == (None, {"name": "Ada", "age": 36})
    await any_storage.set_state(key, "form:city")
    await any_storage.set_data(key, {})
    assert await both() == ("form:city", {})
    await any_storage.update_data(key, {"city": "London"})
    assert await both() == ("form:city", {"city": "London"})


async def test_changing_what_was_passed_or_returned_changes_nothing_stored(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    passed: dict[str, Any] = {"name": "Ada"}
    await any_storage.set_data(key, passed)
    update: dict[str, Any] = {"age": 36}
    returned = await any_storage.update_data(key, update)
    read = await any_storage.get_data(key)
    for mine in (passed, update, returned, read):
        mine["name"] = mine["age"] = mine["new"] = "changed"
    assert await any_storage.get_data(key) == {"name": "Ada", "age": 36}


# Keys

OTHER_KEYS: dict[str, dict[str, Any]] = {
    "bot_id": {"bot_id": 43},
    "chat_id": {"chat_id": 1001234567890},
    "user_id": {"user_id": 8},
    "chat_id and user_id the other way round": {"chat_id": 7, "user_id": -1001234567890},
    "thread_id": {"thread_id": 5},
    "thread_id 0": {"thread_id": 0},
    "business_connection_id": {"business_connection_id": "biz"},
    "business_connection_id empty": {"business_connection_id": ""},
    "destiny": {"destiny": "scenes_history"},
    "destiny empty": {"destiny": ""},
    "destiny that looks like another field": {"destiny": "default:thread_id=5"},
    "all": {"thread_id": 5, "business_connection_id": "biz", "destiny": "aiogd:context:x"},
}


async def assert_independent(storage: BaseStorage, one: StorageKey, other: StorageKey) -> None:
    await storage.set_state(one, "form:name")
    await storage.set_data(one, {"name": "Ada"})
    assert (await storage.get_state(other), await storage.get_data(other)) == (None, {})
    await storage.set_state(other, "form:age")
    await storage.update_data(other, {"age": 36})
    assert await storage.get_state(one) == "form:name"
    assert await storage.get_data(one) == {"name": "Ada"}
    await storage.set_state(one, None)
    await storage.set_data(one, {})
    assert await storage.get_state(other) == "form:age"
    assert await storage.get_data(other) == {"age": 36}
    await storage.set_state(other, None)
    await storage.set_data(other, {})


async def test_keys_that_differ_in_any_field_are_different_conversations(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    for fields in OTHER_KEYS.values():
        await assert_independent(any_storage, key, replace(key, **fields))


async def test_keys_that_differ_in_one_letter_are_different_conversations(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    """Databases may ignore case, accents, trailing blanks and what they take for no character."""
    texts = ["Scene", "scene", "Scene ", " Scene", "Scène", "Scene\0", "Scene\udc80", "Scene%00"]
    for one, *others in (
        [replace(key, destiny=text) for text in texts],
        [replace(key, business_connection_id=text) for text in texts],
    ):
        for other in others:
            await assert_independent(any_storage, one, other)


# As aiogram's handlers use it


async def test_a_handler_finds_what_the_last_one_left(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    context = FSMContext(any_storage, key)
    await context.set_state(Form.name)
    await context.set_data({"name": "Ada"})
    assert await context.update_data(age=36) == {"name": "Ada", "age": 36}
    assert await context.update_data({"age": 37}, age=1, city="London") == {
        "name": "Ada",
        "age": 37,
        "city": "London",
    }
    assert await context.update_data() == {"name": "Ada", "age": 37, "city": "London"}

    later = FSMContext(any_storage, replace(key))
    assert await later.get_state() == Form.name
    assert await later.get_data() == {"name": "Ada", "age": 37, "city": "London"}
    assert await later.get_value("city") == "London"
    assert await later.get_value("street", "unknown") == "unknown"


async def test_a_handler_clears_state_and_data_as_often_as_it_likes(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    context = FSMContext(any_storage, key)
    await context.set_state(Form.name)
    await context.update_data(name="Ada")
    for _ in range(2):
        await context.clear()
        assert (await context.get_state(), await context.get_data()) == (None, {})


async def test_a_storage_that_was_closed_goes_on(any_storage: BaseStorage, key: StorageKey) -> None:
    """A dispatcher closes it before the application's own shutdown handlers run."""
    await any_storage.set_state(key, "form:name")
    for _ in range(2):
        await any_storage.close()
        assert await any_storage.get_state(key) == "form:name"


# What only this storage has: the row


async def insert(storage: SQLAlchemyStorage, **values: Any) -> None:
    """Write a row past the storage."""
    await storage.run_sync(lambda session: session.execute(storage.table.insert().values(values)))


async def test_a_row_holds_the_key_the_state_and_the_data_as_json(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    await storage.set_state(key, Form.name)
    await storage.set_data(key, {"name": "Ada", "age": 36})
    await storage.update_data(key, {"name": "Bób"})
    assert await rows(storage) == [(ROW, "Form:name", '{"name": "B\\u00f3b", "age": 36}')]


async def test_clear_removes_the_row_and_no_other(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    other = replace(key, user_id=8)
    for each in (key, other):
        await storage.set_state(each, "form:name")
        await storage.set_data(each, {"name": "Ada"})
    for _ in range(2):
        await storage.clear(key)
        assert (await storage.get_state(key), await storage.get_data(key)) == (None, {})
        assert [row[0] for row in await rows(storage)] == ["42:-1001234567890:8"]


@pytest.mark.parametrize(
    ("first", "left", "then"),
    [
        pytest.param(
            lambda storage, key: storage.set_state(key, None),
            (ROW, None, '{"name": "Ada"}'),
            lambda storage, key: storage.set_data(key, {}),
            id="state first",
        ),
        pytest.param(
            lambda storage, key: storage.set_data(key, {}),
            (ROW, "form:name", ""),
            lambda storage, key: storage.set_state(key, None),
            id="data first",
        ),
    ],
)
async def test_the_row_goes_when_neither_state_nor_data_is_left(
    storage: SQLAlchemyStorage,
    key: StorageKey,
    first: Callable[..., Any],
    left: tuple[str | None, ...],
    then: Callable[..., Any],
) -> None:
    await storage.set_state(key, "form:name")
    await storage.set_data(key, {"name": "Ada"})
    await first(storage, key)
    assert await rows(storage) == [left]
    await then(storage, key)
    assert await rows(storage) == []


async def test_an_empty_state_is_a_state_and_keeps_the_row(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    await storage.set_state(key, "")
    await storage.set_data(key, {})
    assert [row[:2] for row in await rows(storage)] == [(ROW, "")]


async def test_reads_and_empty_values_make_no_row(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    assert await storage.get_state(key) is None
    assert await storage.get_data(key) == {}
    assert await storage.get_value(key, "name") is None
    await storage.set_state(key, None)
    await storage.set_state(key, State())
    await storage.set_data(key, {})
    assert await storage.update_data(key, {}) == {}
    assert await rows(storage) == []


@pytest.mark.parametrize("data", [None, ""], ids=["NULL", "empty text"])
async def test_a_row_without_data_has_empty_data(
    storage: SQLAlchemyStorage, key: StorageKey, data: str | None
) -> None:
    await insert(storage, id=ROW, state="form:name", data=data)
    assert await storage.get_data(key) == {}
    assert await storage.get_value(key, "name", "nobody") == "nobody"
    assert await storage.update_data(key, {}) == {}
    assert await storage.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
    assert await rows(storage) == [(ROW, "form:name", '{"name": "Ada"}')]


@pytest.mark.parametrize("data", [None, ""], ids=["NULL", "empty text"])
async def test_a_row_without_data_goes_with_its_state(
    storage: SQLAlchemyStorage, key: StorageKey, data: str | None
) -> None:
    await insert(storage, id=ROW, state="form:name", data=data)
    await storage.set_data(key, {})
    assert [row[:2] for row in await rows(storage)] == [(ROW, "form:name")]
    await storage.set_state(key, None)
    assert await rows(storage) == []


async def test_an_empty_row_is_filled_and_removed_as_any_other(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    for data in (None, ""):
        await insert(storage, id=ROW, state=None, data=data)
        assert (await storage.get_state(key), await storage.get_data(key)) == (None, {})
        await storage.set_state(key, "form:name")
        assert await storage.get_state(key) == "form:name"
        await storage.set_state(key, None)
        assert await rows(storage) == []


# What only this storage has: data as JSON


async def test_data_comes_back_as_json_has_it(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    data: dict[Any, Any] = {1: "one", None: "none", False: "no", "pair": (1, 2)}
    as_json = {"1": "one", "null": "none", "false": "no", "pair": [1, 2]}
    await storage.set_data(key, data)
    assert await storage.get_data(key) == as_json
    assert await storage.update_data(key, data) == as_json
    uno: dict[Any, Any] = {1: "uno"}
    assert await storage.update_data(key, uno) == {**as_json, "1": "uno"}


async def test_changing_nested_values_passed_or_returned_changes_nothing_stored(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    passed: dict[str, Any] = {"list": [1], "dict": {"list": [1]}}
    kept = copy.deepcopy(passed)
    await storage.set_data(key, passed)
    update: dict[str, Any] = {"more": [1]}
    kept.update(copy.deepcopy(update))
    returned = await storage.update_data(key, update)
    read = await storage.get_data(key)
    value: dict[str, Any] = {"list": await storage.get_value(key, "list")}
    for mine in (passed, update, returned, read, value):
        for nested in mine.values():
            (nested["list"] if isinstance(nested, dict) else nested).append("changed")
    assert await storage.get_data(key) == kept


class ReadOnly(Mapping[str, Any]):
    """A mapping that has nothing of a dict but what a mapping must have."""

    def __init__(self, pairs: Iterable[tuple[str, Any]]) -> None:
        self._pairs = list(pairs)

    def __getitem__(self, name: str) -> Any:
        for own, value in self._pairs:
            if own == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Any:
        return (name for name, _ in self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


@pytest.mark.parametrize(
    "mapping",
    [
        pytest.param(lambda data: MappingProxyType(data), id="MappingProxyType"),
        pytest.param(lambda data: ChainMap({}, data), id="ChainMap"),
        pytest.param(lambda data: UserDict(data), id="UserDict"),
        pytest.param(lambda data: OrderedDict(data), id="OrderedDict"),
        pytest.param(lambda data: defaultdict(list, data), id="defaultdict"),
        pytest.param(lambda data: ReadOnly(data.items()), id="Mapping"),
    ],
)
async def test_any_mapping_is_data(
    storage: SQLAlchemyStorage,
    key: StorageKey,
    mapping: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> None:
    await storage.set_data(key, mapping({"name": "Ada"}))
    assert await storage.get_data(key) == {"name": "Ada"}
    assert await storage.update_data(key, mapping({"age": 36})) == {"name": "Ada", "age": 36}
    assert await storage.update_data(key, mapping({})) == {"name": "Ada", "age": 36}
    await storage.set_data(key, mapping({}))
    assert await rows(storage) == []


def loads_text(text: str) -> Any:
    """Read JSON as a reader does that takes text only."""
    assert type(text) is str
    return json.loads(text)


JSON: dict[str, dict[str, Any]] = {
    "orjson": {"json_dumps": orjson.dumps, "json_loads": orjson.loads},
    "bytes": {"json_dumps": lambda data: json.dumps(data).encode()},
    "bytearray": {"json_dumps": lambda data: bytearray(json.dumps(data).encode())},
    "unescaped": {"json_dumps": lambda data: json.dumps(data, ensure_ascii=False)},
    "indented": {"json_dumps": lambda data: f"\n {json.dumps(data, indent=2)} \n"},
}


@pytest.mark.parametrize("options", JSON.values(), ids=JSON)
async def test_other_json_functions_write_what_every_other_reads(
    backend: Backend, open_storage: Open, key: StorageKey, options: dict[str, Any]
) -> None:
    storage = await open_storage(backend, json_loads=loads_text)
    other = await open_storage(
        backend, table_name=storage.model, **{"json_loads": loads_text, **options}
    )
    data = {"name": "Bób 🚀", "seen": [1, 2.5, None, True], "form": {"a\0b": "\\'\""}}
    await other.set_data(key, data)
    assert await other.get_data(key) == await storage.get_data(key) == data
    assert await other.update_data(key, {"name": "Ada"}) == {**data, "name": "Ada"}
    assert await storage.update_data(key, {"seen": []}) == {**data, "name": "Ada", "seen": []}
    assert await other.get_value(key, "seen") == []
    [(_, _, text)] = await rows(storage)
    assert type(text) is str
    await other.set_data(key, {})
    assert await rows(storage) == []


# What only this storage has: the key builder


class OneArgument(KeyBuilder):
    """Builds keys as the builders in other storages' documents do."""

    def build(self, key: StorageKey) -> str:  # type: ignore[override]
        return f"{key.bot_id}/{key.chat_id}/{key.user_id}"


@pytest.mark.parametrize(
    ("key_builder", "row"),
    [
        pytest.param(OneArgument(), "42/-1001234567890/7", id="without part"),
        pytest.param(DefaultKeyBuilder(), "fsm:-1001234567890:7", id="aiogram's"),
        pytest.param(
            DefaultKeyBuilder(prefix="Ключ ' % :", separator="|", with_bot_id=True),
            "Ключ ' % :|42|-1001234567890|7",
            id="odd letters",
        ),
    ],
)
async def test_a_key_builder_makes_the_rows_id(
    backend: Backend, open_storage: Open, key: StorageKey, key_builder: KeyBuilder, row: str
) -> None:
    storage = await open_storage(backend, key_builder=key_builder)
    await storage.set_state(key, "form:name")
    await storage.set_data(key, {"name": "Ada"})
    await storage.update_data(key, {"age": 36})
    assert await rows(storage) == [(row, "form:name", '{"name": "Ada", "age": 36}')]
    assert await storage.get_state(key) == "form:name"
    assert await storage.get_value(key, "age") == 36
    await storage.set_state(key, None)
    await storage.clear(key)
    assert await rows(storage) == []
