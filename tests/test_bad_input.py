"""What cannot be stored or read: which error says so, in which words, and that the row stays."""

from __future__ import annotations

import json
import re
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiogram.exceptions import DataNotDictLikeError
from aiogram.fsm.state import StatesGroup
from aiogram.fsm.storage.base import BaseStorage, DefaultKeyBuilder, KeyBuilder, StorageKey
from backends import BACKENDS, POSTGRESQL, SQLITE, Backend
from conftest import Open, rows
from sqlalchemy import URL, Column, Dialect, MetaData, String, Table, text
from sqlalchemy.dialects.mssql.base import MSDialect
from sqlalchemy.dialects.oracle.base import OracleDialect
from sqlalchemy.exc import DatabaseError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from hybrid_storage import CorruptDataError, FSMData, SQLAlchemyStorage
from hybrid_storage._sql.limits import Limits

ROW = "42:-1001234567890:7"  # the id of the row of the key that the tests use

Call = Callable[[SQLAlchemyStorage, StorageKey], Any]
CALLS: dict[str, Call] = {
    "get_state": lambda storage, key: storage.get_state(key),
    "set_state": lambda storage, key: storage.set_state(key, "form:age"),
    "unset_state": lambda storage, key: storage.set_state(key, None),
    "get_data": lambda storage, key: storage.get_data(key),
    "set_data": lambda storage, key: storage.set_data(key, {"age": 36}),
    "unset_data": lambda storage, key: storage.set_data(key, {}),
    "get_value": lambda storage, key: storage.get_value(key, "age"),
    "update_data": lambda storage, key: storage.update_data(key, {"age": 36}),
    "update_nothing": lambda storage, key: storage.update_data(key, {}),
    "clear": lambda storage, key: storage.clear(key),
}


def each_call(*names: str) -> pytest.MarkDecorator:
    """Run a test with each of these calls."""
    return pytest.mark.parametrize("call", [CALLS[name] for name in names], ids=names)


# One backend of each kind: the database, if it is reached at all, has no part in what is refused.
whatever_the_database = pytest.mark.parametrize("backend", SQLITE, ids=str)


class Builds(KeyBuilder):
    """Builds the same for every key."""

    def __init__(self, built: Any) -> None:
        self.built = built

    def build(self, key: StorageKey, part: str | None = None) -> str:
        return self.built  # type: ignore[no-any-return]


@pytest.fixture
async def filled(storage: SQLAlchemyStorage, key: StorageKey) -> SQLAlchemyStorage:
    """Return a storage in which the conversation has a state and data."""
    await storage.set_state(key, "form:name")
    await storage.set_data(key, {"name": "Ada"})
    return storage


@pytest.fixture
def reopen(backend: Backend, open_storage: Open, filled: SQLAlchemyStorage) -> Open:
    """Return a function that makes other storages on the table of the filled one."""
    return partial(open_storage, backend, table_name=filled.model)


async def overwrite(storage: SQLAlchemyStorage, data: str) -> None:
    """Replace the data of all rows past the storage."""
    await storage.run_sync(
        lambda session: session.execute(storage.table.update().values(data=data))
    )


@asynccontextmanager
async def refused(
    storage: SQLAlchemyStorage, error: type[Exception], words: str
) -> AsyncIterator[pytest.ExceptionInfo[Exception]]:
    """Expect an error with these words (a pattern) that leaves the table as it was."""
    before = await rows(storage)
    with pytest.raises(error, match=words) as raised:
        yield raised
    assert await rows(storage) == before


# Data that is no mapping

NO_MAPPINGS = [None, 5, "{}", b"{}", (), [], ["ab"], [("name", "Ada")], {"name"}, object()]


async def test_set_data_refuses_what_is_no_mapping(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    await any_storage.set_state(key, "form:name")
    await any_storage.set_data(key, {"name": "Ada"})
    for data in NO_MAPPINGS:
        words = rf"must be a dict or dict-like object, got {type(data).__name__}$"
        with pytest.raises(DataNotDictLikeError, match=words):
            await any_storage.set_data(key, data)  # type: ignore[arg-type]
    assert await any_storage.get_state(key) == "form:name"
    assert await any_storage.get_data(key) == {"name": "Ada"}


@whatever_the_database
async def test_update_data_refuses_what_is_no_mapping(
    filled: SQLAlchemyStorage, key: StorageKey
) -> None:
    for data in NO_MAPPINGS:
        words = rf"must be a dict or dict-like object, got {type(data).__name__}$"
        async with refused(filled, DataNotDictLikeError, words):
            await filled.update_data(key, data)  # type: ignore[arg-type]


# Data that does not become JSON


def circle() -> dict[str, Any]:
    """Return data that contains itself."""
    data: dict[str, Any] = {}
    data["self"] = data
    return data


UNSERIALISABLE: list[tuple[Any, type[Exception], str]] = [
    ({"x": object()}, TypeError, "object is not JSON serializable"),
    ({"x": {1, 2}}, TypeError, "set is not JSON serializable"),
    ({"x": [b"x"]}, TypeError, "bytes is not JSON serializable"),
    ({("x",): 1}, TypeError, "keys must be str"),
    (circle(), ValueError, "Circular reference"),
]


@whatever_the_database
async def test_data_that_does_not_serialise_gets_the_serialisers_own_error(
    filled: SQLAlchemyStorage, key: StorageKey
) -> None:
    for data, error, words in UNSERIALISABLE:
        async with refused(filled, error, words):
            await filled.set_data(key, data)
        async with refused(filled, error, words):
            await filled.update_data(key, data)


async def test_the_error_of_another_serialiser_comes_through_as_it_is(
    reopen: Open, key: StorageKey
) -> None:
    storage = await reopen(json_dumps=orjson.dumps)
    async with refused(storage, orjson.JSONEncodeError, "64-bit"):
        await storage.set_data(key, {"x": 10**40})
    async with refused(storage, orjson.JSONEncodeError, "64-bit"):
        await storage.update_data(key, {"x": 10**40})


@whatever_the_database
@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (None, TypeError, r"json_dumps\(\) gave NoneType, not text: None"),
        (5, TypeError, r"json_dumps\(\) gave int, not text: 5"),
        (["x"], TypeError, r"json_dumps\(\) gave list, not text: \['x'\]"),
        (memoryview(b"{}"), TypeError, r"json_dumps\(\) gave memoryview, not text"),
        ("", ValueError, r"json_dumps\(\) returned nothing for data that is not empty"),
        (b"", ValueError, r"json_dumps\(\) returned nothing for data that is not empty"),
        (b"\xff\xfe", ValueError, r"json_dumps\(\) .*UTF-8"),
    ],
    ids=["None", "int", "list", "memoryview", "empty text", "no bytes", "not UTF-8"],
)
async def test_a_json_dumps_that_returns_no_text_is_refused(
    reopen: Open, key: StorageKey, returned: object, error: type[Exception], words: str
) -> None:
    storage = await reopen(json_dumps=lambda data: returned)
    async with refused(storage, error, words):
        await storage.set_data(key, {"x": 1})
    async with refused(storage, error, words):
        await storage.update_data(key, {"x": 1})


# Rows that cannot be read

CORRUPT = [
    ("Ada", r"json_loads\(\) fails: Expecting value"),
    ('{"name": "A', r"json_loads\(\) fails: Unterminated string"),
    (" ", r"json_loads\(\) fails: Expecting value"),
    ("[1]", "it is a JSON list, not an object"),
    ('"Ada"', "it is a JSON str, not an object"),
    ("5", "it is a JSON int, not an object"),
    ("null", "it is a JSON NoneType, not an object"),
]


def unreadable(storage: SQLAlchemyStorage, key: StorageKey, why: str) -> str:
    """Return the pattern of the words that say which row it is, why, and what to do."""
    where = re.escape(f"the data of {key} in table {storage.table.fullname!r} cannot be read, ")
    return rf"^{where}{why}.*\. The row is unchanged; set_data\(\) or clear\(\) replaces it$"


@each_call("get_data", "get_value", "update_data", "update_nothing")
async def test_data_that_is_no_json_object_is_said_to_be_corrupt_and_kept(
    filled: SQLAlchemyStorage, key: StorageKey, call: Call
) -> None:
    for data, why in CORRUPT:
        await overwrite(filled, data)
        async with refused(filled, CorruptDataError, unreadable(filled, key, why)):
            await call(filled, key)


async def test_the_state_of_a_corrupt_row_is_read_and_set_and_its_data_kept(
    filled: SQLAlchemyStorage, key: StorageKey
) -> None:
    await overwrite(filled, "corrupt")
    assert await filled.get_state(key) == "form:name"
    await filled.set_state(key, "form:age")
    assert await rows(filled) == [(ROW, "form:age", "corrupt")]
    await filled.set_state(key, None)
    assert await rows(filled) == [(ROW, None, "corrupt")]


@pytest.mark.parametrize(
    ("call", "left"),
    [
        pytest.param(CALLS["set_data"], [(ROW, "form:name", '{"age": 36}')], id="set_data"),
        pytest.param(CALLS["unset_data"], [(ROW, "form:name", "")], id="unset_data"),
        pytest.param(CALLS["clear"], [], id="clear"),
    ],
)
async def test_a_corrupt_row_is_repaired_by(
    storage: SQLAlchemyStorage, key: StorageKey, call: Call, left: object
) -> None:
    for data, _ in CORRUPT:
        await storage.set_state(key, "form:name")
        await overwrite(storage, data)
        await call(storage, key)
        assert await rows(storage) == left
        assert await storage.update_data(key, {"age": 36}) == {"age": 36}
        await storage.clear(key)


@whatever_the_database
@each_call("get_data", "get_value", "update_data", "update_nothing")
async def test_a_json_loads_that_fails_makes_data_corrupt_and_is_named_as_the_cause(
    reopen: Open, key: StorageKey, call: Call
) -> None:
    storage = await reopen(json_loads={}.__getitem__)
    words = unreadable(storage, key, r"json_loads\(\) fails: '{\"name\": \"Ada\"}'")
    async with refused(storage, CorruptDataError, words) as raised:
        await call(storage, key)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value.__cause__, KeyError)


# States that are none


class Form(StatesGroup):
    """A group is no state: passed by mistake for one of its states."""


@whatever_the_database
async def test_a_state_that_is_none_is_refused(filled: SQLAlchemyStorage, key: StorageKey) -> None:
    for state in (5, True, b"form:name", ["form:name"], Form, Form(), object()):
        words = f"a state is a State, a str or None, not {type(state).__name__}: "
        async with refused(filled, TypeError, words + re.escape(repr(state))):
            await filled.set_state(key, state)  # type: ignore[arg-type]


# Text that a database cannot hold

NUL_REFUSED = (
    "^PostgreSQL cannot hold a NUL character in a text, so table 'fsm_.*' cannot store this key, "
    "state or data: remove the character, or serialise the data with a json_dumps that escapes it"
)
SURROGATE_REFUSED = "^{} gave text with a lone surrogate, .*: remove it, or escape it as json.dumps"


def dumps_raw(data: dict[str, Any]) -> str:
    """Write JSON, against its rules, with NUL as it is."""
    return json.dumps(data).replace(r"\u0000", "\0")


loads_raw = partial(json.loads, strict=False)
on_postgresql = pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
elsewhere = pytest.mark.parametrize(
    "backend", [backend for backend in BACKENDS if backend.server != "postgresql"], ids=str
)


@on_postgresql
async def test_a_state_with_nul_is_refused_on_postgresql(
    filled: SQLAlchemyStorage, key: StorageKey
) -> None:
    async with refused(filled, ValueError, NUL_REFUSED):
        await filled.set_state(key, "form\0name")


@on_postgresql
async def test_data_with_raw_nul_is_refused_on_postgresql(reopen: Open, key: StorageKey) -> None:
    storage = await reopen(json_dumps=dumps_raw, json_loads=loads_raw)
    async with refused(storage, ValueError, NUL_REFUSED):
        await storage.set_data(key, {"x": "a\0b"})
    async with refused(storage, ValueError, NUL_REFUSED):
        await storage.update_data(key, {"x": "a\0b"})


@on_postgresql
async def test_a_key_with_nul_is_refused_on_postgresql(reopen: Open, key: StorageKey) -> None:
    storage = await reopen(key_builder=Builds("4\0002"))
    for call in CALLS.values():
        async with refused(storage, ValueError, NUL_REFUSED):
            await call(storage, key)


@elsewhere
async def test_other_databases_keep_nul(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(
        backend, key_builder=Builds("4\0002"), json_dumps=dumps_raw, json_loads=loads_raw
    )
    await storage.set_state(key, "form\0name")
    await storage.set_data(key, {"x": "a\0b"})
    assert await storage.update_data(key, {"\0": 1}) == {"x": "a\0b", "\0": 1}
    assert await rows(storage) == [("4\0002", "form\0name", '{"x": "a\0b", "\0": 1}')]
    assert await storage.get_state(key) == "form\0name"
    assert await storage.get_data(key) == {"x": "a\0b", "\0": 1}
    assert await storage.update_data(key, {"x": ""}) == {"x": "", "\0": 1}


@whatever_the_database
async def test_a_state_with_a_lone_surrogate_is_refused(
    filled: SQLAlchemyStorage, key: StorageKey
) -> None:
    async with refused(filled, ValueError, SURROGATE_REFUSED.format("the state")):
        await filled.set_state(key, "form\ud83dname")


@whatever_the_database
async def test_data_with_an_unescaped_lone_surrogate_is_refused(
    reopen: Open, key: StorageKey
) -> None:
    storage = await reopen(json_dumps=partial(json.dumps, ensure_ascii=False))
    words = SURROGATE_REFUSED.format(r"json_dumps\(\)")
    async with refused(storage, ValueError, words):
        await storage.set_data(key, {"x": "\ud83d"})
    async with refused(storage, ValueError, words):
        await storage.update_data(key, {"x": "\ud83d"})


async def test_data_with_an_escaped_lone_surrogate_is_kept(
    any_storage: BaseStorage, key: StorageKey
) -> None:
    """As when a text was cut in the middle of an emoji."""
    await any_storage.set_data(key, {"x": "\ud83d"})
    assert await any_storage.update_data(key, {"\udfff": 1}) == {"x": "\ud83d", "\udfff": 1}
    assert await any_storage.get_data(key) == {"x": "\ud83d", "\udfff": 1}


@whatever_the_database
async def test_a_key_with_a_lone_surrogate_is_refused(reopen: Open, key: StorageKey) -> None:
    storage = await reopen(key_builder=Builds("4\ud83d2"))
    words = SURROGATE_REFUSED.format(r"the key builder's build\(\)")
    for call in CALLS.values():
        async with refused(storage, ValueError, words):
            await call(storage, key)


# Keys that are none


@whatever_the_database
async def test_a_key_builder_that_returns_no_text_is_refused(reopen: Open, key: StorageKey) -> None:
    for built in (None, 42, b"42", ("42",)):
        storage = await reopen(key_builder=Builds(built))
        words = rf"^the key builder's build\(\) gave {type(built).__name__}, not text: "
        for call in CALLS.values():
            async with refused(storage, TypeError, words + re.escape(repr(built))):
                await call(storage, key)


@whatever_the_database
async def test_what_a_key_builder_raises_comes_through(reopen: Open, key: StorageKey) -> None:
    storage = await reopen(key_builder=DefaultKeyBuilder())
    for call in CALLS.values():
        async with refused(storage, ValueError, "you should set `with_destiny=True`"):
            await call(storage, replace(key, destiny="scenes_history"))


TOO_LONG = (
    r"^the key 'k{{{0}}}'\.\.\. has {1} characters, column 'id' of table 'fsm_.*' holds {2}: use a "
    "key builder that writes shorter keys, or a model of your own with a longer column$"
)


def short_keyed_model() -> type[FSMData]:
    """Return a model whose keys have up to 20 characters."""

    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = f"fsm_{uuid.uuid4().hex}"
        id: Mapped[str] = mapped_column(String(20), primary_key=True)

    return Conversation


async def test_a_key_longer_than_its_column_is_refused(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    """On each database, though SQLite itself would take it."""
    model = short_keyed_model()
    fits = await open_storage(backend, table_name=model, key_builder=Builds("é" * 20))
    assert await fits.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
    await fits.set_state(key, "form:name")
    assert await rows(fits) == [("é" * 20, "form:name", '{"name": "Ada"}')]

    too_long = await open_storage(backend, table_name=model, key_builder=Builds("k" * 21))
    for name in ("set_state", "set_data", "update_data"):
        async with refused(too_long, ValueError, TOO_LONG.format(21, 21, 20)):
            await CALLS[name](too_long, key)


async def test_a_key_has_255_characters_on_mysql_and_any_number_elsewhere(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    fits = await open_storage(backend, key_builder=Builds("é" * 255))
    await fits.set_state(key, "form:name")
    longer = await open_storage(backend, table_name=fits.model, key_builder=Builds("k" * 256))
    for name in ("set_state", "set_data", "update_data"):
        if backend.server == "mariadb":
            async with refused(longer, ValueError, TOO_LONG.format(40, 256, 255)):
                await CALLS[name](longer, key)
        else:
            await CALLS[name](longer, key)
            assert len(await rows(longer)) == 2
    assert await fits.get_state(key) == "form:name"


# Databases that are not as they should be


async def test_a_missing_table_is_named_and_how_to_create_it(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    """In an error of the class that SQLAlchemy raises, so that whoever handles it still does."""
    await storage.run_sync(lambda session: storage.table.drop(session.connection()))
    with pytest.raises(DBAPIError) as original:
        await rows(storage)
    missing = (
        f"table '{storage.table.fullname}' is missing: create it with "
        r"`await storage.create_table\(\)`, `metadata.create_all\(engine\)` or a migration"
    )
    for call in CALLS.values():
        with pytest.raises(type(original.value), match=missing) as raised:
            await call(storage, key)
        assert type(raised.value) is type(original.value)
        assert type(raised.value.orig) is type(original.value.orig)

    await storage.create_table()
    for call in CALLS.values():
        await call(storage, key)


async def test_a_missing_column_is_named_and_how_to_add_it(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    def make_another_table(session: Session) -> None:
        storage.table.drop(session.connection())
        columns = "id VARCHAR(255) PRIMARY KEY, state VARCHAR(255)"
        session.execute(text(f"CREATE TABLE {storage.table.fullname} ({columns})"))

    await storage.run_sync(make_another_table)
    lacks = (
        f"table '{storage.table.fullname}' lacks a column that its model has: add the column with "
        r"a migration; create_table\(\) leaves a table that exists as it is"
    )
    for name in ("get_data", "set_data", "unset_data", "get_value", "update_data"):
        with pytest.raises(DBAPIError, match=lacks) as raised:
            await CALLS[name](storage, key)
        assert re.search(r"\bdata\b", str(raised.value.orig))


@pytest.fixture
def nowhere(backend: Backend, tmp_path: Path) -> Iterator[URL]:
    """Return the URL of a server that does not answer, or of a file that is no database."""
    if backend.server == "sqlite":
        file = tmp_path / "fsm.db"
        file.write_text("no database " * 100)
        yield URL.create("sqlite", database=str(file))
        return
    with socket.socket() as taken:  # its port is nobody else's, and nobody listens on it
        taken.bind(("127.0.0.1", 0))
        host, port = taken.getsockname()
        dialect = {"mariadb": "mysql"}.get(backend.server, backend.server)
        yield URL.create(dialect, "nobody", "secret", host, port, "nothing")


async def test_the_error_of_a_database_that_does_not_answer_comes_through(
    backend: Backend, nowhere: URL, key: StorageKey
) -> None:
    """SQLAlchemy's, or the driver's own where SQLAlchemy does not wrap it, as asyncpg's."""
    engine = backend.engine(nowhere)
    storage = SQLAlchemyStorage(backend.factory(engine), retry_for=0)
    with pytest.raises((DatabaseError, OSError)) as original:
        await rows(storage)
    for call in (*CALLS.values(), create_table):
        with pytest.raises(type(original.value)) as raised:
            await call(storage, key)
        assert type(raised.value) is type(original.value)
        assert in_short(raised.value) == in_short(original.value)
    if isinstance(engine, AsyncEngine):
        await engine.dispose()
    else:
        engine.dispose()


def create_table(storage: SQLAlchemyStorage, _: StorageKey) -> Any:
    """Call what needs a database, but no key."""
    return storage.create_table()


def in_short(error: BaseException) -> str:
    """Return the driver's words, without the statement."""
    return str(getattr(error, "orig", error))


@pytest.mark.parametrize(
    "backend", [backend for backend in BACKENDS if backend.server == "mariadb"], ids=str
)
async def test_more_than_mysql_takes_at_once_is_refused_before_it_drops_the_connection(
    open_storage: Open, backend: Backend, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    await storage.set_data(key, {"kept": True})
    packet = await storage.run_sync(
        lambda session: session.scalar(text("SELECT @@max_allowed_packet"))
    )
    before = await rows(storage)
    too_much = {"quotes": '"' * (packet // 4 + 1)}  # each is sent as four characters
    for write in (storage.set_data, storage.update_data):
        with pytest.raises(ValueError, match=r"larger than MySQL's max_allowed_packet.*raise that"):
            await write(key, too_much)
    assert await rows(storage) == before


@pytest.mark.parametrize(
    "backend", [backend for backend in BACKENDS if backend.server == "mariadb"], ids=str
)
async def test_a_key_that_mysql_would_take_for_another_is_refused(
    open_storage: Open, backend: Backend, key: StorageKey
) -> None:
    class Blank(KeyBuilder):
        def build(self, key: StorageKey, part: str | None = None) -> str:
            return "blank "

    storage = await open_storage(backend, key_builder=Blank())
    with pytest.raises(ValueError, match=r"ignores the blanks at the end.*escapes blanks"):
        await storage.set_state(key, "state")
    assert await rows(storage) == []


@pytest.mark.parametrize("kind", [OracleDialect, MSDialect])
def test_a_database_of_another_kind_is_refused(kind: Callable[[], Dialect]) -> None:
    """No driver of theirs is here: so by what each first write asks."""
    other = kind()
    with pytest.raises(NotImplementedError, match=f"is for PostgreSQL.*bound to {other.name}"):
        Limits(Table("fsm", MetaData(), Column("id", String)), other)
