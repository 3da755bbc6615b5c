"""Where a session would do no more than open a connection, and SQLAlchemy no more than run a text.

There the storage's own calls go without. Whatever an application has added, a session class of its
own, an engine for each table, a listener, a log of the statements, finds everything as it expects.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, Executable
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.engine.interfaces import BindTyping
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool.base import reset_rollback

from ._statements import AsyncpgExecutor, DriverExecutor, Text
from ._turns import is_shared

if TYPE_CHECKING:
    from ._runners import AnySession

_OF_SESSIONS = (
    "after_begin",
    "before_commit",
    "after_commit",
    "after_rollback",
    "after_soft_rollback",
    "after_transaction_create",
    "after_transaction_end",
)
_OF_ENGINES = (
    "begin",
    "commit",
    "rollback",
    "engine_connect",
    "before_execute",
    "after_execute",
    "before_cursor_execute",
    "after_cursor_execute",
    "set_connection_execution_options",
)
_OF_DIALECTS = ("do_execute", "do_execute_no_params", "handle_error")


@dataclass
class Plain:
    """What there is to use where nothing has been added."""

    session: AnySession
    """Never opened: it lends its engine, and an AsyncSession the way into a greenlet."""
    engine: Engine
    texts: dict[Executable, Text | None] = field(default_factory=dict)
    """The statements that have been compiled for the engine."""

    def __post_init__(self) -> None:
        """Choose what runs statements by the driver."""
        dialect = self.engine.dialect
        self._executor: type[DriverExecutor] = DriverExecutor
        if dialect.driver == "asyncpg":
            self._executor = AsyncpgExecutor
        elif (
            dialect.driver == "psycopg"
            and not dialect.is_async
            and not dialect.positional
            and not is_shared(self.engine)  # only psycopg keeps threads off each other
        ):
            from ._libpq import PsycopgExecutor

            self._executor = PsycopgExecutor

    def is_listened_to(self) -> bool:
        """Tell whether the application has something to do when transactions begin or end."""
        session = self.session if isinstance(self.session, Session) else self.session.sync_session
        return _any(session, _OF_SESSIONS)

    def executor(self) -> type[DriverExecutor] | None:
        """Return what runs statements by the driver, None if it takes SQLAlchemy."""
        engine, dialect = self.engine, self.engine.dialect
        if (
            not isinstance(dialect, (PGDialect, SQLiteDialect, MySQLDialect))
            or dialect.bind_typing is BindTyping.SETINPUTSIZES
            or engine.get_execution_options()
            # Otherwise nobody ends the transaction that a driver has begun.
            or engine.pool._reset_on_return is not reset_rollback
            or engine.logger.isEnabledFor(logging.INFO)
            # SQLAlchemy's own marks that somebody has ever listened save most of the looks. On all
            # connections at once nobody can before SQLAlchemy 2.1.
            or getattr(Connection, "_has_events", False)
            or (getattr(engine, "_has_events", True) and _any(engine, _OF_ENGINES))
            or (getattr(dialect, "_has_events", True) and _any(dialect, _OF_DIALECTS))
        ):
            return None
        return self._executor


def plain(session: AnySession, factory: object) -> Plain | None:
    """Return what to use if a factory's sessions are SQLAlchemy's own, on one engine.

    :param session: a session that the factory has made
    :param factory: an unscoped factory
    """
    inner = session if isinstance(session, Session) else session.sync_session
    kinds: tuple[type, ...] = (sessionmaker, Session)
    if inner is not session:
        from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

        if type(inner) is not Session:
            return None
        kinds = (sessionmaker, async_sessionmaker, AsyncSession)
    # A sessionmaker makes a class of its own from the one that it is given.
    if (
        type(factory) in kinds
        and (type(session) in kinds or type(session).__bases__[0] in kinds)
        and isinstance(inner.bind, Engine)
        and not getattr(factory, "kw", {}).get("binds")
        and not inner.twophase
        and not getattr(inner, "execution_options", None)  # since SQLAlchemy 2.1
    ):
        return Plain(session, inner.bind)
    return None


_listeners: dict[tuple[str, ...], Callable[[Any], Iterable[object]]] = {
    events: operator.attrgetter(*events) for events in (_OF_SESSIONS, _OF_ENGINES, _OF_DIALECTS)
}


def _any(target: Any, events: tuple[str, ...]) -> bool:
    return True in map(bool, _listeners[events](target.dispatch))
