"""The recipes of the pages on other storages, for which a server or a package is missing here."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from test_readme import close_engines, run_awaiting

from hybrid_storage import SQLAlchemyStorage

PAGE = Path(__file__).parent.parent / "docs" / "coming-from" / "mongo-storage.md"
BLOCKS = re.findall(r"<!-- run: source -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)

PRIVATE = StorageKey(bot_id=42, chat_id=7, user_id=7)
TOPIC = StorageKey(bot_id=42, chat_id=-1001, user_id=7, thread_id=5)
BUILD = DefaultKeyBuilder().build

DOCUMENTS: list[dict[str, Any]] = [
    {"_id": BUILD(PRIVATE), "state": "Form:name", "data": {"name": "Ada"}},
    {"_id": BUILD(TOPIC), "data": {"name": "Eve"}},
    {"_id": "fsm:8:8", "state": "Form:name"},
    {"_id": "fsm:9:9", "data": {"since": datetime(2026, 1, 1)}},
    {"_id": "fsm:7:7:scenes_history", "data": {"history": []}},
]
"""As MongoStorage and PyMongoStorage write them; those without state and data are not there."""


class Collection:
    """What the page's source asks of a collection, whichever driver's."""

    async def find(
        self, filter: Mapping[str, Any], projection: Mapping[str, int] | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        names = filter["_id"]["$in"] if filter else [each["_id"] for each in DOCUMENTS]
        for each in DOCUMENTS:
            if each["_id"] in names:
                yield {name: each[name] for name in projection or each}


class AsyncMongoClient:
    """The client of pymongo, for the page's own lines."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __getitem__(self, name: str) -> Any:
        return {"states_and_data": Collection()}

    async def close(self) -> None:
        pass


async def test_the_pages_source_moves_what_mongodb_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(BLOCKS) == PAGE.read_text().count("```python") == 2
    monkeypatch.chdir(tmp_path)
    pymongo = ModuleType("pymongo")
    vars(pymongo)["AsyncMongoClient"] = AsyncMongoClient
    monkeypatch.setitem(sys.modules, "pymongo", pymongo)
    names: dict[str, Any] = {"__name__": "page"}
    for block in BLOCKS:
        await run_awaiting(block, names)
    await names["move"]()
    report, *refused = capsys.readouterr().out.splitlines()
    assert report.startswith("5 found: 3 moved, ")
    assert [line.split()[0] for line in refused] == ["fsm:9:9", "fsm:7:7:scenes_history"]
    assert "datetime is not JSON serializable" in refused[0]

    storage = SQLAlchemyStorage(sessionmaker(create_engine("sqlite:///bot.db")))
    assert await storage.get_state(PRIVATE) == "Form:name"
    assert await storage.get_data(PRIVATE) == {"name": "Ada"}
    assert await storage.get_data(TOPIC) == {"name": "Eve"}
    names.clear()
    del storage
    close_engines()


async def test_the_pages_source_lists_names_in_batches(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    await run_awaiting(BLOCKS[0], names)
    source = names["MongoSource"](Collection(), bot_id=42)
    assert [len(batch) async for batch in source.names(2)] == [2, 2, 1]
    assert await source.read(["fsm:6:6"]) == []
