"""Tables of what updates cost, and plain arithmetic from there: how far one server goes.

What is extrapolated says so. Each formula stands where it is used, and in ``docs/scaling.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .report import Table
from .results import Results

BUSY = 0.7
"""The share of a resource to plan with: beyond it, waiting times grow."""
LOG_SPEED = 200e6
"""Bytes a second that a disk takes of WAL: assumed, not measured."""
MOST_CONNECTIONS = 400
"""Of a server without a pooler: assumed."""
CHECKPOINT = 300
"""Seconds between two checkpoints: PostgreSQL's default."""
PEAK = 0.1
"""The share of a day's updates that come in its busiest hour: assumed."""
PACE = 10
"""Seconds between two updates of a user who is there: assumed."""
RATES = (100, 1_000, 10_000)
CORES = (8, 32)
AS_USUAL = "unit of work, lease, plan_cache_mode=auto"


@dataclass(frozen=True)
class Price:
    """What one update costs."""

    server: float
    client: float
    """In seconds of CPU time."""
    wal: float
    """In bytes, of pages that were changed since the last checkpoint."""
    first_wal: float
    """In bytes, of pages that were not: they are logged as a whole, once for each checkpoint."""
    size: float
    """Of the tables with their indexes, in bytes."""
    pool: float
    """Connections of a process."""

    def processes(self, rate: float) -> float:
        """Return how many processes of the bot it takes: each uses one core at most."""
        return max(1, rate * self.client / BUSY)

    def logged(self, rate: float) -> float:
        """Return the bytes of WAL a second: no page is logged as a whole twice a checkpoint."""
        whole_pages = min(rate * (self.first_wal - self.wal), self.size / CHECKPOINT)
        return rate * self.wal + whole_pages

    def shares(self, rate: float, cores: int) -> dict[str, float]:
        """Return what share of each resource so many updates a second take."""
        return {
            "CPU of the server": rate * self.server / cores,
            "connections": self.processes(rate) * self.pool / MOST_CONNECTIONS,
            "writing WAL": self.logged(rate) / LOG_SPEED,
        }

    def most(self, cores: int) -> float:
        """Return how many updates a second a server's CPUs allow."""
        return cores * BUSY / self.server


def prices(results: Results) -> dict[str, Price]:
    """Return what an update costs, by setting: the WAL is that of the largest table."""
    name, largest = list(results.scaling["growth"].items())[-1]
    each = largest["conversation: bytes"] + largest["lock: bytes"]
    wal = (largest["wal"], largest["wal, whole pages"], each * int(name.replace(",", "")))
    pool = results.scaling["setting"]["processes"]["pool"]
    return {
        name: Price(row["server"], row["client"], *wal, pool)
        for name, row in results.scaling["plans"].items()
    }


def scaling_answers(results: Results) -> Iterator[Table]:
    """Return what is extrapolated."""
    price = prices(results)[AS_USUAL]
    rows = []
    for cores in CORES:
        most = price.most(cores)
        rows.append(
            [
                f"{cores} cores",
                f"{_about(most)}",
                _about(most * 3600 / PEAK),
                _about(most * PACE),
                _about(price.processes(most)),
                f"{price.logged(most) / 1e6:.0f} MB/s",
            ]
        )
    yield Table(
        "Extrapolated: what one PostgreSQL carries, with its CPUs 70 % busy",
        [
            "server",
            "updates/s",
            "updates/day",
            "users at a time",
            "processes of the bot",
            "WAL",
        ],
        rows,
    )
    rows = []
    for rate in RATES:
        shares = price.shares(rate, CORES[0])
        first = max(shares, key=lambda name: shares[name])
        rows.append(
            [
                f"{rate:,} updates/s",
                *(f"{share:.0%}" for share in shares.values()),
                f"{price.processes(rate):.0f}",
                first,
            ]
        )
    yield Table(
        f"Extrapolated: share of each resource of a server with {CORES[0]} cores",
        ["", *price.shares(1, 1), "processes of the bot", "runs out first"],
        rows,
    )


def scaling_tables(results: Results) -> Iterator[Table]:
    """Return what was measured."""
    if results.scaling["storage"]:
        yield _storage(results)
        yield _growth(results)
        yield _plans(results)
        yield _processes(results)


def _storage(results: Results) -> Table:
    rows = [
        [
            name,
            f"{row['wal']:,.0f}",
            *(
                f"{row[f'{kind}: HOT']:.0%}, {row[f'{kind}: blocks']:.0f}, "
                f"{row[f'{kind}: size before'] / 1024:.0f} → {row[f'{kind}: size'] / 1024:.0f}"
                for kind in ("conversations", "locks")
            ),
        ]
        for name, row in results.scaling["storage"].items()
    ]
    title = "An update by storage parameters: share of HOT updates, blocks, KiB of the table"
    columns = ["", "WAL, bytes", "conversations", "locks"]
    return Table(f"{title} with its indexes before and after four updates a row", columns, rows)


def _growth(results: Results) -> Table:
    rows = [
        [
            name,
            f"{row['conversation: bytes']:.0f} + {row['lock: bytes']:.0f}",
            f"{row['depth']:.0f}",
            f"{row['blocks']:.0f}",
            f"{row['wal']:,.0f}",
            f"{row['wal, whole pages']:,.0f}",
            _ms(row["server"]),
            f"{row['plain: wal']:,.0f}",
            _ms(row["plain: server"]),
            _ms(row["purge"]),
        ]
        for name, row in results.scaling["growth"].items()
    ]
    return Table(
        "An update of a random conversation, by the number of conversations (bytes with indexes)",
        [
            "conversations",
            "bytes each + lock",
            "blocks of a look-up",
            "blocks",
            "WAL",
            "after a checkpoint",
            "server CPU",
            "not isolated: WAL",
            "server CPU",
            "CPU of a search for old locks",
        ],
        rows,
    )


def _plans(results: Results) -> Table:
    rows = [
        [name, _ms(row["server"]), _ms(row["client"]), f"{row['memory'] / 1e6:.1f} MB"]
        for name, row in results.scaling["plans"].items()
    ]
    columns = ["", "server CPU", "the bot's CPU", "memory of a connection"]
    return Table("An update by how the server plans statements", columns, rows)


def _processes(results: Results) -> Table:
    measured = results.scaling["processes"]
    base = next(iter(measured.values()))["seconds"]
    rows = [
        [
            name,
            f"{base / row['seconds']:.2f}",
            f"{row['connections']:.0f}",
            _ms(row["server"]),
            _ms(row["client"]),
        ]
        for name, row in measured.items()
    ]
    columns = ["processes", "updates/s, 1 = one process", "connections", "server CPU"]
    title = "An update by the number of processes, all on the server's own machine"
    return Table(title, [*columns, "the bot's CPU"], rows)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


def _about(number: float) -> str:
    digits = len(f"{number:.0f}")
    return f"{round(number, 2 - digits):,.0f}"
