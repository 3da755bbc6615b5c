"""Moves conversations here from another storage, while the bot runs or while it stands still.

::

    old = RedisStorage.from_url("redis://localhost/0")
    report = await migrate(RedisSource(old, bot_id=42), storage)
    print(report)

A conversation that is here already is left as it is: what users have done since counts. So
``migrate()`` may be killed and run again. Nothing is removed from the source. A bot that runs
meanwhile needs ``SQLAlchemyStorage(fallback=old)``: see docs/coming-from/moving.md.
"""

from __future__ import annotations

from collections.abc import Callable

from ._moves import Check, Move, Report
from ._sources import Conversation, RedisSource, Refused, Source
from ._table_sources import RaitoSource, TableSource
from .storage import SQLAlchemyStorage

__all__ = [
    "Conversation",
    "RaitoSource",
    "RedisSource",
    "Refused",
    "Report",
    "Source",
    "TableSource",
    "migrate",
]


async def migrate(
    source: Source,
    target: SQLAlchemyStorage,
    *,
    dry_run: bool = False,
    batch: int = 500,
    on_progress: Callable[[Report], object] | None = None,
) -> Report:
    """Move the conversations of a source here, then compare both.

    Each batch is a transaction: killed, it leaves whole batches behind, and the next run goes on
    after them. It may run several times at once, and beside the bot. Memory does not grow with the
    number of conversations.

    :param source: where they come from; nothing is written there
    :param target: the storage to move them to; its table is there
    :param dry_run: only count what would be moved, what is here and what is refused
    :param batch: how many conversations to move at a time
    :param on_progress: called after each batch, with the report so far
    :raises TypeError: if the source or the target is not of its kind
    :raises ValueError: if the batch is not 1 or more
    :return: the report
    """
    if not all(hasattr(source, name) for name in ("names", "read")):
        raise TypeError(f"source is a Source, such as RedisSource(old, bot_id=...), not {source!r}")
    if not isinstance(target, SQLAlchemyStorage):
        raise TypeError(f"target is a SQLAlchemyStorage, not {target!r}")
    if batch < 1:
        raise ValueError(f"batch is a number of conversations, 1 or more, not {batch!r}")
    report = Report(dry_run=dry_run)
    move = Move(source, target, report)
    async for names in source.names(batch):
        await move.move(names)
        if on_progress is not None:
            on_progress(report)
    if dry_run:
        return report
    check = Check(move)
    async for names in source.names(batch):
        await check.compare(names)
    await check.finish(report, batch)
    return report
