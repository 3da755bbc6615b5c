"""Carries a function to the database: by one hop to a thread, or by ``AsyncSession.run_sync``.

Either way a connection is checked out, the function called with it, what it wrote committed, and
the connection given back, all in one go. The function sees SQLAlchemy's synchronous classes both
times; only the waiting differs. For ``storage.py``, ``isolation.py`` and ``transactions.py``.

What this costs was measured on sqlite3, in microseconds: a statement on a connection in hand takes
20, with ``Engine.connect()`` around it 35, with a ``Session`` around that 80. So a session is made
to choose the engine by the application's rules, and is used only where somebody counts on it. On
PostgreSQL, AUTOCOMMIT saves the round trips of BEGIN and ROLLBACK, which take as long as the
statement each; to set and reset it takes none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from anyio import CapacityLimiter
from sqlalchemy import Connection
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import DBAPIError, UnboundExecutionError
from sqlalchemy.orm import Session

from .calls import Call, leave_wrong_server, until_first
from .cancellation import Interrupter, in_callers_task, run_to_completion
from .factories import check_bind, synchronous
from .poolers import connect, look, needs_transactions, note
from .slots import (
    HOLDS_WRITE_LOCK,
    Bind,
    PoolState,
    PoolTaken,
    acquired,
    are_connections_taken,
    exclusive,
    is_held_by_parent,
    pool_state,
)
from .threads import run_in_thread

if TYPE_CHECKING:
    from .factories import AnySession

T = TypeVar("T")

Context: TypeAlias = Callable[[], AbstractContextManager[object]]
"""What the application's own rules need around them, such as Flask's ``app.app_context``."""

Connect: TypeAlias = Callable[[Bind], AbstractContextManager[Connection]]

# On these, cancelling the task cancels the statement at the server, and waits for its answer.
_CANCELLING_DRIVERS = {"asyncpg", "psycopg"}


class Runner:
    """Opens sessions, and runs calls on connections of their own."""

    def __init__(
        self,
        factory: Callable[[], AnySession],
        is_async: bool,
        bind_arguments: Mapping[str, Any],
        limiter: CapacityLimiter | None,
        context: Context,
    ) -> None:
        """Store what to use."""
        self.factory: Callable[[], AnySession] = factory
        self.is_async: bool = is_async
        self.context: Context = context
        self.bind_arguments: dict[str, Any] = dict(bind_arguments)
        self._limiter = limiter

    def open(self, bind_arguments: Mapping[str, Any]) -> tuple[AnySession, Bind]:
        """Return a new session, and what it is bound to.

        :raises TypeError: if that is an engine of the other kind
        """
        with self.context():
            session = self.factory()
            try:
                bind = synchronous(session).get_bind(**bind_arguments)
            except UnboundExecutionError as error:
                raise UnboundExecutionError(
                    f"the session factory is not bound to an engine: give it one, as in "
                    f"sessionmaker(engine), or call its configure(bind=engine) ({error})"
                ) from error
        check_bind(bind, self.is_async)
        return session, bind

    async def execute(self, call: Call[T], *, is_heartbeat: bool = False) -> T:
        """Run a call on a connection of its own.

        Cancelled while it waits for its slot, it does nothing. Cancelled later, the statement is
        ended where the driver can, and nothing of the call happens afterwards.

        :raises RuntimeError: if it would wait for a transaction of its own task, or of its parents
        """
        session, bind = self.open(call.bind_arguments)
        work = partial(_on_connection, synchronous(session), bind, call, self.context)
        try:
            if is_heartbeat:
                pool = pool_state(bind)
                async with pool.heartbeat():
                    spare = are_connections_taken(bind)
                    return await carry(session, bind, partial(work, None if spare else pool))
            return await self.in_slot(
                bind, call.writes, lambda pool: carry(session, bind, partial(work, pool))
            )
        except Exception as error:
            note(bind.engine, error)
            raise

    async def in_slot(
        self, bind: Bind, writes: bool, work: Callable[[PoolState | None], Awaitable[T]]
    ) -> T:
        """Do the work of a call in a slot, beyond the pool if handlers hold all connections.

        :param bind: the engine, or the connection, that the work uses
        :param writes: whether it writes
        :param work: gets the state of the pool to connect from, None to connect beyond it
        :raises RuntimeError: if it would wait for a transaction of its own task, or of its parents
        """
        pool = pool_state(bind)
        if writes and pool.writers and is_held_by_parent(pool):
            raise RuntimeError(HOLDS_WRITE_LOCK)
        slot = pool.call(writes, self._limiter)
        # Those who have the slots may wait for what a transaction of this task has locked.
        goes_on = is_held_by_parent(pool) and not pool.is_shared
        if not goes_on:
            await acquired(slot, pool)
        elif not slot.acquire_nowait():
            return await work(None)
        try:
            return await work(pool)
        except PoolTaken:
            if goes_on:
                return await work(None)
        finally:
            slot.release()
        async with pool.spares:
            return await work(None)


async def carry_to_completion(session: AnySession, work: Callable[[Session], T]) -> T:
    """Do what ends a transaction, even if the caller is cancelled, then re-raise."""
    if isinstance(session, Session):
        return await run_to_completion(partial(run_in_thread, partial(work, session)))
    return await run_to_completion(partial(session.run_sync, work))


async def carry(
    session: AnySession,
    bind: Bind | None,
    work: Callable[[Interrupter], T],
) -> T:
    """Do the work where the session may be used.

    Cancelled, it ends the statement under way where the driver can, and waits for the work's end.
    """
    interrupter = Interrupter()
    if isinstance(session, Session):
        return await run_in_thread(partial(work, interrupter), interrupter)
    if bind is None:
        return await in_callers_task(session.run_sync(lambda _: work(interrupter)), interrupter)
    cancels = bind.dialect.driver in _CANCELLING_DRIVERS
    return await run_to_completion(
        lambda: session.run_sync(lambda _: work(interrupter)), interrupter, cancels=cancels
    )


def _on_connection(
    session: Session,
    bind: Bind,
    call: Call[T],
    context: Context,
    pool: PoolState | None,
    interrupter: Interrupter,
) -> T:
    """Run a call on a connection, and commit what it has written."""
    with context(), exclusive(bind):
        is_counted_on = _is_counted_on(session, bind)
        has_rules = is_counted_on and session.bind is not bind

        def attempt() -> T:
            if has_rules:
                return _in_session(session, call, interrupter)
            with checked_out(bind, pool) as connection:
                if is_counted_on:
                    session.bind = connection
                    return _in_session(session, call, interrupter)
                autocommits = _autocommits(bind) and not call.in_transaction
                return (_in_autocommit if autocommits else _run)(connection, call, interrupter)

        # The application's own transaction is not done again here.
        return attempt() if isinstance(bind, Connection) else until_first(attempt)


def _in_session(session: Session, call: Call[T], interrupter: Interrupter) -> T:
    with session:
        session.begin()
        with interrupter.reaching(connection := session.connection(dict(call.bind_arguments))):
            look(connection)
            result = call.run(connection)
        if call.writes:
            session.commit()
        return result


def _in_autocommit(connection: Connection, call: Call[T], interrupter: Interrupter) -> T:
    # By the driver's own attribute: SQLAlchemy's option sets the isolation level too, and resets
    # it, which costs as much as half a statement.
    driver: Any = connection.connection.dbapi_connection
    switched = False
    # Unless a listener of the pool's has begun a transaction: that is committed below.
    with suppress(connection.dialect.loaded_dbapi.Error):
        if not getattr(driver, "autocommit", True):
            driver.autocommit = switched = True
    try:
        return _run(connection, call, interrupter)
    finally:
        if switched and not connection.invalidated:
            driver.autocommit = False


def _run(connection: Connection, call: Call[T], interrupter: Interrupter) -> T:
    with interrupter.reaching(connection):
        result = call.run(connection)
    if call.writes:
        connection.commit()
    return result


@contextmanager
def checked_out(bind: Bind, pool: PoolState | None) -> Iterator[Connection]:
    """Give a connection of an engine's pool, or the one that the sessions are bound to.

    :param bind: the engine, or the connection
    :param pool: the state of the pool to connect from, None to connect beyond it
    :raises PoolTaken: if handlers hold all connections of the pool
    """
    if isinstance(bind, Connection):
        yield bind
    elif pool is None:
        base = bind.dialect.loaded_dbapi.Error
        spare = bind.pool.recreate()
        try:
            try:
                pooled = spare.connect()
            except base as error:  # raised in the form that Engine.connect() raises it in
                wrapped = DBAPIError.instance(None, None, error, base, dialect=bind.dialect)
                raise wrapped from error
            with Connection(bind, pooled) as connection:
                look(connection)
                yield connection
        finally:
            spare.dispose()
    else:
        # Looked at last: the handlers take connections without asking.
        if are_connections_taken(bind, len(pool.of_calls)):
            raise PoolTaken
        with connect(bind) as connection:
            pool.of_calls.add(connection)
            try:
                yield connection
            except DBAPIError as error:
                leave_wrong_server(connection, error)
                raise
            finally:
                pool.of_calls.discard(connection)


def connected(bind: Bind) -> AbstractContextManager[Connection]:
    """Give a connection for the time of a handler."""
    return nullcontext(bind) if isinstance(bind, Connection) else connect(bind)


def _is_counted_on(session: Session, bind: Bind) -> bool:
    """Tell whether the application counts on its own kind of session, even for these calls."""
    return (
        isinstance(bind, Connection)  # a session knows how to join its transaction
        or session.twophase
        or bool(session.dispatch.after_begin)
        or bool(getattr(session, "execution_options", None))  # since SQLAlchemy 2.1
    )


def _autocommits(bind: Bind) -> bool:
    """Tell whether to do without a transaction that nobody needs.

    What an application does when its transactions begin (``SET LOCAL`` for a tenant, say) needs
    one to be in. On other databases than PostgreSQL the switch costs more than it saves.
    """
    return (
        isinstance(bind.dialect, PGDialect)
        and not needs_transactions(bind.engine)
        and not bind.dispatch.begin
    )
