"""A process that migrates, and tells how far it is: see ``test_migration_from_redis.py``."""

from __future__ import annotations

import asyncio
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection

from aiogram.fsm.storage.base import DefaultKeyBuilder
from aiogram.fsm.storage.redis import RedisStorage
from backends import REDIS_URL, Backend
from blocking import sqlite_without_fsync
from former import FULL
from sqlalchemy import URL, Engine

from hybrid_storage import SQLAlchemyStorage
from hybrid_storage.migration import RedisSource, Report, migrate


@dataclass(frozen=True)
class Job:
    """What to move where."""

    backend: Backend
    url: URL
    table: str
    prefix: str
    """That of the keys in Redis."""
    batch: int


def main(job: Job, told: Connection) -> None:
    """Migrate; send the report after each batch, and at last once more."""
    warnings.simplefilter("error")
    with sqlite_without_fsync():
        asyncio.run(carry_out(job, told))


async def carry_out(job: Job, told: Connection) -> None:
    """Do so."""
    engine = job.backend.engine(job.url)
    builder = DefaultKeyBuilder(prefix=job.prefix, **FULL)
    old = RedisStorage.from_url(REDIS_URL, key_builder=builder)
    storage = SQLAlchemyStorage(job.backend.factory(engine), table_name=job.table)

    def tell(report: Report) -> None:
        told.send(report)
        time.sleep(0.005)  # so that there is time to kill it

    report = await migrate(RedisSource(old), storage, batch=job.batch, on_progress=tell)
    told.send(report)
    await old.close()
    if isinstance(engine, Engine):
        engine.dispose()
    else:
        await engine.dispose()
