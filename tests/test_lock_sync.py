"""lock_sync() where connections are scarce or the database is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from aiogram.fsm.storage.base import StorageKey
from sqlalchemy import URL, create_engine
from sqlalchemy.orm import Session, sessionmaker

from hybrid_storage import SQLAlchemyEventIsolation, SQLAlchemyStorage

TIMEOUT = 20  # seconds that nothing here should take


@contextmanager
def isolated(
    url: URL, pool_size: int, lease: float = 30.0
) -> Iterator[tuple[SQLAlchemyEventIsolation, sessionmaker[Session]]]:
    """Give an isolation on a pool without overflow, and its session factory."""
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=TIMEOUT,
    )
    factory = sessionmaker(engine)
    storage = SQLAlchemyStorage(factory)
    isolation = storage.create_isolation(lease=lease)
    storage.metadata.create_all(engine)
    yield isolation, factory
    engine.dispose()


def test_threads_that_hold_the_whole_pool_take_locks(postgres_database: URL) -> None:
    """As views do whose session has read something before."""
    all_hold = threading.Barrier(3)

    with isolated(postgres_database, pool_size=3) as (isolation, factory):

        def view(user: int) -> bool:
            key = StorageKey(42, user, user)
            with factory() as session:
                session.connection()
                all_hold.wait(TIMEOUT)
                with isolation.lock_sync(key):
                    return isolation.still_held(key)

        began = time.monotonic()
        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(view, range(3))) == [True] * 3
        assert time.monotonic() - began < TIMEOUT


def test_a_lease_is_renewed_while_its_thread_holds_the_whole_pool(postgres_database: URL) -> None:
    key = StorageKey(42, 7, 7)
    with (
        isolated(postgres_database, pool_size=1, lease=0.6) as (isolation, factory),
        isolation.lock_sync(key),
        factory() as session,
    ):
        session.connection()
        for _ in range(6):
            time.sleep(0.2)
            assert isolation.still_held(key)


def test_a_lock_that_could_not_be_renewed_is_not_held_when_its_lease_is_over(
    postgres_database: URL,
) -> None:
    """Another process may have it, whatever this one has heard."""
    key = StorageKey(42, 7, 7)
    with (
        isolated(postgres_database, pool_size=2, lease=1.0) as (isolation, factory),
        isolation.lock_sync(key),
    ):
        assert isolation.still_held(key)
        with factory() as session:  # holds up each renewal
            lock = "LOCK TABLE aiogram_fsm_data_lock IN ACCESS EXCLUSIVE MODE"
            session.connection().exec_driver_sql(lock)
            time.sleep(1.3)
            assert not isolation.still_held(key)
