"""The tables partitioned, the statements that name their key, and the page on scaling."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiogram import Bot as AiogramBot
from aiogram.fsm.storage.base import StorageKey
from aiogram.types import Update
from backends import BY_DRIVER, POSTGRESQL, SQLITE, Backend
from conftest import AnyEngine, Open, dispose, engine_of, every_call
from sharded_bot import dispatcher
from sqlalchemy import DDL, URL, Engine, Table, create_engine, event, select, text
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from test_readme import Answers, message, run_awaiting
from units import BEFORE, HISTORY, KEY, Bot, running

from hybrid_storage import FSMData, SQLAlchemyStorage, declare_lock_table
from hybrid_storage.model import table_of

PAGE = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
BLOCKS = re.findall(r"<!-- run -->\n```(\w+)\n(.*?)```", PAGE, re.DOTALL)
PARTITIONS = 4


def partition(table: Table) -> None:
    """Have a table created by hash of its key."""
    table.dialect_options["postgresql"]["partition_by"] = "HASH (id)"
    for number in range(PARTITIONS):
        ddl: Any = DDL(  # type: ignore[no-untyped-call]
            f"CREATE TABLE %(table)s_{number} PARTITION OF %(table)s"
            f" FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {number})"
        )
        event.listen(table, "after_create", ddl)


@asynccontextmanager
async def partitioned(backend: Backend, url: URL) -> AsyncIterator[tuple[Bot, AnyEngine]]:
    """Give a bot whose two tables are partitioned, and its engine."""

    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = "conversation"

    for table in (table_of(Conversation), declare_lock_table(Conversation)):
        partition(table)
    engine: AnyEngine = backend.engine(url)
    storage: SQLAlchemyStorage = SQLAlchemyStorage(backend.factory(engine), model=Conversation)
    async with running(storage, 30.0, driver_statements=backend.driver_statements) as bot:
        yield bot, engine
    await dispose(engine)


@pytest.mark.parametrize("backend", [*POSTGRESQL, BY_DRIVER], ids=str)
async def test_tables_can_be_partitioned_by_hash_of_the_key(
    backend: Backend, postgres_database: URL
) -> None:
    async with partitioned(backend, postgres_database) as (bot, _):
        await bot.storage.clear(KEY)
        for user in range(20):
            await every_call(bot.storage, StorageKey(42, user, user))
        for user in range(20):
            key = StorageKey(42, user, user)
            for times in range(3):
                async with bot.update(key):
                    data = await bot.storage.get_data(key)
                    await bot.storage.set_data(key, {"count": data.get("count", 0) + 1})
                    await bot.storage.set_data(replace(key, destiny="history"), {"at": times})
            assert await bot.stored(key) == (None, {"count": 3})
            await bot.assert_free(key)
        await bot.storage.set_data(KEY, BEFORE[1])
        async with bot.update(KEY):  # somebody else writes meanwhile: the slower way
            await bot.storage.get_data(KEY)
            await bot.meanwhile("update_data", {"beside": 1})
            await bot.storage.update_data(KEY, {"mine": 1})
        assert (await bot.stored())[1] == {**BEFORE[1], "beside": 1, "mine": 1}
        with looking(postgres_database) as ask:
            filled = ask(
                "SELECT DISTINCT tableoid::regclass::text FROM conversation"
                " UNION SELECT DISTINCT tableoid::regclass::text FROM conversation_lock"
            )
        assert len(filled) == 2 * PARTITIONS


async def test_an_update_looks_into_the_partition_of_its_row_alone(
    postgres_database: URL,
) -> None:
    async with partitioned(POSTGRESQL[-1], postgres_database) as (bot, engine):
        for _ in range(10):
            async with bot.update(KEY):
                data = await bot.storage.get_data(KEY)
                await bot.storage.update_data(KEY, {"count": data.get("count", 0) + 1})
        await dispose(engine)  # which has what was counted written down
        with looking(postgres_database) as ask:
            ask("SELECT pg_sleep(0.2)::text")
            scanned = ask(
                "SELECT relname FROM pg_stat_user_tables WHERE relname ~ '_[0-9]$'"
                " AND (idx_scan > 0 OR seq_scan > 1)"  # one to build its index
            )
        assert len(scanned) == 2, scanned


@contextmanager
def looking(url: URL) -> Iterator[Any]:
    """Give a function that returns the first column of an answer."""
    engine = create_engine(url)
    with engine.connect() as connection:
        yield lambda statement: list(connection.execute(text(statement)).scalars())
    engine.dispose()


@contextmanager
def parameters_of(engine: Engine) -> Iterator[list[tuple[str, str]]]:
    """Collect statements with their parameters."""
    seen: list[tuple[str, str]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        seen.append((statement, repr(parameters)))

    event.listen(engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine, "before_cursor_execute", note)


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_each_statement_of_an_update_names_its_key(
    backend: Backend, open_storage: Open
) -> None:
    storage = await open_storage(backend)
    async with running(storage, 30.0) as bot:
        with parameters_of(engine_of(storage)) as seen:
            await storage.set_state(KEY, None)
            await storage.set_data(KEY, {})
            await storage.set_state(KEY, "Form:name")
            await storage.set_data(KEY, {"name": "Ada"})
            await storage.update_data(KEY, {"age": 36})
            await storage.get_state(KEY)
            await storage.clear(KEY)
            async with bot.update():
                await storage.get_data(KEY)
                await storage.update_data(KEY, {"count": 1})
                await storage.set_state(HISTORY, "Form:name")
            async with bot.update():
                await storage.get_data(KEY)
                await bot.meanwhile("update_data", {"beside": 1})
                await storage.update_data(KEY, {"mine": 1})
        row = storage.key_builder.build(KEY)
        about = [each for each in seen if storage.table.name in each[0]]
        assert len(about) > 15
        assert [each for each in about if f"'{row}" not in each[1]] == []
        by_key = re.compile(r"\bid (= |IN \()|VALUES \(|unnest\(")
        assert [statement for statement, _ in about if not by_key.search(statement)] == []


async def test_the_lock_has_the_id_of_the_row_of_the_default_destiny(
    open_storage: Open,
) -> None:
    storage = await open_storage(POSTGRESQL[-1])
    async with running(storage, 30.0) as bot:
        async with bot.update(HISTORY):
            await storage.set_state(HISTORY, "Form:name")

        def ids(session: Session) -> list[str]:
            return list(
                session.execute(text(f"SELECT id FROM {storage.table.name}_lock")).scalars()
            )

        assert await storage.run_sync(ids) == [storage.key_builder.build(KEY)]
        assert storage.key_builder.build(HISTORY) != storage.key_builder.build(KEY)


async def test_the_examples_of_the_page_run(
    postgres_database: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(BLOCKS) == PAGE.count("```python") + PAGE.count("```sql") > 0
    monkeypatch.chdir(tmp_path)
    url = postgres_database.set(drivername="postgresql+asyncpg")
    former = create_engine(postgres_database, isolation_level="AUTOCOMMIT")
    storage: SQLAlchemyStorage = SQLAlchemyStorage(sessionmaker(former))
    storage.create_isolation()
    storage.metadata.create_all(former)
    for language, code in BLOCKS:
        if language == "sql":
            with former.connect() as connection:
                for statement in filter(None, map(str.strip, code.split(";"))):
                    connection.exec_driver_sql(statement)
            continue
        code = code.replace("postgresql+asyncpg://localhost/shop", url.render_as_string(False))
        names: dict[str, Any] = {"__name__": "scaling"}
        await run_awaiting(code, names)
        await names["engine"].dispose()
    former.dispose()
    with looking(postgres_database) as ask:
        set_for = ask(
            "SELECT relname FROM pg_class WHERE reloptions IS NOT NULL AND relkind = 'r'"
            " AND array_to_string(reloptions, ',') ~ 'fillfactor=90.*scale_factor=0.02'"
        )
        assert {"aiogram_fsm_data", "aiogram_fsm_data_lock", "shop", "shop_lock"} <= set(set_for)
        assert ask("SELECT relname FROM pg_class WHERE relname ~ 'conversation.*_7$'")


@pytest.mark.parametrize("backend", [*SQLITE, *POSTGRESQL], ids=str)
async def test_a_sharded_bot_keeps_each_conversation_and_its_lock_on_one_shard(
    backend: Backend, postgres_url: URL, tmp_path: Path
) -> None:
    urls = [postgres_url] * 2
    if backend.server == "sqlite":
        urls = [URL.create("sqlite", database=str(tmp_path / name)) for name in ("0.db", "1.db")]
    engines = [backend.engine(url) for url in urls]
    shards = [
        SQLAlchemyStorage(backend.factory(engine), table_name=f"shard_{uuid.uuid4().hex}")
        for engine in engines
    ]
    dp = dispatcher(shards)
    await dp.emit_startup()
    bot = AiogramBot("42:TEST", session=Answers())
    for user in range(1, 9):
        for number in (1, 2):
            update = Update(update_id=number, message=message("hi", user))
            await dp.feed_update(bot, update)
    for user in range(1, 9):
        key = StorageKey(bot_id=42, chat_id=user, user_id=user)
        assert await dp.storage.get_data(key) == {"seen": 2}
        found = [(await shard.get_data(key)).get("seen") for shard in shards]
        assert found == ([2, None] if user % 2 == 0 else [None, 2])

    await dp.emit_shutdown()
    for shard, engine in zip(shards, engines, strict=True):

        def ids_and_drop(session: Session, shard: SQLAlchemyStorage = shard) -> set[str]:
            locks = declare_lock_table(shard.model)
            ids = [set(session.scalars(select(each.c.id))) for each in (shard.table, locks)]
            assert ids[0] == ids[1]
            shard.metadata.drop_all(session.connection())
            return ids[0]

        assert len(await shard.run_sync(ids_and_drop)) == 4
        await dispose(engine)
