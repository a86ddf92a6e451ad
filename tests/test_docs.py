"""The documentation: generated pages are current, and every page is in the site."""

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def generate():
    return runpy.run_path(str(DOCS / "generate.py"))


def test_the_reference_of_settings_is_current(generate):
    assert (DOCS / "config.md").read_text() == generate["config_reference"](), "docs/generate.py"


def test_the_reference_has_every_setting_of_the_default(generate):
    rows = set(re.findall(r"^\| `([\w.]+)` \|", generate["config_reference"](), re.M))
    values = generate["flatten"](generate["arithmetic"].get_config().to_dict())
    free = ("data.generator", "model.architecture", "curriculum.curator.architecture")
    free += tuple(
        f"preferences.language_model.{name}" for name in ("chat", "questions", "verdicts")
    )
    free += ("preferences.rubric.objectives",)
    for name in values:
        assert name in rows or any(f"{name}.".startswith(f"{other}.") for other in free), name


def test_the_picture_of_lag_is_drawn(generate, tmp_path):
    generate["draw_lag"](tmp_path / "lag.png")
    assert (tmp_path / "lag.png").read_bytes().startswith(b"\x89PNG")
    assert (DOCS / "lag.png").exists()


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^([\w-]+)$", (DOCS / "index.md").read_text(), re.M))
    assert {path.stem for path in DOCS.glob("*.md")} == listed | {"index"}


@pytest.mark.parametrize(
    "page", [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")], ids=lambda p: p.name
)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    root = DOCS.parent
    for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", text):
        assert (page.parent / target).exists(), target
    for named in re.findall(
        r"(?<![\w/.{-])((?:docs|experiments|tests)/[\w/-]+\.(?:md|py|png|json)\b)", text
    ):
        assert "NAME" in named or (root / named).exists(), named
