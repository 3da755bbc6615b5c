"""The types: what type checkers say of right and of wrong calls to the package as it is built."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RIGHT = ROOT / "tests" / "typing" / "right.py"
WRONG = ROOT / "tests" / "typing" / "wrong.py"

Findings = dict[str, dict[int, set[str]]]
"""By file and by line, the names of the errors."""


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a folder, which is on its path."""
    # Where pyright verifies types it looks for packages by the "python" of the PATH alone.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, *command],
        check=False,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package as built, and nothing else of this repository."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "hybrid_storage").symlink_to(ROOT / "hybrid_storage")
    done = run("setup.py", "-q", "build", "--build-lib", str(built), folder=source)
    assert done.returncode == 0, done.stderr
    (built / "pyrightconfig.json").write_text('{"include": ["*.py"], "typeCheckingMode": "strict"}')
    for file in (RIGHT, WRONG):
        (built / file.name).write_bytes(file.read_bytes())
    return built


@pytest.fixture(scope="module")
def found_by_mypy(built: Path, pytestconfig: pytest.Config) -> Findings:
    """Return what mypy finds in its strict mode."""
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("mypy")
    files = [RIGHT.name, WRONG.name]
    options = ["--strict", "--config-file=", f"--cache-dir={cache}", "--hide-error-context"]
    done = run("-m", "mypy", *options, *files, folder=built)
    assert done.returncode == 1, done.stdout + done.stderr
    found: Findings = {file: {} for file in files}
    errors = re.findall(r"^(\w+\.py):(\d+): error: .*\[(.+)\]$", done.stdout, re.MULTILINE)
    for file, line, code in errors:
        found[file].setdefault(int(line), set()).add(code)
    return found


@pytest.fixture(scope="module")
def found_by_pyright(built: Path) -> Findings:
    """Return what pyright finds."""
    done = run("-m", "pyright", "--outputjson", "--pythonpath", sys.executable, folder=built)
    found: Findings = {RIGHT.name: {}, WRONG.name: {}}
    for each in json.loads(done.stdout)["generalDiagnostics"]:
        assert each["severity"] == "error"
        line = each["range"]["start"]["line"] + 1
        found[Path(each["file"]).name].setdefault(line, set()).add(each.get("rule", ""))
    return found


def marked() -> dict[int, set[str]]:
    """Return the marks in the file of wrong calls, by line."""
    marks = re.compile(r"  # E: (.+)$")
    found = {
        number: marks.search(line)
        for number, line in enumerate(WRONG.read_text().splitlines(), start=1)
    }
    return {number: set(match[1].split(", ")) for number, match in found.items() if match}


def test_mypy_finds_no_error_in_right_calls(found_by_mypy: Findings) -> None:
    assert found_by_mypy[RIGHT.name] == {}


def test_pyright_finds_no_error_in_right_calls(found_by_pyright: Findings) -> None:
    assert found_by_pyright[RIGHT.name] == {}


def test_mypy_finds_each_wrong_call(found_by_mypy: Findings) -> None:
    assert found_by_mypy[WRONG.name] == marked()


def test_pyright_finds_each_wrong_call(found_by_pyright: Findings) -> None:
    assert set(found_by_pyright[WRONG.name]) == set(marked())


def test_the_package_says_that_it_is_typed(built: Path) -> None:
    assert (built / "hybrid_storage" / "py.typed").read_text() == ""


def test_every_public_name_has_a_type(built: Path) -> None:
    options = ["--verifytypes", "hybrid_storage", "--ignoreexternal", "--outputjson"]
    done = run("-m", "pyright", *options, folder=built)
    report: dict[str, Any] = json.loads(done.stdout)["typeCompleteness"]
    why = {
        symbol["name"]: [each["message"] for each in symbol["diagnostics"]]
        for symbol in report["symbols"]
        if symbol["diagnostics"]
    }
    assert report["completenessScore"] == 1, why
    assert report["exportedSymbolCounts"]["withKnownType"] > 0
