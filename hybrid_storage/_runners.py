"""Carries a function to the database: through a greenlet or through a thread.

Either way a session is opened, the function called with it, and the session committed and closed,
all in one go. The function sees a synchronous ``Session`` both times; only the waiting differs.
Where a session would do no more than open a connection, the storage's calls take the connection.
Nothing in here knows aiogram or the table.

A call that is cancelled before its turn never begins. One that has begun is finished first, and
the cancellation goes on afterwards: a write left behind in a thread could land after a newer one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from weakref import WeakSet

from anyio import CancelScope, CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from sqlalchemy import Connection, Engine
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from ._errors import is_lost_statement
from ._factories import check_bind, has_listeners, is_plain
from ._turns import Bind, alone, is_exhausted, spare_turn, turn

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    AnySession: TypeAlias = Session | AsyncSession

T = TypeVar("T")

# How many threads there are is for turn() to decide; anyio's default limiter is the application's.
_any_number: RunVar[CapacityLimiter] = RunVar("any_number")


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
        self._plain: AnySession | None = None
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
        return self._in_turn(session, bind, work)

    def execute(
        self,
        function: Callable[[Connection], T],
        connect: Callable[[Session], Connection],
        *,
        writes: bool = True,
    ) -> Awaitable[T]:
        """Call a function with a connection, as :meth:`run` does with a session.

        :param function: gets a synchronous ``Connection``; its statements need no transaction
        :param connect: gives the connection that the function is to get of a session
        :param writes: False if the function only reads
        :return: what the function returns
        """
        session = self._plain_session()
        if session is not None:
            bind = synchronous(session).get_bind()
            work = partial(_on_connection, bind, function, writes)
        else:
            session, bind = self.open()
            work = partial(
                _in_session,
                synchronous(session),
                bind,
                lambda session: function(connect(session)),
                True,
                self._bind_arguments,
            )
        return self._in_turn(session, bind, work, writes)

    async def _in_turn(
        self, session: AnySession, bind: Bind, work: Callable[..., T], writes: bool = True
    ) -> T:
        async with turn(bind, writes, self._limiter):
            try:
                return await carry(session, work)
            except _PoolExhausted:
                async with spare_turn(bind):
                    return await carry(session, partial(work, spare=True))
            except DBAPIError as error:
                if is_lost_statement(error):
                    _in_transactions.add(bind.engine)
                raise

    def _plain_session(self) -> AnySession | None:
        """Return a session of the factory's if it would do no more than open a connection.

        To go without one saves the making and closing of a session in each call.
        """
        settings = getattr(self._factory, "kw", None)
        if settings is not None and settings != self._settings:  # configure() may change them
            session, _ = self.open()
            self._plain = session if is_plain(session, self._factory) else None
            self._settings = dict(settings)
        if self._plain is None or has_listeners(synchronous(self._plain)):
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


async def in_thread(work: Callable[[], T]) -> T:
    """Do the work in a worker thread, without taking one of the application's.

    :param work: once begun, it is finished, then cancelled
    :return: what it returns
    """
    outcome: Future[T] = Future()

    def job() -> None:
        if outcome.set_running_or_notify_cancel():
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

    limiter = _any_number.get(None)
    if limiter is None:
        limiter = CapacityLimiter(math.inf)
        _any_number.set(limiter)
    try:
        await to_thread.run_sync(job, limiter=limiter)
    except asyncio.CancelledError:
        if not outcome.cancel():
            await _ended(asyncio.wrap_future(outcome))
        raise
    return outcome.result()


async def completed(coroutine: Coroutine[Any, Any, T]) -> T:
    """Complete a coroutine, whatever cancels the caller meanwhile; then let that go on.

    :param coroutine: is run in a task of its own
    :return: what it returns
    """
    task = asyncio.ensure_future(coroutine)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _ended(task)
        raise


async def _ended(future: asyncio.Future[Any]) -> None:
    """Wait for the end of a future, however often the caller is cancelled meanwhile."""
    with CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue
    if not future.cancelled():
        future.exception()  # looked at, or asyncio logs that nobody did


def _in_session(
    session: Session,
    bind: Bind,
    function: Callable[[Session], T],
    autocommit: bool = False,
    bind_arguments: dict[str, Any] | None = None,
    spare: bool = False,
) -> T:
    if spare:
        with _spare_connection(bind) as session.bind:
            return _in_session(session, session.bind, function)
    if session.bind is bind:
        _check_pool(bind)
    with alone(bind), session, session.begin():
        if autocommit and _autocommits(bind, session):
            session.connection(bind_arguments, execution_options=_AUTOCOMMIT)
        return function(session)


def _on_connection(
    bind: Bind, function: Callable[[Connection], T], writes: bool, spare: bool = False
) -> T:
    if not spare:
        _check_pool(bind)
    with alone(bind), _spare_connection(bind) if spare else bind.engine.connect() as connection:
        if _autocommits(bind):
            return function(connection.execution_options(**_AUTOCOMMIT))
        result = function(connection)
        if writes:
            connection.commit()
        return result


def _check_pool(bind: Bind) -> None:
    # A handler that holds a connection while it waits for this call would wait for ever if this
    # call waited for that connection.
    if is_exhausted(bind):
        raise _PoolExhausted


@contextmanager
def _spare_connection(bind: Bind) -> Iterator[Connection]:
    """Give a new connection, beyond those of the pool."""
    pool = bind.engine.pool.recreate()
    try:
        with Connection(bind.engine, pool.connect()) as connection:
            yield connection
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
