"""Statements by libpq, the PostgreSQL library that psycopg wraps.

Psycopg lets go of the interpreter's lock several times in each statement, and has to wait for it
each time where other threads are at work. libpq sends a statement and waits for its answer in one
go; values and rows are psycopg's all the same.
"""

from __future__ import annotations

import math
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from psycopg import Connection, Cursor
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg.pq import DiagnosticField, ExecStatus, TransactionStatus

from ._statements import Answer, DriverExecutor

if TYPE_CHECKING:
    from psycopg import abc
    from psycopg.pq.abc import PGresult

_STATEMENTS = "hybrid_storage.statements"

_PREPARED_ALREADY = b"42P05"  # behind a pooler, by somebody else
_LOST = {
    b"26000",  # the server has not prepared it: behind a pooler, or it was told to forget
    b"0A000",  # its columns are of other types now
}


class PsycopgExecutor(DriverExecutor):
    """Runs statements by libpq where each is to commit by itself, which is what a server does."""

    _by_libpq = False

    def autocommit(self) -> bool:
        connection = self._dbapi
        self._by_libpq = (
            # Whoever traces statements has classes of its own.
            type(connection) is Connection
            and connection.cursor_factory is Cursor
            # Only psycopg hands out what else the server sends.
            and not getattr(connection, "_notify_handlers", None)
            and connection.pgconn.transaction_status == TransactionStatus.IDLE
        )
        return self._by_libpq or super().autocommit()

    def end_autocommit(self) -> None:
        if not self._by_libpq:
            super().end_autocommit()

    def _run(self, sql: str, values: Any) -> Answer:
        if not self._by_libpq:
            return super()._run(sql, values)
        connection: Connection = self._dbapi
        statements = self._pooled.info.setdefault(_STATEMENTS, {})
        statement = statements.get(sql)
        if statement is None:
            statement = statements[sql] = _Statement(sql, connection)
        adapted = Transformer(connection)
        result = statement.run(connection, adapted, values)
        if result.status == ExecStatus.TUPLES_OK:
            adapted.set_pgresult(result)
            return Answer(adapted.load_rows(0, result.ntuples, tuple), -1)
        if result.status == ExecStatus.COMMAND_OK:
            return Answer(None, result.command_tuples or 0)
        raise error_from_result(result, connection.info.encoding)


class _Statement:
    """A statement on one connection, prepared as soon as psycopg would."""

    def __init__(self, sql: str, connection: Connection) -> None:
        marks = _Marks()
        self._text = (sql % marks).encode(connection.info.encoding)
        self._names = list(marks)
        self._formats = [PyFormat.TEXT] * len(marks)
        # Statements of the same name are the same, whoever has prepared them.
        self._name = b"hybrid_storage_" + sha256(self._text).hexdigest()[:32].encode()
        self._uses: float = 0

    def run(self, connection: Connection, adapted: abc.Transformer, values: Any) -> PGresult:
        """Run it.

        :param connection: the connection
        :param adapted: adapts the values
        :param values: the parameters, by name
        :return: the answer, or the error
        """
        pgconn = connection.pgconn
        arguments: Any = adapted.dump_sequence(
            [values[name] for name in self._names], self._formats
        )
        threshold = connection.prepare_threshold
        if threshold is not None and self._uses >= threshold:
            if self._uses == threshold:
                result = pgconn.prepare(self._name, self._text)
                if result.error_field(DiagnosticField.SQLSTATE) not in (None, _PREPARED_ALREADY):
                    return result
                self._uses += 1
            result = pgconn.exec_prepared(self._name, arguments)
            if result.error_field(DiagnosticField.SQLSTATE) not in _LOST:
                return result
            self._uses = -math.inf
        self._uses += 1
        return pgconn.exec_params(self._text, arguments)


class _Marks(dict[str, str]):
    """Numbers the parameters of a statement."""

    def __missing__(self, name: str) -> str:
        mark = self[name] = f"${len(self) + 1}"
        return mark
