"""Promise: the version is the same in every file that names it."""

import re

from support import ROOT

VERSION = (ROOT / "VERSION").read_text().strip()


def test_changelog_begins_with_what_is_unreleased_and_this_version() -> None:
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[0] == "Unreleased"
    assert re.fullmatch(re.escape(VERSION) + r" \(\d{4}-\d{2}-\d{2}\)", titles[1])


def test_documents_name_files_of_this_version() -> None:
    named = re.findall(r"selfattn(?:-|==)(\d+\.\d+\.\d+)", (ROOT / "docs/install.md").read_text())
    assert named and set(named) == {VERSION}
