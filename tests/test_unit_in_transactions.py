"""Units of work inside transactions of the application's."""

from __future__ import annotations

from pathlib import Path

from aiogram.fsm.storage.base import StorageKey
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from hybrid_storage import SQLAlchemyStorage


async def test_a_function_of_the_transaction_may_be_called_after_all_was_written(
    tmp_path: Path, key: StorageKey
) -> None:
    """What was written is forgotten then, and the lease is renewed at the end all the same."""
    engine = create_engine(f"sqlite:///{tmp_path / 'bot.db'}")
    storage = SQLAlchemyStorage(sessionmaker(engine))
    isolation = storage.create_isolation(unit_of_work=True)
    await storage.create_table()
    async with isolation.lock(key), storage.transaction():
        await storage.set_state(key, "paid")
        await storage.run_sync(lambda session: None)
    assert await storage.get_state(key) == "paid"
    engine.dispose()
