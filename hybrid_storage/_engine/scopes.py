"""Scopes: what makes the storage's calls of a task join a session.

A scope is open while its ``async with`` block runs, and belongs to the task that opened it. Single
calls of tasks started inside join it too, one after another, since a session is not for concurrent
use. A task that outlives the scope gets connections of its own again; other tasks never see it.
For ``transactions.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import Lock, move_on_after
from sqlalchemy import Connection
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.exc import PendingRollbackError, ResourceClosedError, SQLAlchemyError
from sqlalchemy.orm import Session

from .calls import Call
from .cancellation import Interrupter, run_to_completion
from .errors import has_rolled_back, is_missing_savepoint
from .factories import Registry, synchronous
from .joined import JoinedSession
from .runner import Runner, carry, carry_to_completion
from .savepoints import begin_savepoint, invalidate
from .slots import PARENT_WAIT, Bind, parents_are_over, pool_state

if TYPE_CHECKING:
    from .factories import AnySession

T = TypeVar("T")

# The scope that a function of the application's is using, in its context and its tasks'.
_occupied: ContextVar[Scope | None] = ContextVar("occupied", default=None)

_WAS_CANCELLED = (
    "a call in this transaction was cancelled, so the transaction cannot go on: let the "
    "cancellation or the time-out leave the block, or roll back and begin again"
)
_IS_GONE = (
    "a nested transaction() could not be undone by itself, so the outer one cannot go on: let the "
    "error leave both blocks, and run all of it again"
)


class ScopeClosed(Exception):
    """The scope ended before the call's turn came. The call has not begun."""


class Scope:
    """A session that calls join."""

    def __init__(
        self,
        session: AnySession,
        runner: Runner,
        registry: Registry | None,
        parent: Scope | None = None,
    ) -> None:
        """Remember the session."""
        self.session: AnySession = session
        self.runner: Runner = runner
        self.registry = registry
        self.task: asyncio.Task[Any] | None = asyncio.current_task()
        self.is_open: bool = True
        self.is_committed: bool = False
        self.parent: Scope | None = parent
        self._root: Scope = self if parent is None else parent._root
        # Whether the session is the application's, which commits when it likes.
        self.is_borrowed: bool = parent is None or parent.is_borrowed
        self._is_closed = asyncio.Event()
        self._was_cancelled = False
        self._is_over = False  # for that reason, or because a nested block could not be undone
        self._nested: Scope | None = None
        self._meanwhile: list[Callable[[Session, Interrupter], object]] = []
        self._is_occupied = False
        self._lock = Lock(fast_acquire=True)

    async def execute(self, call: Call[T]) -> T:
        """Run a call in the session, after the calls that came before.

        One of another task than that which has a nested block open is run in the block, rather than
        wait for it: the block may be waiting for that task. If the block is undone, the call's
        write is repeated.

        :raises ScopeClosed: if the scope has ended
        :raises PendingRollbackError: if an earlier call was cancelled
        """
        arguments = dict(call.bind_arguments)
        bind = self._root._bind_of(arguments)

        def in_session(session: Session, interrupter: Interrupter) -> T:
            connection = session.connection(arguments)
            with interrupter.reaching(connection):
                return call.run(connection)

        if self._nested is not None:
            # Ended meanwhile, or broken by an error of its own: then the call's turn is afterwards.
            with suppress(ScopeClosed, SQLAlchemyError):
                result = await self._nested.execute(call)
                # What a unit of work has collected, it writes again by itself.
                if call.writes and call.in_unit is not None:
                    self._meanwhile.append(in_session)
                return result
        return await self._carry(in_session, bind)

    async def run(self, function: Callable[[Session], T]) -> T:
        """Call a function of the application's with the session, as :meth:`execute` does a call."""

        def in_session(session: Session, interrupter: Interrupter) -> T:
            registry, connection = self.registry, self._root._own_connection(session)
            with (
                self._root._occupied(),
                registry.standing_for(self.session) if registry is not None else nullcontext(),
                interrupter.reaching(connection) if connection is not None else nullcontext(),
            ):
                return function(session)

        return await self._carry(in_session, None)

    @contextmanager
    def _occupied(self) -> Iterator[None]:
        # Known to the tasks that the function starts, through their context.
        token = _occupied.set(self)
        self._is_occupied = True
        try:
            yield
        finally:
            self._is_occupied = False
            _occupied.reset(token)

    def _own_connection(self, session: Session) -> Connection | None:
        """Return the connection that the session has for as long as the scope is open.

        One that it has from a pool goes back when the function commits: to interrupt that might
        end what another does with it.
        """
        return session.bind if isinstance(session.bind, Connection) else None

    def holds_write_lock(self) -> bool:
        """Tell whether it may hold the one lock of a database: another connection would wait."""
        return isinstance(self._root._bind_of(self.runner.bind_arguments).dialect, SQLiteDialect)

    def _bind_of(self, arguments: dict[str, Any]) -> Bind:
        """Return the engine, or the connection, that the session uses for a call."""
        session = synchronous(self.session)
        with self.runner.context():
            if isinstance(session, JoinedSession):  # of another storage's transaction
                return session.chosen_bind(**arguments)
            return session.get_bind(**arguments)

    async def close(self) -> None:
        """End the scope, after the call that is under way: the session is the caller's again."""
        try:
            if self._lock.statistics().locked:
                await run_to_completion(self._close_in_turn)
        finally:
            self.is_open = False
            self._is_closed.set()

    async def _close_in_turn(self) -> None:
        async with self._lock:
            self.is_open = False

    async def is_over(self) -> None:
        """Wait for the end of a parent task's block, and for its commit."""
        await self._root._is_closed.wait()
        await parents_are_over(pool_state(self._root._bind_of(self.runner.bind_arguments)))

    def raise_if_over(self) -> None:
        """Refuse to go on where what was before may be undone: after a cancelled call, too.

        :raises PendingRollbackError: if it may be
        """
        if self._root._is_over:
            raise PendingRollbackError(_WAS_CANCELLED if self._root._was_cancelled else _IS_GONE)

    @contextmanager
    def rolling_back(self, error: BaseException) -> Iterator[None]:
        """Raise the error for which a block is undone, and not that it could not be undone.

        Whoever runs transactions again goes by that error. What takes savepoints away commits,
        unless it is the server that has rolled back: that is to be told.
        """
        try:
            yield
        except ResourceClosedError:  # by a function
            raise
        except SQLAlchemyError as failure:
            self._root._is_over = True
            if is_missing_savepoint(failure) and not has_rolled_back(error):
                raise

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[Scope]:
        """Undo what is done inside, and only that, if it ends with an exception.

        Calls of other tasks that joined this scope are not undone: see :meth:`execute`. Functions
        of theirs wait meanwhile.
        """
        async with self._turn():
            inner = Scope(self.session, self.runner, self.registry, self)
            self._nested, self._meanwhile = inner, []
            try:
                end = await inner._carry(self._root._begin_savepoint, None)
                try:
                    yield inner
                except BaseException as error:
                    await inner.close()
                    await self._undo(end, error)
                    raise
                await inner.close()
                self.raise_if_over()
                try:
                    await carry_to_completion(self.session, partial(end, True))
                except asyncio.CancelledError:  # kept or not, it is taken for undone
                    await self._end_cancelled()
                    raise
                except Exception as error:  # of a flush, say
                    await self._undo(end, error)
                    raise
            finally:
                self._nested, inner.is_open = None, False

    def _begin_savepoint(
        self, session: Session, _: Interrupter
    ) -> Callable[[bool, Session], object]:
        return begin_savepoint(session, dict(self.runner.bind_arguments))

    async def _undo(self, end: Callable[[bool, Session], object], error: BaseException) -> None:
        def undo(session: Session) -> None:
            end(False, session)
            for work in () if self._root._is_over else self._meanwhile:
                self._root._in_order(work, Interrupter())

        with self.rolling_back(error):
            await carry_to_completion(self.session, undo)

    async def _carry(self, work: Callable[[Session, Interrupter], T], bind: Bind | None) -> T:
        async with self._turn():
            self.raise_if_over()
            try:
                return await carry(self.session, bind, partial(self._root._in_order, work))
            except asyncio.CancelledError:
                await self._end_cancelled()
                raise

    async def _end_cancelled(self) -> None:
        self._root._was_cancelled = self._root._is_over = True
        if self.is_borrowed and isinstance(self.session, Session):
            # PostgreSQL would take its owner's COMMIT, and roll back without a word.
            work = partial(invalidate, dict(self.runner.bind_arguments))
            await carry_to_completion(self.session, work)

    def _in_order(self, work: Callable[[Session, Interrupter], T], interrupter: Interrupter) -> T:
        with self.runner.context():
            return work(synchronous(self.session), interrupter)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._root._is_occupied and _occupied.get() is self._root:
            raise RuntimeError(
                "a function that run_sync() has called awaits the storage, whose turn comes after "
                "that function: call storage.operations with its session, or await afterwards"
            )
        nested = self._nested
        while True:
            with move_on_after(PARENT_WAIT) as limit:
                await self._lock.acquire()
            if not limit.cancelled_caught:
                break
            if nested is not None and self._nested is not None:
                raise RuntimeError(
                    "waited for a nested transaction() of the parent task, which may be waiting "
                    "for this task: start the task inside the nested block"
                )
            nested = self._nested
        try:
            if not self.is_open:
                raise ScopeClosed
            yield
        finally:
            self._lock.release()
