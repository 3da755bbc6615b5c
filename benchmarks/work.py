"""What the contenders do: single calls, and the typical step."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import BaseStorage, StorageKey

Subject = TypeVar("Subject")
"""Whom the work is done with: a storage, or a contender's bots."""
Act: TypeAlias = Callable[[Subject, StorageKey], Awaitable[object]]

STATE = "Form:address"
DATA = {"name": "Ada Lovelace", "phone": "+44 20 7946 0000", "items": [1, 2, 3], "confirmed": False}

_numbers = itertools.count()


def conversation(number: int) -> StorageKey:
    """Return the key of a conversation."""
    return StorageKey(bot_id=42, chat_id=number, user_id=number)


async def fill(storage: BaseStorage, key: StorageKey) -> None:
    """Give a conversation a state and data."""
    await storage.set_state(key, STATE)
    await storage.set_data(key, DATA)


@dataclass(frozen=True)
class Work(Generic[Subject]):
    """Something to do with a conversation.

    ``prepare`` is done before, outside the measured time; ``units`` is how many operations,
    or updates, the work counts as.
    """

    name: str
    act: Act[Subject]
    prepare: Act[Subject] | None = None
    units: int = 1

    def suits(self, subject: Subject) -> bool:
        """Tell whether a storage can do it."""
        return self.name != "storage.clear" or hasattr(subject, "clear")


async def _clear(storage: Any, key: StorageKey) -> None:
    await storage.clear(key)


async def _step(storage: BaseStorage, key: StorageKey) -> None:
    await storage.get_state(key)
    await storage.get_data(key)
    await storage.update_data(key, {"seen": next(_numbers)})
    await storage.set_state(key, STATE)


# The first two leave no row, the next two make it again for those that follow.
OPERATIONS: list[Work[BaseStorage]] = [
    Work("storage.clear", _clear, fill),
    Work("FSMContext.clear", lambda storage, key: FSMContext(storage, key).clear(), fill),
    Work("set_state", lambda storage, key: storage.set_state(key, STATE)),
    Work("set_data", lambda storage, key: storage.set_data(key, DATA)),
    Work("get_state", lambda storage, key: storage.get_state(key)),
    Work("get_data", lambda storage, key: storage.get_data(key)),
    Work("update_data", lambda storage, key: storage.update_data(key, {"seen": next(_numbers)})),
    Work("step", _step),
]


def named(works: Iterable[Work[Subject]], *names: str) -> list[Work[Subject]]:
    """Return the works with these names."""
    return [work for work in works if work.name in names]


def on_data(size: int) -> list[Work[BaseStorage]]:
    """Return the works on data of about a size in bytes."""
    data = {"text": "x" * size}
    return [
        Work("set_data", lambda storage, key: storage.set_data(key, data)),
        Work("get_data", lambda storage, key: storage.get_data(key)),
        Work(
            "update_data", lambda storage, key: storage.update_data(key, {"seen": next(_numbers)})
        ),
    ]
