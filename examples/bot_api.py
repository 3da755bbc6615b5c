"""A local stand-in of the Bot API server: one bot, one private chat, real HTTP and JSON.

It keeps the two promises that a long-polling bot relies on. An update is handed out again until a
``getUpdates`` with a higher ``offset`` confirms it; a ``getUpdates`` with a ``timeout`` waits that
long for the next update before it answers empty-handed.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
from aiohttp import web

BOT_ID = 42
USER_ID = 7  # and the chat's: in a private chat they are the same
TOKEN = f"{BOT_ID}:stand-in"

BOT = {"id": BOT_ID, "is_bot": True, "first_name": "Form bot", "username": "form_bot"}
USER = {"id": USER_ID, "is_bot": False, "first_name": "User"}
CHAT = {"id": USER_ID, "type": "private", "first_name": "User"}


class BotAPIError(Exception):
    """An answer with ``"ok": false``.

    :param code: the HTTP status, and the answer's ``error_code``
    :param description: what the Bot API says of it
    """

    def __init__(self, code: int, description: str) -> None:
        super().__init__(description)
        self.code = code
        self.description = description


class BotAPI:
    """What the server knows, and the user's side of the chat; `serve` puts one on the network."""

    def __init__(self) -> None:
        #: where it listens: what ``TelegramAPIServer.from_base`` takes
        self.url = ""
        self._ids = itertools.count(1)
        self._pending: list[dict[str, Any]] = []  # sent by the user, not yet confirmed by the bot
        self._changed = asyncio.Condition()  # of _pending
        self._polled = asyncio.Event()
        self._replies: asyncio.Queue[str] = asyncio.Queue()
        self._methods = {
            "getme": self._get_me,
            "getupdates": self._get_updates,
            "sendmessage": self._send_message,
            "deletewebhook": self._delete_webhook,
        }

    async def send(self, text: str) -> None:
        """Say something to the bot, as the user."""
        async with self._changed:
            message = self._message(USER, text)
            self._pending.append({"update_id": next(self._ids), "message": message})
            self._changed.notify_all()

    async def polled(self) -> None:
        """Wait until a bot has begun to ask for updates."""
        await self._polled.wait()

    async def reply(self) -> str:
        """Wait for the bot's next message, and return its text."""
        return await self._replies.get()

    async def confirmed(self) -> None:
        """Wait until the bot has confirmed every update: it will not see one twice."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._pending)

    async def answer(self, request: web.Request) -> web.Response:
        """Call the method that the path names, and wrap what it returns or raises."""
        try:
            if request.match_info["token"] != TOKEN:
                raise BotAPIError(401, "Unauthorized")
            method = self._methods.get(request.match_info["method"].lower())
            if method is None:
                raise BotAPIError(404, "Not Found")
            form = await request.post()
            result = await method({**request.query, **{name: str(form[name]) for name in form}})
        except BotAPIError as error:
            body = {"ok": False, "error_code": error.code, "description": error.description}
            return web.json_response(body, status=error.code)
        return web.json_response({"ok": True, "result": result})

    async def _get_me(self, params: Mapping[str, str]) -> dict[str, Any]:
        return BOT

    async def _get_updates(self, params: Mapping[str, str]) -> list[dict[str, Any]]:
        self._polled.set()
        offset = int(params.get("offset", 0))
        async with self._changed:
            if offset < 0:  # counts from the end
                self._pending = self._pending[offset:]
            else:
                self._pending = [u for u in self._pending if u["update_id"] >= offset]
            self._changed.notify_all()
            with anyio.move_on_after(int(params.get("timeout", 0))):
                await self._changed.wait_for(lambda: self._pending)
            return self._pending[: int(params.get("limit", 100))]

    async def _send_message(self, params: Mapping[str, str]) -> dict[str, Any]:
        if params.get("chat_id") != str(USER_ID):
            raise BotAPIError(400, "Bad Request: chat not found")
        text = params.get("text", "").strip()
        if not text:
            raise BotAPIError(400, "Bad Request: message text is empty")
        self._replies.put_nowait(text)
        return self._message(BOT, text)

    async def _delete_webhook(self, params: Mapping[str, str]) -> bool:
        """There is no webhook here, so this is about the updates alone."""
        if params.get("drop_pending_updates") == "true":
            async with self._changed:
                self._pending.clear()
                self._changed.notify_all()
        return True

    def _message(self, sender: Mapping[str, Any], text: str) -> dict[str, Any]:
        message: dict[str, Any] = {
            "message_id": next(self._ids),
            "from": sender,
            "chat": CHAT,
            "date": int(time.time()),
            "text": text,
        }
        if text.startswith("/"):
            length = len(text.split()[0])
            message["entities"] = [{"type": "bot_command", "offset": 0, "length": length}]
        return message


@asynccontextmanager
async def serve() -> AsyncGenerator[BotAPI]:
    """Serve a Bot API on a free port of the loopback interface."""
    api = BotAPI()
    app = web.Application()
    app.router.add_route("*", "/bot{token}/{method}", api.answer)
    # A poll is to end with the bot that made it, and not to hold up the server's own end.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        api.url = f"http://{host}:{port}"
        yield api
    finally:
        await runner.cleanup()
