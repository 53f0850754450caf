"""Completion, tried in the shells themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.cli import parser
from outlast.cli._completion import describe, script
from tests.docs.conftest import ROOT
from tests.terminal import Terminal

pytestmark = [pytest.mark.docs, pytest.mark.timeout(120)]

CASES = [
    ("outlast st", {"status", "store"}),
    ("outlast store ch", {"check"}),
    ("outlast store check --r", {"--read-data"}),
    ("outlast migrate 17 --t", {"--to"}),
    ("outlast completion ", {"bash", "zsh", "fish"}),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the three scripts, and a file to complete."""
    place = tmp_path_factory.mktemp("completion")
    for shell, name in (("bash", "outlast.bash"), ("zsh", "_outlast"), ("fish", "outlast.fish")):
        (place / name).write_text(script(shell, parser()))
    (place / "unique-file.html").touch()
    return place


def bash(made: Path, line: str) -> set[str]:
    words = line.split(" ")
    program = (
        f'. "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD={len(words) - 1}; _outlast; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", program, "bash", made / "outlast.bash", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=made,
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(("line", "wanted"), CASES)
def test_bash_offers_what_fits(made: Path, line: str, wanted: set[str]) -> None:
    assert bash(made, line) == wanted


def test_bash_offers_files_where_a_file_is_wanted_and_every_verb_at_the_beginning(made: Path) -> None:
    assert bash(made, "outlast report 17 --plot uni") == {"unique-file.html"}
    assert bash(made, "outlast --config unique-file.html store pr") == {"prune"}
    assert bash(made, "outlast ") == {verb.words[0] for verb in describe(parser()) if verb.words}


def test_a_shell_in_use_completes_on_a_terminal(made: Path) -> None:
    shown = Terminal("bash", "--norc", "--noprofile", "-i", PS1="> ")
    shown.until("> ")
    shown.type_(f". {made}/outlast.bash; echo re''ady\n")
    shown.until("ready")
    shown.type_("outlast store ch\t")
    shown.until("outlast store check")
    shown.type_("\x15exit\n")
    shown.end()


def test_zsh_completes_on_a_terminal(made: Path, program: Callable[[str], str]) -> None:
    shown = Terminal(program("zsh"), "-f", "-i", PS1="> ", TERM="dumb")
    shown.until("> ")
    shown.type_(f"fpath=({made} $fpath); autoload -U compinit; compinit -u -D; echo re''ady\n")
    shown.until("ready")
    for typed, wanted in (
        ("outlast store ch\t", "outlast store check"),
        ("outlast store check --rea\t", "outlast store check --read-data"),
        ("outlast completion fi\t", "outlast completion fish"),
        (f"outlast report 17 --plot {made}/uni\t", "unique-file.html"),
    ):
        shown.type_(typed)
        shown.until(wanted)
        shown.type_("\x15")
    shown.type_("exit\n")
    shown.end()


@pytest.mark.parametrize(("line", "wanted"), CASES)
def test_fish_offers_what_fits(
    made: Path, program: Callable[[str], str], line: str, wanted: set[str]
) -> None:
    done = subprocess.run(
        [
            *(program("fish"), "--no-config", "-c", "source $argv[1]; complete -C $argv[2]"),
            *(made / "outlast.fish", line),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {one.split("\t")[0] for one in done.stdout.splitlines()} == wanted


def test_the_verb_prints_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "outlast.cli", "completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == script("bash", parser())
