"""Columns of the application's own types, and the time of the last write."""

from __future__ import annotations

import asyncio
import base64
import datetime
import secrets
import uuid
import zlib
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import SERVERS, Backend
from conftest import Open
from sqlalchemy import DateTime, Dialect, Text, TypeDecorator, func, select, update
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from hybrid_storage import FSMData, SQLAlchemyStorage


class Encrypted(TypeDecorator[str]):
    """Writes another text each time, as encryption with a nonce does."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        nonce = secrets.token_bytes(8)
        text = bytes(byte ^ nonce[at % 8] for at, byte in enumerate(value.encode()))
        return base64.b64encode(nonce + text).decode()

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        if not value:
            return value
        sealed = base64.b64decode(value)
        return bytes(byte ^ sealed[at % 8] for at, byte in enumerate(sealed[8:])).decode()


class Compressed(TypeDecorator[str]):
    """Writes the same text each time."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value and base64.b64encode(zlib.compress(value.encode())).decode()

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return value and zlib.decompress(base64.b64decode(value)).decode()


@pytest.mark.parametrize("kind", [Encrypted, Compressed])
@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_concurrent_changes_are_kept_whatever_the_data_columns_type(
    backend: Backend, kind: Any, open_storage: Open, key: StorageKey
) -> None:
    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = f"fsm_{uuid.uuid4().hex}"
        data: Mapped[str | None] = mapped_column(kind)

    storage: SQLAlchemyStorage = await open_storage(backend, table_name=Conversation)
    await asyncio.gather(*(storage.update_data(key, {str(n): n}) for n in range(20)))
    assert len(await storage.get_data(key)) == 20
    async with storage.transaction():
        await storage.update_data(key, {"inside": True})
    assert len(await storage.get_data(key)) == 21
    await storage.set_state(key, "waiting")
    await storage.set_data(key, {})
    assert await storage.update_data(key, {"again": 1}) == {"again": 1}


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_an_unchanged_update_moves_the_time_of_the_last_write(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    precise = DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")

    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = f"fsm_{uuid.uuid4().hex}"
        updated_at: Mapped[datetime.datetime | None] = mapped_column(
            precise, onupdate=func.current_timestamp()
        )

    storage: SQLAlchemyStorage = await open_storage(backend, table_name=Conversation)
    long_ago = datetime.datetime(2001, 1, 1)
    await storage.set_data(key, {"name": "Ada"})
    await storage.run_sync(
        lambda session: session.execute(update(Conversation).values(updated_at=long_ago))
    )
    assert await storage.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
    moved = await storage.run_sync(lambda session: session.scalar(select(Conversation.updated_at)))
    assert moved is not None
    assert moved > long_ago
