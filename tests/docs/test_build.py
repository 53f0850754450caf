"""The documentation builds without a warning, and what it links to is there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.conftest import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.timeout(180)]

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/**/*.md")]


def test_all_pages_build_with_warnings_as_errors(
    tmp_path: Path, need: Callable[[str, str | None], None]
) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, ROOT / "docs", tmp_path / "html", "-d", tmp_path / "doctrees"],
        capture_output=True,
        text=True,
    )
    need("docs", "no Sphinx" if "No module named sphinx" in done.stderr else None)

    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "html").glob("*.html"))) > 10
    # It is read where there is no internet, too.
    for page in (tmp_path / "html").glob("**/*.html"):
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://", page.read_text()), page


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_page_links_to_or_names_is_there(document: Path) -> None:
    text = document.read_text()
    links = [
        target.partition("#")[0]
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not re.match(r"[a-z]+:", target)
    ]
    missing = [link for link in links if link and not (document.parent / link).exists()]
    named = re.findall(r"(?<![\w/.~-])((?:docs|tests|scripts|plugins|hooks|outlast|ci|lib)/[\w./-]*\w)", text)
    missing += [name for name in named if not list(ROOT.glob(name + "*"))]
    assert missing == []
