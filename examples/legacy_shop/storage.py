"""The bot's conversations: one more table of the shop's, reached by the shop's own sessions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from aiogram.fsm.storage.base import StorageKey

from hybrid_storage import ConversationColumns, FSMData, SQLAlchemyStorage

from .shop.database import Base, Session

BOT_TOKEN = os.getenv("BOT_TOKEN", "42:stand-in")


class Conversation(ConversationColumns, FSMData, Base):
    __tablename__ = "conversation"


storage = SQLAlchemyStorage(Session, model=Conversation)
# The bot has one process. Leave out lease=None if you run several.
isolation = storage.create_isolation(lease=None, unit_of_work=True)


async def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call one of the shop's functions, which take no session: they use the global one."""
    return await storage.run_sync(lambda session: function(*args))


def conversation(user_id: int) -> StorageKey:
    """Return the key of a user's private chat with the bot."""
    bot_id = int(BOT_TOKEN.split(":")[0])
    return StorageKey(bot_id=bot_id, chat_id=user_id, user_id=user_id)
