"""Which session factories there are, and what to say of those that will not do."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, cast

from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import SingletonThreadPool, StaticPool

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    AnySession: TypeAlias = Session | AsyncSession
    AnyEngine: TypeAlias = Engine | AsyncEngine

S_co = TypeVar("S_co", covariant=True)

DRIVERS = {
    "postgresql": ("psycopg", "asyncpg", "psycopg2", "pg8000"),
    "mysql": ("pymysql", "asyncmy"),
    "mariadb": ("pymysql", "asyncmy"),
}
"""To use, or to name in an error, where the one of the URL is not installed; the best come first.

SQLite has one that comes with Python.
"""


class _Maker(Protocol[S_co]):
    """A ``sessionmaker`` or an ``async_sessionmaker``."""

    @property
    def class_(self) -> type[S_co]: ...

    def __call__(self, **kw: Any) -> S_co: ...


class _Scoped(Protocol[S_co]):
    """A ``scoped_session`` or an ``async_scoped_session``."""

    @property
    def session_factory(self) -> Any: ...

    def __call__(self, **kw: Any) -> S_co: ...


SessionFactory: TypeAlias = _Maker[S_co] | _Scoped[S_co]

_PASS = "pass a sessionmaker or an async_sessionmaker (or a scoped one)"


def session_factory(factory: object) -> tuple[Callable[[], AnySession], bool]:
    """Return the factory to use, and whether it makes asynchronous sessions.

    :raises TypeError: if it is anything else, or bound to an engine of the other kind
    :raises ValueError: if its engine's pool cannot serve several threads
    """
    # A scoped session is the session of a thread or a task: the application's, not ours to commit.
    maker = getattr(factory, "session_factory", factory)
    made = getattr(maker, "class_", None)
    if not isinstance(made, type) or not callable(maker):
        raise TypeError(f"{_description(factory)} is not a session factory: {_remedy(factory)}")
    if issubclass(made, Session):
        is_async = False
    elif _is_async_session(made):
        is_async = True
    else:
        raise TypeError(f"{_description(factory)} makes {made.__name__}, not a Session: {_PASS}")
    bind = getattr(maker, "kw", {}).get("bind")
    if bind is not None:
        check_bind(getattr(bind, "sync_engine", bind) if is_async else bind, is_async)
    return cast("Callable[[], AnySession]", maker), is_async


def engine_and_factory(url: str | URL, options: dict[str, Any]) -> tuple[AnyEngine, Any]:
    """Return a new engine of the kind that a URL's driver needs, and a session factory on it."""
    url = make_url(url)
    if url.get_backend_name() == "postgres":
        raise ValueError(
            "SQLAlchemy's name for PostgreSQL is 'postgresql': write 'postgresql+psycopg://...' in "
            "place of 'postgres://...'"
        )
    try:
        if url.get_dialect().is_async:
            from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

            async_engine = create_async_engine(url, **options)
            return async_engine, async_sessionmaker(async_engine)
        if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
            # One connection for all threads: each connection would have a database of its own.
            options = {"poolclass": StaticPool, **options}
            arguments = {"check_same_thread": False, **options.get("connect_args", {})}
            options["connect_args"] = arguments
        engine = create_engine(url, **options)
        return engine, sessionmaker(engine)
    except ModuleNotFoundError as error:
        backend = url.get_backend_name()
        names = [*(f"{backend}+{driver}" for driver in DRIVERS.get(backend, ())), backend]
        other = next((name for name in names if name != url.drivername), "postgresql+psycopg")
        raise ModuleNotFoundError(
            f"{url.drivername}:// needs the driver {error.name}, which is not installed: install "
            f"it, or name another one in the URL, as in '{other}://...'",
            name=error.name,
        ) from error


class Registry:
    """The registry of the application's scoped session, in which a call's session stands."""

    def __init__(self, registry: Any) -> None:
        """Give the registry a creation function that knows the sessions of calls.

        Legacy functions end with ``Session.remove()``. The registry then creates anew, and what
        follows must not be in a session outside the transaction.

        :param registry: a ``ScopedRegistry`` of SQLAlchemy's
        """
        self._registry = registry
        made = registry.createfunc
        if not isinstance(made, _CreateFunction):  # of another storage's, on the same registry
            # A registry of threads has no function that tells where it is.
            made = _CreateFunction(made, getattr(registry, "scopefunc", threading.get_ident))
            registry.createfunc = made
        self._create: _CreateFunction = made

    @contextmanager
    def standing_for(self, session: AnySession) -> Iterator[None]:
        """Make a session the one that the application's scoped session gives here.

        :raises RuntimeError: if the registry cannot tell where it is, or if the function put
            another session in its place
        """
        registry, create = self._registry, self._create
        try:
            former = registry() if registry.has() else None
            scope = create.scope()
        except RuntimeError as error:
            raise RuntimeError(
                f"the scoped session cannot be used in run_sync(): {error}. With Flask, say "
                "SQLAlchemyStorage(db.session, db.Model, context=app.app_context)"
            ) from error
        if create.sessions.setdefault(scope, session) is not session:
            raise RuntimeError(
                f"the scoped session's scopefunc gives {scope!r} to two functions at a time, which "
                "would get each other's session: use one that tells threads and tasks apart, or "
                "pass a context= to the storage in which it gives another scope to each call"
            )
        registry.set(session)
        try:
            yield
            if registry.has() and registry() is not session:
                raise RuntimeError(
                    "the function gave the scoped session another session, which is not part of "
                    "the transaction: after remove(), don't call the scoped session with arguments"
                )
        finally:
            if registry.has() and (left := registry()) is not session:
                synchronous(left).close()
            create.sessions.pop(scope, None)
            if former is None:
                registry.clear()
            else:
                registry.set(former)


class _CreateFunction:
    """Creates a registry's sessions; in a scope where a call's session stands, gives that."""

    def __init__(self, create: Callable[[], AnySession], scope: Callable[[], Any]) -> None:
        self.scope = scope
        self.sessions: dict[Any, AnySession] = {}
        self._create = create

    def __call__(self) -> AnySession:
        # The scope is the key that the registry would use for what it creates.
        session = self.sessions.get(self.scope())
        return self._create() if session is None else session


def synchronous(session: AnySession) -> Session:
    """Return the synchronous session that a session is or has."""
    return session if isinstance(session, Session) else session.sync_session


def check_bind(bind: object, is_async: bool) -> None:
    """Refuse what the sessions of a factory cannot work on.

    :raises TypeError: if the two do not go together
    :raises ValueError: if the engine's pool cannot serve several threads
    """
    if not isinstance(bind, (Engine, Connection)) or bind.dialect.is_async != is_async:
        made, needs, other = (
            ("an async_sessionmaker", "create_async_engine()", "a sessionmaker")
            if is_async
            else (
                "a sessionmaker",
                "create_engine() with a synchronous driver",
                "an async_sessionmaker",
            )
        )
        raise TypeError(
            f"{made} is bound to {_description(bind)}: "
            f"give it an engine of {needs}, or pass {other}"
        )
    if isinstance(bind, Engine) and isinstance(bind.pool, SingletonThreadPool):
        raise ValueError(
            "with SingletonThreadPool each thread has a connection of its own, and with SQLite in "
            "memory an empty database of its own: use a file, pass poolclass=StaticPool and "
            "connect_args={'check_same_thread': False} to create_engine(), or name the database "
            "in memory and share it, with poolclass=QueuePool and the URL "
            "'sqlite:///file:NAME?mode=memory&cache=shared&uri=true&check_same_thread=false'"
        )


def _is_async_session(made: type) -> bool:
    # Whoever has made such a class has imported this; without greenlet it cannot be imported.
    asyncio_extension = sys.modules.get("sqlalchemy.ext.asyncio")
    return asyncio_extension is not None and issubclass(made, asyncio_extension.AsyncSession)


def _description(thing: object) -> str:
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    if isinstance(thing, (str, URL)):
        return "a URL"
    dialect = getattr(thing, "dialect", None)
    driver = f" ({dialect.name}+{dialect.driver})" if dialect is not None else ""
    return f"{type(thing).__name__}{driver}"


def _remedy(thing: object) -> str:
    if isinstance(thing, (str, URL)):
        return "use SQLAlchemyStorage.from_url()"
    kind = type(thing).__name__
    if kind in ("Engine", "AsyncEngine"):
        return f"pass {'async_' * kind.startswith('A')}sessionmaker(engine)"
    made = thing if isinstance(thing, type) else type(thing)
    if issubclass(made, Session) or _is_async_session(made):
        return "pass the factory that makes it, a sessionmaker or an async_sessionmaker"
    return _PASS
