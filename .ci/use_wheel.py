"""Use the installed package, by each kind of factory that can be had here."""

import asyncio
import importlib.util
import tempfile
from pathlib import Path

from aiogram.fsm.storage.base import StorageKey

from hybrid_storage import SQLAlchemyStorage


async def use(driver: str) -> None:
    """Write and read by one driver."""
    with tempfile.TemporaryDirectory() as folder:
        storage = SQLAlchemyStorage.from_url(f"sqlite+{driver}:///{Path(folder) / 'fsm.db'}")
        key = StorageKey(bot_id=1, chat_id=2, user_id=3)
        await storage.create_table()
        await storage.update_data(key, {"driver": driver})
        assert await storage.get_data(key) == {"driver": driver}
        await storage.close()


drivers = ["pysqlite"]
if importlib.util.find_spec("greenlet"):
    drivers.append("aiosqlite")
for driver in drivers:
    asyncio.run(use(driver))
print("works by", *drivers)
