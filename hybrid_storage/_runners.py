"""Carries a function to the database: through a greenlet or through a thread.

Either way a session is opened, the function called with it, and the session committed and closed,
all in one go. The function sees a synchronous ``Session`` both times; only the waiting differs.
Where a session would do no more than open a connection, an operation gets the connection, and by
asyncpg it needs no greenlet. Nothing in here knows aiogram or the table.

A call that is cancelled before its turn never begins. One that has begun is finished first, and
the cancellation goes on afterwards: a write left behind in a thread could land after a newer one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast
from weakref import WeakSet

from anyio import CapacityLimiter
from sqlalchemy import Connection, Engine, Pool
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from ._cancellation import completed
from ._checkouts import checked_out, checked_out_at_once, is_taken_back_at_once
from ._errors import is_lost_statement
from ._factories import check_bind
from ._plain import Plain, plain
from ._statements import (
    AsyncpgExecutor,
    CoreExecutor,
    Executor,
    Operation,
    Unclear,
)
from ._threads import in_thread
from ._turns import Bind, Turn, alone, is_exhausted, place, spare_turn, turn

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    AnySession: TypeAlias = Session | AsyncSession

T = TypeVar("T")

_AUTOCOMMIT = {"isolation_level": "AUTOCOMMIT"}

# Behind a pooler that changes servers between transactions, a driver that prepares a statement and
# runs it afterwards needs a transaction around both. It turns out when the statement is not there.
_in_transactions: WeakSet[Engine] = WeakSet()


class _PoolExhausted(Exception):
    """The call has not begun: the application has all connections."""


class Runner:
    """Calls functions with sessions or connections of their own."""

    def __init__(
        self,
        factory: Callable[[], AnySession],
        is_async: bool,
        bind_arguments: dict[str, Any],
        limiter: CapacityLimiter | None,
    ) -> None:
        """Store what to use.

        :param factory: makes the sessions
        :param is_async: whether they are of ``AsyncSession``
        :param bind_arguments: what a session gets to choose its engine by
        :param limiter: limits the calls at a time, in place of the pool's size
        """
        self._factory = factory
        self._is_async = is_async
        self._bind_arguments = bind_arguments
        self._limiter = limiter
        self._plain: Plain | None = None
        self._settings: dict[str, Any] | None = None

    def open(self) -> tuple[AnySession, Bind]:
        """Return a new session, and what it is bound to.

        :raises TypeError: if that is an engine of the other kind
        """
        session = self._factory()
        bind = synchronous(session).get_bind(**self._bind_arguments)
        check_bind(bind, self._is_async)
        return session, bind

    def run(self, function: Callable[[Session], T]) -> Awaitable[T]:
        """Call a function with a new session, commit, and close the session.

        Cancelled while it waits for its turn, it does nothing; cancelled later, it is finished
        before the cancellation goes on.

        :param function: gets a synchronous ``Session``; may be called in a worker thread
        :return: what the function returns
        """
        session, bind = self.open()
        work = partial(_in_session, synchronous(session), bind, function)
        way = partial(carry, session)
        return self._in_turn(turn(bind, True, self._limiter), way, session, bind, work)

    def execute(
        self,
        operation: Operation[T],
        connect: Callable[[Session], Executor],
        *,
        writes: bool = True,
    ) -> Awaitable[T]:
        """Run an operation, as :meth:`run` does a function.

        :param operation: its statements need no transaction
        :param connect: gives what is to run the statements of a session
        :param writes: False if the operation only reads
        :return: what the operation returns
        """
        plain = self._plain_here()
        session: AnySession
        bind: Bind
        if plain is not None:
            session, bind = plain.session, plain.engine
            work = partial(_on_connection, plain, operation, writes)
        else:
            session, bind = self.open()
            work = partial(
                _in_session,
                synchronous(session),
                bind,
                lambda session: connect(session).perform(operation),
                True,
                self._bind_arguments,
            )
        way: Callable[[Callable[[], T]], Awaitable[T]] = partial(carry, session)
        if not self._is_async:
            way = place(bind).crew.do
        elif plain is not None and plain.executor() is AsyncpgExecutor:
            way = partial(_by_asyncpg, plain, operation)
        return self._in_turn(turn(bind, writes, self._limiter), way, session, bind, work)

    async def _in_turn(
        self,
        turn: Turn,
        way: Callable[[Callable[[], T]], Awaitable[T]],
        session: AnySession,
        bind: Bind,
        work: Callable[..., T],
    ) -> T:
        async with turn:
            try:
                return await way(work)
            except _PoolExhausted:
                async with spare_turn(bind):
                    return await carry(session, partial(work, spare=True))
            except DBAPIError as error:
                if is_lost_statement(error):
                    _in_transactions.add(bind.engine)
                raise

    def _plain_here(self) -> Plain | None:
        """Return what there is to use if a session would do no more than open a connection.

        To go without one saves the making and closing of a session in each call.
        """
        settings = getattr(self._factory, "kw", None)
        if settings is not None and settings != self._settings:  # configure() may change them
            session, _ = self.open()
            self._plain = plain(session, self._factory)
            self._settings = dict(settings)
        if self._plain is None or self._plain.is_listened_to():
            return None
        return self._plain


def synchronous(session: AnySession) -> Session:
    """Return the synchronous session that a session is or has.

    :param session: a session of either kind
    """
    return session if isinstance(session, Session) else session.sync_session


async def carry(session: AnySession, work: Callable[[], T]) -> T:
    """Do the work where the session may be used. Once begun, it is finished, then cancelled.

    :param session: the session that the work uses, of either kind
    :param work: uses the synchronous session that the session is or has
    :return: what the work returns
    """
    if isinstance(session, Session):
        return await in_thread(work)
    return await _in_greenlet(session, work)


async def _in_greenlet(session: AsyncSession, work: Callable[[], T]) -> T:
    # A statement that is cancelled can leave its connection in the air, and with aiosqlite the
    # whole file locked.
    return await completed(session.run_sync(lambda _: work()))


def _in_session(
    session: Session,
    bind: Bind,
    function: Callable[[Session], T],
    autocommit: bool = False,
    bind_arguments: dict[str, Any] | None = None,
    spare: bool = False,
) -> T:
    if spare:
        with _spare_connection(bind.engine) as session.bind:
            return _in_session(session, session.bind, function)
    if session.bind is bind:
        _check_pool(bind)
    with alone(bind), session, session.begin():
        if autocommit and _autocommits(bind, session):
            session.connection(bind_arguments, execution_options=_AUTOCOMMIT)
        return function(session)


async def _by_asyncpg(plain: Plain, operation: Operation[T], work: Callable[[], T]) -> T:
    """Run an operation without a greenlet, but for what its pool may have to wait for.

    :param work: the same operation for a greenlet
    """
    if plain.engine in _in_transactions:
        return await carry(plain.session, work)
    return await completed(_on_asyncpg(plain, operation))


async def _on_asyncpg(plain: Plain, operation: Operation[T]) -> T:
    engine = plain.engine
    in_greenlet = cast("AsyncSession", plain.session).run_sync
    pool = engine.pool  # until the application disposes the engine
    pooled = checked_out_at_once(engine, pool)
    if pooled is None:
        _check_pool(engine)
        pooled = await in_greenlet(lambda _: checked_out(engine, pool))
    closes_at_once = False
    try:
        executor = AsyncpgExecutor(engine, pooled, plain.texts)
        if not executor.in_transaction():
            try:
                result = await executor.perform_async(operation)
                closes_at_once = is_taken_back_at_once(pool)
                return result
            except Unclear:
                pass
        return await in_greenlet(
            lambda _: _by_sqlalchemy(Connection(engine, pooled), operation, True)
        )
    except (OSError, asyncio.TimeoutError):
        # asyncpg would have the next statement wait for the end of this one, for ever perhaps.
        await in_greenlet(lambda _: pooled.invalidate())
        raise
    finally:
        if closes_at_once:
            pooled.close()
        else:
            await in_greenlet(lambda _: pooled.close())


def _on_connection(plain: Plain, operation: Operation[T], writes: bool, spare: bool = False) -> T:
    engine = plain.engine
    if not spare:
        _check_pool(engine)
    kind = plain.executor()
    autocommits = _autocommits(engine)
    with alone(engine), _spare_pool(engine) if spare else nullcontext(engine.pool) as pool:
        if kind is None or engine in _in_transactions:
            with Connection(engine, checked_out(engine, pool) if spare else None) as connection:
                if autocommits:
                    # Unless a listener of the pool's has begun a transaction.
                    with suppress(engine.dialect.loaded_dbapi.Error, DBAPIError):
                        connection.execution_options(**_AUTOCOMMIT)
                return _by_sqlalchemy(connection, operation, writes)
        with closing(checked_out(engine, pool)) as pooled:
            executor = kind(engine, pooled, plain.texts)
            ends = False
            try:
                ends = autocommits and executor.autocommit()
                result = executor.perform(operation)
                if writes and not ends:
                    executor.commit()
                return result
            except Unclear:
                return _by_sqlalchemy(Connection(engine, pooled), operation, writes)
            finally:
                if ends:
                    executor.end_autocommit()


def _by_sqlalchemy(connection: Connection, operation: Operation[T], writes: bool) -> T:
    result = CoreExecutor(connection).perform(operation)
    if writes:
        connection.commit()
    return result


def _check_pool(bind: Bind) -> None:
    # A handler that holds a connection while it waits for this call would wait for ever if this
    # call waited for that connection.
    if is_exhausted(bind):
        raise _PoolExhausted


@contextmanager
def _spare_connection(engine: Engine) -> Iterator[Connection]:
    """Give a connection beyond those of the engine's pool."""
    with _spare_pool(engine) as pool, Connection(engine, checked_out(engine, pool)) as connection:
        yield connection


@contextmanager
def _spare_pool(engine: Engine) -> Iterator[Pool]:
    pool = engine.pool.recreate()
    try:
        yield pool
    finally:
        pool.dispose()


def _autocommits(bind: Bind, session: Session | None = None) -> bool:
    """Tell whether to do without a transaction that is not needed.

    PostgreSQL needs a round trip for BEGIN and another for COMMIT, its drivers none to switch to
    AUTOCOMMIT; with other databases the switch costs more than it saves. What an application
    does when its transactions begin (``SET LOCAL`` for a tenant, say) needs one to be in.
    """
    return (
        isinstance(bind, Engine)
        and isinstance(bind.dialect, PGDialect)
        and bind not in _in_transactions
        and not bind.dispatch.begin
        and (session is None or not (session.twophase or session.dispatch.after_begin))
    )
