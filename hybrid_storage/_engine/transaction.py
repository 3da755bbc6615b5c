"""A scope whose session is the storage's own: one transaction. For ``transactions.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError
from sqlalchemy.orm import Session

from .calls import leave_wrong_server
from .cancellation import Interrupter
from .errors import is_lock_timeout, is_missing_savepoint, is_of_the_wrong_server
from .factories import Registry
from .joined import JoinedSession
from .runner import Connect, Runner, carry_to_completion, connected
from .scopes import Scope
from .slots import WAITS_FOR_PARENT, Bind, exclusive

if TYPE_CHECKING:
    from .factories import AnySession

T = TypeVar("T")

_ENDED_BELOW = (
    "the transaction has ended before its block: MariaDB and MySQL commit it where a statement "
    "defines something (CREATE, ALTER, DROP, TRUNCATE), and what came before stays; a deadlock, or "
    "MariaDB's error 1020, rolls it back: run it again; a COMMIT or ROLLBACK sent as text ends it, "
    "too; an engine with the isolation level AUTOCOMMIT has none. Create tables outside of "
    "transaction()"
)


class TransactionScope(Scope):
    """A scope with a session of the storage's own, on connections that it keeps to its end."""

    def __init__(
        self,
        session: AnySession,
        side: JoinedSession,
        bind: Bind,
        runner: Runner,
        registry: Registry | None,
        *,
        connect: Connect = connected,
        lock_timeout: float | None = None,
    ) -> None:
        """Remember the session; ``lock_timeout`` is how many seconds to wait for a lock."""
        super().__init__(session, runner, registry)
        self.is_borrowed = False
        self._side = side
        self._bind = bind
        self._connect = connect
        self._lock_timeout = lock_timeout
        self._connection: Connection | None = None
        self._wrong_server: DBAPIError | None = None  # its answer

    async def begin(self) -> None:
        """Check out the connection, for code that uses the session without the storage."""
        await self._carry(lambda session, interrupter: None, self._bind)

    async def end(self, succeeded: bool) -> None:
        """Commit or roll back, and give the connections back, even if the caller is cancelled.

        :raises PendingRollbackError: if a call was cancelled and the block went on all the same
        """
        commits = succeeded and not self._is_over
        await carry_to_completion(self.session, partial(self._end, commits=commits))
        if succeeded:
            self.raise_if_over()

    def _begin(self) -> None:
        if self._connection is None:
            self._connection = self._side.joined.connection(self._bind, self._connect)
            if self._lock_timeout is not None:
                self._side.joined.limit_waits(self._connection, self._lock_timeout)
        if not self._side.autobegin and not self._side.in_transaction():
            self._side.begin()

    def _end(self, session: Session, *, commits: bool) -> None:
        self.is_open = False
        committed = False
        try:
            with self._alone():
                if commits and session.in_transaction():
                    session.commit()
            committed = commits
        finally:
            with self._alone():
                try:
                    # Two tasks may have used the session at a time: that is the error to see.
                    with nullcontext() if commits else suppress(IllegalStateChangeError):
                        session.close()
                finally:
                    # Not before: the application may have said READ ONLY, and go on at a savepoint.
                    if self._wrong_server and self._connection and not committed:
                        leave_wrong_server(self._connection, self._wrong_server)
                    self._side.joined.end(commits=committed)
                    self.is_committed = committed

    def _in_order(self, work: Callable[[Session, Interrupter], T], interrupter: Interrupter) -> T:
        with self._alone():
            self._begin()
            return work(self._side, interrupter)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with exclusive(self._bind), self.runner.context():
            try:
                yield
            except DBAPIError as error:
                if is_of_the_wrong_server(error):
                    self._wrong_server = error
                if self._lock_timeout is not None and is_lock_timeout(error):
                    error.add_detail(WAITS_FOR_PARENT.format(self._lock_timeout))
                elif is_missing_savepoint(error):
                    error.add_detail(_ENDED_BELOW)
                # Errors about savepoints that are gone must not take a cancellation's place.
                if not self._is_over:
                    raise

    def _own_connection(self, session: Session) -> Connection | None:
        return self._connection

    def _bind_of(self, arguments: dict[str, Any]) -> Bind:
        return self._bind

    def _begin_savepoint(
        self, session: Session, _: Interrupter
    ) -> Callable[[bool, Session], object]:
        if session.in_nested_transaction():  # the handler's own begin_nested(), to be kept
            return super()._begin_savepoint(session, _)
        # Below the session's own savepoint, or a function that commits would release both.
        _release(session)
        self._side.joined.savepoint()
        return self._end_savepoint

    def _end_savepoint(self, commits: bool, session: Session) -> None:
        with self._alone():
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
