"""What the journals say, compared with what the table holds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .updater import COUNT
from .writer import STATE, TWIN

Table = dict[str, dict[str, Any]]
"""State and data of each row."""


@dataclass
class Outcome:
    """What came of the work of several processes."""

    acknowledged: int = 0
    """Writes, and updates."""
    updates: int = 0
    """Of them, updates under a lock."""
    fenced: int = 0
    """Updates whose lock was lost, and that were told so."""
    told: list[str] = field(default_factory=list)
    """What those were told, and after how many seconds."""
    retried: int = 0
    """Calls that were made again."""
    cut: int = 0
    """Calls that were cancelled before they were done."""
    lost: list[str] = field(default_factory=list)
    """Acknowledged writes that are gone, or were overtaken by older ones."""
    halves: list[str] = field(default_factory=list)
    """Writes of which a part is there."""
    overlaps: list[str] = field(default_factory=list)
    """Handlers that held one lock at the same time."""
    errors: list[str] = field(default_factory=list)
    """Errors that reached a caller."""
    left: list[str] = field(default_factory=list)
    """Connections and threads in use at the end."""
    longest: float = 0.0
    """Seconds that a write took at most, from the call to its acknowledgement."""
    longest_update: float = 0.0
    """Seconds that an update took at most, with its wait for the lock."""


class Judge:
    """Compares the journals of all processes, one after another, with the table."""

    def __init__(self, table: Table) -> None:
        """Start with nothing.

        :param table: what it holds at the end
        """
        self._table = table
        self._outcome = Outcome()
        self._tried: dict[tuple[str, str], int] = {}
        self._acknowledged: dict[tuple[str, str], int] = {}
        self._tried_updates: dict[str, int] = defaultdict(int)
        self._updates: dict[str, list[tuple[float, float, int]]] = defaultdict(list)

    def read(self, events: list[Any]) -> None:
        """Take in a journal."""
        outcome = self._outcome
        for kind, *facts in events:
            if kind == "try":
                row, name, number = facts
                self._tried[row, name] = number
            elif kind == "ack":
                row, name, number, seconds = facts
                self._acknowledged[row, name] = number
                outcome.acknowledged += 1
                outcome.longest = max(outcome.longest, seconds)
            elif kind == "try update":
                self._tried_updates[facts[0]] += 1
            elif kind == "update":
                row, number, entered, left, seconds = facts
                self._updates[row].append((entered, left, number))
                outcome.acknowledged += 1
                outcome.updates += 1
                outcome.longest_update = max(outcome.longest_update, seconds)
            elif kind == "fenced":
                outcome.fenced += 1
                outcome.told.append(f"{facts}")
            elif kind == "cut":
                outcome.cut += 1
            elif kind == "retry":
                outcome.retried += 1
            elif kind == "error":
                outcome.errors += facts
            elif kind == "end":
                connections, threads = facts
                outcome.left += [f"{connections} connections"] * bool(connections) + threads
            elif kind == "half":
                outcome.halves.append(f"{facts}")
            else:
                outcome.lost.append(f"{kind}: {facts}")

    def outcome(self) -> Outcome:
        """Return what came of it."""
        self._compare_writes()
        self._compare_updates()
        return self._outcome

    def _compare_writes(self) -> None:
        for (row, name), last in self._tried.items():
            found = self._table.get(row, {})
            value = int(found.get(name) or 0)
            acknowledged = self._acknowledged.get((row, name), 0)
            if not acknowledged <= value <= last:
                self._outcome.lost.append(f"{row} {name} is {value}: {acknowledged}, {last}")
            if name != STATE and value != found.get(TWIN + name, 0):
                twin = found.get(TWIN + name)
                self._outcome.halves.append(f"{row} {name} is {value}, its twin {twin}")

    def _compare_updates(self) -> None:
        for row, updates in self._updates.items():
            found = self._table.get(row, {})
            value = found.get(COUNT, 0)
            if str(value) != found.get(STATE):
                self._outcome.halves.append(f"{row} counts {value}, state {found.get(STATE)}")
            # Each acknowledged update has counted up by one, from a number that was there.
            numbers = {number for _, _, number in updates}
            if not (len(updates) == len(numbers) and max(numbers) <= value):
                self._outcome.lost.append(f"{row}: {len(updates)} updates, it counts {value}")
            if not len(updates) <= value <= self._tried_updates[row]:
                tried = self._tried_updates[row]
                self._outcome.lost.append(f"{row}: {len(updates)} of {tried}, it counts {value}")
            for (_, left, one), (entered, _, other) in pairwise(sorted(updates)):
                if entered < left:
                    self._outcome.overlaps.append(f"{row}: {one} and {other}")
