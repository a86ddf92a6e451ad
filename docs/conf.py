"""Sphinx: MyST pages, the book theme, API pages from docstrings. `make docs` builds the site."""

import re
from pathlib import Path
from typing import Any

from oapl_jax import __version__

project, author, release = "oapl_jax", "the authors of oapl_jax", __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
templates_path = ["_templates"]
autosummary_generate = True
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "member-order": "bysource"}
html_theme = "sphinx_book_theme"
html_title = "oapl_jax"
suppress_warnings = ["ref.python"]  # `id` is a field of several classes
SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:")

PAGES = {path.stem for path in Path(__file__).parent.glob("*.md")}


def link_pages(app: Any, name: str, source: list[str]) -> None:
    """Makes a link of each page that the text names, so that Sphinx checks it; titles of tables."""
    if name.startswith("experiments/"):
        source[0] = f"# {name.removeprefix('experiments/')}\n\n{source[0]}"
    link = lambda match: f"[{match[1]}]({match[1]}.md)" if match[1] in PAGES else match[0]
    blocks = re.split(
        r"(^```.*?^```$|^    .*?$|`[^`\n]*`|\[[^\]]*\]\([^)]*\))", source[0], flags=re.M | re.S
    )
    source[0] = "".join(
        block if index % 2 else re.sub(r"(?<![\w/.])docs/([\w-]+)\.md", link, block)
        for index, block in enumerate(blocks)
    )


def plain_text(
    _app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Makes reStructuredText of a docstring in plain text.

    Signs of mark-up are escaped, and indented lines outside of the sections become literal blocks.
    """
    made: list[str] = []
    kept = literal = False
    for line in lines:
        if line.strip() and not line.startswith(" "):
            if literal:
                made.append("")
            kept, literal = line in SECTIONS or line.startswith("- "), False
        elif line.strip() and not kept and not literal:
            made += ["", "::", ""]
            literal = True
        made.append(line if literal else re.sub(r"([*|\\]|``)", r"\\\1", line))
    lines[:] = made


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", link_pages)
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
