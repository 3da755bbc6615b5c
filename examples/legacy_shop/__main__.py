"""The shop and its bot in one process, on one engine: python -m legacy_shop

BOT_TOKEN is the bot's token, and BOT_API_URL may name another Bot API server than Telegram's.
Without a token the bot talks to a stand-in of the Bot API, and you chat with it in the terminal.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partial
from threading import Thread

from anyio.from_thread import start_blocking_portal
from bot_api import serve
from werkzeug.serving import make_server

from .bot import dp, poll
from .shop.orders import set_up
from .support import app


@contextmanager
def serving() -> Generator[str]:
    """Serve the shop's pages, from threads.

    :return: a context manager that gives their address
    """
    server = make_server("127.0.0.1", int(os.getenv("PORT", "5000")), app, threaded=True)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chat() -> None:
    """Let the user talk to the bot, until end of file."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serve()) as api:
        portal.start_task_soon(partial(poll, api.url, handle_signals=False))
        try:
            while True:
                portal.call(api.send, input("you> "))
                print("bot>", portal.call(api.reply), flush=True)
        except EOFError:
            print()
        finally:
            portal.call(dp.stop_polling)


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # no line for each request
    set_up()
    with serving() as url:
        print(f"The shop is at {url}/, and what its staff sees at {url}/admin/", flush=True)
        if "BOT_TOKEN" in os.environ:
            asyncio.run(poll(os.getenv("BOT_API_URL", "https://api.telegram.org")))
        else:
            print("Chat with its bot here: /start begins, Ctrl-D ends.", flush=True)
            chat()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
