"""What spans a whole update: the isolation to give to a dispatcher, and writing before its end."""

from __future__ import annotations

from contextlib import suppress
from typing import TypeVar

from aiogram.fsm.storage.base import StorageKey
from sqlalchemy import Table

from ._codec import Codec
from ._engine.calls import Call
from ._engine.retries import logger
from ._fallback import Fallback
from ._sql.at_once import is_plain
from ._sql.driver import DriverStatements
from ._sql.leases import Leases
from ._sql.results import executed
from ._sql.rows import Rows
from ._sql.units import Units
from ._unit import UnitClosed
from .isolation import SQLAlchemyEventIsolation
from .model import FSMData, declare_lock_table
from .tables import Tables
from .transactions import S

T = TypeVar("T")


class Updates(Tables[S]):
    """The part of the storage that makes isolations, and flushes their units of work."""

    _codec: Codec
    _rows: Rows
    _isolations: set[bool]
    _fallback: Fallback | None
    _model: type[FSMData]
    table: Table

    def create_isolation(
        self,
        *,
        unit_of_work: bool = False,
        lease: float | None = 30.0,
        poll: float = 0.5,
        wait: float | None = None,
        driver_statements: bool = False,
    ) -> SQLAlchemyEventIsolation:
        """Return event isolation: one handler at a time for a conversation.

        :param unit_of_work: whether to read a conversation once an update, and to write it once,
            when the handler is over: see docs/guides/unit-of-work.md
        :param lease: after how many seconds the locks of a process that died end; they are renewed
            three times as often while a handler runs. They are in ``<table_name>_lock``, a table to
            create, too. None locks in this process only, for bots of one process
        :param poll: the longest pause in seconds between two looks at another process's lock
        :param wait: how many seconds to wait for a lock at most; by default without limit
        :param driver_statements: whether asyncpg runs the statements of an update itself, past
            SQLAlchemy's Core: faster, but listeners to statements, ``echo`` and tracing do not see
            them. Makes no difference on other drivers, nor if columns of your own model have types
            or defaults that are functions of Python's
        :raises ValueError: if one of them is not above 0, or if the table's name is taken
        :return: what to pass as ``Dispatcher(events_isolation=...)``
        """
        # The driver does not know the types of SQLAlchemy's that encrypt, or decrypt.
        by_driver = driver_statements and is_plain(self.table)
        execute = DriverStatements().executed if by_driver else executed
        leases = None
        if lease is not None:
            table = declare_lock_table(self._model)
            self._tables = [self.table, table]
            leases = Leases(table, self._rows, execute)
        made = SQLAlchemyEventIsolation(
            self._access,
            self._codec,
            self.units,
            Units(self._rows, leases, execute) if unit_of_work else None,
            leases,
            lease=lease,
            poll=poll,
            wait=wait,
        )
        if self._isolations - {lease is None}:
            logger.warning(
                "table %r has an isolation with a lease and one without: neither waits for the "
                "other's locks. Give the dispatcher and lock_sync() the same one",
                self.table.fullname,
            )
        self._isolations.add(lease is None)
        return made

    async def flush(self) -> None:
        """Write at once what the update has collected so far, before a message goes out, say.

        Without a unit of work there is nothing to write. Inside a transaction it is there for
        others once that has committed. Cancelled, it has happened wholly or not at all.

        :raises LockLostError: if the lock was lost; nothing is written
        """
        await self.units.write()

    async def _execute(self, key: StorageKey, call: Call[T]) -> T:
        if self._fallback is None:
            return await self._carry_out(key, call)
        async with self._fallback.adopted(key, call):
            return await self._carry_out(key, call)

    async def _committed(self, session: object) -> None:
        if self._fallback is not None:
            await self._fallback.committed(session)

    async def _carry_out(self, key: StorageKey, call: Call[T]) -> T:
        unit = self.units.find(key)
        if unit is not None:
            with suppress(UnitClosed):
                result = await unit.execute(call)
                self.units.remember(key)
                return result
        return await self._access.execute(call)
