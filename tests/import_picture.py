"""Draws which layers of the package import which, and lists what each module is for.

``python tests/import_picture.py`` writes ``docs/development/imports.svg``, and the table of modules
in ``docs/development/architecture.md``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path
from textwrap import wrap

from test_public_doors import ORDER, PACKAGE

FOLDER = Path(__file__).parent.parent / "docs" / "development"
PICTURE, PAGE = FOLDER / "imports.svg", FOLDER / "architecture.md"
BEGIN = "<!-- modules: written by tests/import_picture.py -->\n"
END = "<!-- end of the modules -->\n"
LAYERS: dict[str, list[str]] = {
    "command": ["cli", "__main__", "_cli_"],
    "testing, migration": ["testing", "migration", "_sources", "_table_sources", "_moves"],
    "storage": ["storage", "idle", "steering", "updates", "tables"],
    "isolation and middlewares": ["isolation", "middlewares", "_sync_lock", "_fallback"],
    "transactions and units of work": ["transactions", "unit_of_work", "_unit", "_blocks"],
    "leases and queues": ["_leases", "_queues"],
    "operations": ["operations", "conversations", "finding", "_steps"],
    "model and text": ["model", "columns", "keys", "_default_keys", "_codec", "_arguments"],
    "_engine": ["_engine."],
    "_sql": ["_sql."],
}
"""From the top down: the layers, and how the names of their modules begin or are."""
WIDTH, HEIGHT, GAP, LEFT = 690, 58, 20, 8
AT_A_LINE = 110  # characters


def layer_of(module: str) -> str:
    """Return the layer of a module."""
    for layer, names in LAYERS.items():
        for name in names:
            if module == name or (name.endswith((".", "_cli_")) and module.startswith(name)):
                return layer
    raise LookupError(f"{module} belongs to no layer: add it to LAYERS")


def imports() -> Iterator[tuple[str, str]]:
    """Yield who imports whom in the package."""
    for name in ORDER:
        package = name.split(".")[:-1]
        path = (PACKAGE / name.replace(".", "/")).with_suffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - (node.level - 1)]
                yield name, ".".join([*base, node.module or ""])


def edges() -> set[tuple[int, int]]:
    """Return the layers that import one another, by number."""
    numbers = {layer: number for number, layer in enumerate(LAYERS)}
    found = {(numbers[layer_of(one)], numbers[layer_of(other)]) for one, other in imports()}
    return {(one, other) for one, other in found if one != other}


def needed(of: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """Return the edges that do not follow from others: a longer way leads there as well."""
    beyond: set[tuple[int, int]] = set()
    ways = set(of)
    while longer := {(one, end) for one, by in ways for at, end in of if at == by} - beyond:
        beyond |= longer
        ways = longer
    return of - beyond


def picture() -> str:
    """Return the picture as SVG. An arrow that follows from others is left out."""
    drawn = sorted(needed(edges()), key=lambda edge: (edge[1] - edge[0], edge))
    rows = len(LAYERS)
    width = WIDTH + LEFT + 16 + 15 * sum(other - one > 1 for one, other in drawn)
    height = rows * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" font-family="sans-serif">',
        "<title>Which layers of hybrid_storage import which</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#666"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, layer in enumerate(LAYERS):
        parts += _box(number, layer, [name for name in ORDER if layer_of(name) == layer])
    lane = WIDTH + LEFT + 12
    for one, other in drawn:
        parts.append(_arrow(one, other, lane))
        lane += 15 * (other - one > 1)
    return "\n".join([*parts, "</svg>", ""])


def _box(number: int, layer: str, modules: list[str]) -> list[str]:
    top = number * (HEIGHT + GAP) + GAP // 2
    lines = wrap(", ".join(name.rpartition(".")[2] for name in modules), AT_A_LINE)
    return [
        f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="#eef3f8" '
        'stroke="#467"/>',
        f'<text x="{LEFT + 10}" y="{top + 19}" font-size="15" font-weight="bold" fill="#123">'
        f"{escape(layer)}</text>",
        *(
            f'<text x="{LEFT + 10}" y="{top + 36 + 14 * n}" font-size="11.5" fill="#345">'
            f"{escape(line)}</text>"
            for n, line in enumerate(lines)
        ),
    ]


def _arrow(one: int, other: int, lane: int) -> str:
    pitch = HEIGHT + GAP
    if other - one == 1:
        top = one * pitch + GAP // 2 + HEIGHT
        path = f"M{LEFT + WIDTH // 2} {top}v{GAP}"
    else:
        begin, end = (one * pitch + GAP // 2 + HEIGHT - 8), (other * pitch + GAP // 2 + 12)
        path = f"M{LEFT + WIDTH} {begin}H{lane}V{end}H{LEFT + WIDTH}"
    return f'<path d="{path}" fill="none" stroke="#666" marker-end="url(#head)"/>'


def modules() -> str:
    """Return the table of the modules, by layer, each with the first line of its docstring."""
    lines = ["| layer | module | its first line |", "| --- | --- | --- |"]
    for layer in LAYERS:
        heading = layer
        for name in (name for name in ORDER if layer_of(name) == layer):
            path = (PACKAGE / name.replace(".", "/")).with_suffix(".py")
            text = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
            lines.append(f"| {heading} | `{name}` | {text.replace('``', '`')} |")
            heading = ""
    return "\n".join([*lines, ""])


def page(text: str) -> str:
    """Return a page with its table of modules replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{modules()}\n{END}{after}"


if __name__ == "__main__":
    PICTURE.write_text(picture())
    PAGE.write_text(page(PAGE.read_text()))
