"""Chat with a bot that you are writing, without a token: the user's side of a local Bot API.

Run this in one terminal, and your bot in another one, with the two variables that this prints.
What you type goes to the bot. The end of the input ends the chat.
"""

from __future__ import annotations

import sys

from anyio.from_thread import start_blocking_portal
from bot_api import TOKEN, BotAPI, serve


async def show_replies(api: BotAPI) -> None:
    """Print what the bot says, for as long as the chat lasts."""
    while True:
        print(f"bot> {await api.reply()}", flush=True)


def main() -> None:
    """Serve the stand-in, and send it each line that is typed."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serve()) as api:
        replies = portal.start_task_soon(show_replies, api)
        print(f"BOT_TOKEN={TOKEN}\nBOT_API_URL={api.url}", flush=True)
        try:
            for line in sys.stdin:
                if line.strip():
                    portal.call(api.send, line.strip())
        except KeyboardInterrupt:
            pass
        finally:
            replies.cancel()


if __name__ == "__main__":
    main()
