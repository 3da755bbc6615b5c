"""What each driver has to be told: for networks that go silent, for locks, for PgBouncer."""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

Options = dict[str, dict[str, Any]]
"""The ``connect_args`` by driver."""


DRIVERS = {
    "sqlite": ["pysqlite", "aiosqlite"],
    "postgresql": ["psycopg", "psycopg_async", "asyncpg"],
    "mysql": ["pymysql", "asyncmy"],
}
"""Of each backend, as SQLAlchemy calls it."""


def small_pool(is_async: bool, **options: Any) -> dict[str, Any]:
    """Return an engine's options for a queue of connections, which not every release defaults to.

    :param is_async: whether the engine is asynchronous
    :param options: the pool's options
    """
    return {"poolclass": AsyncAdaptedQueuePool if is_async else QueuePool, **options}


def _per_driver(options: Options) -> Options:
    return {**options, "psycopg_async": options["psycopg"]}


TIMEOUTS = _per_driver(
    {
        "psycopg": {
            "connect_timeout": 2,
            "tcp_user_timeout": 2000,  # milliseconds without an acknowledgement of what was sent
            "keepalives_idle": 1,  # seconds of waiting for an answer, then it asks:
            "keepalives_interval": 1,
            "keepalives_count": 2,
        },
        "asyncpg": {"timeout": 2, "command_timeout": 2},
        "pymysql": {"connect_timeout": 2, "read_timeout": 2, "write_timeout": 2},
        "asyncmy": {"connect_timeout": 2, "read_timeout": 2},
    }
)
"""A server that has gone silent is an error after two seconds or so."""

IMPATIENCE = _per_driver(
    {
        "pysqlite": {"timeout": 0},
        "aiosqlite": {"timeout": 0},
        "psycopg": {"options": "-c lock_timeout=50"},
        "asyncpg": {"server_settings": {"lock_timeout": "50"}},
        "pymysql": {"init_command": "SET innodb_lock_wait_timeout = 0"},
        "asyncmy": {"init_command": "SET innodb_lock_wait_timeout = 0"},
    }
)
"""A lock is an error at once."""


def unique_name() -> str:
    """Return a name for a prepared statement."""
    return f"__asyncpg_{uuid.uuid4()}__"


BEHIND_PGBOUNCER = _per_driver(
    {
        "psycopg": {"prepare_threshold": None},
        "asyncpg": {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": unique_name,
        },
    }
)
"""A transaction may meet another server than the one before it, which has prepared other things."""
