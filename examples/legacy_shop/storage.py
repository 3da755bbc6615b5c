"""The bot's conversations: one more table of the shop's, reached by the shop's own sessions."""

from __future__ import annotations

import os

from aiogram.fsm.storage.base import StorageKey
from sqlalchemy.orm import Session

from hybrid_storage import SQLAlchemyStorage

from .shop.database import SessionLocal
from .shop.models import Base

BOT_TOKEN = os.getenv("BOT_TOKEN", "42:stand-in")

storage: SQLAlchemyStorage[Session] = SQLAlchemyStorage(SessionLocal, Base, "conversation")


def conversation(user_id: int) -> StorageKey:
    """Return the key of a user's private chat with the bot."""
    bot_id = int(BOT_TOKEN.split(":")[0])
    return StorageKey(bot_id=bot_id, chat_id=user_id, user_id=user_id)
