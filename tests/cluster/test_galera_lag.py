"""A node that has yet to apply what another has committed: what it shows, and what it takes."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from anyio import to_thread
from chaos.scenario import Report

from hybrid_storage import SQLAlchemyStorage

from .conftest import SHORT
from .galera import DATABASE, PORT, Galera, Node, url
from .hosts import wait_for

KEY = StorageKey(bot_id=1, chat_id=1, user_id=1)
_ROWS = 100_000  # of another table, that the node has to apply first: some seconds


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
        """Tell whether the second node has not come so far."""
        return _read(self._behind) != _read(self._ahead)

    def _execute(self, *statements: str) -> None:
        for statement in statements:
            self._ahead.read(statement, database=DATABASE, autocommit=True, read_timeout=60)

    async def close(self) -> None:
        """Close both storages."""
        await self.there.close()
        await self.here.close()

    async def catch_up(self) -> None:
        """Wait until the second node has come as far as the first."""
        await to_thread.run_sync(wait_for, lambda: not self.is_behind(), "it catches up")


@dataclass(frozen=True)
class Case:
    """A write at the node that is ahead, then a call at the one that is behind."""

    before: Callable[[SQLAlchemyStorage], Awaitable[object]]
    first: Callable[[SQLAlchemyStorage], Awaitable[object]]
    then: Callable[[SQLAlchemyStorage], Awaitable[object]]
    state: str | None
    """What is to be there at the end."""


CASES = {
    # What it writes is what it sees: nothing to do, as it seems.
    "set": Case(
        lambda ahead: ahead.set_state(KEY, "old"),
        lambda ahead: ahead.set_state(KEY, "new"),
        lambda behind: behind.set_state(KEY, "old"),
        "old",
    ),
    "clear": Case(
        lambda ahead: ahead.clear(KEY),
        lambda ahead: ahead.set_state(KEY, "new"),
        lambda behind: behind.clear(KEY),
        None,
    ),
    # Certification: the first to commit wins, the second is made again.
    "set anew": Case(
        lambda ahead: ahead.set_state(KEY, "old"),
        lambda ahead: ahead.set_state(KEY, "new"),
        lambda behind: behind.set_state(KEY, "newer"),
        "newer",
    ),
}
READ = Case(
    lambda ahead: ahead.set_state(KEY, "old"),
    lambda ahead: ahead.set_state(KEY, "new"),
    lambda behind: behind.get_state(KEY),
    "new",
)


async def _end(lag: Lag, case: Case) -> tuple[str | None, object]:
    """Return the state that is there at the end, and what the second node answered."""
    await case.before(lag.there)
    await lag.catch_up()
    lag.fall_behind()
    await case.first(lag.there)
    answer = await case.then(lag.here)
    await lag.catch_up()
    await anyio.sleep(0.5)  # for what came after the other table
    return await lag.there.get_state(KEY), answer


@pytest.mark.parametrize("sync_wait", [0, 7] if SHORT else [0, 1, 7])
def test_galera_node_lags(galera_cluster: Galera, report: Report, sync_wait: int) -> None:
    """Without wsrep_sync_wait, a write that changes nothing as far as the node knows is dropped."""

    async def main() -> None:
        lag = Lag(galera_cluster, sync_wait)
        await lag.there.create_table()
        lag.fill()
        lost = [name for name, case in CASES.items() if (await _end(lag, case))[0] != case.state]
        _, shown = await _end(lag, READ)
        stale = int(shown != READ.state)
        await lag.close()
        report(
            f"Galera, a node that lags, wsrep_sync_wait = {sync_wait}",
            **{"writes acknowledged": 2 * len(CASES) + 1, "stale reads": stale, "lost": len(lost)},
        )
        if sync_wait == 7:
            assert (stale, lost) == (0, [])

    anyio.run(main)


def _read(node: Node) -> object:
    return node.read("SELECT n FROM bulk WHERE id = 1", database=DATABASE)
