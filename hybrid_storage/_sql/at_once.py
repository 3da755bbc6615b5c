"""PostgreSQL's one statement for all that an update writes. For ``units.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Table
from sqlalchemy.types import TypeDecorator

from .changes import ChangedRow, Texts
from .leases import NOBODY, Fence
from .lookups import FILLED, has_columns

_PLAIN = (sa.BigInteger, sa.Integer, sa.String, sa.Text, sa.BIGINT, sa.INTEGER, sa.VARCHAR, sa.TEXT)
"""The types of columns to look conversations by whose values need no conversion."""


def given_rows(changes: Sequence[ChangedRow], lookups: Iterable[str]) -> dict[str, Any]:
    """Return the parameters that hold the rows.

    :param lookups: the columns that each write fills in
    """
    before = [change.found or Texts() for change in changes]
    return {
        "_rows": [change.row for change in changes],
        "_states": [change.now.state for change in changes],
        "_datas": [change.now.data for change in changes],
        "_old_states": [texts.state for texts in before],
        "_old_datas": [texts.data for texts in before],
        "_existed": [change.found is not None for change in changes],
        **{
            f"_all_{name}": [change.columns.get(f"_{name}") for change in changes]
            for name in lookups
        },
    }


def fence_parameters(fence: Fence | None) -> dict[str, Any]:
    """Return the parameters that hold the lease, none for no lease."""
    if fence is None:
        return {}
    return {"_row": fence.row, "_owner": fence.owner, "_version": fence.version}


def one_statement(
    table: Table,
    locks: Table | None,
    clock: sa.ColumnElement[Any],
    lookups: Sequence[str],
    *,
    frees: bool,
) -> sa.Executable:
    """Return PostgreSQL's one statement: either all of it happens or nothing.

    Never an upsert: a row that was read and is gone is a conflict, or a conversation that was
    cleared meanwhile would come back to life. An insert that finds a row fails with all the rest.
    """
    texts_of = ("_rows", "_states", "_datas", "_old_states", "_old_datas")
    given = sa.select(
        sa.func.unnest(
            *(sa.bindparam(name, type_=sa.ARRAY(sa.Text)) for name in texts_of),
            sa.bindparam("_existed", type_=sa.ARRAY(sa.Boolean)),
            *(
                sa.bindparam(f"_all_{name}", type_=sa.ARRAY(_plain_type(table.c[name])))
                for name in lookups
            ),
        )
        .table_valued(
            *("id", "state", "data", "old_state", "old_data", "existed"),
            *lookups,
            name="given_rows",
        )
        .render_derived()
    ).cte("given")
    holds: list[sa.ColumnElement[bool]] = []
    held: Any = sa.literal_column("1")
    this: Any = None
    if locks is not None:
        this = sa.and_(
            locks.c.id == sa.bindparam("_row"),
            locks.c.owner == sa.bindparam("_owner"),
            locks.c.version == sa.bindparam("_version"),
        )
        row = sa.select(locks.c.id).where(this).with_for_update().cte("held")
        held = sa.select(sa.func.count()).select_from(row).scalar_subquery()
        holds = [sa.exists(sa.select(row.c.id))]
    same = (
        sa.select(table.c.id)
        .join(given, table.c.id == given.c.id)
        .where(
            given.c.existed.is_(sa.true()),
            table.c.state.is_not_distinct_from(given.c.old_state),
            table.c.data.is_not_distinct_from(given.c.old_data),
            *holds,
        )
        .with_for_update(of=table)
        .cte("same")
    )
    existed = sa.select(sa.func.count()).select_from(given).where(given.c.existed.is_(sa.true()))
    unchanged = sa.select(sa.func.count()).select_from(same)
    ok = (
        sa.select(sa.literal_column("1").label("one"))
        .where(*holds, unchanged.scalar_subquery() == existed.scalar_subquery())
        .cte("ok")
    )
    is_ok = sa.exists(sa.select(ok.c.one))
    is_empty = sa.and_(
        given.c.state.is_(None),
        sa.func.coalesce(given.c.data, sa.literal_column("''")) == sa.literal_column("''"),
    )
    this_row = sa.and_(table.c.id == given.c.id, given.c.existed.is_(sa.true()), is_ok)
    names = ("state", "data", *lookups)
    texts = sa.select(given.c.id, *(given.c[name] for name in names))
    writes = [
        sa.update(table)
        .where(this_row, ~is_empty)
        .values({name: given.c[name] for name in names})
        .cte("changed"),
        sa.delete(table).where(this_row, is_empty).cte("removed"),
        sa.insert(table)
        .from_select(
            ["id", *names],
            texts.where(given.c.existed.is_(sa.false()), ~is_empty, is_ok),
        )
        .cte("added"),
    ]
    if locks is not None and frees:
        freed = {"owner": NOBODY, "expires": clock, "version": locks.c.version + 1}
        writes.append(sa.update(locks).where(this, is_ok).values(freed).cte("freed"))
    is_written = sa.select(sa.func.count()).select_from(ok).scalar_subquery()
    return sa.select(held, is_written).add_cte(*writes)


def _plain_type(column: sa.Column[Any]) -> Any:
    return sa.BigInteger if isinstance(column.type, sa.Integer) else sa.Text


def is_plain(table: Table) -> bool:
    """Tell whether the database alone makes the values of all columns."""
    if any(isinstance(table.c[name].type, TypeDecorator) for name in ("id", "state", "data")):
        return False
    lookups = [table.c[name].type for name in FILLED] if has_columns(table) else []
    if not all(type(each) in _PLAIN for each in lookups):
        return False
    defaults = (each for column in table.c for each in (column.default, column.onupdate))
    return not any(isinstance(each, sa.ColumnDefault) and each.is_callable for each in defaults)
