"""One transaction per update, for the state of the conversation and the application's rows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiogram import BaseMiddleware
from aiogram.dispatcher.event.bases import CancelHandler, SkipHandler
from aiogram.types import TelegramObject

from .storage import SQLAlchemyStorage


class SessionMiddleware(BaseMiddleware):
    """Opens :meth:`SQLAlchemyStorage.transaction` around what comes after it::

        dp.update.outer_middleware(SessionMiddleware(storage))

    Handlers get the session by name; their ``FSMContext`` joins its transaction. It commits when
    the update has been dealt with, also if no handler took it, or if one raised ``SkipHandler`` or
    ``CancelHandler``, which are decisions and no failures. Any other exception rolls back and goes
    on to aiogram's error handlers, which then run outside the transaction.
    """

    def __init__(self, storage: SQLAlchemyStorage[Any], name: str = "session") -> None:
        """Remember where to open transactions.

        :param storage: the storage of the dispatcher
        :param name: the name by which handlers get the session
        :raises TypeError: if the storage is not of this package
        """
        if not isinstance(storage, SQLAlchemyStorage):
            raise TypeError(f"SessionMiddleware() takes a SQLAlchemyStorage, not {storage!r}")
        self._storage = storage
        self._name = name

    async def __call__(
        self,
        handler: Callable[[TelegramObject, dict[str, Any]], Awaitable[Any]],
        event: TelegramObject,
        data: dict[str, Any],
    ) -> Any:
        """Deal with an update in a transaction.

        :param handler: what comes after this middleware
        :param event: the update, or the part of it that the middleware is registered for
        :param data: the handlers' arguments
        :return: what the handler returns
        """
        async with self._storage.transaction() as session:
            data[self._name] = session
            try:
                return await handler(event, data)
            except (SkipHandler, CancelHandler) as error:
                decision = error
            finally:
                del data[self._name]  # error handlers run when it is closed
        raise decision
