"""The examples of the pages on conversations run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from aiogram import Bot
from aiogram.fsm.storage.base import StorageKey
from aiogram.types import Update
from sqlalchemy import text
from test_readme import Answers, message, run_awaiting

GUIDES = Path(__file__).parent.parent / "docs" / "guides"
KEY, OTHER = StorageKey(42, 7, 7), StorageKey(42, 8, 8)


def blocks_of(name: str) -> list[str]:
    """Return the page's blocks, which have to be all of it."""
    page = (GUIDES / name).read_text()
    blocks = re.findall(r"<!-- run: \w+ -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") > 0
    return blocks


async def test_the_pages_on_looking_them_up_and_changing_them_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "conversations"}
    # The second page goes on with the storage of the first.
    for block in blocks_of("conversations.md") + blocks_of("change-conversations.md"):
        if "storage.find(" in block and "idle_for" in block:
            for each in (KEY, OTHER):
                await names["storage"].set_state(each, names["Order"].payment)
            await names["storage"].set_data(KEY, {"address": "London", "product": "tea"})
        await run_awaiting(block, names)
        if "remove_data" in block:
            data = await names["storage"].get_data(KEY)
            assert data == {"product": "tea", "visits": 1}
    assert "0 rows filled\n2\n{'Order:payment': 2}\n7\n8\n" in capsys.readouterr().out

    storage, answers = names["storage"], Answers()
    bot = Bot("42:TEST", session=answers)
    assert await storage.get_state(KEY) == "Purchase:payment"
    await names["broadcast"](bot, "hello")
    assert answers.sent == ["hello", "hello"]
    update = Update(update_id=1, message=message("/forget_me", OTHER.user_id))
    await names["dp"].feed_update(bot, update)
    assert await storage.count() == 1
    assert await storage.clear_all(user_id=7) == 1  # as the page's table says
    await names["isolation"].close()
    names["engine"].dispose()


async def test_the_page_on_expiry_and_reminders_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "expiry"}
    for block in blocks_of("expiry-and-reminders.md"):
        await run_awaiting(block, names)
    storage, isolation, states = names["storage"], names["isolation"], names["Order"]
    answers = Answers()
    names["bot"] = Bot("42:TEST", session=answers)
    await storage.create_table()
    await storage.set_state(KEY, states.payment)
    await storage.run_sync(
        lambda session: session.execute(text("UPDATE aiogram_fsm_data SET written_at = 1e9"))
    )
    assert await storage.count() == 0  # expired
    eternal = names["SQLAlchemyStorage"](names["SessionLocal"], names["Base"], columns=True)
    once: dict[str, Any] = {"isolation": isolation, "every": None, "state": states}
    assert await eternal.on_idle(after=86400, action=names["remind"], **once) == 1
    assert answers.sent == ["Your order is still waiting for you."]
    await storage.set_state(OTHER, states.cart)
    assert await storage.purge() == 1
    assert await eternal.count() == 1
    await isolation.close()
    names["engine"].dispose()
