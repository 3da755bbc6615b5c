"""What the workflow, the compatibility page and setup.cfg say of versions agrees."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

import pytest
from backends import SERVERS
from test_other_drivers import DRIVERS

ROOT = Path(__file__).parent.parent
WORKFLOW = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
COMPATIBILITY = (ROOT / "docs" / "reference" / "compatibility.md").read_text()
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PYTHONS = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
FLOORS = dict(re.findall(r"(\w+) >= ([\d.]+)", SETUP["options"]["install_requires"]))
OLDEST = dict(re.findall(r"(\w+) == ([\d.]+)", (ROOT / "tests" / "oldest.txt").read_text()))


def listed(name: str) -> list[str]:
    """Return a list of the workflow's."""
    found = re.search(rf"^ +{name}: \[(.*)\]$", WORKFLOW, re.MULTILINE)
    assert found
    return re.findall(r'"(.+?)"', found[1])


def cell(name: str) -> str:
    """Return the second cell of a line of the compatibility page."""
    found = re.search(rf"^\| {name} \| (.*?) \|", COMPATIBILITY, re.MULTILINE)
    assert found, name
    return found[1]


def test_the_workflow_runs_every_python_that_the_package_claims() -> None:
    assert listed("python") == PYTHONS
    assert f">={PYTHONS[0]}" == SETUP["options"]["python_requires"]


def test_the_page_names_every_python_that_the_package_claims() -> None:
    assert cell("Python").split(", ") == PYTHONS


@pytest.mark.parametrize("name", ["aiogram", "anyio", "SQLAlchemy", "tenacity"])
def test_the_page_names_the_oldest_release(name: str) -> None:
    assert cell(name).startswith(f"{FLOORS[name]} ")
    assert f"{name} {OLDEST[name]}" in COMPATIBILITY
    assert OLDEST[name].removesuffix(".0") == FLOORS[name]


def test_the_page_names_the_servers_of_the_workflow() -> None:
    assert cell("PostgreSQL").split(", ") == listed("postgresql")
    servers = [f"mariadb:{version}" for version in cell("MariaDB").split(", ")]
    servers += [f"mysql:{version}" for version in cell("MySQL").split(", ")]
    assert servers == listed("server")


def test_the_page_names_every_driver_that_tests_run_on() -> None:
    names = COMPATIBILITY.lower()
    for backend in [*SERVERS, *DRIVERS]:
        assert backend.driver in names


def test_files_that_the_workflow_runs_are_there() -> None:
    assert ".ci/run" in WORKFLOW
    assert "make chaos" in WORKFLOW
    for path in re.findall(r"tests/test_\w+\.py", WORKFLOW):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_links_and_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"tests/(?:chaos/)?\w+\.py", text):
        assert (ROOT / path).exists(), path
