"""In place of aiogram-sqlalchemy-storage: its tables, its key builders, its constructors."""

from __future__ import annotations

import itertools
import json
import re
import uuid
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import BaseStorage, DefaultKeyBuilder, KeyBuilder, StorageKey
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from backends import POSTGRESQL, SERVERS, SQLITE, Backend
from conftest import Open, rows
from sqlalchemy import URL, MetaData, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, declarative_base, sessionmaker
from sqlalchemy_storage import SQLAlchemyStorage as FormerStorage

from hybrid_storage import SQLAlchemyStorage

PAGE = Path(__file__).parents[1] / "docs" / "coming-from" / "aiogram-sqlalchemy-storage.md"
SQLITE3, AIOSQLITE = SQLITE
PSYCOPG, ASYNCPG = POSTGRESQL[0], POSTGRESQL[-1]

on_each_way = pytest.mark.parametrize("backend", [SQLITE3, AIOSQLITE, PSYCOPG, ASYNCPG], ids=str)


class Form(StatesGroup):
    name = State()


class Former:
    """The former storage, on the engine and with the table that ours uses too."""

    def __init__(self, engine: Any, table_name: str) -> None:
        # Its annotation names the other sessionmaker than its documents do.
        self.factory: Any = async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)
        self.metadata = MetaData()
        self.storage: BaseStorage = FormerStorage(self.factory, self.metadata, table_name)
        self.engine = engine

    async def create_table(self) -> None:
        async with self.engine.begin() as connection:
            await connection.run_sync(self.metadata.create_all)


@pytest.fixture
async def former(url_of: Callable[[Backend], URL], backend: Backend) -> AsyncIterator[Former]:
    """Return the former storage on the server of a backend, without a table so far."""
    driver = {"sqlite": AIOSQLITE, "postgresql": ASYNCPG}[backend.server]
    former = Former(driver.engine(url_of(backend)), f"fsm_{uuid.uuid4().hex}")
    yield former
    async with former.engine.begin() as connection:
        await connection.run_sync(former.metadata.drop_all)
    await former.engine.dispose()


@pytest.fixture
async def ours(backend: Backend, former: Former, open_storage: Open) -> SQLAlchemyStorage:
    """Return our storage, configured as the documents say, on the table that the former made."""
    await former.create_table()
    [table_name] = former.metadata.tables
    storage = await open_storage(backend, table_name=table_name, key_builder=DefaultKeyBuilder())
    assert isinstance(storage, SQLAlchemyStorage)
    return storage


DATA = {"name": "Adá \U0001f600", "age": 36, "list": [1, None, {"a": "\\ ' \" \n"}], "": False}
KEYS = [
    StorageKey(bot_id=42, chat_id=7, user_id=7),
    StorageKey(bot_id=42, chat_id=-1001234567890, user_id=7, thread_id=5),
    StorageKey(bot_id=42, chat_id=-1001234567890, user_id=7, business_connection_id="b"),
]
on_each_key = pytest.mark.parametrize("key", KEYS, ids=["private", "topic", "business"])


# Rows


@on_each_way
@on_each_key
async def test_ours_reads_changes_and_clears_what_the_former_wrote(
    former: Former, ours: SQLAlchemyStorage, key: StorageKey
) -> None:
    old = former.storage
    await old.set_state(key, Form.name)
    await old.set_data(key, DATA)
    assert await ours.get_state(key) == "Form:name"
    assert await ours.get_data(key) == DATA
    assert await ours.get_value(key, "age") == 36

    await ours.set_state(key, "form:age")
    assert await ours.update_data(key, {"age": 37}) == {**DATA, "age": 37}
    assert await old.get_state(key) == "form:age"
    assert await old.get_data(key) == {**DATA, "age": 37}
    assert len(await rows(ours)) == 1

    await ours.clear(key)
    assert await old.get_state(key) is None
    assert await old.get_data(key) == {}
    assert await rows(ours) == []


@on_each_way
@on_each_key
async def test_the_former_reads_and_changes_what_ours_wrote(
    former: Former, ours: SQLAlchemyStorage, key: StorageKey
) -> None:
    old = former.storage
    await ours.set_data(key, DATA)
    assert await old.get_state(key) is None
    assert await old.get_data(key) == DATA
    await ours.set_state(key, Form.name)
    assert await old.get_state(key) == "Form:name"

    await old.set_data(key, {"name": "Eve"})
    assert await ours.get_data(key) == {"name": "Eve"}
    await old.set_state(key, None)
    assert await ours.get_state(key) is None
    await old.set_data(key, {})
    assert await rows(ours) == []


STEPS: dict[str, Callable[[BaseStorage, StorageKey], Any]] = {
    "a state": lambda storage, key: storage.set_state(key, "form:name"),
    "no state": lambda storage, key: storage.set_state(key, None),
    "data": lambda storage, key: storage.set_data(key, {"name": "Adá", "age": 36}),
    "no data": lambda storage, key: storage.set_data(key, {}),
    "more data": lambda storage, key: storage.update_data(key, {"city": "London"}),
}


@on_each_way
async def test_both_leave_the_same_rows(
    former: Former, ours: SQLAlchemyStorage, backend: Backend
) -> None:
    """After every step of a walk that takes each step after each other one."""
    key = KEYS[0]
    walk = itertools.chain.from_iterable(itertools.product(STEPS, repeat=2))
    found: dict[str, list[Any]] = {"theirs": [], "ours": [], "in turns": []}
    storages: dict[str, list[BaseStorage]] = {
        "theirs": [former.storage],
        "ours": [ours],
        "in turns": [former.storage, ours],
    }
    for who, steps in zip(storages, itertools.tee(walk, 3), strict=True):
        for step, storage in zip(steps, itertools.cycle(storages[who]), strict=False):
            await STEPS[step](storage, key)
            found[who].append((step, await rows(ours)))
        await ours.clear(key)
    assert found["ours"] == found["theirs"]
    assert found["in turns"] == found["theirs"]
    assert ("a state", [("fsm:7:7", "form:name", None)]) in found["theirs"]


@on_each_way
@pytest.mark.parametrize(
    ("dumps", "loads"), [(orjson.dumps, orjson.loads), (json.dumps, orjson.loads)]
)
async def test_other_json_functions_read_the_formers_rows(
    former: Former,
    ours: SQLAlchemyStorage,
    backend: Backend,
    open_storage: Open,
    dumps: Callable[..., Any],
    loads: Callable[..., Any],
) -> None:
    key = KEYS[0]
    storage = await open_storage(
        backend,
        table_name=ours.table.name,
        key_builder=DefaultKeyBuilder(),
        json_dumps=dumps,
        json_loads=loads,
    )
    await former.storage.set_data(key, DATA)
    assert await storage.update_data(key, {"age": 37}) == {**DATA, "age": 37}
    assert await former.storage.get_data(key) == {**DATA, "age": 37}


# Tables


@on_each_way
async def test_the_formers_table_is_ours_without_any_migration(
    former: Former, ours: SQLAlchemyStorage
) -> None:
    await ours.create_table()

    def differences(session: Session) -> list[Any]:
        context = MigrationContext.configure(
            session.connection(),
            opts={
                "compare_type": True,
                "include_name": lambda name, type_, _: type_ != "table" or name == ours.table.name,
            },
        )
        return list(compare_metadata(context, ours.metadata))

    assert await ours.run_sync(differences) == []


@on_each_way
async def test_our_table_serves_the_former(
    former: Former, backend: Backend, open_storage: Open
) -> None:
    [table_name] = former.metadata.tables
    ours = await open_storage(backend, table_name=table_name, key_builder=DefaultKeyBuilder())
    await former.create_table()
    await former.storage.set_state(KEYS[0], "form:name")
    await former.storage.set_data(KEYS[0], DATA)
    assert await ours.get_state(KEYS[0]) == "form:name"
    assert await ours.get_data(KEYS[0]) == DATA


@pytest.mark.parametrize("backend", [AIOSQLITE], ids=str)
async def test_both_work_on_the_same_metadata(
    former: Former, open_storage: Open, backend: Backend
) -> None:
    """While an application changes from one to the other, it may construct both."""
    await former.create_table()
    [table_name] = former.metadata.tables
    ours = await open_storage(
        backend, metadata=former.metadata, table_name=table_name, key_builder=DefaultKeyBuilder()
    )
    assert ours.table is former.metadata.tables[table_name]
    await former.storage.set_state(KEYS[0], "form:name")
    assert await ours.get_state(KEYS[0]) == "form:name"


# Keys


class CustomKeyBuilder(KeyBuilder):
    """The builder of the former's documents: it takes one argument."""

    def build(self, key: StorageKey) -> str:  # type: ignore[override] # pyright: ignore[reportIncompatibleMethodOverride]
        return f"custom_{key.bot_id}_{key.chat_id}_{key.user_id}"


@on_each_way
async def test_a_key_builder_of_one_argument_finds_the_formers_rows(
    former: Former, ours: SQLAlchemyStorage, backend: Backend, open_storage: Open
) -> None:
    [table_name] = former.metadata.tables
    old = FormerStorage(former.factory, MetaData(), table_name, CustomKeyBuilder())
    new = await open_storage(backend, table_name=table_name, key_builder=CustomKeyBuilder())
    await old.set_state(KEYS[0], "form:name")
    assert await new.get_state(KEYS[0]) == "form:name"
    assert await new.update_data(KEYS[0], {"name": "Ada"}) == {"name": "Ada"}
    assert await rows(new) == [("custom_42_7_7", "form:name", '{"name": "Ada"}')]
    await new.clear(KEYS[0])
    assert await old.get_state(KEYS[0]) is None


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_the_pages_statement_gives_old_rows_keys_of_one_bot(
    backend: Backend, open_storage: Open
) -> None:
    old = await open_storage(backend, key_builder=DefaultKeyBuilder())
    group = StorageKey(bot_id=42, chat_id=-1001, user_id=8)
    for key in (*KEYS, group):
        await old.set_state(key, "form:name")
    [statement] = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    statement = statement.replace("aiogram_fsm_data", old.table.name)
    await old.run_sync(lambda session: session.execute(text(statement)).close())
    new = await open_storage(backend, table_name=old.table.name)
    assert await new.get_state(KEYS[0]) == await new.get_state(group) == "form:name"
    assert await new.get_state(KEYS[1]) is None  # more than a chat and a user: left alone
    assert len(await rows(new)) == 4


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_by_default_the_key_is_what_the_formers_documents_say(
    former: Former, ours: SQLAlchemyStorage, backend: Backend, open_storage: Open
) -> None:
    storage = await open_storage(backend, table_name=ours.table.name)
    await storage.set_state(KEYS[0], "form:name")
    assert await rows(storage) == [("42:7:7", "form:name", None)]
    assert await former.storage.get_state(KEYS[0]) is None


# Constructors


Construct = Callable[[Any, Any], SQLAlchemyStorage]

CONSTRUCTORS: list[Any] = [
    pytest.param(lambda factory, base: SQLAlchemyStorage(factory, base), id="factory, base"),
    pytest.param(
        lambda factory, base: SQLAlchemyStorage(factory, base.metadata), id="factory, metadata"
    ),
    pytest.param(
        lambda factory, base: SQLAlchemyStorage(sessionmaker=factory, metadata=base.metadata),
        id="sessionmaker=, metadata=",
    ),
    pytest.param(
        lambda factory, base: SQLAlchemyStorage(sessionmaker=factory, metadata=base),
        id="sessionmaker=, metadata=base",
    ),
    pytest.param(
        lambda factory, base: SQLAlchemyStorage(
            sessionmaker=factory,
            metadata=base.metadata,
            table_name="aiogram_fsm_data",
            key_builder=None,
            json_dumps=json.dumps,
            json_loads=json.loads,
        ),
        id="all by name",
    ),
    pytest.param(
        lambda factory, base: SQLAlchemyStorage(
            factory, base.metadata, "aiogram_fsm_data", None, json.dumps, json.loads
        ),
        id="all by position",
    ),
]
FACTORIES: list[Any] = [
    pytest.param(lambda: sessionmaker(), id="sessionmaker"),
    pytest.param(
        lambda: async_sessionmaker(class_=AsyncSession, expire_on_commit=False),
        id="async_sessionmaker",
    ),
    pytest.param(lambda: sessionmaker(class_=AsyncSession), id="sessionmaker of AsyncSession"),
]
with_each_factory = pytest.mark.parametrize("make_factory", FACTORIES)


@with_each_factory
@pytest.mark.parametrize("construct", CONSTRUCTORS)
def test_the_formers_constructors_work(
    construct: Construct, make_factory: Callable[[], Any]
) -> None:
    base = declarative_base()
    storage = construct(make_factory(), base)
    assert storage.metadata is base.metadata
    assert list(base.metadata.tables) == ["aiogram_fsm_data"]


def construct_by_former_names(names: list[str], factory: Any, base: Any) -> SQLAlchemyStorage:
    values = {"session": factory, "sessionmaker": factory, "base": base, "metadata": base}
    return SQLAlchemyStorage(**{name: values[name] for name in names})


@with_each_factory
@pytest.mark.parametrize(
    ("names", "messages"),
    [
        (
            ["session", "base"],
            [
                "SQLAlchemyStorage(session=...) is now SQLAlchemyStorage(sessionmaker=...)",
                "SQLAlchemyStorage(base=...) is now SQLAlchemyStorage(metadata=...)",
            ],
        ),
        (
            ["session", "metadata"],
            ["SQLAlchemyStorage(session=...) is now SQLAlchemyStorage(sessionmaker=...)"],
        ),
        (
            ["sessionmaker", "base"],
            ["SQLAlchemyStorage(base=...) is now SQLAlchemyStorage(metadata=...)"],
        ),
    ],
    ids=str,
)
def test_the_names_of_the_first_release_are_taken_with_a_warning(
    names: list[str], messages: list[str], make_factory: Callable[[], Any]
) -> None:
    base = declarative_base()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        storage = construct_by_former_names(names, make_factory(), base)
    assert storage.metadata is base.metadata
    assert [(str(each.message), each.category) for each in caught] == [
        (message, DeprecationWarning) for message in messages
    ]
    assert {each.filename for each in caught} == {__file__}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["session", "sessionmaker"], "session= is the former name of sessionmaker=: pass one"),
        (["sessionmaker", "base", "metadata"], "base= is the former name of metadata=: pass one"),
    ],
    ids=str,
)
def test_a_name_and_its_former_name_exclude_each_other(names: list[str], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        construct_by_former_names(names, sessionmaker(), declarative_base())


@pytest.mark.parametrize("names", [[], ["base"], ["metadata"]], ids=str)
@pytest.mark.filterwarnings("ignore:SQLAlchemyStorage.base=")
def test_a_session_factory_is_needed(names: list[str]) -> None:
    with pytest.raises(TypeError, match="needs a sessionmaker or an async_sessionmaker"):
        construct_by_former_names(names, sessionmaker(), declarative_base())


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_with_former_names_the_storage_works(
    backend: Backend, url_of: Callable[[Backend], URL]
) -> None:
    engine = backend.engine(url_of(backend))
    base = declarative_base()
    with pytest.warns(DeprecationWarning, match="is now SQLAlchemyStorage"):
        storage = SQLAlchemyStorage(session=backend.factory(engine), base=base)
    await storage.create_table()
    await storage.set_state(KEYS[0], "form:name")
    assert await rows(storage) == [("42:7:7", "form:name", None)]
    disposed: Any = engine.dispose()
    if disposed is not None:
        await disposed
