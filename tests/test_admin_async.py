"""The example of admin pages by Starlette-Admin, in a browser and by a client."""

from __future__ import annotations

import asyncio
import html
import importlib
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from aiogram.fsm.storage.base import StorageKey
from browser import HAS_BROWSER, Browser, chromium
from conftest import checked_out
from selenium import webdriver
from sqlalchemy import URL, update

EXAMPLES = Path(__file__).parents[1] / "examples"
HOUR, DAY, WEEK = 3600, 86400, 604800
LIST = "/admin/conversation/list"


def key(user: int) -> StorageKey:
    return StorageKey(bot_id=42, chat_id=user, user_id=user)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database, by an asynchronous driver."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'admin.db'}"
    url = request.getfixturevalue("postgres_database")
    assert isinstance(url, URL)
    return url.render_as_string(hide_password=False)


@pytest.fixture
async def example(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """Import the example anew, with customers who fell silent now, 2 hours, 3 and 8 days ago.

    The last one has a dialog whose stack was written to now.
    """
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.syspath_prepend(EXAMPLES)
    sys.modules.pop("admin_async", None)
    example = importlib.import_module("admin_async")
    order = {"product": 2, "quantity": 1, "address": "Straße 1"}
    users: dict[int, tuple[str, dict[str, Any], int]] = {
        1001: ("product", {}, 0),
        1002: ("payment", order, 2 * HOUR),
        1003: ("paid", {"order": 1}, 3 * DAY),
        1004: ("address", {"product": 1, "quantity": 3}, 8 * DAY),
        1005: ("payment", order, 8 * DAY),
    }
    async with example.app.router.lifespan_context(example.app):
        for user, (state, data, _) in users.items():
            await example.storage.set_state(key(user), f"Checkout:{state}")
            await example.storage.set_data(key(user), data)
        stack = replace(key(1005), destiny="aiogd:stack:")
        await example.storage.set_data(stack, {"id": ""})
        row = example.Conversation
        async with example.SessionLocal.begin() as session:
            for user, (_, _, age) in users.items():
                aged = update(row).values(written_at=row.written_at - age)
                await session.execute(aged.where(row.id == f"42:{user}:{user}"))
        yield example
        assert checked_out(example.engine) == 0
    del sys.modules["admin_async"]


@pytest.fixture
async def client(example: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(example.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://bot") as client:
        yield client


def text_of(response: httpx.Response) -> str:
    """Return the text of a page's main part."""
    assert response.status_code == 200
    unseen = r"<(title|script|style|template).*?</\1>|<[^>]*>"
    return " ".join(html.unescape(re.sub(unseen, " ", response.text, flags=re.DOTALL)).split())


def by(*rules: str) -> dict[str, str]:
    """Return the query of a list that is filtered."""
    return {"filter": " AND ".join(rules)}


def idle(seconds: int | str) -> str:
    return f"written_at__idle={seconds}"


async def test_the_list_shows_whose_conversations_are_where_and_since_when(
    client: httpx.AsyncClient,
) -> None:
    text = text_of(await client.get(LIST))

    when = r"[-\d]{10} \d\d:\d\d UTC, "
    assert re.search(f"42 1002 1002 default Checkout:payment {when}2:00 h ago", text)
    assert re.search(f"42 1003 1003 default Checkout:paid {when}3 days, 0:00 h ago", text)
    assert text.index("42 1001") < text.index("42 1002") < text.index("42 1003")


@pytest.mark.parametrize(
    ("query", "users"),
    [
        ({"q": "payment"}, {1002, 1005}),
        (by("state__eq=Checkout:payment"), {1002, 1005}),
        (by("user_id__eq=1003"), {1003}),
        (by(idle(HOUR)), {1002, 1003, 1004}),
        (by(idle(DAY)), {1003, 1004}),
        (by(idle(WEEK)), {1004}),
        (by(idle(HOUR), "state__contains=payment"), {1002}),
    ],
    ids=str,
)
async def test_the_list_finds_conversations_by_state_and_age(
    client: httpx.AsyncClient, query: dict[str, str], users: set[int]
) -> None:
    """User 1005 is not idle: a row of the same conversation was written to."""
    text = text_of(await client.get(LIST, params=query))

    assert {int(user) for user in re.findall(r"42 (\d{4}) ", text)} == users


@pytest.mark.parametrize("value", ["1", "nan", "9" * 400, "week"])
async def test_ages_that_are_not_offered_are_refused(client: httpx.AsyncClient, value: str) -> None:
    assert (await client.get(LIST, params=by(idle(value)))).status_code == 400


async def test_the_page_of_a_conversation_shows_its_data_in_lines(
    client: httpx.AsyncClient,
) -> None:
    page = await client.get("/admin/conversation/detail?pk=42:1002:1002")

    assert page.status_code == 200
    data = '{\n  "product": 2,\n  "quantity": 1,\n  "address": "Straße 1"\n}'
    assert data in html.unescape(page.text)


async def test_an_age_that_is_not_known_is_not_one(example: Any, client: httpx.AsyncClient) -> None:
    row = example.Conversation
    async with example.SessionLocal.begin() as session:
        await session.execute(update(row).where(row.user_id == 1003).values(written_at=None))
        stack = update(row).where(row.destiny != "default")
        await session.execute(stack.values(written_at=None))

    text = text_of(await client.get(LIST, params=by(idle(DAY))))
    assert re.findall(r"42 (\d{4}) ", text) == ["1004"]


async def test_data_that_nobody_can_read_is_shown_as_it_is(
    example: Any, client: httpx.AsyncClient
) -> None:
    async with example.SessionLocal.begin() as session:
        await session.execute(update(example.Conversation).values(data="<b>{", written_at=None))

    page = await client.get("/admin/conversation/detail?pk=42:1002:1002")

    assert page.status_code == 200
    assert "&lt;b&gt;{" in page.text
    assert "unknown" in page.text


async def reset(client: httpx.AsyncClient, **params: Any) -> httpx.Response:
    await client.get(LIST)
    token = client.cookies["starlette_admin_csrftoken"]
    return await client.post(
        "/admin/_api/conversation/action",
        params={"name": "reset", **params},
        headers={"X-CSRFToken": token},
    )


async def test_a_reset_clears_the_conversations_that_are_ticked(
    example: Any, client: httpx.AsyncClient
) -> None:
    response = await reset(client, pks=["42:1003:1003", "42:1004:1004"])

    assert response.status_code == 200
    assert "2 reset." in text_of(await client.get(LIST))
    for user, state in {1002: "Checkout:payment", 1003: None, 1004: None}.items():
        assert await example.storage.get_state(key(user)) == state
        assert bool(await example.storage.get_data(key(user))) == bool(state)


async def test_a_reset_of_all_that_match_clears_those(
    example: Any, client: httpx.AsyncClient
) -> None:
    query = str(httpx.QueryParams(by(idle(DAY))))
    assert (await reset(client, all="1", _list_query=query)).status_code == 200

    numbers = await example.storage.count_by_state()
    assert numbers == {"Checkout:product": 1, "Checkout:payment": 2}


async def test_a_reset_that_fails_clears_nothing(example: Any, client: httpx.AsyncClient) -> None:
    async with example.SessionLocal.begin() as session:
        row = example.Conversation
        await session.execute(update(row).where(row.user_id == 1004).values(id="zzz"))

    with pytest.raises(ValueError, match="was not built by FullKeyBuilder"):
        await reset(client, pks=["42:1003:1003", "zzz"])

    assert await example.storage.get_state(key(1003)) == "Checkout:paid"


async def test_no_other_site_can_reset_and_nobody_can_delete_edit_or_create(
    example: Any, client: httpx.AsyncClient
) -> None:
    before = await example.storage.count_by_state()
    action = "/admin/_api/conversation/action"
    forged = await client.post(action, params={"name": "reset", "pks": "42:1002:1002"})
    assert forged.status_code == 403

    deletion = await reset(client, name="delete", pks=["42:1002:1002"])
    assert deletion.status_code == 400
    for path in ("create", "edit?pk=42:1002:1002", "import"):
        assert (await client.get(f"/admin/conversation/{path}")).status_code in (403, 404)
    assert await example.storage.count_by_state() == before


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Return a browser without a window."""
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """Serve an application, whose lifespan is that of the fixture.

    :return: a context manager that gives its address
    """
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
    running = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


if HAS_BROWSER:

    async def test_in_a_browser_staff_filters_ticks_and_resets(
        example: Any, driver: webdriver.Chrome
    ) -> None:
        async with serving(example.app) as url:
            await anyio.to_thread.run_sync(filter_tick_and_reset, Browser(driver, url))
            await anyio.to_thread.run_sync(driver.get, "about:blank")

        assert await example.storage.get_state(key(1002)) == "Checkout:payment"
        assert await example.storage.get_state(key(1003)) is None
        assert await example.storage.get_state(key(1004)) is None


def filter_tick_and_reset(pages: Browser) -> None:
    pages.read(LIST)
    pages.click("#filter-builder-dropdown button")
    pages.click("#add-filter-row")
    pages.choose("#filter-rows [data-sa-hook=filter-row-field]", "Last write")
    pages.choose("#filter-rows [data-sa-hook=filter-row-value-select]", "1 day")
    pages.leave_by("#filter-form button[type=submit]")
    assert "Last write: Idle for at least 1 day" in pages.text
    assert "1003" in pages.text
    assert "1002" not in pages.text
    # SCREENSHOTS=docs/images takes the page's picture anew
    pages.take_picture("admin-starlette.png")
    pages.read("/admin/conversation/detail?pk=42:1004:1004")
    assert '"quantity": 3' in pages.text
    pages.read(LIST + "?" + str(httpx.QueryParams(by(idle(DAY)))))
    pages.click("[data-sa-hook=select-all]")
    pages.click("#actions-dropdown button")
    pages.click("[data-sa-name=reset]")
    pages.leave_by("#actionSubmit")
    assert "2 reset." in pages.text
