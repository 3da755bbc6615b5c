"""The table and its model: where they are declared, what they may be, what databases get."""

from __future__ import annotations

import itertools
import pickle
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import KeyBuilder, StorageKey
from backends import SERVERS, SQLITE, Backend
from conftest import Open, rows
from sqlalchemy import (
    URL,
    Column,
    DateTime,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    func,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    declarative_base,
    declared_attr,
    mapped_column,
    registry,
    sessionmaker,
)
from sqlalchemy.schema import CreateTable

from hybrid_storage import FSMData, SQLAlchemyStorage, declare_lock_table, declare_model

unbound = sessionmaker()
on_both_runners = pytest.mark.parametrize("backend", SQLITE, ids=str)
on_every_server = pytest.mark.parametrize(
    "backend", {backend.server: backend for backend in SERVERS}.values(), ids=str
)


def new_base() -> Any:
    class Base(DeclarativeBase):
        pass

    return Base


def old_style_base() -> Any:
    return declarative_base()


def dataclass_base() -> Any:
    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    return Base


BASES = [new_base, old_style_base, dataclass_base]
on_every_base = pytest.mark.parametrize("make_base", BASES, ids=lambda make: make.__name__)


def new_factory(backend: Backend, **options: Any) -> Any:
    """Return a session factory without an engine."""
    return async_sessionmaker(**options) if backend.is_async else sessionmaker(**options)


def unique_name() -> str:
    return f"fsm_{uuid.uuid4().hex}"


async def use(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    """Run every operation, and every statement that one may consist of."""
    await storage.set_state(key, "form:name")
    assert await storage.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
    assert await storage.update_data(key, {"age": 36}) == {"name": "Ada", "age": 36}
    assert await storage.get_state(key) == "form:name"
    assert await storage.get_data(key) == {"name": "Ada", "age": 36}
    await storage.set_state(key, None)
    await storage.set_data(key, {"name": "Eve"})
    assert await storage.get_value(key, "name") == "Eve"
    await storage.set_state(key, "form:age")
    await storage.set_data(key, {})
    assert await storage.get_data(key) == {}
    await storage.set_state(key, None)
    assert await rows(storage) == []
    assert await storage.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
    await storage.clear(key)
    assert await rows(storage) == []


# Where the table is declared


@on_every_base
@pytest.mark.parametrize("by", ["base", "metadata"])
def test_a_base_and_its_metadata_both_carry_the_table(
    make_base: Callable[[], Any], by: str
) -> None:
    base = make_base()
    storage = SQLAlchemyStorage(unbound, base if by == "base" else base.metadata)
    assert storage.metadata is base.metadata
    assert storage.table is base.metadata.tables["aiogram_fsm_data"]
    assert storage.table is inspect(storage.model).local_table
    assert issubclass(storage.model, FSMData)
    assert storage.table.columns.keys() == ["id", "state", "data"]
    assert [column.name for column in storage.table.primary_key] == ["id"]


def test_a_base_may_be_named_as_metadata() -> None:
    base = new_base()
    assert SQLAlchemyStorage(sessionmaker=unbound, metadata=base).metadata is base.metadata


def test_a_registry_carries_the_table_too() -> None:
    carrier: Any = registry()
    assert SQLAlchemyStorage(unbound, carrier).metadata is carrier.metadata


@pytest.mark.parametrize("make_base", [new_base, old_style_base], ids=lambda make: make.__name__)
def test_the_model_inherits_from_the_base(make_base: Callable[[], Any]) -> None:
    base = make_base()
    assert issubclass(SQLAlchemyStorage(unbound, base).model, base)


@on_every_base
@on_both_runners
async def test_create_all_of_the_base_creates_the_table(
    backend: Backend,
    open_storage: Open,
    key: StorageKey,
    tmp_path: Path,
    make_base: Callable[[], Any],
) -> None:
    base = make_base()
    declared = declare_model(base, "fsm")
    engine = create_engine(f"sqlite:///{tmp_path / 'fsm.db'}")
    base.metadata.create_all(engine)
    assert inspect(engine).get_table_names() == ["fsm"]
    engine.dispose()
    storage = await open_storage(backend, metadata=base, table_name="fsm")
    assert storage.model is declared
    await use(storage, key)


def test_a_storage_without_metadata_has_one_of_its_own() -> None:
    one, other = SQLAlchemyStorage(unbound), SQLAlchemyStorage(unbound)
    assert one.metadata is not other.metadata
    assert one.table is not other.table
    assert list(one.metadata.tables) == list(other.metadata.tables) == ["aiogram_fsm_data"]


@on_every_base
def test_storages_of_one_table_share_its_model(make_base: Callable[[], Any]) -> None:
    base = make_base()
    storages: list[SQLAlchemyStorage] = [
        SQLAlchemyStorage(unbound, base, "fsm"),
        SQLAlchemyStorage(async_sessionmaker(), base, "fsm"),
        SQLAlchemyStorage(unbound, base.metadata, "fsm"),
    ]
    models = {storage.model for storage in storages}
    assert models == {declare_model(base, "fsm")}
    assert {storage.table for storage in storages} == {base.metadata.tables["fsm"]}
    assert len(base.metadata.tables) == 1


@on_every_base
@pytest.mark.parametrize(
    "names",
    [("fsm", "other"), ("fsm_2", "fsm2"), ("fsm", "FSM"), ("таблица", "-", "_", "a-b", "a_b")],
    ids=str,
)
def test_storages_with_different_names_have_different_tables(
    make_base: Callable[[], Any], names: tuple[str, ...]
) -> None:
    base = make_base()
    storages = [SQLAlchemyStorage(unbound, base, name) for name in names]
    assert [storage.table.name for storage in storages] == list(names)
    assert len({storage.model for storage in storages}) == len(names)
    assert set(base.metadata.tables) == set(names)


@on_both_runners
async def test_storages_with_different_names_do_not_share_rows(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    base = new_base()
    one = await open_storage(backend, metadata=base, table_name="one")
    other = await open_storage(backend, metadata=base, table_name="other")
    await one.set_state(key, "form:name")
    assert await other.get_state(key) is None
    await use(other, key)
    assert await one.get_state(key) == "form:name"


@on_every_server
@pytest.mark.parametrize("name", ["select", 'quo"te`d per%cent %s', "Таблица ботов"])
async def test_any_name_will_do_for_the_table(
    backend: Backend, open_storage: Open, key: StorageKey, name: str
) -> None:
    storage = await open_storage(backend, table_name=f"{name}{uuid.uuid4().hex[:8]}")
    await storage.create_table()
    await use(storage, key)


def test_the_table_can_be_copied_to_other_metadata() -> None:
    original, copied = MetaData(), MetaData()
    storage = SQLAlchemyStorage(unbound, original)
    table = storage.table.to_metadata(copied)
    copy = SQLAlchemyStorage(unbound, copied)
    assert copy.table is table
    assert copy.metadata is copied
    assert inspect(copy.model).local_table is table


def test_metadata_with_the_table_can_be_pickled() -> None:
    """As tools do that keep what they reflected."""
    metadata = MetaData()
    storage = SQLAlchemyStorage(unbound, metadata)
    loaded = pickle.loads(pickle.dumps(metadata))
    assert SQLAlchemyStorage(unbound, loaded).table is loaded.tables[storage.table.name]


# Schemas


def schema_of(backend: Backend, url_of: Callable[[Backend], URL]) -> str:
    """Return the name of a schema that is there already."""
    names = {"sqlite": "main", "postgresql": "public", "mariadb": url_of(backend).database}
    return str(names[backend.server])


@on_every_server
async def test_the_schema_of_the_metadata_is_used(
    backend: Backend, open_storage: Open, key: StorageKey, url_of: Callable[[Backend], URL]
) -> None:
    schema = schema_of(backend, url_of)
    storage = await open_storage(backend, metadata=MetaData(schema=schema))
    assert storage.table.schema == schema
    await storage.create_table()
    await use(storage, key)


@on_every_server
async def test_the_schema_may_be_chosen_by_the_engine(
    backend: Backend, open_storage: Open, key: StorageKey, url_of: Callable[[Backend], URL]
) -> None:
    """As applications do that keep a schema for each tenant."""
    translation = {"tenant": schema_of(backend, url_of)}
    options = {"execution_options": {"schema_translate_map": translation}}
    storage = await open_storage(
        backend, metadata=MetaData(schema="tenant"), engine_options=options
    )
    await storage.create_table()
    await use(storage, key)


def test_storages_with_one_schema_share_the_model() -> None:
    metadata = MetaData(schema="bots")
    model = declare_model(metadata, "fsm")
    assert SQLAlchemyStorage(unbound, metadata, "fsm").model is model
    assert list(metadata.tables) == ["bots.fsm"]


def test_the_schema_may_come_from_the_base() -> None:
    class Base(DeclarativeBase):
        __table_args__ = ({"schema": "bots"},)

    model = declare_model(Base, "fsm")
    assert SQLAlchemyStorage(unbound, Base, "fsm").model is model
    assert list(Base.metadata.tables) == ["bots.fsm"]


def test_a_base_that_names_its_tables_itself_is_overruled() -> None:
    class Base(DeclarativeBase):
        @declared_attr.directive
        def __tablename__(cls) -> str:
            return cls.__name__.lower()

    assert SQLAlchemyStorage(unbound, Base, "fsm").table.name == "fsm"


# Names that are taken, and arguments that are none


@pytest.mark.parametrize(
    ("columns", "listed"),
    [
        ([Column("id", Integer, primary_key=True), Column("name", String)], "id, name"),
        ([Column("id", String), Column("state", String), Column("data", Text)], "id, state, data"),
        (
            [
                Column("bot", Integer, primary_key=True),
                Column("id", String, primary_key=True),
                Column("state", String),
                Column("data", Text),
            ],
            "bot, id, state, data",
        ),
    ],
    ids=["lacks columns", "lacks a primary key", "has another primary key"],
)
def test_a_name_that_a_different_table_has_is_refused(columns: list[Any], listed: str) -> None:
    metadata = MetaData()
    Table("users", metadata, *columns)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        SQLAlchemyStorage(unbound, metadata, "users")
    assert str(caught.value).startswith(
        f"table 'users' is taken by a different table (its columns: {listed}): "
        "pass another table_name, or a table with the columns id"
    )
    assert len(metadata.tables["users"].columns) == len(columns)
    with pytest.raises(ValueError, match="taken by a different table"):
        declare_model(metadata, "users")


def test_a_model_without_the_columns_is_refused() -> None:
    base = new_base()

    class User(base):  # type: ignore[misc, valid-type]
        __tablename__ = "users"
        id = mapped_column(Integer, primary_key=True)

    model: Any = User
    with pytest.raises(
        ValueError, match=r"'users' is taken by a different table \(its columns: id"
    ):
        SQLAlchemyStorage(unbound, base, model)


@pytest.mark.parametrize("unmapped", [FSMData, str])
def test_a_class_that_is_not_mapped_is_refused(unmapped: Any) -> None:
    with pytest.raises(TypeError, match=r"is not mapped to a table: write a class that inherits"):
        SQLAlchemyStorage(unbound, MetaData(), unmapped)


@pytest.mark.parametrize("name", ["", None, 5, b"fsm"], ids=repr)
def test_a_table_name_that_is_none_is_refused(name: Any) -> None:
    with pytest.raises(TypeError, match="table_name is a name or a model, not "):
        SQLAlchemyStorage(unbound, MetaData(), name)


@pytest.mark.parametrize("metadata", ["fsm", 5, MetaData, object(), unbound])
def test_metadata_that_is_none_is_refused(metadata: Any) -> None:
    with pytest.raises(TypeError, match="metadata is a MetaData or a declarative base, not "):
        SQLAlchemyStorage(unbound, metadata)


# A model of one's own


def own_model(base: Any) -> Any:
    """Return a model with more columns, some of which change with every write."""
    inserted, updated = itertools.count(1), itertools.count(1)

    class Conversation(FSMData, base):  # type: ignore[misc]
        __tablename__ = unique_name()
        bot: Mapped[str] = mapped_column(String(20), default="main", server_default="none")
        note: Mapped[str | None] = mapped_column(String(20))
        number: Mapped[int] = mapped_column(default=lambda: next(inserted))
        changes: Mapped[int] = mapped_column(default=0, onupdate=lambda: next(updated))
        last: Mapped[str] = mapped_column(String(20), default="insert", onupdate="update")
        sql: Mapped[str] = mapped_column(
            String(20), default="inserted", onupdate=func.lower("UPDATED")
        )
        changed_at: Mapped[datetime] = mapped_column(
            DateTime, default=func.now(), onupdate=func.now()
        )

    return Conversation


async def extra(storage: SQLAlchemyStorage, *names: str) -> list[tuple[Any, ...]]:
    """Return some columns of all rows, through the ORM."""
    columns = [getattr(storage.model, name) for name in names]

    def read(session: Session) -> list[tuple[Any, ...]]:
        found = session.execute(select(*columns).order_by(storage.model.id))
        return [tuple(row) for row in found]

    result: list[tuple[Any, ...]] = await storage.run_sync(read)
    return result


async def test_a_model_of_ones_own_takes_the_place_of_the_name(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    base = new_base()
    model = own_model(base)
    storage = await open_storage(backend, metadata=base, table_name=model)
    assert storage.model is model
    assert storage.table is model.__table__
    assert storage.metadata is base.metadata
    assert len(base.metadata.tables) == 1
    await use(storage, key)


async def test_defaults_of_columns_of_ones_own_are_inserted(
    backend: Backend, open_storage: Open
) -> None:
    storage = await open_storage(backend, table_name=own_model(new_base()))
    one, two, three = (StorageKey(bot_id=42, chat_id=1, user_id=user) for user in (1, 2, 3))
    await storage.set_state(one, "form:name")
    await storage.set_data(two, {"name": "Ada"})
    await storage.update_data(three, {"name": "Ada"})
    assert await extra(storage, "bot", "note", "number", "changes", "last", "sql") == [
        ("main", None, 1, 0, "insert", "inserted"),
        ("main", None, 2, 0, "insert", "inserted"),
        ("main", None, 3, 0, "insert", "inserted"),
    ]


Write = Callable[[SQLAlchemyStorage, StorageKey], Any]

# The state and the data of a conversation, and a write that changes them.
WRITES: list[tuple[str | None, dict[str, Any], Write]] = [
    ("a", {}, lambda storage, key: storage.set_state(key, "b")),
    (None, {"a": 1}, lambda storage, key: storage.set_state(key, "b")),
    ("a", {"a": 1}, lambda storage, key: storage.set_state(key, None)),
    ("a", {"a": 1}, lambda storage, key: storage.set_data(key, {"b": 2})),
    ("a", {"a": 1}, lambda storage, key: storage.set_data(key, {})),
    ("a", {}, lambda storage, key: storage.update_data(key, {"b": 2})),
    ("a", {"a": 1}, lambda storage, key: storage.update_data(key, {"b": 2})),
]


async def test_columns_that_change_with_every_update_do(
    backend: Backend, open_storage: Open
) -> None:
    """Though the write may be an INSERT, for which SQLAlchemy does not see to onupdate=."""
    storage = await open_storage(backend, table_name=own_model(new_base()))
    then = datetime(2001, 2, 3)
    untouched = {"changes": 0, "last": "insert", "sql": "inserted", "changed_at": then}
    keys = [StorageKey(bot_id=42, chat_id=7, user_id=user) for user in range(len(WRITES))]
    for key, (state, data, _) in zip(keys, WRITES, strict=True):
        await storage.set_data(key, data)
        await storage.set_state(key, state)

    def forget(session: Session) -> None:
        session.execute(update(storage.model).values(note="kept", **untouched))

    await storage.run_sync(forget)
    await storage.get_data(keys[-1])
    before = await extra(storage, "bot", "note", "number", *untouched)
    for key, (_, _, write) in zip(keys, WRITES, strict=True):
        await write(storage, key)
    after = await extra(storage, "bot", "note", "number", *untouched)
    for was, became in zip(before, after, strict=True):
        assert was == ("main", "kept", was[2], *untouched.values())
        assert became[:3] == was[:3], "other columns keep what they have"
        changes, *texts, changed_at = became[3:]
        assert changes > 0
        assert texts == ["update", "updated"]
        assert changed_at > then


@on_every_server
async def test_a_column_that_counts_its_updates_does_not_stand_still(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, table_name=own_model(new_base()))
    await storage.set_state(key, "form:name")
    counts = []
    for state in ("b", "c", "d"):
        await storage.set_state(key, state)
        [(changes,)] = await extra(storage, "changes")
        counts.append(changes)
    assert 0 < counts[0] < counts[1] < counts[2]


@on_every_server
async def test_an_onupdate_function_may_take_the_context_of_the_statement(
    backend: Backend, open_storage: Open, key: StorageKey, url_of: Callable[[Backend], URL]
) -> None:
    class Conversation(FSMData, new_base()):  # type: ignore[misc]
        __tablename__ = unique_name()
        by: Mapped[str] = mapped_column(
            String(20), default="nobody", onupdate=lambda context: context.dialect.name
        )

    storage = await open_storage(backend, table_name=Conversation)
    await storage.set_state(key, "a")
    await storage.set_state(key, "b")
    [(by,)] = await extra(storage, "by")
    assert by == url_of(backend).get_backend_name()


@on_every_server
async def test_a_column_of_ones_own_may_have_another_key_than_name(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    table = Table(
        unique_name(),
        MetaData(),
        Column("id", String(255), primary_key=True),
        Column("state", String(255)),
        Column("data", Text),
        Column("last-write", String(20), key="last", default="insert", onupdate="update"),
    )
    storage = await open_storage(backend, metadata=table.metadata, table_name=table.name)
    await storage.set_state(key, "a")
    assert [row[3] for row in await rows(storage)] == ["insert"]
    await storage.set_state(key, "b")
    assert [row[3] for row in await rows(storage)] == ["update"]
    await use(storage, key)


@on_every_server
async def test_a_key_column_of_ones_own_may_be_longer(backend: Backend, open_storage: Open) -> None:
    class Conversation(FSMData, new_base()):  # type: ignore[misc]
        __tablename__ = unique_name()
        id: Mapped[str] = mapped_column(String(500), primary_key=True)

    storage = await open_storage(backend, table_name=Conversation)
    await use(storage, StorageKey(bot_id=42, chat_id=7, user_id=7, destiny="d" * 450))


@on_every_server
async def test_the_model_serves_queries_of_ones_own(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    model: Any = storage.model
    other = StorageKey(bot_id=42, chat_id=1, user_id=1)
    await storage.set_state(key, "form:name")
    await storage.set_state(other, "form:age")
    await storage.set_data(other, {"name": "Ada"})

    def look(session: Session) -> object:
        found = session.scalars(select(model).where(model.state == "form:age")).one()
        assert session.get(model, "42:1:1") is found
        assert isinstance(found, FSMData)
        return found.id, found.state, found.data

    assert await storage.run_sync(look) == ("42:1:1", "form:age", '{"name": "Ada"}')

    def change(session: Session) -> None:
        found = {each.id: each for each in session.scalars(select(model))}
        found["42:1:1"].state = "form:city"
        session.delete(found["42:-1001234567890:7"])
        session.add(model(id="42:2:2", state="form:name"))

    await storage.run_sync(change)
    assert await storage.get_state(key) is None
    assert await storage.get_state(other) == "form:city"
    third = StorageKey(bot_id=42, chat_id=2, user_id=2)
    assert await storage.get_state(third) == "form:name"
    assert await storage.get_data(third) == {}


class Form(StatesGroup):
    name = State()
    age = State()


@on_every_server
async def test_queries_compare_the_state_with_states(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    model: Any = storage.model
    await storage.set_state(key, Form.name)

    def look(session: Session) -> list[int]:
        wheres = [
            model.state == Form.name,
            model.state == Form.age,
            model.state != Form.age,
            model.state.in_([Form.name, Form.age]),
            model.state == State(),  # none
        ]
        return [len(session.scalars(select(model).where(where)).all()) for where in wheres]

    assert await storage.run_sync(look) == [1, 0, 1, 1, 0]


def test_migrations_need_not_import_the_states_type() -> None:
    model: Any = declare_model(MetaData(), "fsm")
    state, data = model.__table__.c.state, model.__table__.c.data
    assert type(state.type) is type(data.type) is String
    assert repr(state.type) == repr(data.type)


# A table that was there before


@on_every_server
async def test_a_reflected_table_is_adopted(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    first = await open_storage(backend)
    await first.set_state(key, "form:name")
    metadata = MetaData()

    def reflect(session: Session) -> None:
        Table(first.table.name, metadata, autoload_with=session.connection())

    await first.run_sync(reflect)
    table = metadata.tables[first.table.name]
    storage = await open_storage(backend, metadata=metadata, table_name=table.name)
    assert storage.table is table
    assert SQLAlchemyStorage(unbound, metadata, table.name).model is storage.model
    assert await storage.get_state(key) == "form:name"
    await storage.clear(key)
    await use(storage, key)


@on_every_server
@pytest.mark.parametrize("by", ["base", "metadata"])
async def test_a_table_declared_by_hand_is_adopted(
    backend: Backend, open_storage: Open, key: StorageKey, by: str
) -> None:
    base = new_base()
    table = Table(
        unique_name(),
        base.metadata,
        Column("note", String(20), default="none"),
        Column("data", Text),
        Column("state", String(100)),
        Column("id", String(100), primary_key=True),
    )
    storage = await open_storage(
        backend, metadata=base if by == "base" else base.metadata, table_name=table.name
    )
    assert storage.table is table
    assert len(base.metadata.tables) == 1
    await storage.set_state(key, "form:name")
    assert await rows(storage) == [("none", None, "form:name", "42:-1001234567890:7")]
    await storage.clear(key)
    await use(storage, key)


@on_both_runners
async def test_a_table_that_the_application_has_mapped_already_is_adopted(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    base = new_base()

    class State(base):  # type: ignore[misc, valid-type]
        __tablename__ = "aiogram_fsm_data"
        id = mapped_column(String, primary_key=True)
        state = mapped_column(String)
        data = mapped_column(String)

    by_name = await open_storage(backend, metadata=base, table_name="aiogram_fsm_data")
    by_model = await open_storage(backend, table_name=State)
    assert by_name.table is by_model.table
    await by_name.set_state(key, "form:name")
    assert await by_model.get_state(key) == "form:name"
    await by_model.clear(key)
    await use(by_name, key)
    await use(by_model, key)


# Sessions that know several engines


@pytest.fixture
def engines(tmp_path: Path, backend: Backend) -> Any:
    """Return a function that makes engines of a backend, each with a file of its own."""

    def engine(name: str) -> Any:
        return backend.engine(make_url(f"sqlite:///{tmp_path / name}"))

    return engine


async def dispose(*engines: Any) -> None:
    for engine in engines:
        disposed = engine.dispose()
        if disposed is not None:
            await disposed


def tables_in(path: Path) -> list[str]:
    engine = create_engine(f"sqlite:///{path}")
    try:
        return inspect(engine).get_table_names()
    finally:
        engine.dispose()


@on_both_runners
@pytest.mark.parametrize("make_base", BASES[:2], ids=lambda make: make.__name__)
async def test_a_session_bound_by_base_uses_that_engine(
    backend: Backend, key: StorageKey, tmp_path: Path, engines: Any, make_base: Callable[[], Any]
) -> None:
    base, other = make_base(), make_base()
    here, elsewhere = engines("here.db"), engines("elsewhere.db")
    factory = new_factory(backend, binds={base: here, other: elsewhere})
    storage = SQLAlchemyStorage(factory, base, "fsm")
    try:
        await storage.create_table()
        await use(storage, key)
    finally:
        await dispose(here, elsewhere)
    assert tables_in(tmp_path / "here.db") == ["fsm"]
    assert tables_in(tmp_path / "elsewhere.db") == []


@on_both_runners
async def test_a_nested_transaction_in_a_session_that_is_bound_by_base_is_a_savepoint(
    backend: Backend, key: StorageKey, engines: Any
) -> None:
    base = new_base()
    here = engines("here.db")
    factory = new_factory(backend, binds={base: here})
    storage = SQLAlchemyStorage(factory, base, "fsm")
    try:
        await storage.create_table()
        session = factory()
        async with storage.using(session):
            await storage.set_state(key, "outer")
            with pytest.raises(LookupError):
                async with storage.transaction():
                    await storage.set_state(key, "inner")
                    raise LookupError
        for end in (session.commit, session.close):
            ended = end()
            if ended is not None:
                await ended
        assert await storage.get_state(key) == "outer"
    finally:
        await dispose(here)


@on_both_runners
@pytest.mark.parametrize("by", ["model", "table"])
async def test_a_session_bound_by_the_model_or_the_table_uses_that_engine(
    backend: Backend, key: StorageKey, tmp_path: Path, engines: Any, by: str
) -> None:
    here, elsewhere = engines("here.db"), engines("elsewhere.db")
    factory = backend.factory(elsewhere)
    storage = SQLAlchemyStorage(factory, MetaData(), "fsm")
    factory.configure(binds={getattr(storage, by): here})
    try:
        await storage.create_table()
        await use(storage, key)
    finally:
        await dispose(here, elsewhere)
    assert tables_in(tmp_path / "here.db") == ["fsm"]
    assert tables_in(tmp_path / "elsewhere.db") == []


@on_both_runners
async def test_a_session_that_chooses_its_engine_by_the_mapper_is_told_the_mapper(
    backend: Backend, key: StorageKey, tmp_path: Path, engines: Any
) -> None:
    base = new_base()
    here, elsewhere = engines("here.db"), engines("elsewhere.db")

    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, **rest: Any) -> Engine:
            ours = mapper is not None and issubclass(mapper.class_, base)
            engine = here if ours else elsewhere
            bind = getattr(engine, "sync_engine", engine)
            assert isinstance(bind, Engine)
            return bind

    option = "sync_session_class" if backend.is_async else "class_"
    storage = SQLAlchemyStorage(new_factory(backend, **{option: RoutingSession}), base, "fsm")
    try:
        await storage.create_table()
        await use(storage, key)
    finally:
        await dispose(here, elsewhere)
    assert tables_in(tmp_path / "here.db") == ["fsm"]
    assert tables_in(tmp_path / "elsewhere.db") == []


# What databases make of it


TEXT = "LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
KEY = "VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"


@pytest.mark.parametrize(
    ("url", "columns"),
    [
        ("sqlite://", ["id VARCHAR NOT NULL", "state VARCHAR", "data VARCHAR"]),
        ("postgresql+psycopg://", ["id VARCHAR NOT NULL", "state VARCHAR", "data VARCHAR"]),
        ("mysql+pymysql://", [f"id {KEY} NOT NULL", f"state {TEXT}", f"data {TEXT}"]),
        ("mariadb+pymysql://", [f"id {KEY} NOT NULL", f"state {TEXT}", f"data {TEXT}"]),
    ],
)
def test_each_database_gets_types_that_hold_every_key_and_any_data(
    url: str, columns: list[str]
) -> None:
    storage = SQLAlchemyStorage(unbound)
    dialect: Any = make_url(url).get_dialect()()
    statement = " ".join(str(CreateTable(storage.table).compile(dialect=dialect)).split())
    assert statement == (
        f"CREATE TABLE aiogram_fsm_data ( {', '.join([*columns, 'PRIMARY KEY (id)'])} )"
    )


class AsItIs(KeyBuilder):
    def build(self, key: StorageKey, part: object = None) -> str:
        return key.destiny


# Each the same as another for some collation.
TWINS = ["a", "A", "á", "a\u0301", "ss", "ß", "K", "\u212a", "i", "İ", "\u0131"]


@pytest.mark.parametrize("options", [{}, {"key_builder": AsItIs()}], ids=["ours", "as it is"])
async def test_keys_that_differ_in_case_or_accents_only_are_different_rows(
    backend: Backend, open_storage: Open, options: dict[str, Any]
) -> None:
    storage = await open_storage(backend, **options)
    keys = [StorageKey(bot_id=42, chat_id=7, user_id=7, destiny=twin) for twin in TWINS]
    for index, key in enumerate(keys):
        await storage.set_state(key, f"state {index}")
    assert len(await rows(storage)) == len(keys)
    for index, key in enumerate(keys):
        assert await storage.get_state(key) == f"state {index}"
    await storage.clear(keys[0])
    assert len(await rows(storage)) == len(keys) - 1


async def test_keys_that_differ_in_trailing_blanks_only_are_different_rows(
    storage: SQLAlchemyStorage,
) -> None:
    connections = ["a", "a ", "a  ", "a\n", "a\t", "A", ""]
    keys = [
        StorageKey(bot_id=42, chat_id=7, user_id=7, business_connection_id=connection)
        for connection in connections
    ]
    for key in keys:
        await storage.set_data(key, {"connection": key.business_connection_id})
    for key in keys:
        assert await storage.get_data(key) == {"connection": key.business_connection_id}


async def test_rows_that_the_application_inserts_are_read(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)

    def write(session: Session) -> None:
        session.execute(
            insert(storage.model).values(id="42:-1001234567890:7", state="a", data='{"a": 1}')
        )

    await storage.run_sync(write)
    assert await storage.get_state(key) == "a"
    assert await storage.get_data(key) == {"a": 1}


def test_the_table_of_locks_can_be_declared_where_the_model_is() -> None:
    """Alembic's autogenerate would drop it if env.py imported the model's module alone."""
    model = declare_model(MetaData(), "fsm")
    table = declare_lock_table(model)
    storage = SQLAlchemyStorage(sessionmaker(create_engine("sqlite:///bot.db")), model=model)
    storage.create_isolation()
    assert storage.metadata.tables["fsm_lock"] is table
