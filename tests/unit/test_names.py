"""Names of strangers: shown on one line, without control characters; no name leads out of its folder."""

from pathlib import Path

import pytest

from utils.checkpoints.atomic import write_text
from utils.names import folder_name, visible


def test_what_is_printable_stays_and_the_rest_is_an_escape() -> None:
    assert visible("Prüfung 1.png") == "Prüfung 1.png"
    assert visible("a\x1b[2J\r\n\t\udcff\u202e\x9b") == r"a\x1b[2J\r\n\t\udcff\u202e\x9b"
    assert visible("a\n\x1bb", keep="\n") == "a\n\\x1bb"


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "..", ".", "", "a/b", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^--flag: .* is no name of a folder"):
        folder_name(name, "--flag")


@pytest.mark.parametrize("name", ["a", "...", ".a", "=cmd|x", "a b", "ü\udcff"])
def test_an_odd_name_of_one_folder_stays(name: str) -> None:
    assert folder_name(name, "--flag") == name


def test_a_table_holds_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "sweep.md", "| w\udcfc |")
    assert (tmp_path / "sweep.md").read_text(encoding="utf-8") == "| w\\udcfc |"
