"""See and steer conversations, for asynchronous code: many at a time, and one atomically.

Many are changed in batches, each in a transaction of its own: a batch that is done stays done if a
later one fails or is cancelled.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import StateType, StorageKey
from aiogram.types import Message
from sqlalchemy import Connection
from typing_extensions import Unpack

from ._codec import Change
from ._engine.retries import logger
from ._steps import Batch, Step, Steps
from .finding import Filters, FoundConversation
from .keys import Parse
from .operations import without
from .transactions import S
from .updates import Updates

T = TypeVar("T")


class Steering(Updates[S]):
    """The part of the storage that finds, counts and changes conversations."""

    _steps: Steps

    async def find(self, **filters: Unpack[Filters]) -> AsyncIterator[FoundConversation]:
        """Find conversations, a page at a time, in the order of their ids::

            async for conversation in storage.find(state=Order.payment, idle_for=86400):
                await bot.send_message(conversation.key.chat_id, "Your order waits for you")

        With ``idle_for`` and without a state, those come first that have been idle for longest. No
        connection is held between two pages. What others write meanwhile may be seen or not.

        :param filters: see :class:`Filters`
        :raises ValueError: if the table lacks the columns to look by
        :return: the conversations
        """
        where, after = self._steps.where("find", filters), None
        while rows := await self._read(partial(self._steps.page, where=where, after=after)):
            for conversation in self._steps.found(rows):
                yield conversation
            after = rows[-1]

    async def conversation(self, key: StorageKey) -> FoundConversation:
        """Return one conversation, with the time of its last write if the table keeps that.

        :param key: the conversation's key
        :return: the conversation; with no state and no data if there is none
        """
        return self._steps.one(key, await self._read(partial(self._steps.row, key=key)))

    async def count(self, **filters: Unpack[Filters]) -> int:
        """Count conversations.

        :param filters: see :class:`Filters`
        """
        return sum((await self.count_by_state(**filters)).values())

    async def count_by_state(self, **filters: Unpack[Filters]) -> dict[str | None, int]:
        """Count conversations by state.

        :param filters: see :class:`Filters`
        :return: the numbers by the state's name; None stands for no state
        """
        where = self._steps.where("count", filters)
        return await self._read(partial(self._steps.count, where=where))

    async def change_data(self, key: StorageKey, function: Change) -> dict[str, Any]:
        """Replace the data of a conversation by what a function makes of it, losing no field.

        :param key: the conversation's key
        :param function: gets the data and returns the new data. It is called again if another has
            changed the data meanwhile, so it must do nothing else
        :raises CorruptDataError: if the row's data is not the JSON text of an object
        :return: the new data, as stored
        """
        return await self._execute(key, self._calls.change_data(key, function))

    async def remove_data(self, key: StorageKey, *names: str) -> dict[str, Any]:
        """Remove fields of a conversation's data, losing none that others change meanwhile.

        :param key: the conversation's key
        :param names: the fields; those that are not there do no harm
        :return: the rest of the data
        """
        return await self.change_data(key, without(*names))

    async def change_states(self, state: StateType, /, **filters: Unpack[Filters]) -> int:
        """Set the state of conversations.

        :param state: the new state; None removes it
        :param filters: see :class:`Filters`; at least one
        :return: how many were changed
        """
        return await self._all(self._steps.changing_states(state, filters))

    async def clear_all(self, **filters: Unpack[Filters]) -> int:
        """Remove conversations: state, data, the history of scenes, and dialogs.

        :param filters: see :class:`Filters`; at least one
        :return: how many were removed
        """
        return await self._all(self._steps.clearing(filters))

    async def rename_state(
        self,
        old: State | str | type[StatesGroup],
        new: State | str | type[StatesGroup],
        *,
        is_group: bool = False,
    ) -> int:
        """Rename a state or a group, in the history of scenes and in dialogs, too.

        For a deployment that renames: call it when the processes of the former version have
        stopped. It may be called again.

        :param old: the state or the group, or its name, such as it is in the table
        :param new: the new one
        :param is_group: whether names are those of groups
        :return: how many rows were changed
        """
        steps = self._steps.renaming(old, new, is_group)
        return sum([await self._all(step) for step in steps])

    async def forget_user(self, user_id: int, *, bot_id: int | None = None) -> int:
        """Delete all that is known of a user: in all chats, with scenes and dialogs.

        :param user_id: the user's id
        :param bot_id: the bot; all bots by default
        :return: how many rows were deleted
        """
        return await self._all(self._steps.forgetting(user_id, bot_id))

    async def move_chat(self, old: int, new: int, *, bot_id: int | None = None) -> int:
        """Give the conversations of a chat its new id, after a group became a supergroup.

        What is in the new chat already stays, and takes the place of what was in the old one. It
        may be called again, and in whatever order Telegram's two messages arrive.

        :param old: the chat's id so far
        :param new: the chat's new id
        :param bot_id: the bot; all bots by default
        :return: how many rows were moved
        """
        return await self._all(self._steps.moving(old, new, bot_id))

    async def follow_chat(self, message: Message) -> None:
        """Move a chat when Telegram says so: a handler of aiogram's, for either message::

            dp.message.register(storage.follow_chat, F.migrate_to_chat_id | F.migrate_from_chat_id)

        :param message: the service message
        """
        bot_id = None if message.bot is None else message.bot.id
        if message.migrate_to_chat_id is not None:
            await self.move_chat(message.chat.id, message.migrate_to_chat_id, bot_id=bot_id)
        elif message.migrate_from_chat_id is not None:
            await self.move_chat(message.migrate_from_chat_id, message.chat.id, bot_id=bot_id)

    async def purge(self) -> int:
        """Delete the conversations that have expired, in batches.

        :raises ValueError: if the storage has no ``expires_after``
        :return: how many rows were deleted
        """
        return await self._all(self._steps.purging())

    async def fill_columns(self, parse: Parse | None = None, *, written_now: bool = False) -> int:
        """Fill the columns to look by in rows that were there before the columns.

        :param parse: makes a key of a row's id; by default that of :class:`FullKeyBuilder`
        :param written_now: whether their time begins now. Otherwise it is not known until they are
            written to, and they neither expire nor count as idle
        :return: how many rows were filled; those that cannot be parsed are left as they are
        """
        return await self._all(self._steps.filling(parse, written_now))

    async def _read(self, function: Callable[[Connection], T]) -> T:
        return await self._access.execute(self._calls.reading("conversations", function))

    async def _all(self, step: Step) -> int:
        if self._fallback is not None:
            logger.warning(
                "conversations that are still in the fallback storage are not changed, and come "
                "back as they are there: move them first, with hybrid_storage.migration.migrate()"
            )
        await self.units.write()  # what this update has collected comes before
        changed, after = 0, None
        try:
            while True:
                batch = await self._batch(partial(step, after))
                changed += batch.changed
                if not batch.rows:
                    return changed
                after = batch.rows[-1]
        finally:
            self.units.forget()

    async def _batch(self, step: Callable[[Connection], Batch]) -> Batch:
        """Do one batch, in a transaction of its own. The command overrides this to count."""
        call = self._calls.writing("conversations", step, in_transaction=True)
        return await self._access.execute(call)
