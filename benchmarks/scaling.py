"""What an update costs the server and the bot, and how that grows with rows and processes.

Bytes, blocks and CPU time: they hold where others use the machine, too, as times do not.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from statistics import median

from .measure import Run
from .scaling_load import LEASE, PLAIN, POOL, TASKS, Cost, Job, measured
from .scaling_server import TUNED, Server, Tables, own_server

OFF = "autovacuum_enabled = off"
UPDATES_A_ROW = 4
STORAGE = {
    "the defaults": ("fillfactor = 100", False),
    **{
        f"fillfactor {factor}, autovacuum {word}": (f"fillfactor = {factor}, {rest}", False)
        for factor in (100, 90, 70, 50)
        for word, rest in (("off", OFF), ("tuned", TUNED))
    },
    "fillfactor 100, columns=True": (f"fillfactor = 100, {TUNED}", True),
    "fillfactor 50, columns=True": (f"fillfactor = 50, {TUNED}", True),
}
LEFT_OPEN = "fillfactor 90, autovacuum tuned, a transaction left open"
PLANS = ("auto", "force_generic_plan")


async def scaling(run: Run) -> None:
    """Measure on a server of one's own."""
    with own_server() as server:
        _storage(run, server)
        _growth(run, server)
        _plans(run, server)
        _processes(run, server)
    run.results.scaling["setting"]["processes"] = {"pool": POOL, "tasks": TASKS}


def _storage(run: Run, server: Server) -> None:
    rows = run.scale.storage_rows
    for name, (parameters, columns) in {
        **STORAGE,
        LEFT_OPEN: (f"fillfactor = 90, {TUNED}", False),
    }.items():
        run.advance(f"scaling: {name}")
        tables = Tables("scaling_storage", parameters, columns)
        with ExitStack() as stack:
            stack.enter_context(server.tables(tables, rows))
            if name == LEFT_OPEN:
                stack.enter_context(server.open_transaction())
            before = [server.counted(table) for table in tables.both]
            # Each lock has its row from its first update on.
            cost = measured(server, Job(server.url, tables, rows, UPDATES_A_ROW * rows), 2)
            after = [server.counted(table) for table in tables.both]
        figures = run.results.scaling["storage"][name]
        figures["wal"] = cost.wal
        for kind, one, other in zip(("conversations", "locks"), before, after, strict=True):
            figures |= {
                f"{kind}: HOT": (other.hot - one.hot) / max(1, other.updates - one.updates),
                f"{kind}: blocks": (other.blocks - one.blocks) / cost.all_updates,
                f"{kind}: size before": one.size + one.indexes,
                f"{kind}: size": other.size + other.indexes,
            }


def _growth(run: Run, server: Server) -> None:
    updates = run.scale.scaling_updates
    for rows in run.scale.scaling_rows:
        run.advance(f"scaling: {rows:,} conversations")
        tables = Tables("scaling_rows")
        with server.tables(tables, rows, rows):
            before = [server.counted(table) for table in tables.both]
            figures = run.results.scaling["growth"][f"{rows:,}"]
            for kind, one in zip(("conversation", "lock"), before, strict=True):
                figures[f"{kind}: bytes"] = (one.size + one.indexes) / rows
            figures["depth"] = server.depth(tables.name)
            figures["purge"] = server.seconds_of_a_purge(tables)
            cost = measured(server, Job(server.url, tables, rows, updates), 2)
            after = [server.counted(table) for table in tables.both]
            blocks = sum(b.blocks - a.blocks for a, b in zip(before, after, strict=True))
            figures["blocks"] = blocks / cost.all_updates
            figures |= {"wal": cost.wal, "server": cost.server_cpu, "client": cost.client_cpu}
            with server.whole_pages():
                figures["wal, whole pages"] = measured(
                    server, Job(server.url, tables, rows, updates, seed=100), 2
                ).wal
            plain = measured(server, Job(server.url, tables, rows, updates, PLAIN), 2)
            figures |= {"plain: wal": plain.wal, "plain: server": plain.server_cpu}


def _plans(run: Run, server: Server) -> None:
    rows, updates = run.scale.scaling_rows[0], run.scale.scaling_updates
    tables = Tables("scaling_plans")
    costs: dict[tuple[str, str], list[Cost]] = defaultdict(list)
    with server.tables(tables, rows):
        for _ in range(run.scale.scaling_rounds):
            for plan in PLANS:
                with server.setting("plan_cache_mode", plan):
                    for isolation in (LEASE, PLAIN):
                        run.advance(f"scaling: {isolation}, plan_cache_mode={plan}")
                        job = Job(server.url, tables, rows, updates, isolation)
                        costs[isolation, plan].append(measured(server, job, 2))
    for (isolation, plan), some in costs.items():
        run.results.scaling["plans"][f"{isolation}, plan_cache_mode={plan}"] = _medians(some)


def _processes(run: Run, server: Server) -> None:
    rows = run.scale.scaling_rows[min(1, len(run.scale.scaling_rows) - 1)]
    tables = Tables("scaling_processes")
    costs: dict[int, list[Cost]] = defaultdict(list)
    with server.tables(tables, rows, rows):
        for _ in range(run.scale.scaling_rounds):
            for processes in run.scale.processes:
                run.advance(f"scaling: {processes} processes")
                job = Job(server.url, tables, rows, run.scale.scaling_updates)
                costs[processes].append(measured(server, job, processes))
    for processes, some in costs.items():
        run.results.scaling["processes"][str(processes)] = _medians(some)


def _medians(costs: list[Cost]) -> dict[str, float]:
    return {
        "seconds": median(cost.seconds for cost in costs),
        "client": median(cost.client_cpu for cost in costs),
        "server": median(cost.server_cpu for cost in costs),
        "wal": median(cost.wal for cost in costs),
        "connections": median(cost.connections for cost in costs),
        "memory": median(cost.memory for cost in costs),
    }
