"""Keys, states and data as the text that the table holds, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from aiogram.exceptions import DataNotDictLikeError
from aiogram.fsm.state import State
from aiogram.fsm.storage.base import DEFAULT_DESTINY, KeyBuilder, StateType, StorageKey

JsonDumps = Callable[..., str | bytes]
JsonLoads = Callable[..., Any]
Change = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Makes new data out of the present ones; called again if these have changed meanwhile."""


class CorruptDataError(ValueError):
    """A row's data is not the JSON text of an object. The row is left as it is."""

    __module__ = "hybrid_storage"


class Codec:
    """Translates with the storage's key builder and JSON functions."""

    def __init__(
        self, key_builder: KeyBuilder, json_dumps: JsonDumps, json_loads: JsonLoads, table: str
    ) -> None:
        self._build = key_builder.build
        self._dumps = json_dumps
        self._loads = json_loads
        self._table = table

    def row(self, key: StorageKey) -> str:
        """Return the id of a key's row.

        :raises TypeError: if the key builder returns something that is no text
        :raises ValueError: if the text has no UTF-8 form
        """
        if not isinstance(key, StorageKey):
            raise TypeError(
                f"a key is a StorageKey, not {key!r}: StorageKey(bot_id=..., chat_id=..., "
                "user_id=...), or state.key in a handler"
            )
        return _text("the key builder's build()", self._build(key))

    def conversation(self, key: StorageKey) -> str:
        """Return what a key's conversation is told by: the id of its row, whatever the destiny.

        Keys that the key builder gives one row, such as those of one user's chats, are of one
        conversation.
        """
        return self.row(default_destiny(key) if isinstance(key, StorageKey) else key)

    def state(self, state: StateType) -> str | None:
        """Return a state's name, None for no state.

        :raises TypeError: if it is none of these
        :raises ValueError: if the name has no UTF-8 form
        """
        name: object = state.state if isinstance(state, State) else state
        if name is None:
            return None
        if not isinstance(name, str):
            raise TypeError(
                f"a state is a State, a str or None, not {type(name).__name__}: {name!r}"
            )
        return _text("the state", name)

    def dump(self, data: Mapping[str, Any]) -> str:
        """Return the data's text, an empty one for empty data.

        :raises DataNotDictLikeError: if it is no mapping
        :raises ValueError: if the text has no UTF-8 form; whatever ``json_dumps`` raises
        """
        if not isinstance(data, Mapping):
            raise DataNotDictLikeError(
                f"Data must be a dict or dict-like object, got {type(data).__name__}"
            )
        if not data:
            return ""
        data = data if isinstance(data, dict) else dict(data)
        try:
            text = self._dumps(data)
        except TypeError as error:
            raise TypeError(f"{error}{self._advice(data)}") from error
        if isinstance(text, (bytes, bytearray)):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"json_dumps() returned bytes that are not UTF-8 ({error}): return str, or "
                    "bytes in UTF-8"
                ) from error
        if text == "":
            raise ValueError("json_dumps() returned nothing for data that is not empty")
        return _text("json_dumps()", text)

    def load(self, key: object, text: str | None) -> dict[str, Any]:
        """Return the data that a text stands for.

        :param key: the conversation's, for the error

        :raises CorruptDataError: if it is not the text of a JSON object
        """
        if not text:
            return {}
        try:
            data = self._loads(text)
        except Exception as error:
            raise self._corrupt(key, f"json_loads() fails: {error}") from error
        if not isinstance(data, dict):
            raise self._corrupt(key, f"it is a JSON {type(data).__name__}, not an object")
        return data

    def _advice(self, data: dict[Any, Any]) -> str:
        for name, value in data.items():
            try:
                self._dumps({name: value})
            except TypeError:
                return (
                    f", in field {name!r} of the data: store what JSON knows, such as "
                    "value.isoformat(), or pass a json_dumps that knows the type"
                )
        return ""

    def _corrupt(self, key: object, why: str) -> CorruptDataError:
        return CorruptDataError(
            f"the data of {key} in table {self._table!r} cannot be read, {why}. "
            "The row is unchanged; set_data() or clear() replaces it"
        )


def default_destiny(key: StorageKey) -> StorageKey:
    """Return the key of a conversation's main row."""
    return key if key.destiny == DEFAULT_DESTINY else replace(key, destiny=DEFAULT_DESTINY)


def _text(source: str, text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{source} gave {type(text).__name__}, not text: {text!r:.80}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{source} gave text with a lone surrogate, which no database stores "
                f"({error}): remove it, or escape it as json.dumps does"
            ) from error
    return text
