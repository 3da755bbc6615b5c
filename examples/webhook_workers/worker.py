"""One of the bot's processes: serves the webhook, until it is told to stop.

    python -m webhook_workers.worker [PORT]

BOT_TOKEN is the bot's token, DATABASE_URL the database that all workers share.
"""

from __future__ import annotations

import logging
import os
import socket
import sys

from aiogram import Bot
from aiogram.webhook.aiohttp_server import SimpleRequestHandler, setup_application
from aiohttp import web

from .bot import dp

PATH = "/webhook"


def application() -> web.Application:
    """Return what serves the webhook."""
    app = web.Application()
    bot = Bot(os.environ["BOT_TOKEN"])
    # In the foreground: Telegram gets its answer when the step has been committed, and sends the
    # update again if the process dies before.
    handler = SimpleRequestHandler(dp, bot, handle_in_background=False)
    handler.register(app, PATH)
    setup_application(app, dp, bot=bot)
    return app


def main() -> None:
    """Listen on the port that was asked for, or on any, and say on which."""
    port = int(sys.argv[1]) if sys.argv[1:] else 0
    # Several workers may listen on one port: the system shares the connections out.
    listening = socket.create_server(("127.0.0.1", port), reuse_port=port != 0, backlog=1024)
    print(f"http://127.0.0.1:{listening.getsockname()[1]}{PATH}", flush=True)
    web.run_app(application(), sock=listening, access_log=None, print=None)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
