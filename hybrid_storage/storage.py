"""The storage as aiogram sees it: translate, pick the operation, let the runner carry it out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar, overload

from aiogram.fsm.storage.base import BaseStorage, KeyBuilder, StateType, StorageKey
from anyio import CapacityLimiter
from sqlalchemy import (
    URL,
    Connection,
    Dialect,
    Engine,
    MetaData,
    Table,
    create_engine,
    inspect,
    make_url,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.orm import sessionmaker as sync_sessionmaker

from ._codec import Codec, JsonDumps, JsonLoads
from ._factories import session_factory
from ._leases import Leases
from ._retries import persist
from ._rows import Rows
from ._runners import Runner
from ._scopes import ScopeClosed
from ._statements import Operation, Steps
from ._threads import in_thread
from .isolation import SQLAlchemyEventIsolation
from .keys import FullKeyBuilder
from .model import FSMData, HasMetaData, declare_lock_table, model_for
from .operations import Operations
from .transactions import S, Transactions

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import (
        AsyncEngine,
        async_scoped_session,
        async_sessionmaker,
    )
    from sqlalchemy.orm import scoped_session

    SessionFactory: TypeAlias = (
        sync_sessionmaker[Any]
        | scoped_session[Any]
        | async_sessionmaker[Any]
        | async_scoped_session[Any]
    )

P = ParamSpec("P")
T = TypeVar("T")

RETRY_FOR = 30.0  # seconds: a server's restart, a short failover


class SQLAlchemyStorage(Transactions[S], BaseStorage):
    """Keeps states and data of aiogram's FSM in a table, one row a conversation.

    Every method may be called by any number of tasks, threads and processes at once. A call that
    is cancelled before its turn does nothing; one that has begun is finished before the
    cancellation goes on, so that no write lands late.
    """

    model: type[FSMData]
    """The mapped class, for queries and admin panels of your own."""
    table: Table
    """The model's table."""
    metadata: MetaData
    """The table's metadata."""
    operations: Operations
    """The same operations for a session of your own, without ``await``."""

    @overload
    def __init__(
        self,
        sessionmaker: SessionFactory,
        metadata: MetaData | type[HasMetaData] | None = None,
        table_name: str | type[FSMData] = "aiogram_fsm_data",
        key_builder: KeyBuilder | None = None,
        json_dumps: JsonDumps = json.dumps,
        json_loads: JsonLoads = json.loads,
        *,
        limiter: CapacityLimiter | None = None,
        retry_for: float = RETRY_FOR,
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        session: SessionFactory,
        base: MetaData | type[HasMetaData] | None = None,
        table_name: str | type[FSMData] = "aiogram_fsm_data",
        key_builder: KeyBuilder | None = None,
        json_dumps: JsonDumps = json.dumps,
        json_loads: JsonLoads = json.loads,
    ) -> None: ...
    def __init__(
        self,
        sessionmaker: SessionFactory | None = None,
        metadata: MetaData | type[HasMetaData] | None = None,
        table_name: str | type[FSMData] = "aiogram_fsm_data",
        key_builder: KeyBuilder | None = None,
        json_dumps: JsonDumps = json.dumps,
        json_loads: JsonLoads = json.loads,
        *,
        limiter: CapacityLimiter | None = None,
        retry_for: float = RETRY_FOR,
        session: SessionFactory | None = None,
        base: MetaData | type[HasMetaData] | None = None,
    ) -> None:
        """Declare the table on the metadata; nothing is sent to the database yet.

        :param sessionmaker: an ``async_sessionmaker``, or a synchronous ``sessionmaker`` whose
            sessions are then used in worker threads; of a scoped session the factory is used
        :param metadata: the ``MetaData`` or the declarative base to declare the table on, so that
            ``create_all`` and Alembic see it; by default a ``MetaData`` of the storage's own
        :param table_name: the table's name, or a model of your own that inherits from ``FSMData``
        :param key_builder: makes the row's id of a key, called without ``part``; by default
            :class:`FullKeyBuilder`
        :param json_dumps: makes JSON of a dict, as ``str`` or as UTF-8 ``bytes``
        :param json_loads: makes a dict of JSON, given as ``str``
        :param limiter: limits the calls that use the database at a time; by default the number of
            connections that the engine's pool can give. Storages may share one
        :param retry_for: how many seconds to go on trying where the database drops the connection,
            restarts, is busy, or resolves a deadlock at the call's cost; then its last error is
            raised. 0 tries once
        :param session: deprecated, ``sessionmaker`` under its former name
        :param base: deprecated, ``metadata`` under its former name
        :raises TypeError: if an argument is not of its kind
        :raises ValueError: if the table's name is taken by a different table, or if the engine
            keeps a database in memory that threads cannot share
        """
        factory = _renamed("sessionmaker", sessionmaker, "session", session)
        if factory is None:
            raise TypeError("SQLAlchemyStorage() needs a sessionmaker or an async_sessionmaker")
        self.model = model_for(_renamed("metadata", metadata, "base", base), table_name)
        self._rows = Rows(self.model)
        self.table = self._rows.table
        self.metadata = self.table.metadata
        self._tables = [self.table]
        for name, function in {"json_dumps": json_dumps, "json_loads": json_loads}.items():
            if not callable(function):
                raise TypeError(f"{name} is a function, not {function!r}")
        if limiter is not None and not isinstance(limiter, CapacityLimiter):
            raise TypeError(f"limiter is an anyio.CapacityLimiter, not {limiter!r}")
        if key_builder is not None and not isinstance(key_builder, KeyBuilder):
            raise TypeError(f"key_builder is a KeyBuilder, not {key_builder!r}")
        self._codec = Codec(
            key_builder or FullKeyBuilder(), json_dumps, json_loads, self.table.fullname
        )
        self.operations = Operations(self._rows, self._codec)
        super().__init__(Runner(*session_factory(factory), self._rows.bind_arguments, limiter))
        if retry_for < 0:
            raise ValueError(f"retry_for is a number of seconds, 0 or more, not {retry_for!r}")
        self._retry_for = retry_for
        self._owned: Engine | AsyncEngine | None = None

    @classmethod
    def from_url(
        cls,
        url: str | URL,
        *,
        metadata: MetaData | type[HasMetaData] | None = None,
        table_name: str | type[FSMData] = "aiogram_fsm_data",
        key_builder: KeyBuilder | None = None,
        json_dumps: JsonDumps = json.dumps,
        json_loads: JsonLoads = json.loads,
        limiter: CapacityLimiter | None = None,
        retry_for: float = RETRY_FOR,
        **engine_options: Any,
    ) -> SQLAlchemyStorage:
        """Make a storage with an engine of its own, which :meth:`close` disposes.

        :param url: the database, by a synchronous or an asynchronous driver
        :param engine_options: passed to ``create_engine`` or ``create_async_engine``; for the
            other parameters see the class
        :return: the storage
        """
        url = make_url(url)
        engine: Engine | AsyncEngine
        factory: SessionFactory
        if url.get_dialect().is_async:
            from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

            engine = create_async_engine(url, **engine_options)
            factory = async_sessionmaker(engine)
        else:
            engine = create_engine(url, **engine_options)
            factory = sync_sessionmaker(engine)
        storage = cls(
            factory,
            metadata,
            table_name,
            key_builder,
            json_dumps,
            json_loads,
            limiter=limiter,
            retry_for=retry_for,
        )
        storage._owned = engine
        return storage

    async def create_table(self) -> None:
        """Create the table unless it is there, with that of event isolation where it is used.

        Several processes may do so at once. Fit for ``dp.startup.register(storage.create_table)``.
        """
        try:
            await self._define(self._create_tables)
        except DBAPIError:
            # Another process may have created it between the look and the statement.
            if not await self._define(self._has_tables):
                raise

    def create_isolation(
        self, *, lease: float = 30.0, poll: float = 0.5, wait: float | None = None
    ) -> SQLAlchemyEventIsolation:
        """Return event isolation by locks in a table beside the storage's, ``<table_name>_lock``.

        Afterwards :meth:`create_table` makes that table too.

        :param lease: after how many seconds the locks of a process that died end; they are renewed
            three times as often while a handler runs
        :param poll: the longest pause in seconds between two looks at a lock that another process
            has; pauses begin at 20 ms, grow, and are of random length
        :param wait: how many seconds to wait for a lock at most; by default without limit
        :raises ValueError: if one of them is not above 0, or if the table's name is taken
        :return: what to pass as ``Dispatcher(events_isolation=...)``
        """
        table = declare_lock_table(self.model)
        self._tables = [self.table, table]
        return SQLAlchemyEventIsolation(
            self._runner,
            Leases(table, self._rows.bind_arguments),
            self._codec.row,
            lease=lease,
            poll=poll,
            wait=wait,
            retry_for=self._retry_for,
        )

    async def close(self) -> None:
        """Dispose the engine if :meth:`from_url` made it; the application's is left alone.

        The storage can be used afterwards: aiogram closes it before the application's own
        shutdown handlers run.
        """
        if isinstance(self._owned, Engine):
            await in_thread(self._owned.dispose)
        elif self._owned is not None:
            await self._owned.dispose()

    async def get_state(self, key: StorageKey) -> str | None:
        """Return the state of a conversation.

        :param key: the conversation's key
        :return: the state's name, None if there is none
        """
        return await self._read(self._rows.get_state, key)

    async def set_state(self, key: StorageKey, state: StateType = None) -> None:
        """Set or remove the state of a conversation.

        :param key: the conversation's key
        :param state: the state or its name; None removes it
        :raises TypeError: if it is neither
        :raises ValueError: if the database cannot hold it
        """
        await self._write(self._rows.set_state, key, self._codec.state(state))

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        """Return the data of a conversation.

        :param key: the conversation's key
        :raises CorruptDataError: if the row's data is not the JSON text of an object
        :return: the data, empty if there is none; the caller's to change
        """
        return self._codec.load(key, await self._read(self._rows.get_data, key))

    async def set_data(self, key: StorageKey, data: Mapping[str, Any]) -> None:
        """Replace the data of a conversation.

        :param key: the conversation's key
        :param data: the new data; an empty one removes it
        :raises DataNotDictLikeError: if it is no mapping
        :raises ValueError: if the database cannot hold it; or whatever ``json_dumps`` raises
        """
        await self._write(self._rows.set_data, key, self._codec.dump(data))

    @overload
    async def get_value(self, storage_key: StorageKey, dict_key: str) -> Any | None: ...
    @overload
    async def get_value(self, storage_key: StorageKey, dict_key: str, default: Any) -> Any: ...
    async def get_value(self, storage_key: StorageKey, dict_key: str, default: Any = None) -> Any:
        """Return one field of a conversation's data.

        :param storage_key: the conversation's key
        :param dict_key: the field's name
        :param default: returned where there is no such field
        :raises CorruptDataError: if the row's data is not the JSON text of an object
        """
        return (await self.get_data(storage_key)).get(dict_key, default)

    async def update_data(self, key: StorageKey, data: Mapping[str, Any]) -> dict[str, Any]:
        """Change fields of a conversation's data, losing none that others change meanwhile.

        :param key: the conversation's key
        :param data: the fields to set, as in ``dict.update``
        :raises DataNotDictLikeError: if it is no mapping
        :raises CorruptDataError: if the row's data is not the JSON text of an object
        :raises ValueError: if the database cannot hold it; or whatever ``json_dumps`` raises
        :return: the whole data, as stored
        """
        changes = self._codec.dump(data)
        if not changes:
            return await self.get_data(key)
        merge = self._codec.merge(key, changes)
        await self._write(self._rows.update_data, key, merge)
        return merge.data

    async def clear(self, key: StorageKey) -> None:
        """Remove state and data of a conversation in one statement.

        :param key: the conversation's key
        """
        await self._write(self._rows.clear, key)

    def _read(self, operation: Callable[[Dialect, str], Steps[T]], key: StorageKey) -> Awaitable[T]:
        row = self._codec.row(key)
        return self._run(lambda database: operation(database, row), row, writes=False)

    def _write(
        self,
        operation: Callable[Concatenate[Dialect, str, P], Steps[T]],
        key: StorageKey,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Awaitable[T]:
        row = self._codec.row(key)
        return self._run(lambda database: operation(database, row, *args, **kwargs), row)

    def _run(self, operation: Operation[T], what: str, *, writes: bool = True) -> Awaitable[T]:
        run = self._run_alone if self._scope.get() is None else self._run_in_scope
        return run(operation, what, writes)

    async def _run_in_scope(self, operation: Operation[T], what: str, writes: bool) -> T:
        connect = self._rows.to_write if writes else self._rows.to_read
        try:
            return await self._join(lambda session: connect(session).perform(operation))
        except ScopeClosed:
            return await self._run_alone(operation, what, writes)

    def _run_alone(self, operation: Operation[T], what: str, writes: bool = True) -> Awaitable[T]:
        connect = self._rows.to_write if writes else self._rows.to_read
        return persist(
            partial(self._runner.execute, operation, connect, writes=writes),
            self._retry_for,
            f"{'writing' if writes else 'reading'} {what!r} in table {self.table.fullname!r}",
        )

    def _define(self, work: Callable[[Connection], T]) -> Awaitable[T]:
        def in_session(session: Session) -> T:
            return work(self._rows.to_write(session).connection)

        what = f"the definition of table {self.table.fullname!r}"
        return persist(partial(self._runner.run, in_session), self._retry_for, what)

    def _create_tables(self, connection: Connection) -> None:
        self.metadata.create_all(connection, tables=self._tables)

    def _has_tables(self, connection: Connection) -> bool:
        inspector = inspect(connection)
        return all(inspector.has_table(table.name, schema=table.schema) for table in self._tables)


def _renamed(name: str, value: object, old_name: str, old_value: object) -> object:
    if old_value is None:
        return value
    if value is not None:
        raise TypeError(f"{old_name}= is the former name of {name}=: pass one of them")
    warnings.warn(
        f"SQLAlchemyStorage({old_name}=...) is now SQLAlchemyStorage({name}=...)",
        DeprecationWarning,
        stacklevel=3,
    )
    return old_value
