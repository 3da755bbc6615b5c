"""The pages of errors and of log messages list all that there is, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from messages import errors, logged

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"


def rows_of(page: str) -> list[tuple[str, str]]:
    """Return the first two cells of a page's tables: a kind, and how a message begins."""
    text = (REFERENCE / page).read_text()
    return re.findall(r"^\| `?(\w+)`? \| `(.+?)` \|", text, re.MULTILINE)


def test_the_page_of_errors_lists_every_error() -> None:
    listed = set(rows_of("errors.md"))
    texts = {text for _, text in listed}
    for message in errors():
        if message.kind:
            assert (message.kind, message.beginning) in listed, message
        else:
            assert message.beginning in texts, message


def test_the_page_of_errors_lists_no_other() -> None:
    found = errors()
    kinds = {(message.kind, message.beginning) for message in found}
    chosen = {message.beginning for message in found if not message.kind}
    assert not [row for row in rows_of("errors.md") if row not in kinds and row[1] not in chosen]


def test_the_page_of_log_messages_lists_them_all() -> None:
    found = {(message.kind, message.beginning) for message in logged()}
    assert set(rows_of("log-messages.md")) == found


def test_no_message_is_listed_twice() -> None:
    for page in ("errors.md", "log-messages.md"):
        rows = rows_of(page)
        assert len(rows) == len(set(rows))


def test_messages_are_found_in_the_modules() -> None:
    assert len(errors()) > 100
    assert len(logged()) > 15
    assert any(message.kind == "LockLostError" for message in errors())
    assert any("been waiting" in message.text for message in logged())  # by partial()
