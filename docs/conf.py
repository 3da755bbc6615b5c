"""How Sphinx builds the documentation: ``make docs``."""

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

from hybrid_storage import __version__

project = "hybrid_storage"
author = "the hybrid_storage developers"
copyright = author
release = __version__
html_title = f"hybrid_storage {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]

autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    name: name
    for name in (
        "Action",
        "AnyScopedSession",
        "AnySession",
        "AnySync",
        "Change",
        "HasMetaData",
        "JsonDumps",
        "JsonLoads",
        "OneOrMoreStates",
        "Parse",
        "SessionFactory",
        "StateType",
    )
}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80

html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

SIGNATURES = {
    "hybrid_storage.SQLAlchemyStorage.transaction": (None, "AsyncContextManager[S]"),
    "hybrid_storage.SQLAlchemyStorage.using": (None, "AsyncContextManager[None]"),
    "hybrid_storage.SQLAlchemyStorage.run_sync": (
        "(function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs)",
        "T",
    ),
    "hybrid_storage.SQLAlchemyEventIsolation.lock": (None, "AsyncContextManager[None]"),
    "hybrid_storage.SQLAlchemyEventIsolation.lock_sync": (None, "ContextManager[None]"),
}
"""What autodoc cannot tell: decorated methods, and generic parameters."""
REPLACED = {r"TypeAliasForwardRef\('(\w+)'\)": r"\1", "RETRY_FOR": "30.0", "SLOW_AFTER": "10.0"}


def as_written(
    _app: object,
    _what: str,
    name: str,
    _object: object,
    _options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Return a signature such as the code has it."""
    own, own_returns = SIGNATURES.get(name, (None, None))
    signature, returns = own or signature, own_returns or returns
    for old, new in REPLACED.items():
        signature = signature and re.sub(old, new, signature)
        returns = returns and re.sub(old, new, returns)
    return signature, returns


def setup(app: Sphinx) -> dict[str, Any]:
    """Correct signatures, and find what is said of attributes where the classes are written."""
    app.connect("autodoc-process-signature", as_written)
    public = ModuleAnalyzer.for_module("hybrid_storage.migration")
    public.analyze()
    for name in ("_moves", "_sources"):
        written = ModuleAnalyzer.for_module(f"hybrid_storage.{name}")
        written.analyze()
        public.attr_docs.update(written.attr_docs)
        public.tagorder.update(written.tagorder)
    return {"parallel_read_safe": True}
