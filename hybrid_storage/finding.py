"""Which conversations to find, and what is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TypeAlias, TypedDict

from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import DEFAULT_DESTINY, StorageKey

from ._arguments import check_seconds
from ._codec import Codec
from ._sql.conversations import Where
from ._sql.lookups import FIELDS
from .columns import key_of

OneOrMoreStates: TypeAlias = "State | str | type[StatesGroup] | Sequence[State | str]"


_MAY_BE_NONE = ("thread_id", "business_connection_id", "destiny")


class Filters(TypedDict, total=False):
    """Which conversations to find. All that is given must hold."""

    bot_id: int
    chat_id: int
    user_id: int
    thread_id: int | None
    """None finds those outside of topics."""
    business_connection_id: str | None
    destiny: str | None
    """By default ``"default"``, a conversation's main row; None finds the rows of all destinies."""
    state: OneOrMoreStates | None
    """A state, a group with the groups in it, or several states; None finds those without one."""
    idle_for: float
    """Seconds in which nothing of the conversation was written, by the database's clock."""


@dataclass(frozen=True)
class FoundConversation:
    """A conversation that was found."""

    key: StorageKey
    state: str | None
    written_at: datetime | None
    """When the row was last written to; None if that is not known."""
    text: str | None
    """The data as JSON text."""
    _codec: Codec = field(repr=False, compare=False)

    @property
    def data(self) -> dict[str, Any]:
        """The data.

        :raises CorruptDataError: if it is not the JSON text of an object
        """
        return self._codec.load(self.key, self.text)


def where_of(what: str, filters: Filters, *, is_change: bool = False) -> Where:
    """Return what to find.

    :param what: the name of the method that was given the filters
    :param is_change: whether it changes what it finds
    :raises TypeError: if a filter is not known, or of the wrong kind
    :raises ValueError: if a change is to be of everything
    """
    known = {*FIELDS, "state", "idle_for"}
    for name in filters:
        if name not in known:
            raise TypeError(f"{what}() finds by {', '.join(sorted(known))}, not by {name!r}")
    if is_change and not any(name != "destiny" or filters.get("destiny") for name in filters):
        raise ValueError(f"{what}() without a filter would change every conversation: name one")
    given: dict[str, Any] = {**filters}
    fields = {name: given[name] for name in FIELDS if name in given}
    for name, value in fields.items():
        kind = str if name in ("business_connection_id", "destiny") else int
        if not (isinstance(value, kind) or (value is None and name in _MAY_BE_NONE)):
            raise TypeError(f"{what}() finds by one {name}, of type {kind.__name__}, not {value!r}")
    if fields.setdefault("destiny", DEFAULT_DESTINY) is None:
        del fields["destiny"]
    if "idle_for" in given:
        check_seconds(idle_for=given["idle_for"])
    states = None
    if given.get("state") is not None:
        states = _names(given["state"])
    elif "state" in given:
        fields["state"] = None
    return Where(fields, states, given.get("idle_for"))


def found(rows: Sequence[Any], codec: Codec) -> list[FoundConversation]:
    """Return conversations of rows, without those whose columns have not been filled."""
    return [conversation(key, row, codec) for row in rows if (key := key_of(row)) is not None]


def conversation(key: StorageKey, row: Any, codec: Codec) -> FoundConversation:
    """Return the conversation of a key.

    :param row: its row, None if there is none
    """
    if row is None:
        return FoundConversation(key, None, None, None, codec)
    time = getattr(row, "written_at", None)
    at = datetime.fromtimestamp(time, timezone.utc) if isinstance(time, float) else None
    return FoundConversation(key, row.state, at, row.data, codec)


def names_of(old: object, new: object) -> tuple[str, str, bool]:
    """Return two names, and whether they are of groups.

    :raises TypeError: if they are not both states, or both groups
    """
    is_group = any(isinstance(each, type) and issubclass(each, StatesGroup) for each in (old, new))
    name_of = _group_name if is_group else _state_name
    names = [name_of(old), name_of(new)]
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(
            f"rename_state() takes two states, two groups or their names, not {old!r} and {new!r}"
        )
    return names[0], names[1], is_group


def _names(states: object) -> list[str]:
    if isinstance(states, type) and issubclass(states, StatesGroup):
        return list(states.__all_states_names__)
    if isinstance(states, (State, str)):
        states = [states]
    if isinstance(states, Sequence):
        names = [_state_name(each) for each in states]
        if all(isinstance(name, str) for name in names):
            return names
    raise TypeError(f"state is a State, a StatesGroup, a name or several, not {states!r}")


def _state_name(state: object) -> Any:
    return state.state if isinstance(state, State) else state


def _group_name(group: object) -> Any:
    return getattr(group, "__full_group_name__", group)
