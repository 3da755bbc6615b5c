"""The commands of the page on the command line print what the page says."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from hybrid_storage import _cli_output
from hybrid_storage.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "command.md"
BLOCK = re.compile(r"(?<=<!-- run -->\n```console\n)(.*?)(?=```)", re.DOTALL)
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
THEN = "2026-11-27T12:00:00+00:00"


def printed(block: str) -> Iterator[str]:
    """Run the commands of a block, and yield them with what they print."""
    code = 0
    for line in block.splitlines():
        if not line.startswith("$ "):
            continue
        yield f"{line}\n"
        program, *arguments = shlex.split(line[2:])
        if program == "echo":
            yield f"{code}\n"
        else:
            assert program == "hybrid-storage"
            result = CliRunner().invoke(app, arguments)
            code = result.exit_code
            yield TIME.sub(THEN, result.output)


@pytest.fixture
def page_as_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the page with what its commands print on a terminal."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bot.db").touch()  # a database without tables
    monkeypatch.setenv("HYBRID_STORAGE_URL", "sqlite:///bot.db")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(_cli_output, "is_terminal", lambda stream: stream is sys.stdout)
    return BLOCK.sub(lambda block: "".join(printed(block[0])), PAGE.read_text())


def test_the_commands_of_the_page_print_what_it_says(page_as_run: str) -> None:
    assert len(BLOCK.findall(page_as_run)) == PAGE.read_text().count("```console") > 0
    assert page_as_run == PAGE.read_text()


@pytest.mark.parametrize("name", [name for name in app.commands if name != "tables"])
def test_the_page_tells_of_each_command(name: str) -> None:
    assert re.search(rf"[`$ ]{name}\b", PAGE.read_text())
