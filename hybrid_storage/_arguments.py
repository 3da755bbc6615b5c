"""Arguments of constructors, refused with an error that says what they should be."""

from __future__ import annotations

import warnings

from aiogram.fsm.storage.base import KeyBuilder, StorageKey
from sqlalchemy import Table

from ._sql.lookups import has_columns

NO_COLUMNS = (
    "{} needs the columns to look conversations by, which table {!r} lacks: pass columns=True to "
    "the storage, or let your model inherit from ConversationColumns, and add them to the table "
    "with a migration"
)


def check_functions(**functions: object) -> None:
    """Refuse what cannot be called.

    :raises TypeError: naming the argument
    """
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} is a function, not {function!r}")


def check_seconds(**arguments: object) -> None:
    """Refuse what is not a number of seconds.

    :raises TypeError: naming the argument
    :raises ValueError: if it is negative
    """
    for name, seconds in arguments.items():
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
            raise TypeError(f"{name} is a number of seconds, such as 30.0, not {seconds!r}")
        if not seconds >= 0:
            raise ValueError(f"{name} is a number of seconds, 0 or more, not {seconds!r}")


def check_columns(table: Table, expires_after: object) -> None:
    """Refuse to let conversations expire on a table that does not know when they were written.

    :raises TypeError: if it is not a number of seconds
    :raises ValueError: if it is not above 0, or if the table lacks the columns
    """
    if expires_after is None:
        return
    check_seconds(expires_after=expires_after)
    if not expires_after:
        raise ValueError("expires_after is a number of seconds above 0, or None for never")
    if not has_columns(table):
        raise ValueError(NO_COLUMNS.format("expires_after", table.fullname))


def checked_key_builder(builder: object) -> KeyBuilder:
    """Return a key builder that builds what the storage asks for.

    :raises TypeError: if it is not a key builder, or cannot build a key without ``part``
    """
    if not isinstance(builder, KeyBuilder):
        raise TypeError(f"key_builder is a KeyBuilder, not {builder!r}")
    try:
        builder.build(StorageKey(bot_id=42, chat_id=7, user_id=7))
    except TypeError as error:
        raise TypeError(
            f"{type(builder).__name__}.build() cannot be called with a key alone: {error}. State "
            "and data stand in one row, so `part` needs a default: "
            "def build(self, key, part=None)"
        ) from error
    except Exception:
        pass  # it may have reasons to refuse this key
    return builder


def renamed(name: str, value: object, old_name: str, old_value: object) -> object:
    if old_value is None:
        return value
    if value is not None:
        raise TypeError(f"{old_name}= is the former name of {name}=: pass one of them")
    warnings.warn(
        f"SQLAlchemyStorage({old_name}=...) is now SQLAlchemyStorage({name}=...)",
        DeprecationWarning,
        stacklevel=3,
    )
    return old_value
