"""The default key builder: every field of a conversation's key, in a short readable string."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, TypeAlias
from urllib.parse import quote, unquote

from aiogram.fsm.storage.base import DEFAULT_DESTINY, KeyBuilder, StorageKey

Parse: TypeAlias = Callable[[str], StorageKey]
"""Makes a key of its text, or raises a ValueError that says why not."""
NUMBER = "-?[0-9]+"
_BUILT = re.compile(
    f"({NUMBER}):({NUMBER}):({NUMBER})(?::thread_id=({NUMBER}))?"
    "(?::business_connection_id=([^:]*))?(?::destiny=([^:]*))?"
)


class FullKeyBuilder(KeyBuilder):
    """Builds ``bot:chat:user`` and adds the rarer fields by name, only where they are set.

    ======================================  ========================================
    key                                     string
    ======================================  ========================================
    bot 42, chat 7, user 7                  ``42:7:7``
    the same in topic 5                     ``42:7:7:thread_id=5``
    the same, a scene's history             ``42:7:7:thread_id=5:destiny=scenes_history``
    ======================================  ========================================

    Different keys never give the same string: free text is percent-encoded, so that it contains
    neither a separator nor blanks, which a database may ignore.
    """

    def build(self, key: StorageKey, part: Literal["data", "state", "lock"] | None = None) -> str:
        """Build the string for a key.

        :param key: the conversation's key
        :param part: appended by name; the storage keeps state and data in one row and passes none
        :raises ValueError: if one of the key's numbers is not a number
        :return: the string, unique to the key and the part
        """
        built = f"{key.bot_id:d}:{key.chat_id:d}:{key.user_id:d}"
        if key.thread_id is not None:
            built += f":thread_id={key.thread_id:d}"
        if key.business_connection_id is not None:
            built += f":business_connection_id={_escape(key.business_connection_id)}"
        if key.destiny != DEFAULT_DESTINY:
            built += f":destiny={_escape(key.destiny)}"
        return built if part is None else f"{built}:part={part}"

    def parse(self, text: str) -> StorageKey:
        """Return the key that a string was built of, the inverse of :meth:`build`.

        :param text: what :meth:`build` has returned for a key without a part
        :raises ValueError: if it was not built by this key builder
        :return: the key
        """
        match = _BUILT.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} was not built by FullKeyBuilder: it does not have the form bot:chat:user"
                "[:thread_id=...][:business_connection_id=...][:destiny=...]. Parse it with the "
                "key builder that has built it"
            )
        bot_id, chat_id, user_id, thread_id, business_connection_id, destiny = match.groups()
        key = StorageKey(
            bot_id=int(bot_id),
            chat_id=int(chat_id),
            user_id=int(user_id),
            thread_id=None if thread_id is None else int(thread_id),
            business_connection_id=(
                None if business_connection_id is None else _unescape(text, business_connection_id)
            ),
            destiny=DEFAULT_DESTINY if destiny is None else _unescape(text, destiny),
        )
        built = self.build(key)
        if built != text:
            raise ValueError(
                f"{text!r} was not built by FullKeyBuilder, which writes {built!r} for that key"
            )
        return key


def _escape(text: str) -> str:
    # A lone surrogate has no UTF-8 form; it still has to give a string of its own.
    return quote(text, safe="", errors="surrogatepass")


def _unescape(text: str, escaped: str) -> str:
    try:
        return unquote(escaped, errors="surrogatepass")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{text!r} was not built by FullKeyBuilder: {escaped!r} is not percent-encoded UTF-8"
        ) from error
