"""What a database cannot hold, refused with an error that says what to do."""

from __future__ import annotations

import sys
from typing import Any

from sqlalchemy import Connection, Dialect, Table, literal_column, select
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.dialects.sqlite.base import SQLiteDialect

_LARGE = 100_000  # characters, which may be a million bytes: the least that MySQL takes at once
_POSTGRESQL_KEY = 2600  # characters; an index has room for a third of a page of 8 KiB, or more
_CHARSET: Any = select(literal_column("@@character_set_client"))
_PACKET: Any = select(literal_column("@@max_allowed_packet"))


def is_doubtful(text: str | None) -> bool:
    """Tell without asking whether there are databases that cannot hold a text."""
    return text is not None and (len(text) > _LARGE or "\0" in text)


def unsupported(dialect: Dialect) -> NotImplementedError:
    """Return what is raised for a database that has none of the statements of ``_sql``."""
    return NotImplementedError(
        "this storage is for PostgreSQL, MariaDB, MySQL and SQLite, and the session factory is "
        f"bound to {dialect.name}: give it the session factory of one of those"
    )


class Limits:
    """The limits of one table on one kind of database."""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        """Find the limits.

        :raises NotImplementedError: if the database is none that the storage is for
        """
        if not isinstance(dialect, (PGDialect, MySQLDialect, SQLiteDialect)):
            raise unsupported(dialect)
        self._table = table.fullname
        # The id of a conversation is one of a row.
        names = [name for name in ("id", "conversation") if name in table.c]
        lengths = {
            name: getattr(table.c[name].type.dialect_impl(dialect), "length", None)
            or (_POSTGRESQL_KEY if isinstance(dialect, PGDialect) else sys.maxsize)
            for name in names
        }
        self._key_column = min(names, key=lambda name: lengths[name])
        self._key_length: int = lengths[self._key_column]
        self._is_mysql = isinstance(dialect, MySQLDialect)
        self._is_postgresql = isinstance(dialect, PGDialect)

    def check(self, connection: Connection, row: str, *texts: str | None) -> None:
        """Refuse a key and texts that the database would not take, or not keep as they are.

        :raises ValueError: if the database cannot hold one of them, or all are too much at once
        """
        self._check_key(row)
        self.check_text(row)
        size = 0
        for text in texts:
            if text:
                self.check_text(text)
                size += len(text)
                if self._is_mysql and not text.isascii() and max(text) > "\uffff":
                    self._check_charset(connection)
        if self._is_mysql and size > _LARGE:
            self._check_size(connection, texts)

    def check_text(self, text: str) -> None:
        """Refuse a text that the database does not take.

        :raises ValueError: if the text holds what PostgreSQL cannot
        """
        if self._is_postgresql and "\0" in text:
            raise ValueError(
                f"PostgreSQL cannot hold a NUL character in a text, so table {self._table!r} "
                "cannot store this key, state or data: remove the character, or serialise the "
                "data with a json_dumps that escapes it, as json.dumps does"
            )

    def _check_key(self, row: str) -> None:
        if len(row) > self._key_length:
            raise ValueError(
                f"the key {row[:40]!r}... has {len(row)} characters, column "
                f"{self._key_column!r} of table {self._table!r} holds {self._key_length}: use a "
                "key builder that writes shorter keys, or a model of your own with a longer column"
            )
        if self._is_mysql and row.endswith(" "):
            raise ValueError(
                f"MySQL ignores the blanks at the end of the key {row!r}, so that it would share "
                "the row of the key without them: use a key builder that escapes blanks"
            )

    def _check_charset(self, connection: Connection) -> None:
        # Without strict mode, MySQL would store question marks, and say nothing.
        charset = connection.scalar(_CHARSET)
        if charset != "utf8mb4":
            raise ValueError(
                f"the connection's character set is {charset!r}, which cannot send emoji and other "
                "characters beyond U+FFFF to MySQL: add ?charset=utf8mb4 to the engine's URL"
            )

    def _check_size(self, connection: Connection, texts: tuple[str | None, ...]) -> None:
        # MySQL would drop the connection as if it had failed. The drivers send texts quoted, with
        # a backslash before each of these characters.
        packet = connection.scalar(_PACKET)
        encoded = [text.encode() for text in texts if text]
        size = sum(len(text) + sum(map(text.count, (b'"', b"'", b"\\"))) for text in encoded)
        if size + 1024 > packet:
            raise ValueError(
                f"a statement of {size} bytes for table {self._table!r} is larger than MySQL's "
                f"max_allowed_packet, {packet} bytes: store less, or raise that setting"
            )
