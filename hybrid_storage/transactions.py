"""One transaction with the application: what a storage on its own database can offer.

By default each of the storage's calls has a session of its own. In here are the ways to make the
calls of a task join a session instead, so that the state of a conversation and the application's
rows are committed together or not at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from inspect import iscoroutinefunction, signature
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeAlias, cast

from sqlalchemy.orm import Session, scoped_session
from typing_extensions import TypeVar

from ._engine.access import Access
from ._engine.factories import Registry, check_bind
from ._engine.joined import JoinedSession, open_joined
from ._engine.retries import warning_if_slow
from ._engine.runner import checked_out
from ._engine.scopes import Scope, ScopeClosed
from ._engine.slots import (
    PARENT_WAIT,
    Bind,
    PoolState,
    is_held_by_parent,
    pool_state,
    transaction_slot,
)
from ._engine.transaction import TransactionScope
from .unit_of_work import UnitsOfWork

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

    from ._engine.factories import AnySession

    AnyScopedSession: TypeAlias = scoped_session[Any] | async_scoped_session[Any]

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Session | AsyncSession", default=Any)


class Transactions(Generic[S]):
    """The part of the storage that opens, joins and ends transactions."""

    def __init__(self, access: Access, units: UnitsOfWork, registry: object) -> None:
        """Remember what runs the calls that join nothing.

        :param access: how the storage's calls reach the database
        :param units: the units of work that its tasks have open
        :param registry: the registry of a scoped session, None if the factory is not scoped
        """
        self._access: Access = access
        self._runner = access.runner
        self.units: UnitsOfWork = units
        self._registry = None if registry is None else Registry(registry)

    @asynccontextmanager
    async def transaction(self, *, allow_blocking: bool = False) -> AsyncIterator[S]:
        """Make the calls of this task, and whatever is done with the session, one transaction::

            async with storage.transaction() as session:
                session.add(Order(...))
                await state.set_state(Form.paid)

        It commits at the end of the block, and rolls back on any exception or cancellation. Nested
        in another block of the same task, it is a savepoint: an exception undoes the inner block,
        and whoever catches it goes on with the rest. Nothing in here is retried.

        The transaction belongs to the task that opened it. Single calls of tasks started inside
        join it while it is open; a ``transaction()`` of theirs is one of its own, in which no wait
        for a lock takes longer than 10 seconds, since the lock may be the parent's.

        :param allow_blocking: let a synchronous session be used in the event loop's thread, where
            each of its statements stops every handler for as long as it waits
        :raises RuntimeError: if it waits for a connection, or in SQLite for the write lock, that
            a transaction of its own task or of its parents holds
        :raises PendingRollbackError: if a call in the block was cancelled and the block went on
        :return: a context manager that gives an ``AsyncSession`` or a ``Session``, as the factory
            makes them
        """
        scope = self._access.scope()
        if scope is not None and scope.task is asyncio.current_task():
            with self.units.undone_on_failure():
                async with scope.savepoint() as inner, self._joining(inner):
                    yield cast("S", inner.session)
            return
        with self.units.undone_on_failure() as block:
            async with self._own_transaction(allow_blocking=allow_blocking) as session:
                block.scope = self._access.scope()
                yield cast("S", session)
                await self.units.write()
        await self._committed(session)

    async def _committed(self, session: AnySession) -> None:
        """Do what has to wait for the commit of a ``transaction()``, by its session."""

    @asynccontextmanager
    async def using(self, session: AnySession | AnyScopedSession) -> AsyncIterator[None]:
        """Make the calls of this task join a session of yours, ``FSMContext``'s included.

        They neither commit nor flush; whether they come to pass is up to the session's owner.
        Concurrent calls inside queue. A synchronous session is used in worker threads meanwhile.
        Nothing in here is retried.

        :param session: a ``Session`` or an ``AsyncSession``, or a scoped one
        :raises TypeError: if it is neither
        :raises PendingRollbackError: if a call in the block was cancelled and the block went on
        """
        scope = Scope(_unscoped(session), self._runner, self._registry)
        try:
            async with self._joining(scope):
                yield
        finally:
            self.units.forget()
        scope.raise_if_over()

    async def run_sync(
        self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call synchronous code with a session: in this task's transaction, or in one of its own.

        With a synchronous factory it runs in a worker thread, with an asynchronous one in a
        greenlet, where it must not block by anything but the session. It is never called twice.
        Cancelled, it ends with the statement under way, where the driver can end that, and what it
        has written is rolled back. In a transaction of its own, that is committed when the
        function returns, and the objects it has loaded expire: return plain values.

        :param function: gets a ``Session`` and the arguments
        :raises TypeError: if the function is asynchronous
        :return: what the function returns
        """
        if not callable(function):
            raise TypeError(
                f"run_sync() takes a function, and its arguments after it, not {function!r}: "
                "run_sync(place_order, 'tea') in place of run_sync(place_order('tea'))"
            )
        if iscoroutinefunction(function):
            raise TypeError(
                f"run_sync() takes a synchronous function: await {function.__name__}() yourself, "
                "with the session of storage.transaction()"
            )
        name = getattr(function, "__qualname__", repr(function))
        _check_call(function, name, args, kwargs)
        work: Callable[[Session], T] = lambda session: function(session, *args, **kwargs)  # noqa: E731
        scope = self._access.scope()
        with warning_if_slow(self._access.slow_after, f"run_sync({name})"):
            try:
                if scope is not None:
                    await self.units.write()  # so that the function sees it
                    with suppress(ScopeClosed):
                        return await scope.run(work)
                return await self._in_own_transaction(work)
            finally:
                self.units.forget()  # what it may have written

    @asynccontextmanager
    async def _own_transaction(self, *, allow_blocking: bool = False) -> AsyncIterator[AnySession]:
        """Open a transaction that takes no part in units of work."""
        session, side, bind = self._open(allow_blocking=allow_blocking)
        pool = pool_state(bind)
        lock_timeout = PARENT_WAIT if is_held_by_parent(pool) else None
        async with transaction_slot(pool):
            own = TransactionScope(
                session,
                side,
                bind,
                self._runner,
                self._registry,
                lock_timeout=lock_timeout,
            )
            async with self._ending(own), self._joining(own):
                await own.begin()
                yield session

    async def _in_own_transaction(self, function: Callable[[Session], T]) -> T:
        async def in_slot(pool: PoolState | None) -> T:
            session, side, bind = self._open(is_one=False)
            connect = partial(checked_out, pool=pool)
            own = TransactionScope(
                session, side, bind, self._runner, self._registry, connect=connect
            )
            async with self._ending(own):
                return await own.run(function)

        _, bind = self._runner.open(self._runner.bind_arguments)
        return await self._runner.in_slot(bind, True, in_slot)

    def _open(
        self, *, is_one: bool = True, allow_blocking: bool = False
    ) -> tuple[AnySession, JoinedSession, Bind]:
        runner = self._runner
        with runner.context():
            session, side = open_joined(
                runner.factory, runner.is_async, is_one=is_one, allow_blocking=allow_blocking
            )
            bind = side.chosen_bind(**runner.bind_arguments)
        check_bind(bind, runner.is_async)
        return session, side, bind

    @asynccontextmanager
    async def _joining(self, scope: Scope) -> AsyncIterator[None]:
        token = self._access.joined.set(scope)
        try:
            yield
        finally:
            await scope.close()
            with suppress(ValueError):  # left in another context than entered
                self._access.joined.reset(token)

    @asynccontextmanager
    async def _ending(self, scope: TransactionScope) -> AsyncIterator[None]:
        try:
            yield
        except BaseException as error:
            with scope.rolling_back(error):
                await scope.end(False)
            raise
        await scope.end(True)


def _check_call(
    function: Callable[..., object], name: str, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    with suppress(ValueError):  # some of C's functions do not tell
        try:
            signature(function).bind(None, *args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"{name}() cannot be called with a session and these arguments: {error}. "
                "run_sync() passes the session first; for a function that takes none, write "
                "run_sync(lambda session: function())"
            ) from error


def _unscoped(session: AnySession | AnyScopedSession) -> AnySession:
    # A scoped session stands for that of a task or thread; a worker thread would get another.
    own: object = session
    if hasattr(session, "registry"):
        own = cast("AnyScopedSession", session)()
    if isinstance(own, Session) or isinstance(getattr(own, "sync_session", None), Session):
        return cast("AnySession", own)
    raise TypeError(f"using() takes a Session or an AsyncSession that you have opened, not {own!r}")
