"""PostgreSQL's one statement for all that an update writes: either all of it happens or nothing.

Never an upsert: a row that was read and is gone is a conflict, or a conversation that was cleared
meanwhile would come back to life. An insert that finds a row fails with all the rest.

A single row, which is what most updates write, gets a statement that does only what is to be done
with it. That is quicker to plan than the one for several rows, and quicker to execute. PostgreSQL
plans either once, see ``taking.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Table
from sqlalchemy.types import TypeDecorator

from .changes import ChangedRow, Texts
from .leases import Fence, Leases
from .lookups import FILLED, has_columns

_PLAIN = (sa.BigInteger, sa.Integer, sa.String, sa.Text, sa.BIGINT, sa.INTEGER, sa.VARCHAR, sa.TEXT)
"""The types of columns to look conversations by whose values need no conversion."""
_ONE: sa.ColumnElement[Any] = sa.literal_column("1")


class AtOnce:
    """The statements, each made when it is first needed."""

    def __init__(self, table: Table, leases: Leases | None, lookups: Mapping[str, Any]) -> None:
        """Begin with no statement.

        :param lookups: the columns that each write fills in, with their parameters
        """
        self._table = table
        self._leases = leases
        self._lookups = lookups
        self._made: dict[tuple[str, bool, bool], sa.Executable] = {}

    def statement(
        self,
        connection: Connection,
        changes: Sequence[ChangedRow],
        fence: Fence | None,
        *,
        frees: bool,
    ) -> tuple[sa.Executable, dict[str, Any]]:
        """Return the statement that writes some rows, and its parameters.

        Its answer is whether the lease is held, and whether the rows are written.

        :param fence: the lease to hold, None for no lease
        :param frees: whether to free it
        """
        fenced = {} if fence is None else fence.parameters
        verb = _verb(changes[0]) if len(changes) == 1 else None
        kind = (verb or "", bool(fenced), frees)
        if kind not in self._made:
            fence_of = _Fence(self._leases if fenced else None, connection, frees=frees)
            self._made[kind] = (
                self._several(fence_of) if verb is None else self._single(verb, fence_of)
            )
        given = self._given_rows(changes) if verb is None else self._given_row(verb, changes[0])
        return self._made[kind], {**given, **fenced}

    def _given_row(self, verb: str, change: ChangedRow) -> dict[str, Any]:
        given: dict[str, Any] = {"_id": change.row}
        if verb != "insert":
            before = change.found or Texts()
            given |= {"_old_state": before.state, "_old_data": before.data}
        if verb != "delete":
            given |= {"_state": change.now.state, "_data": change.now.data, **change.columns}
        return given

    def _given_rows(self, changes: Sequence[ChangedRow]) -> dict[str, Any]:
        before = [change.found or Texts() for change in changes]
        return {
            "_count": len(changes),
            "_ids": [change.row for change in changes],
            "_states": [change.now.state for change in changes],
            "_datas": [change.now.data for change in changes],
            "_old_states": [texts.state for texts in before],
            "_old_datas": [texts.data for texts in before],
            "_existed": [change.found is not None for change in changes],
            **{
                f"_all_{name}": [change.columns[f"_{name}"] for change in changes]
                for name in self._lookups
            },
        }

    def _single(self, verb: str, fence: _Fence) -> sa.Executable:
        table = self._table
        this = sa.bindparam("_id", type_=table.c.id.type)
        as_it_was = (
            table.c.id == this,
            table.c.state.is_not_distinct_from(sa.bindparam("_old_state")),
            table.c.data.is_not_distinct_from(sa.bindparam("_old_data")),
            *fence.holds,
        )
        texts: dict[str, Any] = {
            "state": sa.bindparam("_state", type_=table.c.state.type),
            "data": sa.bindparam("_data", type_=table.c.data.type),
            **self._lookups,
        }
        write: Any
        if verb == "insert":
            given = sa.select(this, *texts.values()).where(*fence.holds)
            write = sa.insert(table).from_select(["id", *texts], given)
        elif verb == "update":
            write = sa.update(table).where(*as_it_was).values(texts)
        else:
            write = sa.delete(table).where(*as_it_was)
        return fence.answer(write.returning(table.c.id).cte("written"))

    def _several(self, fence: _Fence) -> sa.Executable:
        table = self._table
        given = self._all_given()
        same = (
            sa.select(table.c.id)
            .join(given, table.c.id == given.c.id)
            .where(
                given.c.existed.is_(sa.true()),
                table.c.state.is_not_distinct_from(given.c.old_state),
                table.c.data.is_not_distinct_from(given.c.old_data),
                *fence.holds,
            )
            .with_for_update(of=table)
            .cte("same")
        )
        existed = _count_of(given).where(given.c.existed.is_(sa.true())).scalar_subquery()
        unchanged = _count_of(same).scalar_subquery()
        ok = sa.select(_ONE.label("id")).where(*fence.holds, unchanged == existed).cte("ok")
        is_ok = sa.exists(sa.select(ok.c.id))
        is_empty = sa.and_(
            given.c.state.is_(None),
            sa.func.coalesce(given.c.data, sa.literal_column("''")) == sa.literal_column("''"),
        )
        this_row = sa.and_(table.c.id == given.c.id, given.c.existed.is_(sa.true()), is_ok)
        names = ("state", "data", *self._lookups)
        texts = sa.select(given.c.id, *(given.c[name] for name in names))
        added = texts.where(given.c.existed.is_(sa.false()), ~is_empty, is_ok)
        return fence.answer(
            ok,
            sa.update(table)
            .where(this_row, ~is_empty)
            .values({name: given.c[name] for name in names})
            .cte("changed"),
            sa.delete(table).where(this_row, is_empty).cte("removed"),
            sa.insert(table).from_select(["id", *names], added).cte("added"),
        )

    def _all_given(self) -> sa.CTE:
        texts_of = ("_ids", "_states", "_datas", "_old_states", "_old_datas")
        rows = (
            sa.func.unnest(
                *(sa.bindparam(name, type_=sa.ARRAY(sa.Text)) for name in texts_of),
                sa.bindparam("_existed", type_=sa.ARRAY(sa.Boolean)),
                *(
                    sa.bindparam(f"_all_{name}", type_=sa.ARRAY(_plain_type(self._table.c[name])))
                    for name in self._lookups
                ),
            )
            .table_valued(
                *("id", "state", "data", "old_state", "old_data", "existed"),
                *self._lookups,
                name="given_rows",
            )
            .render_derived()
        )
        return sa.select(rows).limit(sa.bindparam("_count", type_=sa.BigInteger)).cte("given")


class _Fence:
    """What a statement has to say of the lease that it is to be written behind."""

    def __init__(self, leases: Leases | None, connection: Connection, *, frees: bool) -> None:
        """Build the conditions.

        :param leases: None for no lease
        """
        self.holds: list[sa.ColumnElement[bool]] = []
        self._held: Any = _ONE
        self._freed: Any = None
        if leases is not None:
            locks = leases.table
            this = sa.and_(leases.this, locks.c.version == sa.bindparam("_version"))
            row = sa.select(locks.c.id).where(this).with_for_update().cte("held")
            self.holds = [sa.exists(sa.select(row.c.id))]
            self._held = _count_of(row).scalar_subquery()
            self._freed = leases.freeing(connection) if frees else None

    def answer(self, written: sa.CTE, *writes: sa.CTE) -> sa.Executable:
        """Return the statement that writes, and frees the lease if that has happened."""
        if self._freed is not None:
            is_written = sa.exists(sa.select(written.c.id))
            writes = (*writes, self._freed.where(is_written).cte("freed"))
        answer = sa.select(self._held, _count_of(written).scalar_subquery())
        return answer.add_cte(*writes)


def _verb(change: ChangedRow) -> str | None:
    """Return what is to be done with a row; None if a row that is not there is to stay so."""
    if change.found is None:
        return None if change.now.is_empty else "insert"
    return "delete" if change.now.is_empty else "update"


def _count_of(rows: sa.CTE) -> sa.Select[Any]:
    return sa.select(sa.func.count()).select_from(rows)


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
