"""README and docs name only files, keys and recipes that are there."""

import re
from pathlib import Path

import pytest

from detection.defaults import detection_schema
from docs import key_page
from models import framework_options
from segmentation.defaults import segmentation_schema
from utils.config.schema import declare

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What other repositories call theirs stands in the first column of these pages.
FOREIGN = {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs/migrate").glob("*.md")}
FOREIGN.add("docs/sit.md")


def text_of(page: Path) -> str:
    text = page.read_text()
    if page.relative_to(ROOT).as_posix() in FOREIGN:
        rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
        return "\n".join(row[-2] for row in rows)
    return text


def test_the_page_of_keys_is_up_to_date() -> None:
    assert key_page.PAGE.read_text() == key_page.render(), "run `make docs`"


def known_keys() -> set[str]:
    keys = set(declare(framework_options()))
    return keys | set(detection_schema()) | set(segmentation_schema())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_keys_are_declared(page: Path) -> None:
    keys = known_keys()
    sections = {key[:end] for key in keys for end, char in enumerate(key) if char == "."}
    named = set(re.findall(r"\b(?:[A-Z][A-Z0-9_]+\.)+[A-Z][A-Z0-9_]+\b", text_of(page)))
    files = {name for name in named if name.endswith((".MD", ".PT"))}
    assert sorted(named - files - keys - sections) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_recipes_are_there(page: Path) -> None:
    text = page.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    paths = [page.parent / link for link in links if link and "://" not in link]
    paths += [
        ROOT / name
        for name in re.findall(r"\bconfigs/[\w/]+\.yaml\b", text_of(page))
        if not re.search(rf"(detection|segmentation)/{name}", text)
    ]
    assert [str(path) for path in paths if not path.exists()] == []
