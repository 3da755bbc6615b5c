"""Scopes: what makes the storage's calls of a task join a session.

A scope is open while its ``async with`` block runs, and belongs to the task that opened it. Single
calls of tasks started inside join it too, one after another, since a session is not for concurrent
use. A task that outlives the scope gets connections of its own again; other tasks never see it.
For ``transactions.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import Lock, move_on_after
from sqlalchemy import Connection
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import Session, SessionTransaction

from .cancellation import Interrupter, run_to_completion
from .errors import is_lock_timeout
from .factories import synchronous
from .runner import Call, bound, carry, carry_to_completion
from .slots import PARENT_WAIT, WAITS_FOR_PARENT, Bind, exclusive

if TYPE_CHECKING:
    from .factories import AnySession

T = TypeVar("T")


class ScopeClosed(Exception):
    """The scope ended before the call's turn came. The call has not begun."""


class Scope:
    """A session that calls join."""

    def __init__(self, session: AnySession, parent: Scope | None = None) -> None:
        """Remember the session."""
        self.session = session
        self.task = asyncio.current_task()
        self.is_open = True
        self.parent = parent
        self._root: Scope = self if parent is None else parent._root
        self._was_cancelled = False
        self._has_savepoint = False
        self._lock = Lock(fast_acquire=True)

    async def execute(self, call: Call[T]) -> T:
        """Run a call in the session, after the calls that came before.

        :raises ScopeClosed: if the scope has ended
        :raises PendingRollbackError: if an earlier call was cancelled
        """
        arguments = dict(call.bind_arguments)
        bind = synchronous(self.session).get_bind(**arguments)

        def in_session(session: Session, interrupter: Interrupter) -> T:
            connection = session.connection(arguments)
            with interrupter.reaching(connection):
                return call.run(connection)

        return await self._carry(in_session, bind)

    async def run(self, function: Callable[[Session], T]) -> T:
        """Call a function of the application's with the session, as :meth:`execute` does a call."""

        def in_session(session: Session, interrupter: Interrupter) -> T:
            # A connection that the session has from a pool goes back when the function commits: to
            # interrupt it might end what another does with it.
            bind = session.bind
            with interrupter.reaching(bind) if isinstance(bind, Connection) else nullcontext():
                return function(session)

        return await self._carry(in_session, None)

    async def close(self) -> None:
        """End the scope, after the call that is under way: the session is the caller's again."""
        if self._lock.statistics().locked:
            await run_to_completion(self._close_in_turn())
        self.is_open = False

    async def _close_in_turn(self) -> None:
        async with self._lock:
            self.is_open = False

    def raise_if_cancelled(self) -> None:
        """Refuse to go on after a cancelled call, which may have undone what was before it.

        :raises PendingRollbackError: if a call was cancelled
        """
        if self._root._was_cancelled:
            raise PendingRollbackError(
                "a call in this transaction was cancelled, so the transaction cannot go on: let "
                "the cancellation or the time-out leave the block, or roll back and begin again"
            )

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[Scope]:
        """Undo what is done inside, and only that, if it ends with an exception.

        Calls of other tasks that joined this scope wait meanwhile: they are not to be undone too.
        """
        async with self._turn():
            self._has_savepoint = True
            inner = Scope(self.session, self)
            try:
                savepoint = await inner._carry(_begin_nested, None)
                try:
                    yield inner
                except BaseException:
                    await inner.close()
                    await carry_to_completion(self.session, lambda _: savepoint.rollback())
                    raise
                await inner.close()
                self.raise_if_cancelled()
                await carry_to_completion(self.session, lambda _: savepoint.commit())
            finally:
                self._has_savepoint = False

    async def _carry(self, work: Callable[[Session, Interrupter], T], bind: Bind | None) -> T:
        async with self._turn():
            self.raise_if_cancelled()
            try:
                return await carry(self.session, bind, partial(self._root._in_order, work))
            except asyncio.CancelledError:
                self._root._was_cancelled = True
                raise

    def _in_order(self, work: Callable[[Session, Interrupter], T], interrupter: Interrupter) -> T:
        return work(synchronous(self.session), interrupter)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        with move_on_after(PARENT_WAIT if self._has_savepoint else None) as limit:
            await self._lock.acquire()
        if limit.cancelled_caught:
            raise RuntimeError(
                f"waited {PARENT_WAIT:g} s for a nested transaction() of the parent task, which "
                "may be waiting for this task: start the task inside the nested block"
            )
        try:
            if not self.is_open:
                raise ScopeClosed
            yield
        finally:
            self._lock.release()


class TransactionScope(Scope):
    """A scope with a session of the storage's own, on one connection that it keeps to its end."""

    def __init__(
        self,
        session: AnySession,
        bind: Bind,
        bind_arguments: Mapping[str, Any],
        *,
        spare: bool = False,
        lock_timeout: float | None = None,
    ) -> None:
        """Remember the session."""
        super().__init__(session)
        self._bind = bind
        self._bind_arguments = dict(bind_arguments)
        self._spare = spare
        self._lock_timeout = lock_timeout
        self._stack: ExitStack | None = None
        self._timeout = ExitStack()

    async def begin(self) -> None:
        """Check out the connection, for code that uses the session without the storage."""
        await self._carry(lambda session, interrupter: None, self._bind)

    async def end(self, succeeded: bool) -> None:
        """Commit or roll back, and give the connection back, even if the caller is cancelled.

        :raises PendingRollbackError: if a call was cancelled and the block went on all the same
        """
        commits = succeeded and not self._was_cancelled
        await carry_to_completion(self.session, partial(self._end, commits=commits))
        if succeeded:
            self.raise_if_cancelled()

    def _begin(self, session: Session) -> None:
        if self._stack is not None:
            return
        with ExitStack() as stack:
            stack.enter_context(bound(session, self._bind, self._spare))
            stack.enter_context(session)
            session.begin()
            if self._lock_timeout is not None:
                connection = session.connection(self._bind_arguments)
                self._timeout.enter_context(_lock_timeout(connection, self._lock_timeout))
            self._stack = stack.pop_all()

    def _end(self, session: Session, *, commits: bool) -> None:
        with exclusive(self._bind), self._stack or nullcontext():
            self._timeout.close()
            if commits:
                session.commit()

    def _in_order(self, work: Callable[[Session, Interrupter], T], interrupter: Interrupter) -> T:
        with exclusive(self._bind):
            try:
                self._begin(synchronous(self.session))
                return super()._in_order(work, interrupter)
            except DBAPIError as error:
                if self._lock_timeout is not None and is_lock_timeout(error):
                    error.add_detail(WAITS_FOR_PARENT.format(self._lock_timeout))
                raise


@contextmanager
def _lock_timeout(connection: Connection, seconds: float) -> Iterator[None]:
    """Have the server end each wait for a lock: it sees no deadlock with a task that waits."""
    if isinstance(connection.dialect, PGDialect):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(1000 * seconds)}")
        yield
    elif isinstance(connection.dialect, MySQLDialect):
        former = connection.exec_driver_sql("SELECT @@innodb_lock_wait_timeout").scalar_one()
        variable = "SET SESSION innodb_lock_wait_timeout"
        connection.exec_driver_sql(f"{variable} = {min(former, round(seconds))}")
        try:
            yield
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql(f"{variable} = {former}")
    else:
        yield


def _begin_nested(session: Session, _: Interrupter) -> SessionTransaction:
    connection = session.connection()
    if isinstance(connection.dialect, SQLiteDialect):
        # Python's driver begins a transaction before the first write only. A savepoint before
        # that would be the transaction itself, and its release would commit.
        driver_connection = connection.connection.driver_connection
        if driver_connection is not None and not driver_connection.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
    return session.begin_nested()
