"""A node that has yet to apply what another has committed: what it shows, and what it takes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable
from contextlib import closing

import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from chaos.scenario import Report

from hybrid_storage import SQLAlchemyStorage

from .galera import DATABASE, PORT, Galera, Node, url

KEY = StorageKey(bot_id=1, chat_id=1, user_id=1)
_ROWS = 200_000  # of another table, that the node has to apply first: some seconds


class Lag:
    """Two nodes, of which the second is behind when it is written to."""

    def __init__(self, cluster: Galera, sync_wait: int) -> None:
        """Store which nodes.

        :param sync_wait: what sessions wait for, as the server's variable has it
        """
        self._ahead, self._behind, _ = cluster.nodes
        self._sync_wait = sync_wait
        self._table = f"lag_{uuid.uuid4().hex}"
        self.there, self.here = self._storage(self._ahead), self._storage(self._behind)

    async def after(self, change: Callable[[], Awaitable[object]], then: str) -> object:
        """Commit at one node, call the other at once, and return what that is answered.

        :param change: to commit at the node that is ahead
        :param then: the name of a method of this class
        """
        return await getattr(self, then)()

    def _storage(self, node: Node) -> SQLAlchemyStorage:
        return SQLAlchemyStorage.from_url(
            url(PORT, node.address).set(drivername="mysql+asyncmy"),
            table_name=self._table,
            connect_args={"init_command": f"SET SESSION wsrep_sync_wait = {self._sync_wait}"},
        )

    def fill(self) -> None:
        """Make the other table."""
        self._execute(
            "CREATE OR REPLACE TABLE bulk (id INT PRIMARY KEY, n INT NOT NULL)",
            f"INSERT INTO bulk SELECT seq, 0 FROM seq_1_to_{_ROWS}",
        )

    def fall_behind(self) -> None:
        """Have the second node busy for some seconds."""
        self._execute("UPDATE bulk SET n = n + 1")

    def is_behind(self) -> bool:
        with closing(self._behind.connection(database=DATABASE)) as c, c.cursor() as cursor:
            cursor.execute("SELECT n FROM bulk WHERE id = 1")
            (seen,) = cursor.fetchone()
        with closing(self._ahead.connection(database=DATABASE)) as c, c.cursor() as cursor:
            cursor.execute("SELECT n FROM bulk WHERE id = 1")
            return cursor.fetchone() != (seen,)

    def _execute(self, *statements: str) -> None:
        options = {"database": DATABASE, "autocommit": True, "read_timeout": 60}
        with closing(self._ahead.connection(**options)) as connection:
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
