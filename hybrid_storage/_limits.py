"""What a database cannot hold, refused with an error that says what to do."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect, Table, literal_column, select
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.postgresql.base import PGDialect

from ._statements import Ask, Steps

_LARGE = 100_000  # characters, which may be a million bytes: the least that MySQL takes at once
_POSTGRESQL_KEY = 2600  # characters; an index has room for a third of a page of 8 KiB, or more
_PACKET: Any = select(literal_column("@@max_allowed_packet"))


def is_suspect(parameters: dict[str, Any]) -> bool:
    """Tell at little cost whether parameters want a closer look.

    :param parameters: the texts that a statement sends
    """
    value = parameters.get("_value", "")
    size = len(value) + len(parameters.get("_old", ""))
    return size > _LARGE or "\0" in value or "\0" in parameters["_row"]


class Limits:
    """The limits of one table on one kind of database."""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        """Find the limits.

        :param table: the table
        :param dialect: the dialect of its database
        """
        self._table = table.fullname
        length: int | None = getattr(table.c.id.type.dialect_impl(dialect), "length", None)
        if length is None and isinstance(dialect, PGDialect):
            length = _POSTGRESQL_KEY
        self._key_length = length
        self._is_mysql = isinstance(dialect, MySQLDialect)
        self._is_postgresql = isinstance(dialect, PGDialect)

    def check_key(self, row: str) -> None:
        """Refuse a key that the column would not keep apart from every other.

        :param row: the key
        :raises ValueError: if it is too long, or would be taken for another
        """
        if self._key_length is not None and len(row) > self._key_length:
            raise ValueError(
                f"the key {row[:40]!r}... has {len(row)} characters, column 'id' of table "
                f"{self._table!r} holds {self._key_length}: use a key builder that writes shorter "
                "keys, or a model of your own with a longer column"
            )
        if self._is_mysql and row.endswith(" "):
            raise ValueError(
                f"MySQL ignores the blanks at the end of the key {row!r}, so that it would share "
                "the row of the key without them: use a key builder that escapes blanks"
            )

    def check(self, parameters: dict[str, Any]) -> Steps[None]:
        """Refuse texts that the database does not take.

        :param parameters: the texts that a statement sends
        :raises ValueError: if one holds what PostgreSQL cannot, or all are too much for MySQL
        """
        texts = [each if isinstance(each, bytes) else each.encode() for each in parameters.values()]
        if self._is_postgresql and any(b"\0" in text for text in texts):
            raise ValueError(
                f"PostgreSQL cannot hold a NUL character in a text, so table {self._table!r} "
                "cannot store this key, state or data: remove the character, or serialise the "
                "data with a json_dumps that escapes it, as json.dumps does"
            )
        if self._is_mysql:
            # It would drop the connection as if it had failed. The drivers send texts quoted, with
            # a backslash before each of these characters.
            packet = (yield Ask(_PACKET, {})).scalar()
            size = sum(len(text) + sum(map(text.count, (b'"', b"'", b"\\"))) for text in texts)
            if size + 1024 > packet:
                raise ValueError(
                    f"a statement of {size} bytes for table {self._table!r} is larger than MySQL's "
                    f"max_allowed_packet, {packet} bytes: store less, or raise that setting"
                )
