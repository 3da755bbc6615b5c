"""Sessions of synchronous applications, however they choose their engine, in one transaction."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from anyio import to_thread
from backends import MARIADB, POSTGRESQL, SQLITE, Backend, mysql_version
from conftest import Open
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import URL, Column, Engine, Integer, MetaData, String, Table, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError
from sqlalchemy.orm import Session, declarative_base, scoped_session, sessionmaker
from sqlalchemy.pool import QueuePool

from hybrid_storage import FSMData, SQLAlchemyStorage


@dataclass
class Shop:
    """An application with a global session, an order and a ledger, and a storage on it."""

    storage: SQLAlchemyStorage[Any, Any]
    session: Any
    Order: Any
    Ledger: Any
    engines: list[Engine]

    def place(self, product: str) -> None:
        """Add a row to each table, by the global session."""
        self.session.add(self.Order(product=product))
        self.session.add(self.Ledger(entry=product))

    async def run(self, function: Callable[[], Any]) -> Any:
        """Call a function that takes no session, as most do."""
        return await self.storage.run_sync(lambda _: function())

    async def products(self) -> list[str]:
        """Return what both tables hold."""

        def read() -> list[str]:
            orders = [each.product for each in self.session.query(self.Order)]
            assert sorted(orders) == sorted(each.entry for each in self.session.query(self.Ledger))
            return sorted(orders)

        found: list[str] = await self.run(read)
        return found

    def checked_out(self) -> int:
        """Return how many connections are in use."""
        pools = [each.pool for each in self.engines]
        return sum(each.checkedout() for each in pools if isinstance(each, QueuePool))


def new_models(base: Any, ledgers_base: Any, **of_ledger: Any) -> tuple[Any, Any]:
    suffix = uuid.uuid4().hex

    class Order(base):  # type: ignore[misc]
        __tablename__ = f"order_{suffix}"
        id = Column(Integer, primary_key=True)
        product = Column(String(50))

    class Ledger(ledgers_base):  # type: ignore[misc]
        __tablename__ = f"ledger_{suffix}"
        id = Column(Integer, primary_key=True)
        entry = Column(String(50))
        for name, value in of_ledger.items():
            locals()[name] = value

    return Order, Ledger


def storage_of(session: Any, base: Any) -> SQLAlchemyStorage[Any, Any]:
    return SQLAlchemyStorage(session, base, f"fsm_{uuid.uuid4().hex}")


def by_url(*engines: Engine) -> Shop:
    base = declarative_base()
    session = scoped_session(sessionmaker(engines[0]))
    return Shop(storage_of(session, base), session, *new_models(base, base), [engines[0]])


def by_binds(*engines: Engine) -> Shop:
    base, other = declarative_base(), declarative_base()
    order, ledger = new_models(base, other)
    session = scoped_session(sessionmaker(binds={base: engines[0], other: engines[1]}))
    return Shop(storage_of(session, base), session, order, ledger, [*engines])


def by_get_bind(*engines: Engine) -> Shop:
    base = declarative_base()
    order, ledger = new_models(base, base)

    class Routing(Session):
        def get_bind(self, mapper: Any = None, **_: Any) -> Engine:
            return engines[mapper is not None and mapper.class_ is ledger]

    session = scoped_session(sessionmaker(class_=Routing))
    return Shop(storage_of(session, base), session, order, ledger, [*engines])


def by_flask(*engines: Engine, bind_key: str | None = None) -> Shop:
    app = Flask(__name__)
    urls = [each.url.render_as_string(hide_password=False) for each in engines]
    app.config["SQLALCHEMY_DATABASE_URI"] = urls[0]
    app.config["SQLALCHEMY_BINDS"] = {"other": urls[1]}
    db = SQLAlchemy(app)
    more = {} if bind_key is None else {"__bind_key__": bind_key}
    order, ledger = new_models(db.Model, db.Model, **more)

    class Conversation(FSMData, db.Model):  # type: ignore[name-defined,misc]
        __tablename__ = f"conversation_{uuid.uuid4().hex}"

    storage = SQLAlchemyStorage(db.session, model=Conversation, context=app.app_context)
    with app.app_context():
        used = [db.engines[key] for key in dict.fromkeys((None, bind_key))]
    return Shop(storage, db.session, order, ledger, used)


def by_bind_key(*engines: Engine) -> Shop:
    return by_flask(*engines, bind_key="other")


SHOPS = [by_url, by_binds, by_get_bind, by_flask, by_bind_key]
EVERY_SHOP = pytest.mark.parametrize("shop", SHOPS, indirect=True)
BACKENDS = [SQLITE[0], POSTGRESQL[0]]


@pytest.fixture(params=BACKENDS, ids=str)
def engines(
    request: pytest.FixtureRequest, url_of: Callable[[Backend], URL], tmp_path: Path
) -> Iterator[list[Engine]]:
    """Return two engines: of two files, or of one server."""
    backend: Backend = request.param
    urls = [url_of(backend), url_of(backend)]
    if backend.server == "sqlite":
        urls[1] = urls[1].set(database=str(tmp_path / "other.db"))
    made = [backend.engine(url) for url in urls]
    yield [each for each in made if isinstance(each, Engine)]
    for each in made:
        each.dispose()


@pytest.fixture
def shop(request: pytest.FixtureRequest, engines: list[Engine]) -> Iterator[Shop]:
    """Return a shop with its tables; at the end nothing of it may be left in use."""
    shop: Shop = getattr(request, "param", by_url)(*engines)
    tables = [
        (shop.storage.table, shop.engines[0]),
        (shop.Order.__table__, shop.engines[0]),
        (shop.Ledger.__table__, shop.engines[-1]),
    ]
    for table, engine in tables:
        table.create(engine)
    yield shop
    assert shop.checked_out() == 0
    for table, engine in tables:
        table.drop(engine)
    for engine in shop.engines:
        engine.dispose()


class Refused(Exception):
    """The payment's failure."""


@EVERY_SHOP
@pytest.mark.parametrize("fails", [False, True], ids=["commit", "rollback"])
async def test_what_functions_commit_is_one_with_the_conversation(
    shop: Shop, key: StorageKey, fails: bool
) -> None:
    def commits() -> None:
        shop.place("committed")
        shop.session.commit()

    def rolls_back() -> None:
        shop.place("rolled back")
        shop.session.flush()
        shop.session.rollback()

    def closes() -> None:
        shop.place("closed")
        shop.session.flush()
        shop.session.close()

    def begins() -> None:
        with shop.session.begin():
            shop.place("begun")
        with pytest.raises(Refused), shop.session.begin():
            shop.place("begun in vain")
            raise Refused

    def removes() -> None:
        shop.place("before")
        shop.session.commit()
        shop.place("removed")
        shop.session.remove()
        shop.place("after")
        shop.session.commit()
        shop.session.remove()

    try:
        async with shop.storage.transaction():
            await shop.storage.set_state(key, "paid")
            for function in (commits, rolls_back, closes, begins, removes):
                await shop.run(function)
            await shop.run(lambda: shop.place("left"))
            expected = ["after", "before", "begun", "committed", "left"]
            assert await shop.products() == expected
            if fails:
                raise Refused
    except Refused:
        expected = []
    assert await shop.products() == expected
    assert await shop.storage.get_state(key) == (None if fails else "paid")


@EVERY_SHOP
async def test_a_nested_transaction_undoes_what_functions_in_it_committed(
    shop: Shop, key: StorageKey
) -> None:
    def order(product: str) -> None:
        shop.place(product)
        shop.session.commit()
        shop.session.remove()

    async with shop.storage.transaction():
        await shop.run(lambda: order("kept"))
        with pytest.raises(Refused):
            async with shop.storage.transaction():
                await shop.run(lambda: order("undone"))
                await shop.storage.set_state(key, "undone")
                raise Refused
        await shop.run(lambda: order("kept, too"))
    assert await shop.products() == ["kept", "kept, too"]
    assert await shop.storage.get_state(key) is None


async def test_a_thousand_calls_by_the_registry_leave_nothing_checked_out(shop: Shop) -> None:
    def count_twice() -> None:
        shop.session.query(shop.Order).count()
        shop.session.remove()
        shop.session.query(shop.Order).count()

    async def many() -> None:
        for _ in range(25):
            await shop.run(count_twice)
            async with shop.storage.transaction():
                await shop.run(count_twice)

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(many)
    assert shop.checked_out() == 0
    assert not shop.session.registry.has()


async def test_the_registry_is_the_applications_own_outside_of_calls(shop: Shop) -> None:
    second = SQLAlchemyStorage(shop.session, table_name="second")
    given = await second.run_sync(lambda session: shop.session() is session)
    own = shop.session()
    assert given
    assert type(own) is shop.session.session_factory.class_
    assert not await shop.run(lambda: shop.session() is own)
    assert shop.session() is own
    shop.session.remove()


async def test_a_session_put_in_the_transactions_place_is_refused(shop: Shop) -> None:
    def replaces() -> None:
        shop.session.remove()
        shop.session(expire_on_commit=False)

    with pytest.raises(RuntimeError, match="not part of the transaction"):
        async with shop.storage.transaction():
            await shop.run(lambda: shop.place("undone"))
            await shop.run(replaces)
    assert await shop.products() == []


async def test_a_session_that_may_be_closed_but_once_can_be_used_after_remove(shop: Shop) -> None:
    shop.session.configure(close_resets_only=False)
    async with shop.storage.transaction():
        await shop.run(lambda: shop.session.remove())
        await shop.run(lambda: shop.place("after"))
    assert await shop.products() == ["after"]


@pytest.mark.parametrize("name", ["close", "reset"])
async def test_closing_in_the_event_loop_forgets_what_was_not_flushed(
    shop: Shop, name: str, key: StorageKey
) -> None:
    async with shop.storage.transaction() as session:
        session.add_all([shop.Order(product="flushed"), shop.Ledger(entry="flushed")])
        await shop.storage.run_sync(Session.flush)
        session.add(shop.Order(product="forgotten"))
        getattr(session, name)()
        await shop.storage.set_state(key, "paid")
    assert await shop.products() == ["flushed"]
    assert await shop.storage.get_state(key) == "paid"


@pytest.mark.parametrize("backend", [*SQLITE, *POSTGRESQL], ids=str)
async def test_invalidating_the_session_ends_the_transaction(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage: SQLAlchemyStorage[Any] = await open_storage(backend)
    with pytest.raises(PendingRollbackError):
        async with storage.transaction() as session:
            await storage.set_state(key, "paid")
            if not backend.is_async:
                with pytest.raises(InvalidRequestError, match="blocks the event loop"):
                    session.invalidate()
            assert await storage.get_state(key) == "paid"
            await storage.run_sync(Session.invalidate)
            with pytest.raises(PendingRollbackError):
                await storage.get_state(key)
    assert await storage.get_state(key) is None


async def test_a_function_that_awaits_the_storage_is_refused_at_once(
    shop: Shop, key: StorageKey
) -> None:
    async with shop.storage.transaction():
        with pytest.raises(RuntimeError, match=r"storage\.operations"):
            await shop.run(lambda: anyio.from_thread.run(shop.storage.set_state, key, "paid"))
        await shop.storage.set_state(key, "waiting")
    assert await shop.storage.get_state(key) == "waiting"


@pytest.mark.parametrize("backend", [*BACKENDS, *(MARIADB if mysql_version() else [])], ids=str)
async def test_a_transaction_that_is_ended_below_its_block_is_explained(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    """By DDL on MariaDB, which commits, and by a COMMIT sent as text elsewhere."""
    storage: SQLAlchemyStorage[Any] = await open_storage(backend)
    table = Table(f"new_{uuid.uuid4().hex}", MetaData(), Column("id", Integer, primary_key=True))

    def end(session: Session) -> None:
        if backend.server == "mariadb":
            table.create(session.connection())
        else:
            session.execute(text("COMMIT"))
        session.commit()

    with pytest.raises(DBAPIError, match="the transaction has ended before its block"):
        async with storage.transaction():
            await storage.set_state(key, "paid")
            await storage.run_sync(end)
    await storage.run_sync(lambda session: table.drop(session.connection(), checkfirst=True))


async def test_a_session_that_is_used_after_its_block_is_refused(shop: Shop) -> None:
    async with shop.storage.transaction() as session:
        pass
    with pytest.raises(InvalidRequestError, match="is over"):
        session.query(shop.Order).all()
    kept = await shop.storage.run_sync(lambda session: session)
    for late in (session, kept):
        with pytest.raises(InvalidRequestError, match="is over"):
            await to_thread.run_sync(late.query(shop.Order).all)
        late.close()


async def test_a_savepoint_in_the_event_loop_is_refused_and_the_session_goes_on(shop: Shop) -> None:
    async with shop.storage.transaction() as session:
        session.add_all([shop.Order(product="kept"), shop.Ledger(entry="kept")])
        await shop.storage.run_sync(Session.flush)
        with pytest.raises(InvalidRequestError, match="blocks the event loop"):
            session.begin_nested()
    assert await shop.products() == ["kept"]


async def test_a_factory_that_does_more_than_make_a_session_is_called(
    engines: list[Engine], key: StorageKey
) -> None:
    class Telling(sessionmaker[Session]):
        def __call__(self, **options: Any) -> Session:
            session = super().__call__(**options)
            session.info["tenant"] = 7
            return session

    storage = SQLAlchemyStorage(Telling(engines[0]), table_name=f"fsm_{uuid.uuid4().hex}")
    assert await storage.run_sync(lambda session: session.info["tenant"]) == 7
    async with storage.transaction() as session:
        assert session.info["tenant"] == 7


async def test_sessions_that_do_not_begin_by_themselves(shop: Shop, key: StorageKey) -> None:
    shop.session.configure(autobegin=False)

    async with shop.storage.transaction():
        await shop.storage.set_state(key, "paid")
        await shop.run(lambda: shop.session.commit())
    await shop.run(lambda: shop.session.commit())
    shop.session.configure(autobegin=True)
    assert await shop.storage.get_state(key) == "paid"


async def test_a_function_that_commits_the_session_of_using_is_explained(
    shop: Shop, key: StorageKey
) -> None:
    """Its commit is that of the whole session: a nested block can undo nothing any more."""
    session = shop.session()
    async with shop.storage.using(session):
        with pytest.raises(InvalidRequestError, match="in place of using"):
            async with shop.storage.transaction():
                await shop.storage.set_state(key, "committed")
                await shop.storage.run_sync(Session.commit)
    shop.session.remove()
    assert await shop.storage.get_state(key) == "committed"


@pytest.mark.parametrize("backend", [*SQLITE, *POSTGRESQL], ids=str)
async def test_a_nested_transaction_leaves_the_handlers_own_savepoint_alone(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage: SQLAlchemyStorage[Any] = await open_storage(backend)
    async with storage.transaction(allow_blocking=True) as session:
        await storage.set_state(key, "before")
        own = session.begin_nested()
        if backend.is_async:
            await own
        async with storage.transaction():
            await storage.set_state(key, "inside")
        assert await storage.get_state(key) == "inside"
        if backend.is_async:
            await own.rollback()
        else:
            own.rollback()
        assert await storage.get_state(key) == "before"
    assert await storage.get_state(key) == "before"


@pytest.mark.parametrize("engines", POSTGRESQL[:1], ids=str, indirect=True)  # SQLite has one writer
async def test_two_functions_at_a_time_in_one_scope_are_refused(engines: list[Engine]) -> None:
    """Each would get the other's session, and the other's transaction."""
    session = scoped_session(sessionmaker(engines[0]), scopefunc=lambda: "the app")
    storage = SQLAlchemyStorage(session, table_name=f"fsm_{uuid.uuid4().hex}")
    begun, ends = threading.Event(), threading.Event()

    def first(own: Session) -> bool:
        begun.set()
        ends.wait(30)
        return session() is own

    found: list[bool] = []

    async def run() -> None:
        found.append(await storage.run_sync(first))

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await to_thread.run_sync(begun.wait, 30)
        with pytest.raises(RuntimeError, match="tells threads and tasks apart"):
            await storage.run_sync(lambda _: session())
        ends.set()
    assert found == [True]
    assert await storage.run_sync(lambda own: session() is own)
