"""Statements by libpq: prepared where that helps, and no worse off where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from aiogram.fsm.storage.base import StorageKey
from conftest import Open, engine_of, every_call, give_up, in_session
from sqlalchemy import URL, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool
from ways import POSTGRESQL, Way

from hybrid_storage import SQLAlchemyStorage, _libpq

PSYCOPG = POSTGRESQL[0]
ONE = {"pool_size": 1, "max_overflow": 0}


async def open_one(open_storage: Open, **options: Any) -> SQLAlchemyStorage:
    """Open a storage on a pool of one connection; nothing is tried again."""
    storage = await open_storage(PSYCOPG, engine_options={**ONE, **options}, retry_for=0)
    assert isinstance(storage, SQLAlchemyStorage)
    return storage


async def prepared(storage: SQLAlchemyStorage) -> set[str]:
    """Return the statements that the connection has prepared."""

    def read(session: Session) -> set[str]:
        query = "SELECT statement FROM pg_prepared_statements WHERE name LIKE 'hybrid_storage_%%'"
        return set(session.connection().exec_driver_sql(query).scalars())

    found: set[str] = await in_session(storage, read)
    return found


async def execute(storage: SQLAlchemyStorage, statement: str) -> None:
    """Run a statement of the application's on the connection."""
    await in_session(storage, lambda session: session.connection().exec_driver_sql(statement))


async def test_psycopgs_cursor_is_not_needed(
    open_storage: Open, key: StorageKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = await open_one(open_storage)
    await storage.set_state(key, "Form:name")

    def fail(*_: object, **__: object) -> None:
        pytest.fail("psycopg has run a statement")

    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Cursor, "execute", fail)
        assert await storage.get_state(key) == "Form:name"
        assert await storage.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
        await storage.clear(key)
    await every_call(storage, key)


async def test_a_cursor_of_the_applications_own_sees_every_statement(
    open_storage: Open, key: StorageKey
) -> None:
    seen: list[str] = []

    class Traced(psycopg.Cursor[Any]):
        def execute(self, query: Any, *args: Any, **options: Any) -> Traced:
            seen.append(str(query))
            return super().execute(query, *args, **options)

    storage = await open_one(open_storage, connect_args={"cursor_factory": Traced})
    await every_call(storage, key)
    for verb in ("INSERT", "SELECT", "UPDATE", "DELETE"):
        assert any(text.startswith(verb) for text in seen), verb


async def test_a_connection_that_threads_share_is_left_to_psycopg(
    open_storage: Open, key: StorageKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a lock, which the application's threads wait for as well."""
    storage = await open_storage(PSYCOPG, engine_options={"poolclass": StaticPool})
    execute = psycopg.Cursor.execute
    seen: list[object] = []

    def see(cursor: Any, query: Any, *args: Any, **options: Any) -> Any:
        seen.append(query)
        return execute(cursor, query, *args, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", see)
    await storage.set_state(key, "Form:name")
    assert "INSERT" in str(seen)


async def test_handlers_of_notifications_are_called(open_storage: Open, key: StorageKey) -> None:
    storage = await open_one(open_storage)
    heard: list[str] = []

    def listen(connection: Any, _: object) -> None:
        connection.add_notify_handler(lambda notify: heard.append(notify.payload))
        connection.execute("LISTEN fsm_news")
        connection.commit()

    event.listen(engine_of(storage), "connect", listen)
    await in_session(storage, give_up)
    await storage.get_state(key)
    other = await open_one(open_storage)
    await execute(other, "NOTIFY fsm_news, 'read all about it'")
    await storage.get_state(key)
    assert heard == ["read all about it"]


@pytest.mark.parametrize("threshold", [None, 0, 2])
async def test_statements_are_prepared_when_psycopg_would(
    threshold: int | None, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_one(open_storage, connect_args={"prepare_threshold": threshold})
    for number in range(1, 5):
        await storage.get_state(key)
        found = await prepared(storage)
        assert len(found) == (threshold is not None and number > threshold), number
    await every_call(storage, key)


async def test_a_statement_that_the_server_forgot_is_run_all_the_same(
    open_storage: Open, key: StorageKey
) -> None:
    storage = await open_one(open_storage)
    for number in range(8):
        await storage.set_state(key, f"Form:{number}")
        assert await storage.get_state(key) == f"Form:{number}"
    assert len(await prepared(storage)) == 2
    await execute(storage, "DEALLOCATE ALL")
    await storage.set_state(key, "Form:name")
    assert await storage.get_state(key) == "Form:name"


async def test_a_statement_that_is_prepared_already_is_run(
    open_storage: Open, key: StorageKey
) -> None:
    """As behind a pooler, which lends a server's connection to many."""
    storage = await open_one(open_storage, connect_args={"prepare_threshold": 0})

    def forget(_: object, record: Any, *__: object) -> None:
        record.info.pop(_libpq._STATEMENTS, None)

    event.listen(engine_of(storage), "checkout", forget)
    for _ in range(2):
        await every_call(storage, key)
    assert await prepared(storage)


async def test_an_error_while_a_statement_is_prepared_is_raised(
    open_storage: Open, url_of: Callable[[Way], URL], key: StorageKey
) -> None:
    options = {"prepare_threshold": 0, "options": "-c lock_timeout=50"}
    storage = await open_one(open_storage, connect_args=options)
    engine: Any = PSYCOPG.engine(url_of(PSYCOPG))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"LOCK TABLE {storage.table.name} IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(DBAPIError, match="lock timeout"):
            await storage.get_state(key)
    engine.dispose()
    await storage.get_state(key)
    assert len(await prepared(storage)) == 1  # it is tried again


async def test_a_column_may_be_altered_meanwhile(open_storage: Open, key: StorageKey) -> None:
    storage = await open_one(open_storage, connect_args={"prepare_threshold": 0})
    await every_call(storage, key)
    table = storage.table.name
    other = await open_storage(PSYCOPG, table_name=table)  # psycopg forgets what it altered itself
    await execute(other, f"ALTER TABLE {table} ALTER COLUMN state TYPE TEXT")
    assert f"SELECT {table}.state" in str(await prepared(storage))
    await storage.set_state(key, "Form:name")
    assert await storage.get_state(key) == "Form:name"


async def test_an_error_is_the_databases(open_storage: Open, key: StorageKey) -> None:
    storage = await open_one(open_storage)
    table = storage.table.name
    await execute(storage, f"ALTER TABLE {table} ADD CONSTRAINT known CHECK (state <> 'unknown')")
    with pytest.raises(DBAPIError, match="known") as caught:
        await storage.set_state(key, "unknown")
    assert isinstance(caught.value.orig, psycopg.errors.CheckViolation)
    assert caught.value.orig.diag.constraint_name == "known"
    await every_call(storage, key)


@pytest.mark.parametrize("encoding", ["utf8", "latin1"])
async def test_text_is_sent_in_the_connections_encoding(
    encoding: str, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(
        PSYCOPG,
        engine_options={**ONE, "connect_args": {"client_encoding": encoding}},
        table_name="fsm 50% größer",
        json_dumps=lambda data: str(data).replace("'", '"'),
    )
    await every_call(storage, key)
    await storage.set_state(key, "Größe")
    await storage.set_data(key, {"name": "Zoë"})
    assert await storage.get_state(key) == "Größe"
    assert await storage.get_data(key) == {"name": "Zoë"}


async def test_much_data_is_sent_and_received(open_storage: Open, key: StorageKey) -> None:
    storage = await open_one(open_storage)
    data = {"text": "x" * 20_000_000}
    await storage.set_data(key, data)
    assert await storage.get_data(key) == data
