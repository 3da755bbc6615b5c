"""The migration that Alembic writes by itself creates the storage's table, and nothing else."""

from __future__ import annotations

import io
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from alembic import command
from alembic.config import Config
from alembic.operations.ops import (
    CreateTableOp,
    DropTableOp,
    MigrationScript,
    ModifyTableOps,
)
from alembic.script import Script
from backends import SERVERS, Backend
from conftest import rows
from sqlalchemy import URL, Connection, Engine, MetaData, func, inspect
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from hybrid_storage import FSMData, SQLAlchemyStorage, declare_model

T = TypeVar("T")

ENVIRONMENT = """
from alembic import context

attributes = context.config.attributes
metadata = attributes["metadata"]
context.configure(
    connection=attributes["connection"],
    target_metadata=metadata,
    version_table=attributes["version_table"],
    # Other tables of this database are not this application's.
    include_name=lambda name, type_, _: type_ != "table" or name in metadata.tables,
    compare_type=True,
    compare_server_default=True,
)
with context.begin_transaction():
    context.run_migrations()
"""


class Application:
    """An application with an Alembic environment and an engine.

    :param engine: its engine
    :param folder: where to make the environment
    """

    def __init__(self, engine: Engine | AsyncEngine, folder: Path) -> None:
        class Base(DeclarativeBase):
            pass

        self.base: Any = Base
        self.metadata: MetaData = Base.metadata
        self.name = f"fsm_{uuid.uuid4().hex}"
        self.version_table = f"version_{self.name}"
        self.engine = engine
        self._config = Config(folder / "alembic.ini", stdout=io.StringIO())
        command.init(self._config, str(folder / "migrations"))
        (folder / "migrations" / "env.py").write_text(ENVIRONMENT)
        self._config = Config(stdout=io.StringIO())
        self._config.set_main_option("script_location", str(folder / "migrations"))
        self._config.set_main_option("path_separator", "os")
        self._config.attributes.update(metadata=self.metadata, version_table=self.version_table)

    def forget(self) -> None:
        """Begin the models anew, as the next version of the application does."""
        metadata = self.metadata

        class Base(DeclarativeBase):
            pass

        Base.metadata = metadata
        self.base = Base

    async def alembic(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function of ``alembic.command``."""

        def call(connection: Connection) -> Any:
            self._config.attributes["connection"] = connection
            return function(self._config, *args, **options)

        return await self.with_connection(call)

    async def revision(self) -> tuple[MigrationScript, str]:
        """Let Alembic write a revision; return its operations and the file's text."""
        written: list[MigrationScript] = []

        def look(context: object, revision: object, directives: list[MigrationScript]) -> None:
            written.extend(directives)

        script = await self.alembic(
            command.revision, autogenerate=True, process_revision_directives=look
        )
        assert isinstance(script, Script)
        [directive] = written
        return directive, await anyio.Path(script.path).read_text()

    async def has_table(self, name: str) -> bool:
        """Tell whether the database has a table."""
        found = await self.with_connection(lambda connection: inspect(connection).has_table(name))
        assert isinstance(found, bool)
        return found

    async def with_connection(self, function: Callable[[Connection], Any]) -> Any:
        """Call a function with a connection, and commit."""
        if isinstance(self.engine, AsyncEngine):
            async with self.engine.begin() as connection:
                return await connection.run_sync(function)
        with self.engine.begin() as sync_connection:
            return function(sync_connection)


@pytest.fixture(params=SERVERS, ids=str)
async def application(
    request: pytest.FixtureRequest, url_of: Callable[[Backend], URL], tmp_path: Path
) -> AsyncIterator[tuple[Application, Backend]]:
    """Return an application on each backend; at the end its tables are dropped."""
    backend: Backend = request.param
    application = Application(backend.engine(url_of(backend)), tmp_path)
    yield application, backend

    def drop(connection: Connection) -> None:
        application.metadata.drop_all(connection)
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {application.version_table}")

    await application.with_connection(drop)
    disposed: Any = application.engine.dispose()
    if disposed is not None:
        await disposed


def declare_by_constructor(application: Application, backend: Backend) -> Any:
    """Declare the table as bots do that import their storage in Alembic's env.py."""
    return SQLAlchemyStorage(
        backend.factory(application.engine), application.base, application.name
    )


def declare_by_metadata(application: Application, backend: Backend) -> Any:
    """Declare the table without any session factory, next to the application's own models."""
    declare_model(application.metadata, application.name)
    return SQLAlchemyStorage(
        backend.factory(application.engine), application.metadata, application.name
    )


def declare_by_model(application: Application, backend: Backend) -> Any:
    """Declare a model of the application's own."""

    class Conversation(FSMData, application.base):  # type: ignore[name-defined, misc]
        __tablename__ = application.name
        changed_at: Mapped[datetime] = mapped_column(default=func.now(), onupdate=func.now())

    return SQLAlchemyStorage(backend.factory(application.engine), table_name=Conversation)


def declare_with_isolation(application: Application, backend: Backend) -> Any:
    """Declare the table of event isolation too."""
    storage = declare_by_constructor(application, backend)
    storage.create_isolation()
    return storage


def declare_with_columns(application: Application, backend: Backend) -> Any:
    """Declare a table that has the columns to look conversations by."""
    factory = backend.factory(application.engine)
    return SQLAlchemyStorage(factory, application.base, application.name, columns=True)


def only(kind: type[T], operations: Sequence[object]) -> list[T]:
    """Return operations, which have to be of one kind."""
    found = [operation for operation in operations if isinstance(operation, kind)]
    assert len(found) == len(operations)
    return found


@pytest.mark.parametrize(
    ("declare", "suffixes"),
    [
        pytest.param(declare_by_constructor, [""], id="by the constructor"),
        pytest.param(declare_by_metadata, [""], id="by declare_model"),
        pytest.param(declare_by_model, [""], id="by a model"),
        pytest.param(declare_with_isolation, ["", "_lock"], id="with isolation"),
        pytest.param(declare_with_columns, [""], id="with columns to look by"),
    ],
)
async def test_the_first_revision_creates_what_is_declared_and_the_next_is_empty(
    application: tuple[Application, Backend],
    key: StorageKey,
    declare: Callable[[Application, Backend], SQLAlchemyStorage[Any]],
    suffixes: list[str],
) -> None:
    app, backend = application
    storage = declare(app, backend)
    first, text = await app.revision()
    assert first.upgrade_ops is not None
    assert first.downgrade_ops is not None
    names = [f"{app.name}{suffix}" for suffix in suffixes]
    operations = [each for each in first.upgrade_ops.ops if not isinstance(each, ModifyTableOps)]
    created = [each.to_table() for each in only(CreateTableOp, operations)]
    assert sorted(table.name for table in created) == names
    [table] = [table for table in created if table.name == app.name]
    assert [column.name for column in table.columns] == storage.table.columns.keys()
    operations = [each for each in first.downgrade_ops.ops if not isinstance(each, ModifyTableOps)]
    dropped = only(DropTableOp, operations)
    assert sorted(each.table_name for each in dropped) == names
    assert "hybrid_storage" not in text, "a revision has to run without this package"

    assert not await app.has_table(app.name)
    await app.alembic(command.upgrade, "head")
    assert await app.has_table(app.name)

    second, _ = await app.revision()
    assert second.upgrade_ops is not None
    assert second.upgrade_ops.is_empty()
    await app.alembic(command.upgrade, "head")
    await app.alembic(command.check)

    await storage.create_table()
    await storage.set_state(key, "form:name")
    assert await storage.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
    assert await storage.update_data(key, {"age": 36}) == {"name": "Ada", "age": 36}
    assert await storage.get_state(key) == "form:name"
    assert await storage.get_data(key) == {"name": "Ada", "age": 36}
    await storage.clear(key)
    assert await rows(storage) == []
    await app.alembic(command.check)

    await app.alembic(command.downgrade, "base")
    assert not await app.has_table(app.name)


async def test_a_table_of_the_storages_own_making_needs_no_revision(
    application: tuple[Application, Backend],
) -> None:
    app, backend = application
    storage = declare_by_constructor(app, backend)
    await storage.create_table()
    await app.alembic(command.check)


async def test_one_revision_adds_the_columns_to_look_by(
    application: tuple[Application, Backend], key: StorageKey
) -> None:
    app, backend = application
    former = declare_by_constructor(app, backend)
    await former.create_table()
    await former.set_state(key, "form:name")
    await former.set_data(key, {"name": "Ada"})
    app.metadata.clear()
    app.forget()
    storage = declare_with_columns(app, backend)
    revision, text = await app.revision()
    assert "hybrid_storage" not in text
    assert revision.upgrade_ops is not None
    await app.alembic(command.upgrade, "head")
    await app.alembic(command.check)
    assert await storage.get_data(key) == {"name": "Ada"}
    assert await storage.count() == 0
    assert await storage.fill_columns() == 1
    assert [found.key async for found in storage.find(state="form:name")] == [key]
    await app.alembic(command.downgrade, "base")
