"""One transaction on connections of the storage's own, joined by a session of the application's.

Legacy functions commit, roll back and close the session that they get. Here the transaction is that
of the connections: SQLAlchemy's ``join_transaction_mode="create_savepoint"`` makes a commit of the
session's a savepoint of theirs, and nothing is there for others before all is. For ``scopes.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Connection, event
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.engine import Transaction, TwoPhaseTransaction
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction

from .factories import synchronous
from .runner import Connect, connected
from .savepoints import begin_for_real
from .slots import Bind, is_shared

if TYPE_CHECKING:
    from .factories import AnySession

_STATEMENTS = ("before_cursor_execute", "begin", "commit", "rollback", "savepoint")
_BLOCKS = (
    "this session blocks the event loop: a statement that waits, for a row lock or for SQLite's "
    "file, stops every handler of the bot, for ever if one of them holds the lock. Use it in a "
    "worker thread instead: `await storage.run_sync(lambda session: session.execute(...))`, or "
    "`await storage.run_sync(function, ...)` for a function that takes the session first. If you "
    "know that it does not wait, say `transaction(allow_blocking=True)`"
)

_ENDED = (
    "the block that this session belongs to is over, and its connection given back: open another "
    "`storage.transaction()`, and let no function keep the session that it was given"
)


class JoinedConnections:
    """The connections of one transaction: one for each engine that the session asks for."""

    def __init__(self, *, is_one: bool, twophase: bool, blocks_in: int | None) -> None:
        """Open none so far.

        :param is_one: whether all is one transaction, whatever the session commits
        :param twophase: whether to prepare on all connections before committing on the first
        :param blocks_in: the thread in which statements are refused, None for no thread
        """
        self.is_one: bool = is_one
        self._twophase = twophase
        self._blocks_in = blocks_in
        self._stack = ExitStack()
        self._connections: dict[Bind, Connection] = {}
        self._transactions: list[Transaction] = []
        self._savepoints: list[list[Transaction]] = []
        self._has_ended = False

    def connection(self, bind: Bind, connect: Connect = connected) -> Connection:
        """Return the connection to use in place of an engine, begun if it is the first time."""
        connection = self._connections.get(bind)
        if connection is not None:
            return connection
        if self._has_ended:
            raise InvalidRequestError(_ENDED)
        self.refuse()
        connection = self._stack.enter_context(connect(bind))
        if self.is_one:
            self._transactions.append(self._begun(connection))
        self._connections[bind] = connection
        for savepoints in self._savepoints:
            savepoints.append(connection.begin_nested())
        if self._blocks_in is not None and connection is not bind:
            for name in _STATEMENTS:
                event.listen(connection, name, self.refuse)
        return connection

    def limit_waits(self, connection: Connection, seconds: float) -> None:
        """Have the server end each wait for a lock: it sees no deadlock with a task that waits."""
        self._stack.enter_context(_lock_timeout(connection, seconds))

    def _begun(self, connection: Connection) -> Transaction:
        if connection.in_transaction():  # of a test suite's, which will roll it back
            return connection.begin_nested()
        transaction = connection.begin_twophase() if self._twophase else connection.begin()
        begin_for_real(connection)
        return transaction

    def refuse(self, *_: object) -> None:
        """Refuse what would block the event loop.

        :raises InvalidRequestError: in the event loop's thread
        """
        if self.would_block():
            raise InvalidRequestError(_ENDED if self._has_ended else _BLOCKS)

    def would_block(self) -> bool:
        """Tell whether a statement would block the event loop."""
        return self._blocks_in == threading.get_ident()

    def savepoint(self) -> None:
        """Begin what can be undone by itself."""
        self._savepoints.append([each.begin_nested() for each in self._connections.values()])

    def end_savepoint(self, *, commits: bool) -> None:
        """Keep or undo what has been done since the last savepoint."""
        savepoints = self._savepoints.pop()
        try:
            for savepoint in reversed(savepoints):
                if savepoint.is_active:
                    savepoint.commit() if commits else savepoint.rollback()
        except BaseException:
            if commits:  # they will be undone
                self._savepoints.append(savepoints)
            raise

    def end(self, *, commits: bool) -> None:
        """Commit or roll back on all connections, and give them back."""
        with self._stack:
            # Before they are given back, and after the commit, whose listeners may use the session.
            self._stack.callback(self._forget)
            if commits:
                for each in self._transactions:
                    if isinstance(each, TwoPhaseTransaction) and len(self._transactions) > 1:
                        each.prepare()
            for each in self._transactions:
                if commits:
                    each.commit()
                else:
                    self._roll_back(each)

    def _roll_back(self, transaction: Transaction) -> None:
        try:
            transaction.rollback()
        except BaseException:
            # The pool would hand on a connection whose transaction is open, and whoever gets it
            # would never commit.
            if not is_shared(transaction.connection.engine):
                transaction.connection.invalidate()
            raise

    def _forget(self) -> None:
        self._has_ended = True
        self._connections.clear()


class JoinedSession(Session):
    """What is added to the application's own session class."""

    joined: JoinedConnections

    def chosen_bind(self, **arguments: Any) -> Bind:
        """Return what the application's own rules choose."""
        return super().get_bind(**arguments)

    def get_bind(self, *args: Any, **kwargs: Any) -> Connection:
        """Return the transaction's connection to what the application's own rules choose."""
        self.joined.refuse()  # whoever asks is about to execute a statement
        return self.joined.connection(super().get_bind(*args, **kwargs))

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Flush, unless that would block the event loop: refused later, the session would fail."""
        if self.new or self.dirty or self.deleted:
            self.joined.refuse()
        super().flush(objects)

    def begin(self, nested: bool = False) -> SessionTransaction:
        """Begin, or begin a savepoint in what has begun: ``with session.begin():`` works."""
        nested = nested or self.in_transaction()
        if nested:
            self.joined.refuse()  # refused later, the session would fail
        return super().begin(nested=nested)

    def close(self) -> None:
        """Close; in the event loop's thread, where that would block, only forget all objects."""
        if self.joined.would_block():
            self.expunge_all()
        else:
            super().close()

    def reset(self) -> None:
        """Do what :meth:`close` does."""
        if self.joined.would_block():
            self.expunge_all()
        else:
            super().reset()

    def invalidate(self) -> None:
        """Close the connections: the transaction cannot go on. Not in the event loop's thread."""
        self.joined.refuse()
        super().invalidate()

    def commit(self) -> None:
        """Release the session's savepoint, unless that would block the event loop."""
        self.joined.refuse()
        super().commit()

    def rollback(self) -> None:
        """Roll back to the session's savepoint, unless that would block the event loop."""
        self.joined.refuse()
        super().rollback()


@cache
def joining(base: type[Session]) -> type[JoinedSession]:
    """Return a session class that joins, derived from one of the application's."""
    return cast("type[JoinedSession]", type(base.__name__, (JoinedSession, base), {}))


def open_joined(
    factory: Any, is_async: bool, *, is_one: bool, allow_blocking: bool
) -> tuple[AnySession, JoinedSession]:
    """Return a new session that joins connections of its own, and its synchronous side."""
    settings: dict[str, Any] = getattr(factory, "kw", {})
    options: dict[str, Any] = {}
    if is_one:
        options = {"join_transaction_mode": "create_savepoint", "twophase": False}
    if "close_resets_only" in settings:  # for a function that goes on after remove()
        options["close_resets_only"] = True
    session: AnySession
    if is_async:
        base = settings.get("sync_session_class") or factory.class_.sync_session_class
        session = factory(sync_session_class=joining(base), **options)
    else:
        joined_factory = copy(factory)  # to be called: one of a class of its own may do more
        joined_factory.class_ = joining(factory.class_)
        session = joined_factory(**options)
    side = cast("JoinedSession", synchronous(session))
    side.joined = JoinedConnections(
        is_one=is_one,
        twophase=bool(settings.get("twophase")),
        blocks_in=None if is_async or allow_blocking else threading.get_ident(),
    )
    return session, side


@contextmanager
def _lock_timeout(connection: Connection, seconds: float) -> Iterator[None]:
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
            # After the commit, or the rollback, before which it might be refused. So an error would
            # tell of no transaction that has failed; the pool gives no lost connection out again.
            with suppress(DBAPIError):
                if not connection.invalidated:
                    connection.exec_driver_sql(f"{variable} = {former}")
    else:
        yield
