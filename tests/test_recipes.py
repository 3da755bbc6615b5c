"""The guides for synchronous applications run as they stand, framework by framework."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import StorageKey
from anyio import to_thread
from test_readme import ROOT, close_engines, run_awaiting

GUIDES = ROOT / "docs" / "guides"
BLOCK = re.compile(r"<!-- run: (\w+) -->\n```python\n(.*?)```", re.DOTALL)
LEGACY = [GUIDES / "synchronous-applications.md", GUIDES / "functions-that-commit.md"]
"""The second page goes on with the application of the first."""
FRAMEWORKS = ["flask-sqlalchemy", "fastapi", "celery-and-cron"]


def recipes() -> list[tuple[str, str]]:
    """Return the guides' recipes, each with the heading above it."""
    found = []
    for name in FRAMEWORKS:
        heading = ""
        for part in re.split(r"^(#+ .*)$", (GUIDES / f"{name}.md").read_text(), flags=re.MULTILINE):
            if re.match(r"#+ [A-Z_]", part):
                heading = part.lstrip("# ")
            found += [(heading, code) for _, code in BLOCK.findall(part)]
    return found


RECIPES = recipes()
FACTORY = dict(
    re.findall(
        r"<!-- run: factory (\S+) -->\n```python\n(.*?)```",
        (GUIDES / "flask-sqlalchemy.md").read_text(),
        re.DOTALL,
    )
)
"""The files of the application with a factory, by their names."""
EXTENSIONS = """
from flask_sqlalchemy import SQLAlchemy

db = SQLAlchemy()
"""
APPLICATION = """
from flask import Flask

from .extensions import db


def create_app():
    from .views import shop

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{app.root_path}/shop.db"
    db.init_app(app)
    app.register_blueprint(shop)
    return app
"""


def test_every_python_block_of_these_guides_is_run() -> None:
    pages = [path.read_text() for path in LEGACY]
    assert all(page.count("```python") == len(BLOCK.findall(page)) > 0 for page in pages)
    pages = [(GUIDES / f"{name}.md").read_text() for name in FRAMEWORKS]
    assert (len(RECIPES), len(FACTORY)) == (7, 3)
    assert sum(page.count("```python") for page in pages) == 7 + 3


async def test_the_application_factory_of_the_flask_guide_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, beside those of an application that are not printed."""
    files = {**FACTORY, "shop/extensions.py": EXTENSIONS, "shop/__init__.py": APPLICATION}
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        app = importlib.import_module("wsgi").app
        storage = importlib.import_module("shop.conversations").storage
        await storage.create_table()
        answer = await to_thread.run_sync(lambda: app.test_client().post("/paid/7"))
        assert answer.text == "paid"
        users_key = StorageKey(bot_id=42, chat_id=7, user_id=7)
        assert await storage.get_state(users_key) == "order:paid"
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("shop", "wsgi")]:
            del sys.modules[name]
    close_engines()


async def test_the_examples_for_synchronous_applications_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "legacy"}
    for _, code in BLOCK.findall("".join(page.read_text() for page in LEGACY)):
        await run_awaiting(code, names)
    assert await names["state"].get_data() == {"order": 1, "orders": 2}
    assert not names["Session"].registry.has()
    close_engines()


@pytest.mark.parametrize(("name", "code"), RECIPES, ids=[name for name, _ in RECIPES])
async def test_the_recipes_for_frameworks_run(
    name: str,
    code: str,
    key: StorageKey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those that have no use of their own in them are used here."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("recipe")
    module.__file__ = str(tmp_path / "recipe.py")
    monkeypatch.setitem(sys.modules, "recipe", module)
    names = vars(module)
    names["key"] = key
    await run_awaiting(code, names)
    storage = names["storage"]
    await storage.create_table()
    users_key = StorageKey(bot_id=42, chat_id=7, user_id=7)
    if "FastAPI" in name:
        transport = httpx.ASGITransport(names["app"])
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            assert (await client.get("/state/7")).json() is None
            assert (await client.post("/paid/7")).status_code == 200
            assert (await client.get("/state/7")).json() == "order:paid"
    elif "Celery" in name:
        names["ship"].apply([7]).get()
        assert await storage.get_state(users_key) == "order:shipped"
        assert await storage.get_data(users_key) == {"parcel": 1}
    elif "cron" in name:
        await storage.set_state(key, "order:payment")
        await storage.set_state(users_key, "order:paid")
        await run_awaiting(code, {"__name__": "recipe"})
        assert await storage.get_state(key) is None
        assert await storage.get_state(users_key) == "order:paid"
        assert capsys.readouterr().out.endswith("\n1 conversations reset\n")
    elif "pay" in names:
        await names["pay"](FSMContext(storage, key))
        assert await storage.get_data(key) == {"order": 1}
        assert await storage.get_state(key) == "order:paid"
    elif "key, " in code:
        assert await storage.get_state(key) == "order:paid"
    names.clear()
    close_engines()
