"""Does something about each conversation that has been idle for long, once across processes."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from inspect import isawaitable
from typing import Any

import anyio
from aiogram.fsm.storage.base import StorageKey
from typing_extensions import Unpack

from ._arguments import check_functions, check_seconds
from ._codec import default_destiny
from ._engine.errors import in_short
from ._engine.retries import logger
from ._sql.conversations import Where
from .finding import Filters, FoundConversation
from .isolation import SQLAlchemyEventIsolation
from .steering import Steering
from .transactions import S

Action = Callable[[FoundConversation], Awaitable[object]]


class Idle(Steering[S]):
    """The part of the storage that looks after idle conversations."""

    async def on_idle(
        self,
        *,
        after: float,
        action: Action,
        isolation: SQLAlchemyEventIsolation,
        every: float | None = 60.0,
        at_once: int = 1,
        retry_after: float = 3600.0,
        **filters: Unpack[Filters],
    ) -> int:
        """Hand each conversation that has been idle for long to an action, once::

            async def remind(conversation: FoundConversation) -> None:
                await bot.send_message(conversation.key.chat_id, "Your order waits for you")

            reminding = asyncio.create_task(
                storage.on_idle(after=86400, action=remind, isolation=isolation, state=Order)
            )

        It holds the conversation's lock meanwhile, so no handler runs for it, and with a lease no
        other process hands it out. It is handed out again only after it has been written to and
        has been idle once more. If the process dies between the action and the note of it, the
        action is called again: at least once, then. What the action does to the conversation is
        written with it.

        Runs until it is cancelled, which ends the action under way.

        :param after: seconds without a write. Of several calls with different ones, each gets the
            conversation in its time
        :param action: an async function. If it fails, the log says so, and it is called again
        :param isolation: that of the dispatcher
        :param every: seconds between two looks; None looks once and returns, for cron
        :param at_once: how many actions run at a time. No more are looked for meanwhile
        :param retry_after: seconds until a conversation whose action failed is tried again
        :param filters: see :class:`Filters`
        :raises ValueError: if the table lacks the columns to look by
        :return: how many were handed out
        """
        check_functions(action=action)
        check_seconds(after=after, retry_after=retry_after, every=0.0 if every is None else every)
        if not after:
            raise ValueError("after is a number of seconds above 0")
        if not isinstance(at_once, int) or at_once < 1:
            raise ValueError(f"at_once is a number of actions, 1 or more, not {at_once!r}")
        if not isinstance(isolation, SQLAlchemyEventIsolation):
            raise TypeError(f"isolation is that of storage.create_isolation(), not {isolation!r}")
        round = _Round(self, isolation, action, after, at_once, retry_after, filters)
        while every is not None:
            try:
                await round.run()
            except TypeError:
                raise
            except Exception as error:
                logger.warning("%s failed, and goes on: %s", round, in_short(error))
            await anyio.sleep(every)
        return await round.run()


class _Round:
    """Looks for idle conversations, and hands them out."""

    def __init__(
        self,
        storage: Idle[Any],
        isolation: SQLAlchemyEventIsolation,
        action: Action,
        after: float,
        at_once: int,
        retry_after: float,
        filters: Filters,
    ) -> None:
        self._storage = storage
        self._isolation = isolation
        self._action = action
        self._after = after
        self._where: Where = storage._steps.idle(after, filters)
        self._limiter = anyio.CapacityLimiter(at_once)
        self._retry_after = retry_after
        self._failed: dict[StorageKey, float] = {}
        self._handed = 0
        self._is_wrong = False

    def __str__(self) -> str:
        return f"on_idle(after={self._after:g}, action={getattr(self._action, '__name__', '?')})"

    async def run(self) -> int:
        """Look once."""
        self._handed, after = 0, None
        now = time.monotonic()
        self._failed = {key: at for key, at in self._failed.items() if at > now}
        steps = self._storage._steps
        while rows := await self._storage._read(
            partial(steps.page, where=self._where, after=after)
        ):
            keys = {default_destiny(found.key): None for found in steps.found(rows)}
            async with anyio.create_task_group() as group:
                for key in keys:
                    if key not in self._failed:
                        await self._limiter.acquire_on_behalf_of(key)
                        group.start_soon(self._handle, key)
            if self._is_wrong:  # it would be called for ever
                raise TypeError(
                    f"on_idle() takes an async function as action, not {self._action!r}"
                )
            logger.info("%s: conversations handed out: %d", self, self._handed)
            after = rows[-1]
        return self._handed

    async def _handle(self, key: StorageKey) -> None:
        try:
            async with self._isolation.lock(key):
                await self._hand_out(key)
        except Exception:
            self._failed[key] = time.monotonic() + self._retry_after
            logger.exception("%s failed for %s", self, key)
        finally:
            self._limiter.release_on_behalf_of(key)

    async def _hand_out(self, key: StorageKey) -> None:
        storage, steps = self._storage, self._storage._steps
        # Another process may have dealt with it, or its user may have, since it was found.
        if self._is_wrong or not await storage._read(
            partial(steps.is_still, where=self._where, key=key)
        ):
            return
        result: object = self._action(await storage.conversation(key))
        if not isawaitable(result):
            self._is_wrong = True
            return
        await result
        await storage.flush()
        mark = partial(steps.handled, key=key, after=self._after)
        await storage._access.execute(storage._calls.writing("conversations", mark))
        self._handed += 1
