"""The middlewares: a transaction around each update, a flush before each request to Telegram."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiogram import BaseMiddleware, Bot
from aiogram.client.session.middlewares.base import (
    BaseRequestMiddleware,
    NextRequestMiddlewareType,
)
from aiogram.dispatcher.event.bases import CancelHandler, SkipHandler
from aiogram.methods import Response, TelegramMethod
from aiogram.methods.base import TelegramType
from aiogram.types import TelegramObject
from sqlalchemy.exc import InvalidRequestError

from ._engine.retries import logger
from .transactions import Transactions


def _checked(middleware: object, storage: object) -> Transactions[Any]:
    if not isinstance(storage, Transactions):
        name = type(middleware).__name__
        raise TypeError(f"{name}() takes a SQLAlchemyStorage, not {storage!r}")
    return storage


class _EndedSession:
    """Stands where the session was, for error handlers, which run when its transaction is over."""

    def __getattr__(self, name: str) -> Any:
        raise InvalidRequestError(
            f"session.{name}: the update's transaction has been rolled back, for a handler raised. "
            "In an error handler, open your own: async with storage.transaction() as session"
        )


class SessionMiddleware(BaseMiddleware):
    """Opens :meth:`SQLAlchemyStorage.transaction` around what comes after it::

        dp.update.outer_middleware(SessionMiddleware(storage))

    Handlers get the session by name; their ``FSMContext`` joins its transaction. It commits when
    the update has been dealt with, also if no handler took it, or if one raised ``SkipHandler`` or
    ``CancelHandler``, which are decisions and no failures. Any other exception rolls back and goes
    on to aiogram's error handlers, which then run outside the transaction.
    """

    def __init__(
        self, storage: Transactions[Any], name: str = "session", *, allow_blocking: bool = False
    ) -> None:
        """Remember where to open transactions.

        :param storage: the storage of the dispatcher, a :class:`SQLAlchemyStorage`
        :param name: the name by which handlers get the session
        :param allow_blocking: as of :meth:`SQLAlchemyStorage.transaction`
        :raises TypeError: if the storage is not of this package
        """
        self._storage = _checked(self, storage)
        self._name = name
        self._allow_blocking = allow_blocking

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
        former: dict[str, Any] = {self._name: data[self._name]} if self._name in data else {}
        try:
            async with self._storage.transaction(allow_blocking=self._allow_blocking) as session:
                data[self._name] = session
                try:
                    return await handler(event, data)
                except (SkipHandler, CancelHandler) as error:
                    decision = error
        except BaseException:  # of a handler, or because it could not begin or commit
            former.setdefault(self._name, _EndedSession())
            raise
        finally:
            data.pop(self._name, None)
            data.update(former)
        raise decision


class FlushMiddleware(BaseRequestMiddleware):
    """Writes what the update has collected before each request to the Bot API::

        bot.session.middleware(FlushMiddleware(storage))

    So no user receives a message whose state is not in the database, even if the process is killed
    right afterwards. It costs a round trip for each request before which something was collected,
    and what is written then stays if the handler fails later.
    """

    def __init__(self, storage: Transactions[Any]) -> None:
        """Remember what to flush.

        :param storage: the storage of the dispatcher
        :raises TypeError: if it is not of this package
        """
        self._units = _checked(self, storage).units
        self._has_warned = False

    async def __call__(
        self,
        make_request: NextRequestMiddlewareType[TelegramType],
        bot: Bot,
        method: TelegramMethod[TelegramType],
    ) -> Response[TelegramType]:
        """Flush, then make the request.

        :param make_request: what comes after this middleware
        :param bot: the bot
        :param method: the request
        :raises LockLostError: if the lock was lost; the request is not made
        :return: the answer
        """
        if await self._units.write() and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a request to the Bot API is made inside a transaction: what was flushed before it "
                "is there for others, and safe, only once the transaction has committed. Open "
                "transaction() for what belongs together, and make the request after it"
            )
        return await make_request(bot, method)
