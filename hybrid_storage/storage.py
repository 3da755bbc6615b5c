"""The storage as aiogram sees it: translate, pick the operation, let the runner carry it out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, cast

from aiogram.fsm.storage.base import BaseStorage, KeyBuilder, StateType, StorageKey
from anyio import CapacityLimiter
from sqlalchemy import URL, Engine, MetaData, Table
from typing_extensions import TypeVar

from ._arguments import (
    check_columns,
    check_functions,
    check_seconds,
    checked_key_builder,
    renamed,
)
from ._codec import Codec, JsonDumps, JsonLoads
from ._engine.access import Access
from ._engine.factories import SessionFactory, engine_and_factory, session_factory
from ._engine.runner import Runner
from ._engine.threads import run_in_thread
from ._fallback import Fallback
from ._sql.rows import Rows
from ._steps import Steps
from .conversations import Operations
from .idle import Idle
from .keys import FullKeyBuilder
from .model import FSMData, HasMetaData, model_for, table_of
from .operations import Calls
from .transactions import S
from .unit_of_work import UnitsOfWork

if TYPE_CHECKING:
    from ._engine.factories import AnyEngine

T = TypeVar("T")
M = TypeVar("M", bound=FSMData, default=FSMData)

RETRY_FOR = 30.0  # seconds: a server's restart, a short failover
SLOW_AFTER = 10.0  # seconds


class SQLAlchemyStorage(Idle[S], BaseStorage, Generic[S, M]):
    """Keeps states and data of aiogram's FSM in a table, one row a conversation.

    Every method may be called by any number of tasks, threads and processes at once. A call that is
    cancelled ends soon where the driver can end a statement. Its write has happened wholly or not
    at all, and nothing of it happens afterwards.
    """

    model: type[M]
    """The mapped class, for queries and admin panels of your own."""
    table: Table
    """The model's table."""
    metadata: MetaData
    """The table's metadata."""
    operations: Operations
    """The same operations for a session of your own, without ``await``."""

    def __init__(
        self,
        sessionmaker: SessionFactory[S] | None = None,
        metadata: MetaData | type[HasMetaData] | None = None,
        table_name: str | type[M] = "aiogram_fsm_data",
        key_builder: KeyBuilder | None = None,
        json_dumps: JsonDumps = json.dumps,
        json_loads: JsonLoads = json.loads,
        *,
        limiter: CapacityLimiter | None = None,
        retry_for: float = RETRY_FOR,
        slow_after: float = SLOW_AFTER,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        columns: bool = False,
        expires_after: float | None = None,
        model: type[M] | None = None,
        fallback: BaseStorage | None = None,
        session: SessionFactory[S] | None = None,
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
        :param limiter: limits the calls that use the database at a time; by default as many as
            the engine's pool keeps connections (``pool_size``). Storages may share one
        :param retry_for: how many seconds to go on trying where the database drops the connection,
            restarts, is busy, or resolves a deadlock at the call's cost. 0 tries once
        :param slow_after: after how many seconds the log warns of a call that waits
        :param context: what sessions need around them, such as Flask's ``app.app_context``
        :param columns: whether the table has the columns to look conversations by, which a model
            gets from :class:`ConversationColumns`
        :param expires_after: after how many seconds without a write a conversation reads as absent;
            never by default. Needs the columns
        :param model: a model of your own, in place of ``table_name``
        :param fallback: the storage used before: a conversation that is not here yet is read from
            it, moved here and removed there. It is yours to close. See docs/coming-from/moving.md
        :param session: deprecated, ``sessionmaker`` under its former name
        :param base: deprecated, ``metadata`` under its former name
        :raises TypeError: if an argument is not of its kind
        :raises ValueError: if the table's name is taken by a different table, or if the engine
            keeps a database in memory that threads cannot share
        """
        factory = renamed("sessionmaker", sessionmaker, "session", session)
        if factory is None:
            raise TypeError("SQLAlchemyStorage() needs a sessionmaker or an async_sessionmaker")
        name: object = table_name if model is None else model
        self.model = cast(
            "type[M]",
            model_for(renamed("metadata", metadata, "base", base), name, columns=columns),
        )
        self._model = self.model
        self.table = table_of(self.model)
        self.metadata = self.table.metadata
        check_functions(json_dumps=json_dumps, json_loads=json_loads, context=context)
        check_seconds(retry_for=retry_for, slow_after=slow_after)
        if limiter is not None and not isinstance(limiter, CapacityLimiter):
            raise TypeError(f"limiter is an anyio.CapacityLimiter, not {limiter!r}")
        self.key_builder: KeyBuilder = checked_key_builder(key_builder or FullKeyBuilder())
        """Makes the row's id of a key."""
        codec = Codec(self.key_builder, json_dumps, json_loads, self.table.fullname)
        check_columns(self.table, expires_after)
        rows = Rows(self.table, expires_after)
        calls = Calls(self.model, rows, codec)
        runner = Runner(*session_factory(factory), calls.bind_arguments, limiter, context)
        access = Access(runner, retry_for, slow_after)
        units = UnitsOfWork(access, calls, codec)
        super().__init__(access, units, getattr(factory, "registry", None))
        self._codec, self._rows, self._calls = codec, rows, calls
        self._steps = Steps(rows, codec, expires_after)
        self.operations = Operations(calls, self._steps)
        self._tables = [self.table]
        self._isolations = set()
        self._fallback: Fallback | None = None
        if fallback is not None:
            transaction = self._own_transaction
            self._fallback = Fallback(fallback, rows, calls, codec, access, units, transaction)
        self.engine: AnyEngine | None = None
        """The engine that :meth:`from_url` has made: to dispose with ``close=False`` in a process
        that has been forked. None where the factory is the application's."""

    def __repr__(self) -> str:
        """Name the table and the kind of the factory."""
        kind = "async_sessionmaker" if self._runner.is_async else "sessionmaker"
        return f"<{type(self).__name__} of table {self.table.fullname!r} by a {kind}>"

    @classmethod
    def from_url(
        cls,
        url: str | URL,
        *,
        metadata: MetaData | type[HasMetaData] | None = None,
        table_name: str | type[Any] = "aiogram_fsm_data",
        key_builder: KeyBuilder | None = None,
        json_dumps: JsonDumps = json.dumps,
        json_loads: JsonLoads = json.loads,
        limiter: CapacityLimiter | None = None,
        retry_for: float = RETRY_FOR,
        slow_after: float = SLOW_AFTER,
        columns: bool = False,
        expires_after: float | None = None,
        fallback: BaseStorage | None = None,
        **engine_options: Any,
    ) -> SQLAlchemyStorage[Any, Any]:
        """Make a storage with an engine of its own, which :meth:`close` disposes.

        :param url: the database, by a synchronous or an asynchronous driver
        :param engine_options: passed to ``create_engine`` or ``create_async_engine``; for the
            other parameters see the class
        :return: the storage
        """
        engine, factory = engine_and_factory(url, engine_options)
        storage = cls(
            factory,
            metadata,
            table_name,
            key_builder,
            json_dumps,
            json_loads,
            limiter=limiter,
            retry_for=retry_for,
            slow_after=slow_after,
            columns=columns,
            expires_after=expires_after,
            fallback=fallback,
        )
        storage.engine = engine
        return storage

    async def close(self) -> None:
        """Dispose the engine that :meth:`from_url` made; the application's is left alone.

        The storage works on: aiogram closes it before the application's shutdown handlers run.
        """
        if isinstance(self.engine, Engine):
            await run_in_thread(self.engine.dispose)
        elif self.engine is not None:
            await self.engine.dispose()

    async def get_state(self, key: StorageKey) -> str | None:
        """Return the state of a conversation.

        :param key: the conversation's key
        :return: the state's name, None if there is none
        """
        return await self._execute(key, self._calls.get_state(key))

    async def set_state(self, key: StorageKey, state: StateType = None) -> None:
        """Set or remove the state of a conversation.

        :param key: the conversation's key
        :param state: the state or its name; None removes it
        :raises TypeError: if it is neither
        :raises ValueError: if the database cannot hold it
        """
        await self._execute(key, self._calls.set_state(key, state))

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        """Return the data of a conversation.

        :param key: the conversation's key
        :raises CorruptDataError: if the row's data is not the JSON text of an object
        :return: the data, empty if there is none; the caller's to change
        """
        return await self._execute(key, self._calls.get_data(key))

    async def set_data(self, key: StorageKey, data: Mapping[str, Any]) -> None:
        """Replace the data of a conversation.

        :param key: the conversation's key
        :param data: the new data; an empty one removes it
        :raises DataNotDictLikeError: if it is no mapping
        :raises ValueError: if the database cannot hold it; or whatever ``json_dumps`` raises
        """
        await self._execute(key, self._calls.set_data(key, data))

    async def update_data(self, key: StorageKey, data: Mapping[str, Any]) -> dict[str, Any]:
        """Change fields of a conversation's data, losing none that others change meanwhile.

        :param key: the conversation's key
        :param data: the fields to set, as in ``dict.update``
        :raises DataNotDictLikeError: if it is no mapping
        :raises CorruptDataError: if the row's data is not the JSON text of an object
        :raises ValueError: if the database cannot hold it; or whatever ``json_dumps`` raises
        :return: the whole data, as stored
        """
        return await self._execute(key, self._calls.update_data(key, data))

    async def clear(self, key: StorageKey) -> None:
        """Remove state and data of a conversation in one statement.

        :param key: the conversation's key
        """
        await self._execute(key, self._calls.clear(key))
