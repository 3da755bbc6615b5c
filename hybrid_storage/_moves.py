"""Moving a batch of conversations, and looking at it again. For ``migration.py``."""

from __future__ import annotations

import json
from asyncio import sleep
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

from aiogram.fsm.storage.base import StorageKey
from sqlalchemy import Connection

from ._codec import CorruptDataError
from ._engine.retries import with_retries
from ._sources import MODULE, Refused, Source
from ._sql.absent import AbsentRows
from ._sql.changes import Texts
from .storage import SQLAlchemyStorage

T = TypeVar("T")

_LISTED = 1000  # refused keys that a report lists: there may be millions
_LOOKED_AT_AGAIN = 10_000  # conversations that seem to be missing or changed
_PAUSE = 0.5  # seconds before that
_LOOKS = 5  # at most, while a bot at work goes on
_MODULUS = 1 << 128


@dataclass
class Report:
    """What has become of the source's conversations."""

    dry_run: bool = False
    """Whether nothing was written, and what follows is what would be done."""
    found: int = 0
    """All conversations of the source: the sum of the following four."""
    moved: int = 0
    """Those that were not here."""
    same: int = 0
    """Those that were here, and are what the source has."""
    different: int = 0
    """Those that were here, and are something else: they are kept as they are here."""
    refused: int = 0
    """Those whose key or content cannot be moved."""
    refusals: list[Refused] = field(default_factory=list)
    """The first thousand of those, each with the reason."""
    missing: int = 0
    """Those that a second look found in the source and not here."""
    changed: int = 0
    """Those that were moved, or the same, and that the second look found to be different."""
    checksum: str = ""
    """Of what the second look found in the source, without the refused and the different."""
    target_checksum: str = ""
    """Of what it found here for the same conversations."""
    verified: bool = False
    """Whether the second look found none missing and none changed, and the checksums are equal.

    It says nothing of those that are refused.
    """

    __module__ = MODULE

    def __str__(self) -> str:
        """Say it in a few words."""
        told = (
            f"{self.found} found: {self.moved} {'to move' if self.dry_run else 'moved'}, "
            f"{self.same} here already, {self.different} kept because they differ here, "
            f"{self.refused} refused"
        )
        if self.dry_run:
            return f"{told}. Nothing was written"
        if self.verified and self.refused:
            return f"{told}. Verified, but for those refused, which are NOT here"
        if self.verified:
            return f"{told}. Verified"
        return f"{told}. NOT verified: {self.missing} missing, {self.changed} changed since"


class Given(NamedTuple):
    """A conversation to move."""

    name: str
    key: StorageKey
    row: str
    texts: Texts
    age: float | None


class Move:
    """Moves the conversations of a source, a batch at a time."""

    def __init__(self, source: Source, target: SQLAlchemyStorage, report: Report) -> None:
        self._source = source
        self._target = target
        self._codec = target._codec
        self._absent = AbsentRows(target._rows)
        self._report = report

    async def move(self, names: Sequence[str]) -> None:
        """Insert what is not here, and count."""
        given, refused = await self.read(names)
        self._report.found += len(refused)
        self._report.refused += len(refused)
        self._report.refusals += refused[: _LISTED - len(self._report.refusals)]
        here = await self.here(given)
        absent: dict[str, Given] = {}
        for each in given:
            if each.row not in here:
                absent.setdefault(each.row, each)
        inserted = set(absent)
        if absent and not self._report.dry_run:
            what = f"moving {len(absent)} conversations"
            retry_for = self._target._access.retry_for
            inserted = await with_retries(partial(self._insert, absent), retry_for, what)
            here |= await self.here([each for each in given if each.row not in inserted])
        outdated = [each.name for each in given if not self._counted(each, inserted, here)]
        if outdated:  # moved by others since they were read, or changed
            await self.move(outdated)

    def _counted(self, given: Given, inserted: set[str], here: dict[str, Texts]) -> bool:
        if given.row in inserted:
            self._report.moved += 1
            # Another conversation that the target's key builder gives the same row is compared.
            inserted.discard(given.row)
            here[given.row] = given.texts
        elif given.row not in here:
            return False
        elif self.content(given, here[given.row]) == self.content(given, given.texts):
            self._report.same += 1
        else:
            self._report.different += 1
        self._report.found += 1
        return True

    async def read(self, names: Sequence[str]) -> tuple[list[Given], list[Refused]]:
        """Return what can be moved of some conversations, and what cannot."""
        given: list[Given] = []
        refused: list[Refused] = []
        for each in await self._source.read(names):
            if isinstance(each, Refused):
                refused.append(each)
                continue
            try:
                row = self._codec.row(each.key)
                texts = Texts(self._codec.state(each.state), self._codec.dump(each.data))
            except Exception as error:  # the application's functions raise what they like
                refused.append(Refused(each.name, str(error) or repr(error)))
            else:
                given.append(Given(each.name, each.key, row, texts, each.age))
        why = await self._reading(partial(self._reasons, given)) if given else {}
        refused += [Refused(each.name, why[each.name]) for each in given if each.name in why]
        return [each for each in given if each.name not in why], refused

    async def here(self, given: Sequence[Given]) -> dict[str, Texts]:
        """Return what the rows of conversations hold by now."""
        rows = list({each.row for each in given})
        return await self._reading(partial(self._absent.read, rows=rows)) if rows else {}

    def content(self, given: Given, texts: Texts) -> int:
        """Return a hash of what a row holds, the same however its JSON is written."""
        try:
            data: Any = self._codec.load(given.key, texts.data)
        except CorruptDataError:
            data = texts.data
        whole = json.dumps([given.row, texts.state, data], sort_keys=True, default=repr)
        return int.from_bytes(blake2b(whole.encode(), digest_size=16).digest(), "big")

    async def _insert(self, absent: Mapping[str, Given]) -> set[str]:
        """Insert the rows that are not here, unless the source has changed; return their ids."""
        target = self._target
        texts = {row: each.texts for row, each in absent.items()}
        write = partial(target._calls.writing, min(absent))
        async with target.transaction():
            columns = {row: target._calls.row(each.key).columns for row, each in absent.items()}
            ages = {row: each.age for row, each in absent.items() if each.age is not None}
            insert = partial(self._absent.insert, given=texts, columns=columns, ages=ages)
            inserted = await target._access.execute(write(insert))
            if not inserted:
                return set()
            # Now those who want to move one of them wait. What they had moved before may have been
            # cleared here since. Then it is not in the source any more.
            now, _ = await self.read([absent[row].name for row in inserted])
            current = {each.row for each in now if each.texts == texts[each.row]}
            if current != inserted:
                delete = partial(self._absent.delete, rows=list(inserted - current))
                await target._access.execute(write(delete))
        return current

    async def _reading(self, function: Callable[[Connection], T]) -> T:
        target = self._target
        return await target._access.execute(target._calls.reading("a batch", function))

    def _reasons(self, given: Sequence[Given], connection: Connection) -> dict[str, str]:
        """Return why the database cannot hold some of the conversations."""
        why: dict[str, str] = {}
        for each in given:
            try:
                self._target._rows.check(connection, each.row, *each.texts)
            except ValueError as error:
                why[each.name] = str(error)
        return why


class Check:
    """Looks at both a second time, and compares."""

    def __init__(self, move: Move) -> None:
        self._move = move
        self._missing = self._different = 0
        self._sum = self._target_sum = 0
        self._again: list[str] = []

    async def compare(self, names: Sequence[str], *, is_last: bool = False) -> None:
        """Compare a batch.

        :param is_last: whether what is missing or different is not looked at once more
        """
        given, _ = await self._move.read(names)
        here = await self._move.here(given)
        for each in given:
            expected = self._move.content(each, each.texts)
            found = self._move.content(each, here[each.row]) if each.row in here else None
            if found is not None and found == expected:
                self._sum += expected
                self._target_sum += found
            elif not is_last and len(self._again) < _LOOKED_AT_AGAIN:
                self._again.append(each.name)
            elif found is None:
                self._sum += expected
                self._missing += 1
            else:
                self._different += 1

    async def finish(self, report: Report, batch: int) -> None:
        """Write down what was found.

        A bot may have moved a conversation since it was read, or is about to remove it there.
        """
        for look in range(1, _LOOKS + 1):
            again, self._again = self._again, []
            if not again:
                break
            await sleep(_PAUSE)
            is_last = look == _LOOKS or len(again) <= report.different
            for first in range(0, len(again), batch):
                await self.compare(again[first : first + batch], is_last=is_last)
        report.missing = self._missing
        report.changed = max(0, self._different - report.different)
        report.checksum = f"{self._sum % _MODULUS:032x}"
        report.target_checksum = f"{self._target_sum % _MODULUS:032x}"
        is_complete = not report.missing and not report.changed
        report.verified = is_complete and report.checksum == report.target_checksum
