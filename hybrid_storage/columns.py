"""Columns to look conversations by: whose they are, and when they were last written to.

They are optional. Without them the table has a row's id, which is a text that only the key builder
understands. With them the storage finds, counts, changes and expires conversations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiogram.fsm.storage.base import StorageKey
from sqlalchemy import BigInteger, ColumnElement, Double, Index, String, literal_column
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from sqlalchemy.types import TypeEngine

from ._sql.clock import Clock
from ._sql.lookups import FIELDS

# MySQL wants a length for VARCHAR, and its default collations take "a" and "A" for the same key.
UTF8 = {"charset": "utf8mb4", "collation": "utf8mb4_bin"}
Key: TypeEngine[str] = String().with_variant(mysql.VARCHAR(255, **UTF8), "mysql", "mariadb")


_NONE: ColumnElement[float] = literal_column("0.0", Double)  # not a value: those are parameters


class ConversationColumns:
    """The columns to look conversations by, as a mixin beside ``FSMData``::

        class Conversation(ConversationColumns, FSMData, Base):
            __tablename__ = "conversation"

    The storage fills them at each write. Rows that were there before have NULL in them:
    ``await storage.fill_columns()`` fills all but the time.
    """

    bot_id: Mapped[int | None] = mapped_column(BigInteger)
    chat_id: Mapped[int | None] = mapped_column(BigInteger, index=True)
    user_id: Mapped[int | None] = mapped_column(BigInteger, index=True)
    thread_id: Mapped[int | None] = mapped_column(BigInteger)
    business_connection_id: Mapped[str | None] = mapped_column(Key)
    destiny: Mapped[str | None] = mapped_column(Key)
    conversation: Mapped[str | None] = mapped_column(Key, index=True)
    """The id of the conversation's row of the default destiny, which all its rows share."""
    written_at: Mapped[float | None] = mapped_column(
        Double, default=Clock(), onupdate=Clock(), index=True
    )
    """When the row was last written to, in seconds since 1970 by the database's clock."""
    idle_handled: Mapped[float | None] = mapped_column(Double, default=_NONE, onupdate=_NONE)
    """The longest ``after`` of ``on_idle()`` that was dealt with since the last write."""

    if not TYPE_CHECKING:  # a model may have a tuple or a dict of its own

        @declared_attr.directive
        def __table_args__(cls) -> Any:
            beside: Any = getattr(super(), "__table_args__", None) or ()  # of the declarative base
            if isinstance(beside, dict):
                beside = (beside,)
            if any("__table__" in vars(base) for base in cls.mro()[1:]):
                return beside or None  # inherits the table, and its indexes
            return (state_index(cls.__tablename__), *beside)


def state_index(table_name: str) -> Index:
    """Return the index by state, for a model that has a ``__table_args__`` of its own.

    :param table_name: the model's
    """
    length = {"state": 191}  # SQLAlchemy takes MariaDB for another dialect if the URL names it
    name = f"ix_{table_name}_state"
    return Index(name, "state", "id", mysql_length=length, mariadb_length=length)


def values_of(key: StorageKey, conversation: str) -> dict[str, Any]:
    """Return what the columns of a key's row hold."""
    return {**{name: getattr(key, name) for name in FIELDS}, "conversation": conversation}


def key_of(row: Any) -> StorageKey | None:
    """Return the key that a row's columns hold, None if they have not been filled."""
    if row.conversation is None:
        return None
    return StorageKey(**{name: getattr(row, name) for name in FIELDS})
