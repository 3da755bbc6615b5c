"""What the command prints: tables for people, JSON for machines, and never a password."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO
from urllib.parse import quote, quote_plus

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sqlalchemy import URL

_SHORT = 4  # characters of a password


class Secrets:
    """The passwords of URLs, taken out of whatever is printed."""

    def __init__(self, *urls: URL) -> None:
        """Remember the passwords in all spellings that an error may quote."""
        words: set[str] = set()
        for url in urls:
            words |= {url.password or "", url.render_as_string(hide_password=False)}
            for name, value in url.query.items():
                if "pass" in name or "pwd" in name or "secret" in name:
                    words |= {value} if isinstance(value, str) else set(value)
        words |= {spelled(word) for word in words for spelled in (quote, quote_plus, ascii)}
        words -= {"", "''"}
        # A short one is part of many words: to hide it there would tell what it is.
        patterns = [
            re.escape(word) if len(word) >= _SHORT else rf"(?<!\w){re.escape(word)}(?!\w)"
            for word in sorted(words, key=len, reverse=True)
        ]
        self._pattern = re.compile("|".join(patterns) or r"(?!)")

    def hide(self, text: str) -> str:
        """Return a text with ``***`` in place of each password."""
        return self._pattern.sub("***", text)


class Output:
    """Prints results to stdout, and all else to stderr."""

    def __init__(self, as_json: bool) -> None:
        """Choose the form: JSON, tables on a terminal, or plain lines."""
        self.as_json = as_json
        self.is_rich = is_terminal(sys.stdout) and not as_json

    def result(self, document: dict[str, Any], text: str) -> None:
        """Print one JSON document, or what it says."""
        click.echo(json.dumps(document) if self.as_json else text)

    def rows(self, names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a table, as lines with tabs where stdout is not a terminal."""
        texts = [[printable(cell) for cell in row] for row in rows]
        if not self.is_rich:
            for cells in texts:
                click.echo("\t".join(cells))
            return
        table = Table(*names, show_header=any(names))
        for cells in texts:
            table.add_row(*(Text(cell) for cell in cells))
        Console().print(table)

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show a bar on a terminal. Gives the function to call with the number done so far."""
        if not self.is_rich or not is_terminal(sys.stderr):
            yield lambda done: None
            return
        columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)


def is_terminal(stream: TextIO) -> bool:
    """Tell whether somebody sits in front of a stream."""
    return stream.isatty()


def printable(value: object) -> str:
    """Return a value as one line that no terminal takes for a command."""
    if value is None:
        return "-"
    text = value if isinstance(value, str) else str(value)
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
