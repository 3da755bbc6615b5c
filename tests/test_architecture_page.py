"""The page of the architecture shows the package as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from import_picture import PAGE, PICTURE, edges, layer_of, needed, page, picture
from test_public_doors import MODULES, ORDER, name_of

ROOT = Path(__file__).parent.parent
AGAIN = "run python tests/import_picture.py"


def test_the_picture_of_imports_is_that_of_the_code() -> None:
    assert PICTURE.read_text() == picture(), AGAIN


def test_the_table_of_modules_says_their_first_lines() -> None:
    assert PAGE.read_text() == page(PAGE.read_text()), AGAIN


def test_each_module_belongs_to_a_layer() -> None:
    assert {name_of(path) for path in MODULES if path.stem != "__init__"} == set(ORDER)
    assert all(layer_of(name) for name in ORDER)
    with pytest.raises(LookupError, match="belongs to no layer"):
        layer_of("unheard_of")


def test_layers_import_only_what_is_below() -> None:
    assert all(one < other for one, other in edges())


def test_an_arrow_that_follows_from_others_is_left_out() -> None:
    assert needed({(0, 1), (1, 2), (0, 2), (2, 3), (0, 3)}) == {(0, 1), (1, 2), (2, 3)}


def test_modules_and_tests_that_the_page_names_are_there() -> None:
    text = PAGE.read_text()
    for path in re.findall(r"`(tests/\w+\.py)`", text):
        assert (ROOT / path).exists(), path
    table = text[text.index("## Where to change what") :]
    for name in re.findall(r"`(_\w+\.\w+|_steps|finding|steering|model|columns)`", table):
        assert name in ORDER, name
