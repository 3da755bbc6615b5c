"""See and steer conversations in a session of the caller's, for synchronous code.

``steering.py`` has the same for asynchronous code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import StateType
from sqlalchemy import Connection
from typing_extensions import Unpack

from ._steps import Step, Steps
from .finding import Filters, FoundConversation
from .keys import Parse
from .operations import AnySync, Calls, ConversationOperations, run

T = TypeVar("T")


class Operations(ConversationOperations):
    """The storage's operations on one conversation and on many, in a session of the caller's.

    No operation commits, rolls back or flushes.
    """

    def __init__(self, calls: Calls, steps: Steps) -> None:
        super().__init__(calls)
        self._steps = steps

    def find(self, session: AnySync, **filters: Unpack[Filters]) -> Iterator[FoundConversation]:
        """Find conversations, a page at a time, in the order of their ids.

        With ``idle_for`` and without a state, those come first that have been idle for longest.

        :param session: the session to read in
        :param filters: see :class:`Filters`
        :raises ValueError: if the table lacks the columns to look by
        :return: the conversations
        """
        where, after = self._steps.where("find", filters), None
        while rows := self._read(session, partial(self._steps.page, where=where, after=after)):
            yield from self._steps.found(rows)
            after = rows[-1]

    def count(self, session: AnySync, **filters: Unpack[Filters]) -> int:
        """Count conversations.

        :param session: the session to read in
        :param filters: see :class:`Filters`
        """
        return sum(self.count_by_state(session, **filters).values())

    def count_by_state(self, session: AnySync, **filters: Unpack[Filters]) -> dict[str | None, int]:
        """Count conversations by state.

        :param session: the session to read in
        :param filters: see :class:`Filters`
        :return: the numbers by the state's name; None stands for no state
        """
        where = self._steps.where("count", filters)
        return self._read(session, partial(self._steps.count, where=where))

    def change_states(
        self, session: AnySync, state: StateType, /, **filters: Unpack[Filters]
    ) -> int:
        """Set the state of conversations.

        :param session: the session to write in
        :param state: the new state; None removes it
        :param filters: see :class:`Filters`; at least one
        :return: how many were changed
        """
        return self._all(session, self._steps.changing_states(state, filters))

    def clear_all(self, session: AnySync, **filters: Unpack[Filters]) -> int:
        """Remove conversations: state, data, the history of scenes, and dialogs.

        :param session: the session to write in
        :param filters: see :class:`Filters`; at least one
        :return: how many were removed
        """
        return self._all(session, self._steps.clearing(filters))

    def rename_state(
        self,
        session: AnySync,
        old: State | str | type[StatesGroup],
        new: State | str | type[StatesGroup],
        *,
        is_group: bool = False,
    ) -> int:
        """Rename a state or a group, in the history of scenes and in dialogs, too.

        :param session: the session to write in
        :param old: the state or the group, or its name, such as it is in the table
        :param new: the new one
        :param is_group: whether names are those of groups
        :return: how many rows were changed
        """
        return sum(self._all(session, step) for step in self._steps.renaming(old, new, is_group))

    def forget_user(self, session: AnySync, user_id: int, *, bot_id: int | None = None) -> int:
        """Delete all that is known of a user: in all chats, with scenes and dialogs.

        :param session: the session to write in
        :param user_id: the user's id
        :param bot_id: the bot; all bots by default
        :return: how many rows were deleted
        """
        return self._all(session, self._steps.forgetting(user_id, bot_id))

    def move_chat(self, session: AnySync, old: int, new: int, *, bot_id: int | None = None) -> int:
        """Give the conversations of a chat its new id, after a group became a supergroup.

        What is in the new chat already stays, and takes the place of what was in the old one.

        :param session: the session to write in
        :param old: the chat's id so far
        :param new: the chat's new id
        :param bot_id: the bot; all bots by default
        :return: how many rows were moved
        """
        return self._all(session, self._steps.moving(old, new, bot_id))

    def purge(self, session: AnySync) -> int:
        """Delete the conversations that have expired.

        :param session: the session to write in
        :raises ValueError: if the storage has no ``expires_after``
        :return: how many rows were deleted
        """
        return self._all(session, self._steps.purging())

    def fill_columns(
        self, session: AnySync, parse: Parse | None = None, *, written_now: bool = False
    ) -> int:
        """Fill the columns to look by in rows that were there before the columns.

        :param session: the session to write in
        :param parse: makes a key of a row's id; by default that of :class:`FullKeyBuilder`
        :param written_now: whether their time begins now. Otherwise it is not known until they are
            written to, and they neither expire nor count as idle
        :return: how many rows were filled; those that cannot be parsed are left as they are
        """
        return self._all(session, self._steps.filling(parse, written_now))

    def _read(self, session: AnySync, function: Callable[[Connection], T]) -> T:
        return run(session, self._calls.reading("conversations", function))

    def _all(self, session: AnySync, step: Step) -> int:
        changed, after = 0, None
        while True:
            batch = run(session, self._calls.writing("conversations", partial(step, after)))
            changed += batch.changed
            if not batch.rows:
                return changed
            after = batch.rows[-1]
