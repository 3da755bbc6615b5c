"""The conversation and the application's rows are committed together, or not at all."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import anyio
import pytest
from aiogram import Bot, Dispatcher
from aiogram.dispatcher.event.bases import UNHANDLED, CancelHandler, SkipHandler
from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from aiogram.types import Chat, ErrorEvent, Message, Update, User
from backends import FORKED, POSTGRESQL, SERVERS, SQLITE, Backend
from blocking import locked
from conftest import Open, engine_of, new_session, rows
from process_worker import order_and_die
from sqlalchemy import MetaData, String, event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import (
    Mapped,
    Session,
    declarative_base,
    mapped_column,
    scoped_session,
    sessionmaker,
)

from hybrid_storage import SessionMiddleware, SQLAlchemyStorage


class Shop:
    """A storage, and a table of the application's in the same database."""

    def __init__(self, storage: SQLAlchemyStorage, order: Any) -> None:
        self.storage = storage
        self.Order = order

    async def orders(self) -> list[str]:
        """Return the orders that another session sees."""

        def read(session: Session) -> list[str]:
            return list(session.scalars(select(self.Order.product).order_by(self.Order.product)))

        result: list[str] = await outside(self.storage.run_sync, read)
        return result

    async def state(self, key: StorageKey) -> str | None:
        """Return the state that another session sees."""
        result: str | None = await outside(self.storage.get_state, key)
        return result


async def outside(function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Call a function from a task that has nothing of this one's scopes."""
    call = contextvars.Context().run(asyncio.ensure_future, function(*args))
    return await call


@pytest.fixture
async def shop(backend: Backend, open_storage: Open) -> Shop:
    """Return a storage with a table of the application's beside it, on each backend."""
    return await open_shop(backend, open_storage)


async def open_shop(backend: Backend, open_storage: Open, **options: Any) -> Shop:
    name = f"order_{uuid.uuid4().hex}"
    base: Any = declarative_base()

    class Order(base):  # type: ignore[misc]
        __tablename__ = name
        product: Mapped[str] = mapped_column(String(50), primary_key=True)

    storage: SQLAlchemyStorage = await open_storage(backend, metadata=base, **options)
    await storage.run_sync(lambda session: base.metadata.create_all(session.connection()))
    # Dropped with the storage's table.
    event.listen(
        storage.table,
        "after_drop",
        lambda _, connection, **__: Order.__table__.drop(connection, checkfirst=True),
    )
    return Shop(storage, Order)


async def test_a_transaction_commits_the_state_and_the_rows_together(
    shop: Shop, key: StorageKey
) -> None:
    async with shop.storage.transaction() as session:
        session.add(shop.Order(product="tea"))
        await shop.storage.set_state(key, "paid")
        await shop.storage.update_data(key, {"product": "tea"})
        assert await shop.storage.get_state(key) == "paid"
    assert await shop.orders() == ["tea"]
    assert await shop.state(key) == "paid"
    assert await shop.storage.get_data(key) == {"product": "tea"}


@pytest.mark.parametrize(
    "backend", [backend for backend in SERVERS if backend.server != "sqlite"], ids=str
)
async def test_nobody_outside_sees_anything_before_the_commit(shop: Shop, key: StorageKey) -> None:
    async with shop.storage.transaction() as session:
        session.add(shop.Order(product="tea"))
        await shop.storage.set_state(key, "paid")
        await shop.storage.run_sync(Session.flush)
        assert await shop.state(key) is None
        assert await shop.orders() == []
    assert await shop.state(key) == "paid"


class Refused(Exception):
    """The payment's failure."""


async def test_an_exception_rolls_back_both_and_goes_on_unchanged(
    shop: Shop, key: StorageKey
) -> None:
    await shop.storage.set_state(key, "payment")
    refused = Refused()
    with pytest.raises(Refused) as caught:
        async with shop.storage.transaction() as session:
            session.add(shop.Order(product="tea"))
            await shop.storage.set_state(key, "paid")
            await shop.storage.set_data(key, {"product": "tea"})
            raise refused
    assert caught.value is refused
    assert await shop.orders() == []
    assert await shop.state(key) == "payment"
    assert await shop.storage.get_data(key) == {}


@pytest.mark.parametrize("cancel", ["task", "scope", "wait_for"])
async def test_a_cancellation_rolls_back_both(shop: Shop, key: StorageKey, cancel: str) -> None:
    written = anyio.Event()

    async def handler() -> None:
        async with shop.storage.transaction() as session:
            session.add(shop.Order(product="tea"))
            await shop.storage.set_state(key, "paid")
            written.set()
            await anyio.sleep_forever()

    if cancel == "scope":
        async with anyio.create_task_group() as group:
            group.start_soon(handler)
            await written.wait()
            group.cancel_scope.cancel()
    else:
        task = asyncio.ensure_future(handler())
        await written.wait()
        if cancel == "task":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.01)
    assert await shop.orders() == []
    assert await shop.state(key) is None


async def test_what_a_listener_of_the_commit_writes_by_the_session_is_committed(
    shop: Shop, key: StorageKey
) -> None:
    def listen(session: Session) -> None:
        order = text(f"INSERT INTO {shop.Order.__tablename__} (product) VALUES ('tea')")
        event.listen(session.connection(), "commit", lambda _: session.execute(order))

    async with shop.storage.transaction():
        await shop.storage.set_state(key, "paid")
        await shop.storage.run_sync(listen)
    assert await shop.orders() == ["tea"]
    assert await shop.state(key) == "paid"


async def test_a_call_that_is_cancelled_twice_still_rolls_back(shop: Shop, key: StorageKey) -> None:
    written = anyio.Event()

    async def handler() -> None:
        async with shop.storage.transaction():
            await shop.storage.set_state(key, "paid")
            written.set()
            await anyio.sleep_forever()

    task = asyncio.ensure_future(handler())
    await written.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await shop.state(key) is None


@pytest.mark.parametrize(
    "backend", [backend for backend in SERVERS if not backend.is_async], ids=str
)
async def test_a_process_that_is_killed_in_a_handler_leaves_neither(
    backend: Backend, open_storage: Open, url_of: Callable[[Backend], Any]
) -> None:
    shop = await open_shop(backend, open_storage)
    url = backend.engine(url_of(backend)).url.render_as_string(hide_password=False)
    ours, theirs = FORKED.Pipe(duplex=False)
    arguments = [theirs, url, shop.storage.table.name, shop.Order.__tablename__]
    process = FORKED.Process(target=order_and_die, args=arguments)
    process.start()
    theirs.close()
    assert await anyio.to_thread.run_sync(ours.recv) == "written"
    await anyio.to_thread.run_sync(process.join)
    assert process.exitcode == -9
    ours.close()
    assert await shop.orders() == []
    assert await rows(shop.storage) == []


async def test_a_nested_transaction_is_a_savepoint(shop: Shop, key: StorageKey) -> None:
    async with shop.storage.transaction() as session:
        with pytest.raises(Refused):
            async with shop.storage.transaction() as inner:
                assert inner is session
                session.add(shop.Order(product="tea"))
                await shop.storage.set_state(key, "paid")
                raise Refused
        assert await shop.storage.get_state(key) is None
        async with shop.storage.transaction():
            session.add(shop.Order(product="cake"))
        await shop.storage.set_state(key, "refused")
    assert await shop.orders() == ["cake"]
    assert await shop.state(key) == "refused"


@pytest.mark.parametrize("joins", [False, True], ids=["transaction", "using"])
async def test_a_nested_transaction_whose_own_end_fails_is_undone_and_the_outer_one_goes_on(
    shop: Shop, key: StorageKey, joins: bool
) -> None:
    storage, order = shop.storage, shop.Order

    def sell_twice(session: Session) -> None:
        session.execute(insert(order).values(product="tea"))
        session.add(order(product="tea"))  # refused when it is flushed

    async with a_session(storage) as session:
        async with storage.using(session) if joins else storage.transaction():
            await storage.run_sync(lambda session: session.add(order(product="cake")))
            with pytest.raises(IntegrityError):
                async with storage.transaction():
                    await storage.set_state(key, "paid")
                    await storage.run_sync(sell_twice)
            assert await storage.get_state(key) is None
            await storage.set_state(key, "refused")
        await _(session.commit())
    assert await shop.orders() == ["cake"]
    assert await shop.state(key) == "refused"


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_a_failed_statement_that_a_nested_function_hid_ends_the_session_of_using(
    shop: Shop, key: StorageKey
) -> None:
    """PostgreSQL would take the owner's COMMIT, and roll back without a word."""
    storage, order = shop.storage, shop.Order

    def sell_twice(session: Session) -> None:
        for _ in range(2):
            with suppress(IntegrityError):
                session.execute(insert(order).values(product="tea"))

    async with a_session(storage) as session:
        with pytest.raises(PendingRollbackError, match="could not be undone by itself"):
            async with storage.using(session):
                await storage.set_state(key, "outer")
                with pytest.raises(DBAPIError, match="transaction is aborted"):
                    async with storage.transaction():
                        await storage.run_sync(sell_twice)
    assert await shop.orders() == []
    assert await shop.state(key) is None


@pytest.mark.parametrize("joins", [False, True], ids=["transaction", "using"])
async def test_an_error_of_a_listener_at_a_nested_transactions_end_is_the_one_to_see(
    shop: Shop, key: StorageKey, joins: bool
) -> None:
    """SQLAlchemy's session can't be rolled back then, and says so."""
    storage = shop.storage

    def refuse(session: Session) -> None:
        raise Refused

    async with a_session(storage) as session:
        with pytest.raises(PendingRollbackError, match="could not be undone by itself"):
            async with storage.using(session) if joins else storage.transaction():
                await storage.set_state(key, "outer")
                with pytest.raises(Refused):
                    async with storage.transaction():
                        await storage.set_state(key, "inner")
                        await storage.run_sync(event.listen, "after_commit", refuse, once=True)
    assert await shop.state(key) is None


@pytest.mark.parametrize("joins", [False, True], ids=["transaction", "using"])
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
async def test_a_transaction_does_not_go_on_after_a_nested_one_whose_end_was_cancelled(
    shop: Shop, key: StorageKey, joins: bool, fails: bool
) -> None:
    """Whoever catches that takes all of it for undone: the conversation, but not the order."""
    storage, order = shop.storage, shop.Order
    loop = asyncio.get_running_loop()

    async with a_session(storage) as session:
        with pytest.raises(PendingRollbackError, match="was cancelled"):
            async with storage.using(session) if joins else storage.transaction():
                await storage.set_state(key, "outer")
                with anyio.CancelScope() as scope:

                    def cancel(*_: object) -> None:
                        loop.call_soon_threadsafe(scope.cancel)
                        time.sleep(0.02)

                    def sell(session: Session) -> None:
                        session.execute(insert(order).values(product="cake"))
                        session.add(order(product="cake" if fails else "tea"))
                        event.listen(session, "before_flush", cancel)

                    async with storage.transaction():
                        await storage.run_sync(sell)
                assert scope.cancelled_caught
    assert await shop.orders() == []
    assert await shop.state(key) is None


async def test_what_a_nested_transaction_wrote_goes_if_the_outer_one_fails(
    shop: Shop, key: StorageKey
) -> None:
    with pytest.raises(Refused):
        async with shop.storage.transaction() as session:
            async with shop.storage.transaction():
                session.add(shop.Order(product="tea"))
                await shop.storage.set_state(key, "paid")
            raise Refused
    assert await shop.orders() == []
    assert await shop.state(key) is None


async def test_calls_of_concurrent_tasks_inside_join_and_take_turns(
    shop: Shop, key: StorageKey
) -> None:
    with pytest.raises(Refused):
        async with shop.storage.transaction():
            await asyncio.gather(*(shop.storage.update_data(key, {str(n): n}) for n in range(20)))
            assert len(await shop.storage.get_data(key)) == 20
            raise Refused
    assert await shop.storage.get_data(key) == {}


LONG = text(
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 30000000)"
    " SELECT count(*) FROM t"
)


@pytest.mark.parametrize("using", [False, True], ids=["transaction", "using"])
@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_a_transaction_does_not_go_on_after_a_cancelled_call(
    backend: Backend,
    using: bool,
    open_storage: Open,
    url_of: Callable[[Backend], Any],
    key: StorageKey,
) -> None:
    """What came before the call may be undone already: it is all or nothing."""
    arguments = {"timeout": 0.3} if backend.server == "sqlite" else {}
    storage = await open_storage(backend, engine_options={"connect_args": arguments})
    await storage.set_state(key, "before")
    other = replace(key, user_id=8)

    async def give_up_a_call() -> None:
        with locked(backend, url_of(backend), storage, key) as lock:
            call = asyncio.ensure_future(storage.set_state(key, "after"))
            await lock.is_waited_for()
            call.cancel()
            await asyncio.wait([call], timeout=1)
            lock.release()
            with pytest.raises(asyncio.CancelledError):
                await call
        with pytest.raises(PendingRollbackError, match="was cancelled, so the transaction cannot"):
            await storage.get_state(key)

    async def give_up_a_function() -> None:
        """Where nobody else can hold the lock: SQLite has but one, which the transaction holds."""
        call = asyncio.ensure_future(storage.run_sync(lambda session: session.execute(LONG)))
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        with pytest.raises(PendingRollbackError, match="was cancelled, so the transaction cannot"):
            await storage.get_state(key)

    if using:
        async with a_session(storage) as session:
            with pytest.raises(PendingRollbackError):
                async with storage.using(session):
                    await give_up_a_call()
    else:
        with pytest.raises(PendingRollbackError):
            async with storage.transaction():
                await storage.set_state(other, "written")
                await (give_up_a_function if backend.server == "sqlite" else give_up_a_call)()
    assert await storage.get_state(key) == "before"
    assert await storage.get_state(other) is None


async def test_a_task_that_outlives_the_scope_uses_sessions_of_its_own(
    shop: Shop, key: StorageKey
) -> None:
    over = anyio.Event()

    async def later() -> None:
        await over.wait()
        await shop.storage.set_state(key, "later")

    tasks: list[asyncio.Future[None]] = []
    with pytest.raises(Refused):
        async with shop.storage.transaction():
            tasks.append(asyncio.ensure_future(later()))
            await shop.storage.set_state(key, "inside")
            raise Refused
    over.set()
    await tasks[0]
    assert await shop.state(key) == "later"


async def test_a_call_under_way_is_finished_before_the_scope_ends(
    shop: Shop, key: StorageKey
) -> None:
    """The session is never used by two at a time, nor after its end."""
    async with shop.storage.transaction():
        tasks = [
            asyncio.ensure_future(shop.storage.update_data(key, {str(n): n})) for n in range(9)
        ]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert len(await shop.storage.get_data(key)) == 9


async def test_other_storages_are_not_drawn_in_unless_told_to_use_the_session(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    metadata = MetaData()
    one = await open_storage(backend, metadata=metadata, table_name=f"one_{uuid.uuid4().hex}")
    two = await open_storage(backend, metadata=metadata, table_name=f"two_{uuid.uuid4().hex}")
    for end, state in ((Refused, None), (None, "both")):
        try:
            async with one.transaction() as session, two.using(session):
                await one.set_state(key, "both")
                await two.set_state(key, "both")
                if end is not None:
                    raise end
        except Refused:
            pass
        assert await one.get_state(key) == await two.get_state(key) == state
    if backend.server == "sqlite":
        return  # one writer: the second storage would wait for the first
    with pytest.raises(Refused):
        async with one.transaction():
            await one.set_state(key, "one")
            await two.set_state(key, "two")
            raise Refused
    assert (await one.get_state(key), await two.get_state(key)) == ("both", "two")


@asynccontextmanager
async def a_session(storage: SQLAlchemyStorage) -> AsyncIterator[Any]:
    """Open a session of the application's, of the storage's own factory."""
    session = new_session(storage)
    try:
        yield session
    finally:
        result = session.close()
        if result is not None:
            await result


async def _(result: Awaitable[None] | None) -> None:
    if result is not None:
        await result


async def test_calls_join_a_session_of_the_applications(shop: Shop, key: StorageKey) -> None:
    async with a_session(shop.storage) as session:
        async with shop.storage.using(session):
            await shop.storage.set_state(key, "paid")
        await _(session.rollback())
        assert await shop.state(key) is None
        session.add(shop.Order(product="tea"))
        async with shop.storage.using(session):
            await shop.storage.set_state(key, "paid")
            await shop.storage.clear(key)
            await shop.storage.set_state(key, "sent")
        await _(session.commit())
    assert await shop.state(key) == "sent"
    assert await shop.orders() == ["tea"]


async def test_pending_objects_are_not_flushed_by_the_storage(shop: Shop, key: StorageKey) -> None:
    async with a_session(shop.storage) as session:
        order = shop.Order(product="tea")
        session.add(order)
        async with shop.storage.using(session):
            await shop.storage.set_state(key, "paid")
            await shop.storage.update_data(key, {"a": 1})
            assert await shop.storage.get_state(key) == "paid"
            assert list(session.new) == [order]
        await _(session.rollback())


async def test_the_scoped_session_of_the_application_can_be_joined(
    open_storage: Open, key: StorageKey
) -> None:
    shop = await open_shop(SQLITE[0], open_storage)
    scoped = scoped_session(sessionmaker(engine_of(shop.storage)))
    scoped.add(shop.Order(product="tea"))
    async with shop.storage.using(scoped):
        await shop.storage.set_state(key, "paid")
    assert len(scoped.new) == 1
    scoped.rollback()
    scoped.remove()
    assert await shop.state(key) is None


@pytest.mark.parametrize("wrong", [None, "session", object, sessionmaker, sessionmaker()], ids=repr)
async def test_using_refuses_what_is_no_session(open_storage: Open, wrong: Any) -> None:
    storage = await open_storage(SQLITE[0])
    with pytest.raises(TypeError, match=r"using\(\) takes a Session or an AsyncSession that"):
        async with storage.using(wrong):
            pass


async def test_legacy_code_runs_in_the_transaction_or_in_one_of_its_own(
    shop: Shop, key: StorageKey
) -> None:
    def place_order(session: Session, product: str, *, fail: bool = False) -> str:
        session.add(shop.Order(product=product))
        session.flush()
        if fail:
            raise Refused
        return product.upper()

    assert await shop.storage.run_sync(place_order, "tea") == "TEA"
    with pytest.raises(Refused):
        await shop.storage.run_sync(place_order, "cake", fail=True)
    assert await shop.orders() == ["tea"]
    with pytest.raises(Refused):
        async with shop.storage.transaction():
            await shop.storage.set_state(key, "paid")
            assert await shop.storage.run_sync(place_order, "milk") == "MILK"
            raise Refused
    assert await shop.orders() == ["tea"]
    assert await shop.state(key) is None


async def test_legacy_code_is_off_the_event_loops_thread_if_it_is_synchronous(
    shop: Shop, backend: Backend
) -> None:
    thread = await shop.storage.run_sync(lambda _: threading.current_thread())
    assert (thread is threading.current_thread()) == backend.is_async


async def test_the_session_given_is_of_the_factorys_kind(shop: Shop, backend: Backend) -> None:
    async with shop.storage.transaction() as session:
        assert isinstance(session, AsyncSession if backend.is_async else Session)


async def test_more_transactions_than_connections_wait_for_their_turn(
    open_storage: Open, key: StorageKey
) -> None:
    for backend in SERVERS:
        if backend.server == "sqlite":
            continue
        storage = await open_storage(
            backend, engine_options={"pool_size": 2, "max_overflow": 0, "pool_timeout": 1}
        )

        async def handler(storage: SQLAlchemyStorage, number: int) -> None:
            own = StorageKey(bot_id=1, chat_id=2, user_id=number)
            async with storage.transaction():
                await storage.set_state(own, "paid")
                # A call that does not join, while all connections are taken.
                await outside(storage.get_state, key)

        await asyncio.gather(*(handler(storage, number) for number in range(20)))
        assert len(await rows(storage)) == 20


def message(text: str) -> Update:
    user = User(id=7, is_bot=False, first_name="Ada")
    chat = Chat(id=7, type="private")
    date = datetime.now(timezone.utc)
    return Update(
        update_id=1,
        message=Message(message_id=1, date=date, chat=chat, from_user=user, text=text),
    )


KEY = StorageKey(bot_id=42, chat_id=7, user_id=7)


class Bots:
    """A dispatcher with one transaction per update, and a handler that does as it is told."""

    def __init__(self, shop: Shop, inner: bool = False) -> None:
        self.shop = shop
        self.bot = Bot("42:TEST")
        self.dispatcher = Dispatcher(storage=shop.storage)
        self.errors: list[tuple[BaseException, bool]] = []
        self.action: BaseException | None = None
        middleware = SessionMiddleware(shop.storage)
        if inner:
            self.dispatcher.message.middleware(middleware)
        else:
            self.dispatcher.update.outer_middleware(middleware)

        @self.dispatcher.message()
        async def first(message: Message, state: FSMContext, session: Any) -> Any:
            session.add(shop.Order(product=f"{message.text}-1"))
            await state.set_state("first")
            if self.action is not None:
                raise self.action

        @self.dispatcher.message()
        async def second(message: Message, state: FSMContext, session: Any) -> Any:
            session.add(shop.Order(product=f"{message.text}-2"))
            await state.update_data(second=True)

        @self.dispatcher.error()
        async def failed(error: ErrorEvent, **data: Any) -> Any:
            session = data.get("session")  # where it is, it says that its transaction is over
            self.errors.append((error.exception, isinstance(session, Session)))

    async def say(self, text: str) -> Any:
        return await self.dispatcher.feed_update(self.bot, message(text))


@pytest.mark.parametrize("inner", [False, True], ids=["outer", "inner"])
async def test_the_middleware_commits_what_a_handler_did(shop: Shop, inner: bool) -> None:
    await Bots(shop, inner).say("tea")
    assert await shop.orders() == ["tea-1"]
    assert await shop.state(KEY) == "first"


@pytest.mark.parametrize("inner", [False, True], ids=["outer", "inner"])
async def test_a_handlers_error_rolls_back_and_reaches_the_error_handlers(
    shop: Shop, inner: bool
) -> None:
    bots = Bots(shop, inner)
    bots.action = Refused()
    await bots.say("tea")
    assert await shop.orders() == []
    assert await shop.state(KEY) is None
    assert bots.errors == [(bots.action, False)]


@pytest.mark.parametrize("inner", [False, True], ids=["outer", "inner"])
async def test_skipping_to_the_next_handler_is_no_failure(shop: Shop, inner: bool) -> None:
    bots = Bots(shop, inner)
    bots.action = SkipHandler()
    await bots.say("tea")
    assert await shop.orders() == ["tea-1", "tea-2"]
    assert await shop.state(KEY) == "first"
    assert await shop.storage.get_data(KEY) == {"second": True}
    assert bots.errors == []


@pytest.mark.parametrize("inner", [False, True], ids=["outer", "inner"])
async def test_cancelling_the_handling_is_no_failure(shop: Shop, inner: bool) -> None:
    bots = Bots(shop, inner)
    bots.action = CancelHandler()
    with pytest.raises(CancelHandler):
        await bots.say("tea")
    assert await shop.orders() == ["tea-1"]
    assert await shop.state(KEY) == "first"


@pytest.mark.parametrize("backend", SQLITE[:1], ids=str)
@pytest.mark.parametrize("taken_out", [False, True], ids=["left", "taken out"])
async def test_a_session_that_an_outer_middleware_put_in_is_there_again(
    shop: Shop, taken_out: bool
) -> None:
    """Also where one inside has taken the middleware's own out."""
    seen: list[object] = []
    dispatcher = Dispatcher(storage=shop.storage)

    async def outermost(handler: Any, event: Any, data: dict[str, Any]) -> Any:
        data["session"] = "of another"
        result = await handler(event, data)
        seen.append(data["session"])
        return result

    async def innermost(handler: Any, event: Any, data: dict[str, Any]) -> Any:
        own = data.pop("session") if taken_out else data["session"]
        seen.append(isinstance(own, Session))
        return await handler(event, data)

    dispatcher.update.outer_middleware(outermost)
    dispatcher.update.outer_middleware(SessionMiddleware(shop.storage))
    dispatcher.update.outer_middleware(innermost)
    await dispatcher.feed_update(Bot("42:TEST"), message("tea"))
    assert seen == [True, "of another"]


async def test_an_update_that_nobody_handles_is_no_failure(
    open_storage: Open,
) -> None:
    shop = await open_shop(SQLITE[0], open_storage)
    dispatcher = Dispatcher(storage=shop.storage)
    dispatcher.update.outer_middleware(SessionMiddleware(shop.storage, name="db"))
    seen: list[type] = []

    @dispatcher.message(lambda message, db: seen.append(type(db)))
    async def never() -> None: ...

    assert await dispatcher.feed_update(Bot("42:TEST"), message("tea")) is UNHANDLED
    assert [issubclass(made, Session) for made in seen] == [True]


def test_a_middleware_needs_a_storage_that_has_transactions() -> None:
    other: Any = MemoryStorage()
    with pytest.raises(TypeError, match="takes a SQLAlchemyStorage"):
        SessionMiddleware(other)


async def test_an_asynchronous_function_is_refused(storage: SQLAlchemyStorage) -> None:
    async def function(_: Session) -> None:
        pass

    with pytest.raises(TypeError, match="synchronous function"):
        await storage.run_sync(function)  # type: ignore[unused-coroutine]


async def test_an_operation_on_an_asynchronous_session_is_refused(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    session: Any = AsyncSession()
    with pytest.raises(TypeError, match="run_sync"):
        storage.operations.set_state(session, key, "Form:name")
