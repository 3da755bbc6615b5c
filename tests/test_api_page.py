"""The page of the API, and ``help()``, show what is public."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import hybrid_storage
from hybrid_storage import SQLAlchemyEventIsolation, SQLAlchemyStorage, migration, testing

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "api.md").read_text()
NAMED = set(re.findall(r"^\.\. auto\w+:: hybrid_storage\.([\w.]+)", PAGE, re.MULTILINE))


def public(thing: type) -> list[str]:
    """Return the names of a class's public methods, inherited ones included."""
    return [
        name
        for name, value in inspect.getmembers(thing)
        if not name.startswith("_") and callable(value)
    ]


def test_every_public_name_is_on_the_page() -> None:
    assert {name for name in hybrid_storage.__all__ if name != "__version__"} <= NAMED
    assert {f"migration.{name}" for name in migration.__all__} <= NAMED
    assert {"testing.memory_storage", "testing.fsm_storage"} <= NAMED
    assert testing.memory_storage.__doc__


@pytest.mark.parametrize("name", public(SQLAlchemyStorage))
def test_every_method_of_the_storage_is_on_the_page(name: str) -> None:
    assert f"SQLAlchemyStorage.{name}" in NAMED


def test_every_method_of_the_isolation_is_on_the_page() -> None:
    members = re.search(r"SQLAlchemyEventIsolation\(\)\n.*\n\s+:members: (.*)", PAGE)
    assert members
    assert sorted(members[1].split(", ")) == public(SQLAlchemyEventIsolation)


def test_help_names_the_public_modules_and_where_to_begin() -> None:
    doc = hybrid_storage.__doc__ or ""
    for name in ("SQLAlchemyStorage", "hybrid_storage.migration", "hybrid_storage.testing"):
        assert name in doc


@pytest.mark.parametrize("name", sorted({*hybrid_storage.__all__} - {"__version__"}))
def test_every_public_name_has_a_docstring(name: str) -> None:
    thing = getattr(hybrid_storage, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing) and name != "ConversationColumns":
        for method in public(thing):
            value = getattr(thing, method)
            if getattr(value, "__module__", "").startswith("hybrid_storage"):
                assert inspect.getdoc(value), f"{name}.{method}"
