"""What ten thousand calls at once cost, by each driver; aiogram's own storage for comparison.

A short run makes a thousand.
"""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import URL

from .crew import SECONDS, context
from .drivers import DRIVERS
from .load import measure
from .scenario import Report
from .servers import SERVERS


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        pytest.param(database, driver, id=driver)
        for database in ["sqlite", *SERVERS]
        for driver in DRIVERS[database]
    ],
    indirect=["url"],
)
def test_load(url: URL, driver: str, report: Report) -> None:
    """Seconds, the event loop's longest stall, memory taken, and taken more the next time."""
    address = url.set(drivername=f"{url.get_backend_name()}+{driver}")
    figures_of(driver, address.render_as_string(hide_password=False), report)


def test_load_of_memory_storage(report: Report) -> None:
    """The same calls without a database."""
    figures_of("MemoryStorage", None, report)


def figures_of(name: str, url: str | None, report: Report) -> None:
    """Measure in a process of its own, and print the figures."""
    ours, theirs = context.Pipe(duplex=False)
    conversations = 1_000 if SECONDS >= 3 else 100
    table = f"load_{uuid.uuid4().hex}"
    process = context.Process(target=measure, args=(url, table, conversations, theirs))
    process.start()
    theirs.close()
    figures = ours.recv()
    process.join()
    report(f"load: {name}", **figures)
