"""Every block of code in the documentation is run, and prints what the page says.

A Python block follows a line that says how it is run:

``<!-- run -->``
    Together with the page's other such blocks, in one namespace and an empty folder. It may await.
``<!-- run: name -->``
    In a namespace of that name, which begins empty. A page's own test may give names a meaning.
``<!-- from: path -->``
    It is a quotation of that file of the repository, word for word.

A block that follows ``<!-- prints -->`` is what the block before it prints.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from test_readme import close_engines, run_awaiting

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
BY_THEIR_OWN_TEST = {
    "README.md",
    "docs/coming-from/mongo-storage.md",
    "docs/coming-from/moving.md",
    "docs/guides/admin-pages.md",
    "docs/guides/alembic.md",
    "docs/guides/celery-and-cron.md",
    "docs/guides/change-conversations.md",
    "docs/guides/conversations.md",
    "docs/guides/expiry-and-reminders.md",
    "docs/guides/fastapi.md",
    "docs/guides/flask-sqlalchemy.md",
    "docs/guides/functions-that-commit.md",
    "docs/guides/production-checklist.md",
    "docs/guides/synchronous-applications.md",
    "docs/guides/testing-on-a-database.md",
    "docs/guides/testing-your-handlers.md",
    "docs/guides/transactions.md",
    "docs/guides/webhooks.md",
    "docs/reference/command.md",
    "docs/scaling.md",
    "docs/tutorial.md",
}
"""Pages whose blocks are run by a test that knows what they do."""
FENCE = re.compile(r"(?:<!-- ([^\n]+) -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HERE = [name for name in PAGES if name not in BY_THEIR_OWN_TEST]


@pytest.mark.parametrize("name", PAGES)
def test_each_python_block_says_how_it_is_run(name: str) -> None:
    for how, language, code in FENCE.findall(PAGES[name]):
        if language in ("python", "py", "pycon"):
            assert how.startswith(("run", "from: ")), f"{name}: nothing runs {code[:60]!r}"


@pytest.mark.parametrize("name", [name for name in HERE if "```python" in PAGES[name]])
async def test_the_blocks_of_a_page_run(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, dict[str, Any]] = defaultdict(lambda: {"__name__": "page"})
    printed = ""
    for how, language, code in FENCE.findall(PAGES[name]):
        if how.startswith("run") and language == "python":
            await run_awaiting(code, names[how])
            printed = capsys.readouterr().out
        elif how == "prints":
            assert printed == code
    names.clear()
    close_engines()


@pytest.mark.parametrize("name", PAGES)
def test_a_quotation_is_word_for_word(name: str) -> None:
    for how, _, code in FENCE.findall(PAGES[name]):
        if how.startswith("from: "):
            assert code in (ROOT / how.removeprefix("from: ")).read_text()


@pytest.mark.parametrize("name", PAGES)
def test_links_to_files_lead_somewhere(name: str) -> None:
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", PAGES[name]):
        assert (folder / target).exists(), target
