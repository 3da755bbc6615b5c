"""The package uses what other packages make public, and its own imports run one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hybrid_storage

PACKAGE = Path(hybrid_storage.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
ALLOWED: set[tuple[str, str]] = set()
"""Exceptions, as module and name. None."""

# From the ground up: a module imports only from what stands before it.
ORDER = [
    "_sql.results",
    "_sql.driver",
    "_sql.changes",
    "_sql.limits",
    "_sql.clock",
    "_sql.lookups",
    "_sql.upsert",
    "_sql.rows",
    "_sql.absent",
    "_sql.taking",
    "_sql.leases",
    "_sql.at_once",
    "_sql.units",
    "_sql.conversations",
    "_sql.tables",
    "_engine.codes",
    "_engine.errors",
    "_engine.retries",
    "_engine.cancellation",
    "_engine.threads",
    "_engine.factories",
    "_engine.slots",
    "_engine.calls",
    "_engine.poolers",
    "_engine.runner",
    "_engine.savepoints",
    "_engine.joined",
    "_engine.scopes",
    "_engine.transaction",
    "_engine.access",
    "_arguments",
    "_codec",
    "keys",
    "columns",
    "_default_keys",
    "model",
    "operations",
    "finding",
    "_steps",
    "conversations",
    "_leases",
    "_queues",
    "_sync_lock",
    "_blocks",
    "_unit",
    "unit_of_work",
    "transactions",
    "_fallback",
    "middlewares",
    "isolation",
    "tables",
    "updates",
    "steering",
    "idle",
    "storage",
    "_sources",
    "_table_sources",
    "_moves",
    "migration",
    "testing",
    "_cli_output",
    "_cli_storage",
    "_cli_command",
    "_cli_tables",
    "_cli_migrate",
    "cli",
    "__main__",
]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def own_names(tree: ast.AST) -> set[str]:
    """Return the private names that a module defines or sets on ``self``."""
    names = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def private_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Yield the private names that a module takes from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (part for part in parts if is_private(part))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from (part for part in alias.name.split(".") if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, (ast.Name, ast.Attribute))
            and (node.func.id if isinstance(node.func, ast.Name) else node.func.attr)
            in {"getattr", "hasattr", "setattr", "delattr", "attrgetter", "methodcaller"}
        ):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield from (part for part in argument.value.split(".") if is_private(part))


@cache
def everything_owned() -> set[str]:
    return set().union(*(own_names(ast.parse(path.read_text())) for path in MODULES))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_private_name_of_another_package_is_used(path: Path) -> None:
    found = set(private_names(ast.parse(path.read_text()), everything_owned()))
    assert {(name_of(path), name) for name in found} <= ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "from asyncio.tasks import _enter_task",
        "from sqlalchemy.pool import base; base._x",
        "pool._max_overflow",
        "getattr(task, '_fut_waiter')",
        "import anyio._backends",
        "operator.attrgetter('dispatch._listen')",
    ],
)
def test_a_private_name_would_be_found(code: str) -> None:
    assert list(private_names(ast.parse(code), everything_owned()))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_listens_to_what_the_application_owns(path: Path) -> None:
    listening = [
        ast.unparse(node.args[0])
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"event.listen", "listen"}
    ]
    # On a connection that a transaction of the storage's has opened, to refuse what would block.
    assert listening == (["connection"] if name_of(path) == "_engine.joined" else [])
    assert "listens_for" not in path.read_text()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    name = name_of(path)
    if name.endswith("__init__"):
        return
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            imported = ".".join([*base, node.module or ""])
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"
            assert not (imported.startswith("_sql") and name.startswith("_engine"))
            assert not (imported.startswith("_engine") and name.startswith("_sql"))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_read_in_one_sitting_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text))
