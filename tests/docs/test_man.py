"""The man pages are those of this command line and of this configuration, and other programs can read them."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outlast.cli import parser
from outlast.cli._completion import Verb, describe
from outlast.config import Config
from tests.docs.conftest import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.timeout(120)]

PAGES = ("man1/outlast.1", "man5/outlast.toml.5", "man8/outlast-admin.8", "man8/spank_outlast.8")
VERBS = [verb for verb in describe(parser()) if verb.words]


def plain(page: Path) -> str:
    """Return the words of *page*, as a terminal without bold shows them."""
    said = subprocess.run(
        ["mandoc", "-T", "ascii", "-O", "width=1000", page], capture_output=True, check=True, text=True
    )
    return re.sub(r".\x08", "", said.stdout)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_free_of_faults_and_warnings(pages: Path, program: Callable[[str], str], name: str) -> None:
    lint = subprocess.run(
        [program("mandoc"), "-T", "lint", "-W", "warning", pages / name], capture_output=True, text=True
    )
    assert (lint.returncode, lint.stdout) == (0, "")
    shown = subprocess.run(
        [program("man"), "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", pages / name],
        capture_output=True,
        text=True,
        env=os.environ | {"MANROFFSEQ": ""},
    )
    assert (shown.returncode, shown.stderr) == (0, "")


def test_no_page_is_missing_or_unknown(pages: Path) -> None:
    assert sorted(str(one.relative_to(pages)) for one in pages.glob("*/*")) == sorted(PAGES)
    assert list((ROOT / "lib/man").glob("*.3")), "those of section 3 belong to the library"


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb.words))
def test_every_option_of_every_verb_is_in_a_page(
    pages: Path, program: Callable[[str], str], verb: Verb
) -> None:
    program("mandoc")
    if any(other.words[:-1] == verb.words for other in VERBS):
        return  # it only groups others, which are here themselves
    text = plain(pages / PAGES[0]) + plain(pages / PAGES[2])
    (found,) = re.findall(rf"^   outlast {' '.join(verb.words)}(?: .*)?\n((?:(?!   \w|\w).*\n)*)", text, re.M)
    listed = set(re.findall(r"(?<![\w-])(--[a-z-]+)", found))
    wanted = {name for option in verb.options for name in option.names if name.startswith("--")} - {"--help"}
    assert wanted <= listed
    for argument in verb.arguments:
        assert argument.value in text


def keys(table: object = Config, where: str = "") -> Iterator[str]:
    for field in dataclasses.fields(table):  # type: ignore[arg-type]
        value = getattr(Config(), field.name) if not where else None
        if dataclasses.is_dataclass(value):
            yield from keys(type(value), f"{field.name}.")
        else:
            yield where + field.name


def test_every_key_of_the_configuration_is_in_its_page(pages: Path, program: Callable[[str], str]) -> None:
    program("mandoc")
    text = plain(pages / PAGES[1])
    listed = set(re.findall(r"^ +([A-Za-z_.]+) \(default: ", text, re.M))
    # Tables of tables have names of the site's own: store.other.NAME.url.
    listed |= {name.partition(".NAME.")[0] for name in listed}
    assert set(keys()) - listed == set()
