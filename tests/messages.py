"""What the package's modules raise and log, read from their syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hybrid_storage

PACKAGE = Path(hybrid_storage.__file__).parent
ERRORS = ("Error", "BadParameter", "Unfit")
"""How the names of classes end that are errors."""
LEVELS = {"debug": "DEBUG", "info": "INFO", "warning": "WARNING", "exception": "ERROR"}
_BEGINNING = re.compile(
    r".{10,76}?(?=: |(?<!\.)\. | \(|, (?!not|a str|or |such|0 or)|$)|.{10,76}(?= )"
)
DETAIL = "detail"
"""The kind of a text that is added to an error of SQLAlchemy's."""


class Message(NamedTuple):
    """A message of the package's own."""

    module: str
    kind: str
    """The error's class, or the level; empty for a class that is chosen when it is raised."""
    text: str
    """With ``…`` for what is filled in."""

    @property
    def beginning(self) -> str:
        """The words up to the remedy, for which a page has its own."""
        text = self.text.partition("`")[0].rstrip()
        found = _BEGINNING.match(text)
        return found[0] if found else text


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Yield the modules of the package, by name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name, ast.parse(path.read_text())


def errors() -> list[Message]:
    """Return all messages of errors that the package makes."""
    return [
        Message(name, kind, text)
        for name, tree in trees()
        for kind, argument in _made(tree)
        for text in _texts(argument)
        if text.strip("… ") and kind != "AssertionError"
    ]


def logged() -> list[Message]:
    """Return all messages that the package logs."""
    return [
        Message(name, LEVELS[level], text)
        for name, tree in trees()
        for level, argument in _logged(tree)
        for text in _texts(argument)
    ]


def _made(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            if node.exc.args and name.isidentifier() and name.islower() and name[0] != "_":
                yield "", node.exc.args[0]
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).rpartition(".")[2]
            if name == "add_detail":
                yield DETAIL, node.args[0]
            elif name == "warn" and "Warning" in ast.unparse(node.args[1]):
                yield ast.unparse(node.args[1]), node.args[0]
            elif name.endswith(ERRORS) and name[0] != "_":
                yield name, node.args[0]


def _logged(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function, arguments = node.func, node.args
        if ast.unparse(function) == "partial":  # to be called later
            function, *arguments = arguments
        if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "logger":
            yield function.attr, arguments[0]


def _constants() -> dict[str, ast.expr]:
    return {
        target.id: node.value
        for _, tree in trees()
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _texts(node: ast.expr) -> list[str]:
    """Return the texts that an expression may give."""
    constant = CONSTANTS.get(node.id) if isinstance(node, ast.Name) else None
    if constant is not None:
        return _texts(constant)
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [_filled_in(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(text for value in node.values for text in _texts(value))]
    if isinstance(node, ast.FormattedValue):
        return _texts(node.value) if isinstance(node.value, ast.Name) else ["…"]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".format"):
        assert isinstance(node.func, ast.Attribute)
        return _texts(node.func.value)
    return ["…"]


def _filled_in(text: str) -> str:
    for old in ("%r", "%s", "%d", "%.0f", "%g", "{0:g}", "{1!r}", "{:g}", "{!r}", "{}"):
        text = text.replace(old, "…")
    return text


CONSTANTS = _constants()
