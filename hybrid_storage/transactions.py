"""One transaction with the application: what a storage on its own database can offer.

By default each of the storage's calls has a session of its own. In here are the ways to make the
calls of a task join a session instead, so that the state of a conversation and the application's
rows are committed together or not at all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeAlias, cast

from sqlalchemy.orm import Session, scoped_session
from typing_extensions import TypeVar

from ._cancellation import completed
from ._runners import Runner, carry, synchronous
from ._scopes import Scope, ScopeClosed
from ._turns import long_turn

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

    from ._runners import AnySession

    AnyScopedSession: TypeAlias = scoped_session[Any] | async_scoped_session[Any]

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Session | AsyncSession", default=Any)


class Transactions(Generic[S]):
    """The part of the storage that opens, joins and ends transactions."""

    def __init__(self, runner: Runner) -> None:
        """Remember what runs the calls that join nothing.

        :param runner: the storage's runner
        """
        self._runner = runner
        self._scope: ContextVar[Scope | None] = ContextVar("scope", default=None)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[S]:
        """Make the calls of this task, and whatever is done with the session, one transaction::

            async with storage.transaction() as session:
                session.add(Order(...))
                await state.set_state(Form.paid)

        It commits at the end of the block, and rolls back on any exception or cancellation. Inside
        of another scope of the storage's it is a savepoint of that one's transaction: an exception
        undoes the inner block, and whoever catches it goes on with the rest. Nothing in here is
        retried.

        :return: a context manager that gives an ``AsyncSession`` or a ``Session``, as the factory
            makes them
        """
        scope = self._scope.get()
        if scope is not None and scope.is_open:
            async with scope.savepoint():
                yield cast("S", scope.session)
            return
        session, bind = self._runner.open()
        async with long_turn(bind):
            succeeded = False
            try:
                async with self.using(session):
                    synchronous(session).begin()
                    yield cast("S", session)
                succeeded = True
            finally:
                end = partial(_end, synchronous(session), succeeded)
                await completed(carry(session, end))

    @asynccontextmanager
    async def using(self, session: AnySession | AnyScopedSession) -> AsyncIterator[None]:
        """Make the calls of this task join a session of yours, ``FSMContext``'s included.

        They neither commit nor flush; whether they come to pass is up to the session's owner.
        Concurrent calls inside queue. A synchronous session is used in worker threads meanwhile.
        Nothing in here is retried.

        :param session: a ``Session`` or an ``AsyncSession``, or a scoped one
        :raises TypeError: if it is neither
        """
        scope = Scope(_unscoped(session))
        token = self._scope.set(scope)
        try:
            yield
        finally:
            self._scope.reset(token)
            await scope.close()

    async def run_sync(
        self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call synchronous code with a session: in this task's transaction, or in one of its own.

        With a synchronous factory it runs in a worker thread, with an asynchronous one in a
        greenlet, where it must not block by anything but the session. It is never called twice.
        Cancelled once begun, it is finished first. In a transaction of its own, that is committed
        when the function returns, and the objects it has loaded expire: return plain values.

        :param function: gets a ``Session`` and the arguments
        :raises TypeError: if the function is asynchronous
        :return: what the function returns
        """
        if iscoroutinefunction(function):
            raise TypeError(
                f"run_sync() takes a synchronous function: await {function.__name__}() yourself, "
                "with the session of storage.transaction()"
            )
        work: Callable[[Session], T] = lambda session: function(session, *args, **kwargs)  # noqa: E731
        try:
            return await self._join(work)
        except ScopeClosed:
            return await self._runner.run(work)

    async def _join(self, function: Callable[[Session], T]) -> T:
        scope = self._scope.get()
        if scope is None or not scope.is_open:
            raise ScopeClosed
        return await scope.run(function)


def _end(session: Session, succeeded: bool) -> None:
    with session:  # closing rolls back what has not been committed
        if succeeded:
            session.commit()


def _unscoped(session: AnySession | AnyScopedSession) -> AnySession:
    # A scoped session stands for that of a task or thread; a worker thread would get another.
    own: object = session
    if hasattr(session, "registry"):
        own = cast("AnyScopedSession", session)()
    if isinstance(own, Session) or isinstance(getattr(own, "sync_session", None), Session):
        return cast("AnySession", own)
    raise TypeError(f"using() takes a Session or an AsyncSession that you have opened, not {own!r}")
