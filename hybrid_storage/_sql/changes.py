"""What an update has read of a row, and what it is about to write: texts, and no statement.

For ``units.py`` and ``unit_of_work.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, NamedTuple, TypeAlias

Change: TypeAlias = Callable[[str | None], str]
"""Makes the new text of the data out of the present one."""


class Texts(NamedTuple):
    """What a row holds."""

    state: str | None = None
    data: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether a row need not be there."""
        return self.state is None and not self.data


class ChangedRow:
    """A row as it was read, and the changes since then.

    A state that is set, data that are replaced and fields that are updated can be applied any
    number of times, on whatever the row holds by then. So what others have written meanwhile stays.
    """

    def __init__(self, row: str, found: Texts | None) -> None:
        """Begin without changes.

        :param row: the row's id
        :param found: what has been read, None if there is no row
        """
        self.row: str = row
        self.found: Texts | None = found
        self.now: Texts = found or Texts()
        """What it holds once the changes have been written."""
        self.columns: Mapping[str, Any] = {}
        """What else a write fills in, by the names of the parameters."""
        self._has_state = False
        self._data: list[Change] = []

    def copied(self) -> ChangedRow:
        """Return a copy, to come back to."""
        other = copy(self)
        self._data = list(self._data)
        return other

    def set_state(self, state: str | None) -> None:
        """Set the state, or remove it."""
        self._has_state = True
        self.now = Texts(state, self.now.data)

    def set_data(self, text: str) -> None:
        """Replace the data."""
        self._data = [lambda _: text]
        self.now = Texts(self.now.state, text)

    def clear(self) -> None:
        """Remove the state and the data."""
        self.set_state(None)
        self.set_data("")

    def update_data(self, merge: Change) -> None:
        """Change fields of the data."""
        self.now = Texts(self.now.state, merge(self.now.data))
        self._data.append(merge)

    def is_to_be_written(self, *, keeps_time: bool) -> bool:
        """Tell whether the row has to be written.

        :param keeps_time: whether the table keeps the time of the last write, which moves even if
            the texts stay as they are
        """
        before = self.found or Texts()
        is_same = before.state == self.now.state and (before.data or "") == (self.now.data or "")
        if is_same and self.now.is_empty:
            return self.found is not None and self.is_changed  # a row that need not be there
        return not is_same or (keeps_time and self.is_changed)

    @property
    def is_changed(self) -> bool:
        """Whether anything was written to it, be it what was there before."""
        return self._has_state or bool(self._data)

    def rebase(self, found: Texts | None) -> None:
        """Apply the changes to what the row holds by now."""
        state = self.now.state
        self.found, self.now = found, found or Texts()
        if self._has_state:
            self.now = Texts(state, self.now.data)
        for change in self._data:
            self.now = Texts(self.now.state, change(self.now.data))

    def written(self) -> None:
        """Begin anew: the row holds what it was to hold."""
        self.found = None if self.now.is_empty else self.now
        self._has_state, self._data = False, []
