"""Scopes: what makes the storage's calls of a task join a session.

A scope is open while its ``async with`` block runs, and belongs to the task that opened it. Single
calls of tasks started inside join it too, one after another, since a session is not for concurrent
use. A task that outlives the scope gets connections of its own again; other tasks never see it.
For ``transactions.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from anyio import Lock, move_on_after
from sqlalchemy import Connection, Dialect
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import Session

from .calls import Call
from .cancellation import Interrupter, run_to_completion
from .errors import is_lock_timeout
from .factories import registered, synchronous
from .joined import JoinedSession, begin_for_real, lock_timeout
from .runner import Connect, Context, carry, carry_to_completion, connected
from .slots import PARENT_WAIT, WAITS_FOR_PARENT, Bind, exclusive

if TYPE_CHECKING:
    from .factories import AnySession

T = TypeVar("T")


class ScopeClosed(Exception):
    """The scope ended before the call's turn came. The call has not begun."""


class Scope:
    """A session that calls join."""

    def __init__(
        self,
        session: AnySession,
        context: Context = nullcontext,
        registry: object = None,
        parent: Scope | None = None,
    ) -> None:
        """Remember the session."""
        self.session = session
        self.context = context
        self.registry = registry
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
            connection = self._root._own_connection(session)
            with (
                registered(self.registry, self.session),
                interrupter.reaching(connection) if connection is not None else nullcontext(),
            ):
                return function(session)

        return await self._carry(in_session, None)

    def _own_connection(self, session: Session) -> Connection | None:
        """Return the connection that the session has for as long as the scope is open.

        One that it has from a pool goes back when the function commits: to interrupt that might
        end what another does with it.
        """
        return session.bind if isinstance(session.bind, Connection) else None

    def holds_write_lock(self) -> bool:
        """Tell whether it may hold the one lock of a database: another connection would wait."""
        return isinstance(self._root._dialect(), SQLiteDialect)

    def _dialect(self) -> Dialect:
        return synchronous(self.session).get_bind().dialect

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
            inner = Scope(self.session, self.context, self.registry, self)
            try:
                end = await inner._carry(self._root._begin_savepoint, None)
                try:
                    yield inner
                except BaseException:
                    await inner.close()
                    await carry_to_completion(self.session, partial(end, False))
                    raise
                await inner.close()
                self.raise_if_cancelled()
                await carry_to_completion(self.session, partial(end, True))
            finally:
                self._has_savepoint = False

    def _begin_savepoint(
        self, session: Session, _: Interrupter
    ) -> Callable[[bool, Session], object]:
        begin_for_real(session.connection())
        savepoint = session.begin_nested()
        return lambda commits, _: savepoint.commit() if commits else savepoint.rollback()

    async def _carry(self, work: Callable[[Session, Interrupter], T], bind: Bind | None) -> T:
        async with self._turn():
            self.raise_if_cancelled()
            try:
                return await carry(self.session, bind, partial(self._root._in_order, work))
            except asyncio.CancelledError:
                self._root._was_cancelled = True
                raise

    def _in_order(self, work: Callable[[Session, Interrupter], T], interrupter: Interrupter) -> T:
        with self.context():
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
    """A scope with a session of the storage's own, on connections that it keeps to its end."""

    session: AnySession

    def __init__(
        self,
        session: AnySession,
        side: JoinedSession,
        bind: Bind,
        context: Context,
        registry: object,
        *,
        connect: Connect = connected,
        lock_timeout: float | None = None,
    ) -> None:
        """Remember the session; ``lock_timeout`` is how many seconds to wait for a lock."""
        super().__init__(session, context, registry)
        self._side = side
        self._bind = bind
        self._connect = connect
        self._lock_timeout = lock_timeout
        self._connection: Connection | None = None
        self._timeout = ExitStack()

    async def begin(self) -> None:
        """Check out the connection, for code that uses the session without the storage."""
        await self._carry(lambda session, interrupter: None, self._bind)

    async def end(self, succeeded: bool) -> None:
        """Commit or roll back, and give the connections back, even if the caller is cancelled.

        :raises PendingRollbackError: if a call was cancelled and the block went on all the same
        """
        commits = succeeded and not self._was_cancelled
        await carry_to_completion(self.session, partial(self._end, commits=commits))
        if succeeded:
            self.raise_if_cancelled()

    def _begin(self) -> None:
        if self._connection is not None:
            return
        self._connection = self._side.joined.connection(self._bind, self._connect)
        if not self._side.autobegin:
            self._side.begin()
        if self._lock_timeout is not None:
            self._timeout.enter_context(lock_timeout(self._connection, self._lock_timeout))

    def _end(self, session: Session, *, commits: bool) -> None:
        with exclusive(self._bind), self.context():
            committed = False
            try:
                if commits:
                    session.commit()
                committed = commits
            finally:
                try:
                    session.close()
                    self._timeout.close()
                finally:
                    self._side.joined.end(commits=committed)

    def _in_order(self, work: Callable[[Session, Interrupter], T], interrupter: Interrupter) -> T:
        with exclusive(self._bind):
            try:
                self._begin()
                return super()._in_order(work, interrupter)
            except DBAPIError as error:
                if self._lock_timeout is not None and is_lock_timeout(error):
                    error.add_detail(WAITS_FOR_PARENT.format(self._lock_timeout))
                raise

    def _own_connection(self, session: Session) -> Connection | None:
        return self._connection

    def _dialect(self) -> Dialect:
        return self._bind.dialect

    def _begin_savepoint(
        self, session: Session, _: Interrupter
    ) -> Callable[[bool, Session], object]:
        # Below the session's own savepoint, or a function that commits would release both.
        _release(session)
        self._side.joined.savepoint()
        return self._end_savepoint

    def _end_savepoint(self, commits: bool, session: Session) -> None:
        with exclusive(self._bind), self.context():
            if commits:
                _release(session)
            else:
                session.rollback()
                session.expire_all()
            self._side.joined.end_savepoint(commits=commits)


def _release(session: Session) -> None:
    """Have a session release its savepoint, and keep what it has loaded."""
    expires, session.expire_on_commit = session.expire_on_commit, False
    try:
        if session.in_transaction():
            session.commit()
    finally:
        session.expire_on_commit = expires
