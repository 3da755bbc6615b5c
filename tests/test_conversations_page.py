"""The examples of the page on conversations run as they stand."""

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

PAGE = (Path(__file__).parent.parent / "docs" / "guides" / "conversations.md").read_text()
BLOCKS = re.findall(r"<!-- run: \w+ -->\n```python\n(.*?)```", PAGE, re.DOTALL)


async def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(BLOCKS) == PAGE.count("```python") > 0
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "conversations"}
    answers = Answers()
    key, other = StorageKey(42, 7, 7), StorageKey(42, 8, 8)
    for block in BLOCKS:
        if "storage.find(" in block and "idle_for" in block:
            for each in (key, other):
                await names["storage"].set_state(each, names["Order"].payment)
            await names["storage"].set_data(key, {"address": "London", "product": "tea"})
        await run_awaiting(block, names)
        if "remove_data" in block:
            data = await names["storage"].get_data(key)
            assert data == {"product": "tea", "visits": 1}
        if "bot = Bot" in block:
            names["bot"] = Bot("42:TEST", session=answers)
    printed = capsys.readouterr().out
    assert "0 rows filled\n2\n{'Order:payment': 2}\n7\n8\n" in printed
    assert printed.endswith("Purchase:payment: 1\n")  # the other one was stuck

    storage, isolation = names["storage"], names["isolation"]
    await names["broadcast"]("hello")
    await storage.run_sync(
        lambda session: session.execute(text("UPDATE aiogram_fsm_data SET written_at = 1e9"))
    )
    assert await storage.count() == 0  # expired
    eternal = names["SQLAlchemyStorage"](names["SessionLocal"], names["Base"], columns=True)
    states = names["Purchase"]
    once: dict[str, Any] = {"isolation": isolation, "every": None, "state": states}
    assert await eternal.on_idle(after=86400, action=names["remind"], **once) == 1
    assert answers.sent == ["hello", "Your order is still waiting for you."]
    await storage.set_state(other, states.cart)
    update = Update(update_id=1, message=message("/forget_me", other.user_id))
    await names["dp"].feed_update(names["bot"], update)
    assert await eternal.count() == 0
    await isolation.close()
    names["engine"].dispose()
