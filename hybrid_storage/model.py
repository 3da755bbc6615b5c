"""The table: one row per conversation, with its state and its data as JSON text.

Declared on the caller's own ``MetaData``, so that ``create_all`` and Alembic's autogenerate see it
like any other table of the application.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, TypeAlias, TypeGuard, cast
from weakref import WeakKeyDictionary, ref

from aiogram.fsm.state import State
from sqlalchemy import JSON, BigInteger, Column, ColumnElement, Double, MetaData, String, Table
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import (
    Mapped,
    MappedAsDataclass,
    declarative_base,
    mapped_column,
)
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeEngine

from ._sql.lookups import has_columns
from .columns import UTF8, ConversationColumns, Key

# The models declared for tables. Not in Table.info: Alembic writes that into its migrations.
_models: WeakKeyDictionary[Table, ref[type[FSMData]]] = WeakKeyDictionary()


def _text() -> TypeEngine[str]:
    return String().with_variant(mysql.LONGTEXT(**UTF8), "mysql", "mariadb")


class _Comparator(String.Comparator[str]):
    """Compares the state's column with states of aiogram's, too, by their names."""

    def operate(self, op: OperatorType, *other: Any, **kwargs: Any) -> ColumnElement[Any]:
        return super().operate(op, *map(_name_of, other), **kwargs)


def _name_of(value: object) -> object:
    if isinstance(value, State):
        return value.state
    if isinstance(value, (list, tuple, set, frozenset)):  # for in_()
        return [_name_of(each) for each in value]
    return value


# Of this one object: migrations would have to import a type of our own.
_Text: TypeEngine[str] = _text()
_StateText: TypeEngine[str] = _text()
_StateText.comparator_factory = _Comparator


class FSMData:
    """The columns of the table, as a mixin for a model of your own::

        class Conversation(FSMData, Base):
            __tablename__ = "conversation"

    Columns that you add need a default or must be nullable. Pass the model as ``table_name``. A
    base of dataclasses (``MappedAsDataclass``) does not take the mixin.
    """

    id: Mapped[str] = mapped_column(Key, primary_key=True)
    """The key, as the key builder writes it."""
    state: Mapped[str | None] = mapped_column(_StateText, nullable=True)
    """The state's name; NULL for none."""
    data: Mapped[str | None] = mapped_column(_Text, nullable=True)
    """The data as JSON text; NULL and the empty string stand for ``{}``."""


class _Base(Protocol):
    """A declarative base."""

    metadata: ClassVar[MetaData]


class _OtherBase(Protocol):
    """A base that says less of its metadata, as those of Flask-SQLAlchemy and SQLModel do."""

    @property
    def metadata(self) -> MetaData: ...


HasMetaData: TypeAlias = _Base | _OtherBase
"""A declarative base, or whatever else carries a ``metadata``."""


def model_for(metadata: object, table_name: object, *, columns: bool = False) -> type[FSMData]:
    """Return the model that a storage's arguments ask for.

    :param metadata: a ``MetaData``, a declarative base, or None for a new ``MetaData``
    :param table_name: the table's name, or a model to use as it is
    :param columns: whether a table that is declared has the columns to look conversations by
    :raises TypeError: if one of them is something else
    :raises ValueError: if the metadata has a table of that name with other columns
    """
    if isinstance(table_name, type):
        table = table_of(table_name)
        _check_writable(table)
        if metadata is not None and getattr(metadata, "metadata", metadata) is not table.metadata:
            raise ValueError(
                f"the model {table_name.__name__} has a MetaData of its own: leave out metadata, "
                "or pass the declarative base that it inherits from"
            )
        return table_name
    if not isinstance(table_name, str) or not table_name:
        raise TypeError(f"table_name is a name or a model, not {table_name!r}")
    if "." in table_name:
        schema, _, name = table_name.rpartition(".")
        raise ValueError(
            f"a dot in a table's name is part of the name: for table {name!r} in schema {schema!r} "
            f"pass table_name={name!r} and a MetaData(schema={schema!r})"
        )
    if metadata is None:
        metadata = MetaData()
    elif not isinstance(metadata, type):
        metadata = getattr(metadata, "metadata", metadata)  # a registry, Flask-SQLAlchemy's db
    if isinstance(metadata, MetaData) or _has_metadata(metadata):
        return declare_model(metadata, table_name, columns=columns)
    raise TypeError(f"metadata is a MetaData or a declarative base, not {metadata!r}")


def _metadata_of(base: type[HasMetaData]) -> MetaData:
    return cast("type[_Base]", base).metadata


def _has_metadata(thing: object) -> TypeGuard[type[HasMetaData]]:
    return isinstance(thing, type) and isinstance(getattr(thing, "metadata", None), MetaData)


def declare_model(
    base: type[HasMetaData] | MetaData, table_name: str, *, columns: bool = False
) -> type[FSMData]:
    """Declare the storage's model, or return the one already declared for that table.

    :param base: the declarative base to inherit from, or a bare ``MetaData``
    :param table_name: the table's name, without a schema (``MetaData(schema=...)`` sets that)
    :param columns: whether it has the columns to look conversations by
    :raises ValueError: if the metadata has a table of that name with other columns
    :return: the mapped class
    """
    metadata = base if isinstance(base, MetaData) else _metadata_of(base)
    schema = _schema(base)
    name = f"{schema}.{table_name}" if schema else table_name
    table = metadata.tables.get(name)
    if table is not None:  # may have been reflected, or declared by the application
        _check_columns(table, "id", "state", "data")
        _check_lookups(table, columns)
        declared = _models[table]() if table in _models else None
        if declared is not None:
            return declared
    # A base of dataclasses, or of pydantic's as SQLModel's, takes no mixin: it lends its metadata.
    inherits = isinstance(base, type) and not (
        issubclass(base, MappedAsDataclass) or hasattr(base, "model_fields")
    )
    parent = base if inherits else declarative_base(metadata=metadata)
    attributes: dict[str, Any] = {"__module__": __name__}
    if table is None:
        attributes["__tablename__"] = table_name
    else:
        attributes["__table__"] = table
    # A declarative base wants the names of its classes to differ, as those of its tables do.
    metaclass: Any = type(parent)
    mixins = (ConversationColumns, FSMData) if columns and table is None else (FSMData,)
    model = cast("type[FSMData]", metaclass(name, (*mixins, parent), attributes))
    table = table_of(model)
    _check_writable(table)
    _models[table] = ref(model)
    return model


def declare_lock_table(model: type[FSMData]) -> Table:
    """Declare the table of event isolation's locks beside a model's, or return the one declared.

    For the module that Alembic's ``env.py`` imports, if ``create_isolation()`` is called in
    another one: autogenerate would drop the table.

    :param model: the storage's model
    :raises ValueError: if the metadata has a table of that name with other columns
    :return: the table, ``<table_name>_lock``
    """
    beside = table_of(model)
    name = f"{beside.name}_lock"
    found = beside.metadata.tables.get(f"{beside.schema}.{name}" if beside.schema else name)
    if found is not None:
        _check_columns(found, "id", "owner", "expires", "version")
        return found
    return Table(
        name,
        beside.metadata,
        Column("id", Key, primary_key=True),
        Column("owner", String(32), nullable=False),
        Column("expires", Double, nullable=False),
        Column("version", BigInteger, nullable=False),
        schema=beside.schema,
    )


def table_of(model: type[FSMData]) -> Table:
    """Return the table that a model is mapped to.

    :param model: a mapped class with the mixin's columns
    :raises TypeError: if it is not mapped to a table
    :raises ValueError: if the table lacks a column, or its primary key is not ``id``
    """
    table = getattr(model, "__table__", None)
    if not isinstance(table, Table):
        raise TypeError(
            f"{model!r} is not mapped to a table: "
            "write a class that inherits from FSMData and from your declarative base"
        )
    _check_columns(table, "id", "state", "data")
    return table


def _schema(base: type[HasMetaData] | MetaData) -> str | None:
    if isinstance(base, MetaData):
        return base.schema
    arguments: Any = getattr(base, "__table_args__", None)
    options = arguments[-1] if isinstance(arguments, tuple) and arguments else arguments
    schema = _metadata_of(base).schema
    return options.get("schema", schema) if isinstance(options, dict) else schema


def _check_columns(table: Table, *names: str) -> None:
    missing = set(names) - set(table.columns.keys())
    if missing or [column.name for column in table.primary_key] != ["id"]:
        raise ValueError(
            f"table {table.fullname!r} is taken by a different table (its columns: "
            f"{', '.join(table.columns.keys())}): pass another table_name, or a table with "
            f"the columns {', '.join(names)}, of which id is the primary key"
        )


def _check_lookups(table: Table, columns: bool) -> None:
    if columns and not has_columns(table):
        raise ValueError(
            f"table {table.fullname!r} has been declared without the columns to look conversations "
            "by: pass columns=True wherever it is, or add those of ConversationColumns to it"
        )


def _check_writable(table: Table) -> None:
    """Refuse a table into which the storage could not write.

    :raises ValueError: naming the column, and what to do
    """
    for name in ("state", "data"):
        if isinstance(table.c[name].type, JSON):
            raise ValueError(
                f"column {name!r} of table {table.fullname!r} is of type JSON, which would "
                "hold the storage's text as a JSON string: make it Text, and cast it to query it"
            )
    for column in table.columns:
        if (
            column.name not in ("id", "state", "data")
            and not column.nullable
            and column.default is None
            and column.server_default is None
            and column.computed is None
            and column.identity is None
        ):
            raise ValueError(
                f"column {column.name!r} of table {table.fullname!r} is NOT NULL and has no "
                "default, so that the storage could not write a row: give it a default or make it "
                "nullable. If it comes from your declarative base, pass Base.metadata in place of "
                "Base"
            )
