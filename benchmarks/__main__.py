"""Runs the benchmark: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .contenders import contenders, running_servers
from .measure import SMOKE, Run, Scale
from .plots import draw, draw_updates
from .report import ratios, tables
from .results import Results
from .scaling import scaling
from .scaling_report import scaling_answers, scaling_tables
from .updates import updates

SECTIONS: dict[str, Callable[[Run], Coroutine[Any, Any, None]]] = {
    "updates": updates,
    "trips": Run.trips,
    "operations": Run.operations,
    "network": Run.network,
    "rows": Run.rows,
    "data": Run.data,
    "memory": Run.memory,
    "scaling": scaling,
}
ALONE = ("scaling",)
"""Measured only where it is named: it takes long, and compares with nobody."""
SERVERS = ("postgresql", "sqlite", "mysql", "redis")
DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- figures: written by python -m benchmarks -->\n", "<!-- end of the figures -->\n"
ALT = {
    "updates-by-network": "Milliseconds that an update takes, by the delay of a round trip, for "
    "one user: this package beside RedisStorage and the package that it replaces",
    "updates-by-users": "Updates per second, by the number of users at a time, with a network of "
    "1 ms: this package beside RedisStorage and the package that it replaces",
    "updates-round-trips": "Round trips to the server that five updates take, by bot",
}
"""What the plots of the docs show, for those who do not see them."""
PACKAGES = ("aiogram", "SQLAlchemy", "asyncpg", "psycopg", "aiosqlite", "asyncmy", "redis")


def main() -> None:
    """Measure, or read the figures of an earlier run, and show them."""
    options = _options()
    logging.getLogger("hybrid_storage").setLevel(logging.ERROR)  # warns of several isolations
    console = Console(width=None if sys.stdout.isatty() else 200)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.read:
        results = Results.load(options.read)
    else:
        results = asyncio.run(_measure(options, console))
    results.save(options.out / "results.json")
    shown = list(tables(results)) if results.cells or results.trips else []
    if results.scaling:
        shown += [*scaling_answers(results), *scaling_tables(results)]
    for table in shown:
        table.show(console)
    (options.out / "tables.md").write_text("\n\n".join(table.markdown() for table in shown) + "\n")
    files = draw(results, options.out)
    console.print(f"Written to {options.out}: results.json, tables.md,", *(f.name for f in files))
    if options.write_docs:
        _write_docs(results)
        _write_scaling(results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--smoke", action="store_true", help="run everything once, in a minute or two"
    )
    parser.add_argument("--rounds", type=int, help="how many rounds")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*SECTIONS, *SERVERS],
        default=[],
        metavar="PART",
        help=f"some sections ({', '.join(SECTIONS)}), some databases ({', '.join(SERVERS)}), "
        "or some of each",
    )
    parser.add_argument("--tasks", nargs="+", type=int, metavar="N", help="so many tasks at a time")
    parser.add_argument(
        "--contenders", nargs="+", default=[""], metavar="WORD", help="those whose names have one"
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), metavar="FOLDER")
    parser.add_argument("--read", type=Path, metavar="JSON", help="show an earlier run's figures")
    parser.add_argument("--write-docs", action="store_true", help="put the figures into docs/")
    return parser.parse_args()


async def _measure(options: argparse.Namespace, console: Console) -> Results:
    scale = SMOKE if options.smoke else Scale()
    chosen = {
        "rounds": options.rounds,
        "update_rounds": options.rounds,
        "scaling_rounds": options.rounds,
        "tasks": options.tasks,
    }
    scale = replace(scale, **{name: value for name, value in chosen.items() if value})
    sections = [name for name in SECTIONS if name in options.only] or [
        name for name in SECTIONS if name not in ALONE
    ]
    databases = [name for name in SERVERS if name in options.only]
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    taking_part = [
        each
        for each in contenders()
        if any(word in each.name for word in options.contenders)
        and (not databases or each.server in databases)
    ]
    with Progress(*columns, console=console) as progress, running_servers() as servers:
        bar = progress.add_task("", total=len(sections))
        async with AsyncExitStack() as stack:
            run = Run(
                servers,
                taking_part,
                scale,
                lambda what: progress.update(bar, description=what),
                stack,
            )
            for name in sections:
                await SECTIONS[name](run)
                progress.advance(bar)
                run.results.environment = _environment(scale)
                run.results.save(options.out / "results.json")
    return run.results


def _environment(scale: Scale) -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "CPUs": str(os.cpu_count()),
        "processor": _processor(),
        "load at the end": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "rounds": str(scale.rounds),
        **{name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _write_docs(results: Results) -> None:
    if not results.cells:
        return
    page = DOCS / "performance.md"
    head, _, rest = page.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    figures = DOCS / "performance-figures.json"
    results.save(figures)
    figures.write_text(json.dumps(json.loads(figures.read_text())) + "\n")  # on one line
    texts = "\n\n".join(table.markdown() for table in tables(results))
    made = ", ".join(f"{name} {value}" for name, value in results.environment.items()) + "."
    (DOCS / "performance-tables.md").write_text(f"# All figures\n\n{made}\n\n{texts}\n")
    parts = [made]
    for file in draw_updates(results, DOCS):
        named = file.rename(DOCS / f"performance-{file.name}")
        parts.append(f"![{ALT[file.stem]}]({named.name})")
    parts.append(ratios(results).markdown())
    page.write_text(f"{head}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{tail}")


def _write_scaling(results: Results) -> None:
    if not results.scaling:
        return
    page = DOCS / "scaling.md"
    text = page.read_text()
    made = ", ".join(f"{name} {value}" for name, value in results.environment.items()) + "."
    measured = [table.markdown() for table in scaling_tables(results)]
    for part, blocks in (
        ("answers", [table.markdown() for table in scaling_answers(results)]),
        ("figures", [f"{made} PostgreSQL from the wheel.", *measured]),
    ):
        head, begin, rest = text.partition(f"<!-- {part}: written by python -m benchmarks -->\n")
        _, end, tail = rest.partition(f"<!-- end of the {part} -->\n")
        text = f"{head}{begin}\n" + "\n\n".join(blocks) + f"\n\n{end}{tail}"
    page.write_text(text)
    figures = {"environment": results.environment, "scaling": results.scaling}
    (DOCS / "scaling-figures.json").write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
