"""What docs/guides/connection-strings.md prints, for the tests that try it on real servers."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from backends import Backend
from sqlalchemy import URL, make_url

PAGE = (Path(__file__).parents[1] / "docs" / "guides" / "connection-strings.md").read_text()
_NAMES = {"pysqlite": "sqlite3", "pymysql": "PyMySQL"}


def _row(driver: str, heading: str) -> list[str]:
    """Return a driver's cells of the table below a heading."""
    name = _NAMES.get(driver, driver)
    _, section = PAGE.split(f"\n## {heading}", 1)
    lines = [
        line for line in section.splitlines() if re.match(rf"\| [^|]*\b{name}\b[^|]* \|", line)
    ]
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def url(driver: str) -> URL:
    """Return the URL of several hosts that is printed for a driver."""
    return make_url(_row(driver, "List the hosts")[1].strip("`"))


TIME_OUTS = ["connecting", "a silent network", "a statement", "a lock", "idle in a transaction"]
assert f"| driver | {' | '.join(TIME_OUTS)} |" in PAGE


def time_out(backend: Backend, what: str) -> str:
    """Return what is printed to set a time-out, without the marks around; empty if it has none."""
    return _row(backend.driver, "Timeouts")[1 + TIME_OUTS.index(what)].strip("`")


def connect_args(backend: Backend, *what: str) -> dict[str, Any]:
    """Return time-outs that belong into ``connect_args``."""
    entries = ", ".join(time_out(backend, each) for each in what)
    settings: dict[str, Any] = ast.literal_eval(f"{{{entries}}}")
    return settings


def dictionary(beginning: str) -> dict[str, Any]:
    """Return a dictionary that is printed, by how it begins."""
    found = re.search(rf"`(\{{{re.escape(beginning)}.*?\}})`", PAGE)
    assert found is not None, beginning
    settings: dict[str, Any] = ast.literal_eval(found[1])
    return settings


def block(how: str) -> str:
    """Return the block of code that follows a line such as ``<!-- run: asyncpg -->``."""
    found = re.search(rf"<!-- {how} -->\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None, how
    return found[1]
