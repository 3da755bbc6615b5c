"""The example of a synchronous application with a bot: its transactions, its pages, its README."""

from __future__ import annotations

import ast
import asyncio
import html
import importlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.request import urlopen

import anyio
import pytest
from aiogram import Bot
from aiogram.types import Update
from browser import HAS_BROWSER, PATIENCE, Browser, chromium
from selenium import webdriver
from selenium.webdriver.common.by import By
from sqlalchemy import URL, Connection, insert, update
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool
from test_readme import Answers, message

if TYPE_CHECKING:
    from bot_api import BotAPI
    from flask.testing import FlaskClient
    from werkzeug.test import TestResponse

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = EXAMPLES / "legacy_shop"
PICTURE = EXAMPLES.parent / "docs" / "images" / "admin-flask.png"
README = (FOLDER / "README.md").read_text()

USER = 7  # of the stand-in of the Bot API
FORM = ["/start", "1", "3", "221b Baker Street"]
FILLED_IN = {"product": 1, "quantity": 3, "address": "221b Baker Street"}
NOTHING_SOLD: dict[str, Any] = {"orders": [], "payments": [], "balance": 5000}
ALL_SOLD = {
    "orders": [("Tea", 3, "221b Baker Street")],
    "payments": [1350],
    "balance": 3650,
}

# Where a process of its own is started, which takes its time: by then the rest has run on both.
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ON_POSTGRESQL = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

pytestmark = pytest.mark.filterwarnings(
    # From version 3 on Flask-Admin takes Flask-SQLAlchemy's object only, and the shop has none.
    "ignore:Passing a session object directly is deprecated:DeprecationWarning"
)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'shop.db'}"
    url = request.getfixturevalue("postgres_database")
    assert isinstance(url, URL)
    return url.render_as_string(hide_password=False)


@pytest.fixture
def shop(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Open the shop of the example, imported anew, on a database of its own."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("PORT", "0")  # any that is free
    monkeypatch.delenv("BOT_TOKEN", raising=False)
    monkeypatch.delenv("BOT_API_URL", raising=False)
    forget_the_shop()
    importlib.import_module("legacy_shop.storage")  # for its table to be among the shop's
    from legacy_shop.shop.database import engine
    from legacy_shop.shop.orders import set_up

    set_up()
    try:
        yield
        assert isinstance(engine.pool, QueuePool)
        assert engine.pool.checkedout() == 0
    finally:
        engine.dispose()
        forget_the_shop()


def forget_the_shop() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "legacy_shop"]:
        del sys.modules[name]


def books() -> dict[str, Any]:
    """Return what the shop has sold, and the balance of the gift card."""
    from legacy_shop.shop.database import engine
    from legacy_shop.shop.models import GiftCard, Order, Payment

    with Session(engine) as session:
        return {
            "orders": [(o.product.name, o.quantity, o.address) for o in session.query(Order)],
            "payments": [payment.amount for payment in session.query(Payment)],
            "balance": session.query(GiftCard).filter_by(code="BIRTHDAY").one().balance,
        }


def state_and_data(user: int = USER) -> tuple[str | None, dict[str, Any]]:
    """Return a user's state and data."""
    from legacy_shop.shop.database import engine
    from legacy_shop.storage import conversation, storage

    key = conversation(user)
    with Session(engine) as session:
        operations = storage.operations
        return operations.get_state(session, key), operations.get_data(session, key)


# The bot, on a stand-in of the Bot API


@pytest.fixture
async def api(shop: None) -> AsyncIterator[BotAPI]:
    """Serve a stand-in."""
    from bot_api import serve

    async with serve() as api:
        yield api


@asynccontextmanager
async def bot_at(api: BotAPI) -> AsyncGenerator[None]:
    """Run the bot in this process."""
    from legacy_shop.bot import dp, poll

    polling = asyncio.create_task(poll(api.url, handle_signals=False))
    yield
    await dp.stop_polling()
    await polling


@pytest.fixture
async def chat(api: BotAPI) -> AsyncIterator[BotAPI]:
    """Return a stand-in that the bot polls."""
    async with bot_at(api):
        yield api


async def ask(api: BotAPI, text: str) -> str:
    """Say something to the bot, and return its answer."""
    with anyio.fail_after(PATIENCE):
        await api.send(text)
        return await api.reply()


async def fill_in(api: BotAPI) -> None:
    """Fill in the form, up to the payment."""
    for text in FORM:
        await ask(api, text)
    assert state_and_data() == ("Checkout:payment", FILLED_IN)


async def test_the_bot_takes_an_order_and_a_payment(chat: BotAPI) -> None:
    assert await ask(chat, "hello") == "/start begins an order."
    assert await ask(chat, "/start") == "We have 1: Tea, 4.50; 2: Coffee, 7.20. Which number?"
    assert await ask(chat, "3") == "Please send a number of the list."
    assert await ask(chat, "1") == "How many?"
    for quantity in ("some", "0", "100"):
        assert await ask(chat, quantity) == "Please send a number from 1 to 99."
    assert await ask(chat, "3") == "Where do we send it?"
    address = "221b Baker Street"
    assert await ask(chat, address) == "That makes 13.50. The code of your gift card?"
    assert books() == NOTHING_SOLD

    assert await ask(chat, "BIRTHDAY") == "Order 1 is paid. Thank you!"

    assert books() == ALL_SOLD
    assert state_and_data() == ("Checkout:paid", {"order": 1})
    again = "Order 1 is paid and on its way. /start begins another."
    assert await ask(chat, "BIRTHDAY") == again
    assert books() == ALL_SOLD


@pytest.mark.parametrize(
    ("card", "refusal"),
    [
        ("LEFTOVER", "Of 13.50, only 1.00 is on the card."),
        ("FORGED", "There is no gift card FORGED."),
    ],
)
async def test_a_refused_payment_leaves_neither_order_nor_state_change(
    chat: BotAPI, card: str, refusal: str
) -> None:
    await fill_in(chat)

    assert await ask(chat, card) == f"{refusal} Nothing was ordered. Another card?"

    assert books() == NOTHING_SOLD
    assert state_and_data() == ("Checkout:payment", FILLED_IN)
    assert (await ask(chat, "BIRTHDAY")).endswith("is paid. Thank you!")
    assert books() == ALL_SOLD
    assert state_and_data()[0] == "Checkout:paid"


async def test_a_payment_that_breaks_down_leaves_neither_order_nor_state_change(
    chat: BotAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    from legacy_shop.shop.database import Session
    from legacy_shop.shop.models import Order, Payment
    from legacy_shop.shop.orders import pay

    written: list[int] = []

    def break_down(order_id: int, card_code: str) -> None:
        pay(order_id, card_code)
        written.extend([Session.query(Order).count(), Session.query(Payment).count()])
        raise ConnectionError("the till is out of order")

    await fill_in(chat)
    with monkeypatch.context() as patch:
        patch.setattr("legacy_shop.bot.pay", break_down)
        await chat.send("BIRTHDAY")
        with anyio.fail_after(PATIENCE):
            await chat.confirmed()

    assert written == [1, 1]
    assert books() == NOTHING_SOLD
    assert state_and_data() == ("Checkout:payment", FILLED_IN)
    assert (await ask(chat, "BIRTHDAY")).endswith("is paid. Thank you!")
    assert books() == ALL_SOLD
    assert state_and_data()[0] == "Checkout:paid"


MORTAL = """
import os, signal, sys
from legacy_shop import bot
from legacy_shop.__main__ import main
from legacy_shop.shop.database import engine
from sqlalchemy import event

def pay_and_die(order_id, card_code):
    pay(order_id, card_code)
    event.listen(engine, sys.argv[1], lambda *_: os.kill(os.getpid(), signal.SIGKILL))

pay, bot.pay = bot.pay, pay_and_die
main()
"""


@ON_POSTGRESQL
@pytest.mark.parametrize("moment", ["commit", "checkin"], ids=["before", "after"])
async def test_a_bot_killed_around_its_commit_sells_once(
    api: BotAPI, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update was not confirmed: the next process gets it again, and knows what to do."""
    from bot_api import TOKEN

    monkeypatch.setenv("BOT_TOKEN", TOKEN)
    monkeypatch.setenv("BOT_API_URL", api.url)
    committed = moment == "checkin"
    async with await anyio.open_process(
        [sys.executable, "-c", MORTAL, moment], stdin=subprocess.DEVNULL, stdout=None, stderr=None
    ) as killed:
        await fill_in(api)
        await api.send("BIRTHDAY")
        with anyio.fail_after(PATIENCE):
            assert await killed.wait() == -signal.SIGKILL

    assert books() == (ALL_SOLD if committed else NOTHING_SOLD)
    assert state_and_data()[0] == ("Checkout:paid" if committed else "Checkout:payment")

    async with bot_at(api):
        with anyio.fail_after(PATIENCE):
            answer = await api.reply()
            await api.confirmed()
    assert re.sub(r"\d+", "N", answer) == (
        "Order N is paid and on its way. /start begins another."
        if committed
        else "Order N is paid. Thank you!"
    )
    assert books() == ALL_SOLD
    assert state_and_data()[0] == "Checkout:paid"


# Many users at once


class Ticker:
    """Notes by how many seconds the event loop comes late to what is due every 5 ms."""

    def __init__(self) -> None:
        self.late: list[float] = []

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.005
            await asyncio.sleep(0.005)
            self.late.append(loop.time() - due)


async def test_fifty_users_order_at_once(shop: None) -> None:
    """Every order is paid, and no statement stops the event loop, however long it waits.

    A statement in the event loop would stop it for the second that what all payments need is
    locked, or for ever where it is a handler's. The limits leave room for what else this machine
    does.
    """
    from legacy_shop.bot import dp
    from legacy_shop.shop.database import engine
    from legacy_shop.shop.models import GiftCard

    users = range(1001, 1051)
    cards = {user: "LEFTOVER" if user % 5 == 0 else "BIRTHDAY" for user in users}
    with Session(engine) as session, session.begin():
        session.query(GiftCard).filter_by(code="BIRTHDAY").update({"balance": 1_000_000})
    bot = Bot("42:TEST", session=Answers())

    async def say(user: int, *texts: str) -> None:
        for text in texts:
            await dp.feed_update(bot, Update(update_id=1, message=message(text, user)))

    ticker = Ticker()
    ticking = asyncio.create_task(ticker.run())
    await asyncio.gather(*(say(user, *FORM) for user in users))
    ticker_while_free, ticker.late = ticker.late, []
    with engine.connect() as connection:
        lock(connection)
        payments = [asyncio.create_task(say(user, card)) for user, card in cards.items()]
        await asyncio.sleep(1)
        assert not any(task.done() for task in payments)
        while_locked = sorted(ticker.late)
        # The loop had nothing to do but to tick; this machine may have.
        assert while_locked[len(while_locked) * 9 // 10] < 0.25
    with anyio.fail_after(PATIENCE):
        await asyncio.gather(*payments)
    ticking.cancel()
    late = sorted(ticker_while_free + ticker.late)
    assert late[len(late) * 9 // 10] < 0.25

    sold = books()
    assert sold["orders"] == [("Tea", 3, "221b Baker Street")] * 40
    assert sold["payments"] == [1350] * 40
    assert sold["balance"] == 1_000_000 - 40 * 1350
    orders = set()
    for user, card in cards.items():
        state, data = state_and_data(user)
        assert (state, data == FILLED_IN) == (
            ("Checkout:payment", True) if card == "LEFTOVER" else ("Checkout:paid", False)
        )
        orders.add(data.get("order"))
    assert len(orders) == 40 + 1  # each has one of its own, and those who were refused none


def lock(connection: Connection) -> None:
    """Lock what each payment needs."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        # Should the loop stand still, so that nobody releases the lock: the server does.
        connection.exec_driver_sql("SET idle_in_transaction_session_timeout = '10s'")
        connection.exec_driver_sql("SELECT * FROM gift_card FOR UPDATE")


# The pages


class Pages(Protocol):
    """The shop's pages, in front of somebody."""

    @property
    def text(self) -> str:
        """The text of the open page."""
        ...

    def read(self, path: str) -> str:
        """Open a page, and return its text."""
        ...

    def follow(self, link: str) -> None:
        """Follow the link of the open page whose path begins like that."""

    def submit(self, **fields: str) -> str:
        """Fill in the open page's form, press its button, and return the text of what comes."""
        ...

    def reset(self, *ids: str) -> str:
        """Tick conversations in the open list, reset them, and return the text of what comes."""
        ...


class BrowserPages(Browser):
    """Pages in a browser."""

    def reset(self, *ids: str) -> str:
        for id in ids:
            self.click(f"input.action-checkbox[value='{id}']")
        self.driver.find_element(By.LINK_TEXT, "With selected").click()
        page = self.driver.find_element(By.TAG_NAME, "html")
        self.click("a[onclick*=reset]")
        self.driver.switch_to.alert.accept()
        self.wait_for_another(page)
        return self.text


class Client:
    """Pages by Flask's test client.

    :param client: the client
    """

    def __init__(self, client: FlaskClient) -> None:
        self._client = client
        self._path = ""
        self._page = ""

    def _open(self, response: TestResponse) -> str:
        assert response.status_code == 200
        self._path = response.request.full_path
        self._page = response.text
        return self.text

    @property
    def text(self) -> str:
        unseen = r"<title>.*?</title>|<script.*?</script>|<[^>]*>"
        text = html.unescape(re.sub(unseen, " ", self._page, flags=re.DOTALL))
        return " ".join(text.split())

    def read(self, path: str) -> str:
        return self._open(self._client.get(path))

    def follow(self, link: str) -> None:
        found = re.search(f'href="({re.escape(link)}[^"]*)"', self._page)
        assert found is not None
        self.read(html.unescape(found[1]))

    def submit(self, **fields: str) -> str:
        form = re.search(r'<form[^>]*method="post"[^>]*>', self._page, re.IGNORECASE)
        assert form is not None
        action = re.search(r'action="([^"]+)"', form[0])
        path = html.unescape(action[1]) if action else self._path
        return self._post(path, {**self._hidden(), **fields})

    def reset(self, *ids: str) -> str:
        fields = {**self._hidden(), "action": "reset", "rowid": list(ids)}
        return self._post("/admin/conversation/action/", fields)

    def _hidden(self) -> dict[str, str]:
        fields = re.findall(r'<input[^>]*name="csrf_token"[^>]*value="([^"]*)"', self._page)
        return {"csrf_token": fields[0]} if fields else {}

    def _post(self, path: str, data: dict[str, Any]) -> str:
        return self._open(self._client.post(path, data=data, follow_redirects=True))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Return a browser without a window."""
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="module", autouse=True)
def notice(request: pytest.FixtureRequest) -> None:
    """Say so where there is no browser."""
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    assert capture is not None
    if not HAS_BROWSER:
        with capture.global_and_fixture_disabled():
            print("\nno Chromium or no chromedriver: pages are tested by Flask's client alone")  # noqa: T201


@pytest.fixture(params=["browser", "client"] if HAS_BROWSER else ["client"])
def pages(shop: None, request: pytest.FixtureRequest) -> Iterator[Pages]:
    """Return the shop's pages."""
    from legacy_shop.__main__ import serving
    from legacy_shop.support import app

    if request.param == "client":
        yield Client(app.test_client())
    else:
        with serving() as url:
            driver: webdriver.Chrome = request.getfixturevalue("driver")
            yield BrowserPages(driver, url)
            driver.get("about:blank")  # and no connection to the server that ends


def test_customers_order_on_the_page_too(pages: Pages) -> None:
    order = {"product": "1", "quantity": "3", "address": "221b Baker Street"}

    assert "Tea, 4.50" in pages.read("/")
    assert "only 1.00 is on the card" in pages.submit(**order, card="LEFTOVER")
    assert books() == NOTHING_SOLD
    assert "is paid." in pages.submit(**order, card="BIRTHDAY")
    assert books() == ALL_SOLD


async def test_the_admin_pages_show_the_shop(chat: BotAPI, pages: Pages) -> None:
    await fill_in(chat)
    await ask(chat, "BIRTHDAY")

    assert "Tea 3 221b Baker Street 1350" in pages.read("/admin/order/")
    assert "Order 1 BIRTHDAY 1350" in pages.read("/admin/payment/")
    assert "Tea 450" in pages.read("/admin/product/")
    assert "BIRTHDAY 3650" in pages.read("/admin/giftcard/")


HOUR, DAY, WEEK = 3600, 86400, 604800
LIST = "/admin/conversation/"


@pytest.fixture
def silent(shop: None) -> None:
    """Have four customers fall silent: now, 2 hours, 3 days and 8 days ago.

    The last one has a dialog whose stack was written to now.
    """
    from legacy_shop.shop.database import engine
    from legacy_shop.storage import Conversation, conversation, storage

    order = {"product": 2, "quantity": 1, "address": "Straße 1"}
    users: dict[int, tuple[str, dict[str, Any], int]] = {
        1001: ("product", {}, 0),
        1002: ("payment", order, 2 * HOUR),
        1003: ("paid", {"order": 1}, 3 * DAY),
        1004: ("address", {"product": 1, "quantity": 3}, 8 * DAY),
        1005: ("payment", order, 8 * DAY),
    }
    with Session(engine) as session, session.begin():
        for user, (state, data, _) in users.items():
            storage.operations.set_state(session, conversation(user), f"Checkout:{state}")
            storage.operations.set_data(session, conversation(user), data)
        stack = replace(conversation(1005), destiny="aiogd:stack:")
        storage.operations.set_data(session, stack, {"id": ""})
        for user, (_, _, age) in users.items():
            session.execute(
                update(Conversation)
                .where(Conversation.id == f"42:{user}:{user}")
                .values(written_at=Conversation.written_at - age)
            )


def test_the_admin_page_lists_conversations_with_the_last_to_be_written_first(
    silent: None, pages: Pages
) -> None:
    text = pages.read(LIST)

    assert "List (6)" in text
    assert re.search(
        r"42 1002 1002 default Checkout:payment [-\d]{10} \d\d:\d\d UTC, 2:00 h ago", text
    )
    assert '{"product": 2, "quantity": 1, ' in text
    assert re.search(r"Checkout:paid [-\d]{10} \d\d:\d\d UTC, 3 days, 0:00 h ago", text)
    assert text.index("42 1001") < text.index("42 1002") < text.index("42 1003")


@pytest.mark.parametrize(
    ("query", "users"),
    [
        ("search=payment", {1002, 1005}),
        ("flt0_state_equals=Checkout:payment", {1002, 1005}),
        ("flt0_user_id_equals=1003", {1003}),
        (f"flt0_idle_for_at_least={HOUR}", {1002, 1003, 1004}),
        (f"flt0_idle_for_at_least={DAY}", {1003, 1004}),
        (f"flt0_idle_for_at_least={WEEK}", {1004}),
        (f"flt0_idle_for_at_least={HOUR}&flt1_state_equals=Checkout:payment", {1002}),
    ],
)
def test_the_admin_page_finds_conversations_by_state_and_age(
    silent: None, pages: Pages, query: str, users: set[int]
) -> None:
    """User 1005 is not idle: a row of the same conversation was written to."""
    text = pages.read(f"{LIST}?{query}")

    assert {int(user) for user in re.findall(r"42 (\d{4}) ", text)} == users
    assert f"List ({len(users)})" in text


@pytest.mark.parametrize("value", ["1", "nan", "9" * 400, "week"])
def test_the_admin_page_refuses_ages_that_it_does_not_offer(
    silent: None, pages: Pages, value: str
) -> None:
    assert "Invalid Filter Value" in pages.read(f"{LIST}?flt0_idle_for_at_least={value}")


def test_the_admin_page_of_a_conversation_shows_its_data_in_lines(
    silent: None, pages: Pages
) -> None:
    pages.read(LIST)
    pages.follow("/admin/conversation/details/?id=42:1002:1002")

    assert '{ "product": 2, "quantity": 1, "address": "Straße 1" }' in pages.text
    if isinstance(pages, Browser):
        shown = pages.driver.find_element(By.TAG_NAME, "pre").text
        assert json.loads(shown)["address"] == "Straße 1"
        assert shown.count("\n") == 4


def test_the_admin_page_shows_data_that_nobody_can_read(shop: None, pages: Pages) -> None:
    from legacy_shop.shop.database import engine
    from legacy_shop.storage import Conversation

    with Session(engine) as session, session.begin():
        session.execute(insert(Conversation).values(id="42:1:1", data="<b>{", written_at=None))

    text = pages.read(f"{LIST}details/?id=42:1:1")
    assert "unknown" in text
    assert "<b>{" in html.unescape(text)


def test_the_admin_page_resets_the_conversations_that_are_ticked(
    silent: None, pages: Pages
) -> None:
    pages.read(f"{LIST}?flt0_idle_for_at_least={DAY}")
    if isinstance(pages, Browser):
        # SCREENSHOTS=docs/images takes the README's picture anew
        pages.take_picture(PICTURE.name)
    text = pages.reset("42:1003:1003", "42:1004:1004")

    assert "2 reset." in text
    assert state_and_data(1003) == state_and_data(1004) == (None, {})
    assert state_and_data(1002)[0] == "Checkout:payment"
    assert "List (4)" in pages.read(LIST)


def test_no_other_site_can_reset_conversations_or_delete_or_edit_them(
    silent: None, shop: None
) -> None:
    from legacy_shop.support import app

    client = app.test_client()
    for path, fields in (
        ("action/", {"action": "reset", "rowid": "42:1002:1002"}),
        ("action/", {"action": "delete", "rowid": "42:1002:1002"}),
        ("delete/", {"id": "42:1002:1002"}),
        ("edit/?id=42:1002:1002", {"state": "Checkout:paid", "data": "{}"}),
    ):
        client.post(LIST + path, data=fields)
    assert state_and_data(1002)[0] == "Checkout:payment"


async def test_an_edit_on_the_admin_page_is_what_the_bot_sees_next(
    chat: BotAPI, pages: Pages
) -> None:
    await fill_in(chat)

    pages.read(LIST)
    pages.follow("/admin/conversation/edit/?id=42:7:7")
    text = pages.submit(state="Checkout:address", data='{"product": 2, "quantity": 2}')

    assert "successfully saved" in text
    assert re.search(
        r'42 7 7 default Checkout:address .* ago \{"product": 2, "quantity": 2\}', text
    )
    assert (await ask(chat, "Elsewhere")).startswith("That makes 14.40.")
    await ask(chat, "BIRTHDAY")
    assert books()["orders"] == [("Coffee", 2, "Elsewhere")]


@pytest.mark.parametrize("data", ["{'product': 2}", '["product"]'], ids=["no JSON", "no object"])
async def test_the_admin_page_refuses_data_that_the_bot_could_not_read(
    chat: BotAPI, pages: Pages, data: str
) -> None:
    await fill_in(chat)

    pages.read("/admin/conversation/edit/?id=42:7:7")
    assert "This is no JSON" in pages.submit(state="Checkout:address", data=data)

    assert state_and_data() == ("Checkout:payment", FILLED_IN)


async def test_a_conversation_emptied_on_the_admin_page_is_over(chat: BotAPI, pages: Pages) -> None:
    await fill_in(chat)

    pages.read("/admin/conversation/edit/?id=42:7:7")
    assert "successfully saved" in pages.submit(state="", data="")

    assert state_and_data() == (None, {})
    assert await ask(chat, "hello") == "/start begins an order."


async def test_the_page_of_a_user_resets_the_conversation(chat: BotAPI, pages: Pages) -> None:
    await ask(chat, "/start")
    await ask(chat, "2")

    assert 'State: Checkout:quantity Data: {"product": 2}' in pages.read("/conversations/7")
    assert "State: None Data: {}" in pages.read("/conversations/8")
    pages.submit()
    assert state_and_data() == ("Checkout:quantity", {"product": 2})
    pages.read("/conversations/7")
    assert "State: None Data: {}" in pages.submit()

    assert await ask(chat, "3") == "/start begins an order."


@ON_SQLITE
async def test_the_script_resets_the_conversation(chat: BotAPI) -> None:
    await ask(chat, "/start")
    await ask(chat, "2")

    script = await anyio.run_process(
        [sys.executable, "-m", "legacy_shop.reset_conversation", str(USER)], stderr=None
    )

    assert script.stdout.decode() == "was: Checkout:quantity {'product': 2}\n"

    assert state_and_data() == (None, {})
    assert await ask(chat, "3") == "/start begins an order."


# The command, and what the README says of it


def excerpts() -> list[tuple[str, str]]:
    """Return the README's excerpts: from which file, and the text."""
    return re.findall(r"<!-- from: (\S+) -->\n```python\n(.*?)```", README, re.DOTALL)


@ON_SQLITE
def test_the_command_serves_the_shop_and_answers_as_the_readme_has_it(shop: None) -> None:
    found = re.search(r"<!-- run -->\n```text\n(.*?)```", README, re.DOTALL)
    assert found is not None
    transcript = found[1]
    assert "make shop\n" in README
    with subprocess.Popen(
        [sys.executable, "-m", "legacy_shop"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as command:
        try:
            assert command.stdout is not None
            url = re.findall(r"http://\S+?/", command.stdout.readline())[0]
            with urlopen(url, timeout=PATIENCE) as page:
                assert "<h1>Legacy shop</h1>" in page.read().decode()
            said = "".join(re.findall(r"you> (.*\n)", transcript))
            output, _ = command.communicate(said, timeout=PATIENCE)
        finally:
            command.kill()

    assert command.returncode == 0
    assert re.findall("bot> .*", output) == re.findall("bot> .*", transcript)
    assert books() == ALL_SOLD


def test_the_readme_quotes_the_files() -> None:
    assert len(excerpts()) == README.count("```python") == 4
    for name, code in excerpts():
        assert code in (FOLDER / name).read_text()


def test_the_readme_names_every_file_that_is_there() -> None:
    files = {path for path in FOLDER.rglob("*.py") if path.name != "__init__.py"}
    assert {FOLDER / name for name in re.findall(r"\]\(([\w/]+\.py)\)", README)} == files


def test_the_shop_knows_nothing_of_the_bot() -> None:
    imported = {
        "." * node.level + (node.module or "").split(".")[0]
        for path in (FOLDER / "shop").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    shops_own = {".database", ".models", ".orders"}
    assert imported - shops_own == {"flask", "flask_admin", "sqlalchemy"}


def test_the_shop_is_as_old_code_is() -> None:
    """It has no type hints; its functions use the global session, take none, and commit."""
    for path in (FOLDER / "shop").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.AnnAssign)
            if isinstance(node, ast.FunctionDef):
                assert node.returns is None
                assert not any(each.annotation for each in node.args.args)
                assert "session" not in [each.arg for each in node.args.args]
    assert (FOLDER / "shop" / "orders.py").read_text().count("Session.commit()") >= 4


def test_the_readme_shows_a_picture_of_the_admin_page() -> None:
    assert f"](../../docs/images/{PICTURE.name})" in README
    start = PICTURE.read_bytes()[:24]
    assert start[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", start[16:])
    assert 800 <= width <= 1280
    assert 300 <= height <= 800
    assert PICTURE.stat().st_size < 100_000
