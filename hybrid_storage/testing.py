"""For your tests: a storage in memory that behaves as on a database, and a fixture of pytest's.

The twin is the storage itself, on a SQLite database in memory: values go through JSON, keys become
rows, ``operations`` and ``transaction()`` work. Say ``pytest_plugins = ["hybrid_storage.testing"]``
in your ``conftest.py`` to have the fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from .storage import SQLAlchemyStorage


def memory_storage(**options: Any) -> SQLAlchemyStorage[Session]:
    """Return a storage in memory, whose tables are there.

    :param options: those of :meth:`SQLAlchemyStorage.from_url`, such as ``metadata`` and
        ``key_builder``; all tables of the metadata are created
    :return: the storage; ``storage.engine`` is for the tests' own sessions
    """
    storage = SQLAlchemyStorage.from_url("sqlite://", **options)
    assert isinstance(storage.engine, Engine)
    storage.metadata.create_all(storage.engine)
    return storage


@pytest.fixture
def fsm_storage() -> Iterator[SQLAlchemyStorage[Session]]:
    """Return an empty storage in memory, whose table has the columns to look by."""
    storage = memory_storage(columns=True)
    yield storage
    assert isinstance(storage.engine, Engine)
    storage.engine.dispose()
