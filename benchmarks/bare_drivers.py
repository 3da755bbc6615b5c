"""The storage's own statements on bare drivers, each autocommitted, and nothing else.

What a storage on these databases takes at least; the difference is the price of SQLAlchemy, and of
working with any of its drivers.
"""

from __future__ import annotations

import json
import sqlite3
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import psycopg_pool
from aiogram.fsm.state import State
from aiogram.fsm.storage.base import BaseStorage, StateType, StorageKey
from anyio import CapacityLimiter, to_thread

from hybrid_storage import FullKeyBuilder

Row = Sequence[Any] | None


class BareStorage(BaseStorage):
    """A storage that runs statements written by hand."""

    def __init__(self, table: str, mark: Callable[[int], str]) -> None:
        one, two, three = (mark(number) for number in (1, 2, 3))
        self._build = FullKeyBuilder().build
        self._get = {
            column: f"SELECT {column} FROM {table} WHERE id = {one}" for column in ("state", "data")
        }
        self._set = {
            column: f"INSERT INTO {table} (id, {column}) VALUES ({one}, {two}) "
            f"ON CONFLICT (id) DO UPDATE SET {column} = excluded.{column}"
            for column in ("state", "data")
        }
        empty = f"{table}.data IS NULL OR {table}.data = ''"
        self._set_if_empty = f"{self._set['data']} WHERE {empty} RETURNING id"
        self._swap = (
            f"UPDATE {table} SET data = {one} WHERE id = {two} AND data = {three} RETURNING id"
        )
        self._unset = {
            "state": f"UPDATE {table} SET state = NULL WHERE id = {one} RETURNING data",
            "data": f"UPDATE {table} SET data = '' WHERE id = {one} RETURNING state",
        }
        self._delete = f"DELETE FROM {table} WHERE id = {one}"
        self._delete_empty = f"{self._delete} AND state IS NULL AND ({empty})"

    @abstractmethod
    async def run(self, statement: str, *parameters: str) -> Row:
        """Run a statement, return its first row."""

    async def get_state(self, key: StorageKey) -> str | None:
        row = await self.run(self._get["state"], self._build(key))
        return row[0] if row else None

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        text = await self._text(key)
        return dict(json.loads(text)) if text else {}

    async def set_state(self, key: StorageKey, state: StateType = None) -> None:
        name = state.state if isinstance(state, State) else state
        await self._write("state", key, name)

    async def set_data(self, key: StorageKey, data: Mapping[str, Any]) -> None:
        await self._write("data", key, json.dumps(data) if data else None)

    async def update_data(self, key: StorageKey, data: Mapping[str, Any]) -> dict[str, Any]:
        row = self._build(key)
        while True:
            old = await self._text(key)
            merged = {**json.loads(old or "{}"), **data}
            new = json.dumps(merged)
            if old:
                done = await self.run(self._swap, new, row, old)
            else:
                done = await self.run(self._set_if_empty, row, new)
            if done:
                return merged

    async def clear(self, key: StorageKey) -> None:
        await self.run(self._delete, self._build(key))

    async def close(self) -> None:
        pass

    async def _text(self, key: StorageKey) -> str | None:
        row = await self.run(self._get["data"], self._build(key))
        return row[0] if row else None

    async def _write(self, column: str, key: StorageKey, value: str | None) -> None:
        row = self._build(key)
        if value is not None:
            await self.run(self._set[column], row, value)
        else:
            rest = await self.run(self._unset[column], row)
            if rest and not rest[0]:
                await self.run(self._delete_empty, row)


class BareAsyncpg(BareStorage):
    """On a pool of asyncpg's."""

    def __init__(self, table: str, pool: Any) -> None:
        super().__init__(table, "${}".format)
        self._pool = pool

    async def run(self, statement: str, *parameters: str) -> Row:
        row: Row = await self._pool.fetchrow(statement, *parameters)
        return row


class BarePsycopg(BareStorage):
    """On a pool of psycopg's, in threads."""

    def __init__(self, table: str, pool: psycopg_pool.ConnectionPool[Any], limiter: int) -> None:
        super().__init__(table, lambda _: "%s")
        self._pool = pool
        self._limiter = CapacityLimiter(limiter)

    async def run(self, statement: str, *parameters: str) -> Row:
        return await to_thread.run_sync(self._run, statement, parameters, limiter=self._limiter)

    def _run(self, statement: str, parameters: tuple[str, ...]) -> Row:
        with self._pool.connection() as connection:
            cursor = connection.execute(statement.encode(), parameters)
            return cursor.fetchone() if cursor.description else None


class BareSqlite(BareStorage):
    """On one connection of sqlite3's, in a thread."""

    def __init__(self, table: str, connection: sqlite3.Connection) -> None:
        super().__init__(table, lambda _: "?")
        self._connection = connection
        self._limiter = CapacityLimiter(1)

    async def run(self, statement: str, *parameters: str) -> Row:
        return await to_thread.run_sync(self._run, statement, parameters, limiter=self._limiter)

    def _run(self, statement: str, parameters: tuple[str, ...]) -> Row:
        rows = self._connection.execute(statement, parameters).fetchall()
        return rows[0] if rows else None


class RoundTrip(BaseStorage):
    """Not a storage, but the measure of one round trip: the least of statements for every call."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def _trip(self) -> None:
        await self._connection.fetchval("SELECT 1")

    async def get_state(self, key: StorageKey) -> None:
        await self._trip()

    async def get_data(self, key: StorageKey) -> dict[str, Any]:
        await self._trip()
        return {}

    async def set_state(self, key: StorageKey, state: StateType = None) -> None:
        await self._trip()

    async def set_data(self, key: StorageKey, data: Mapping[str, Any]) -> None:
        await self._trip()

    async def close(self) -> None:
        pass


@asynccontextmanager
async def asyncpg_pool(dsn: str, size: int) -> AsyncIterator[Any]:
    """Open a pool that does not reset connections between calls: that is a round trip more."""

    async def leave(connection: object) -> None:
        pass

    pool = await asyncpg.create_pool(dsn, min_size=1, max_size=size, reset=leave)
    try:
        yield pool
    finally:
        await pool.close()
