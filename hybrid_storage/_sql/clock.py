"""The database's clock, which all processes agree on. For the rest of ``_sql``."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Dialect
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.ext.compiler import compiles

from .limits import unsupported


def now(dialect: Dialect) -> sa.ColumnElement[Any]:
    """Return the database's clock, in seconds since 1970, whatever its time zone."""
    if isinstance(dialect, PGDialect):
        # Not now(), which stands still in a transaction.
        return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)
    if isinstance(dialect, MySQLDialect):
        time = sa.func.utc_timestamp(sa.literal_column("6"))
        unit: Any = sa.literal_column("MICROSECOND")
        return sa.func.timestampdiff(unit, "1970-01-01", time, type_=sa.Double) / 1e6
    if isinstance(dialect, SQLiteDialect):
        return (sa.func.julianday("now", type_=sa.Double) - 2440587.5) * 86400.0
    raise unsupported(dialect)


class Clock(ColumnElement[float]):
    """The same in a statement, on whatever database that is compiled for."""

    inherit_cache = True
    type = sa.Double()


@compiles(Clock)
def _compiled(clock: Clock, compiler: Any, **options: Any) -> str:
    text: str = compiler.process(now(compiler.dialect), **{**options, "literal_binds": True})
    return text
