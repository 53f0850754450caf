"""Critical data: what a program names is saved alone, and loaded by another process, in C and in Python alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULT = {3: "7821cb0738d4ca21", 6: "b3c1801925a69e24"}  # after so many steps
LANGUAGES = ["C", "Python"]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with liboutlast and the example in C."""
    directory = tmp_path_factory.mktemp("critical")
    library = directory / "liboutlast.so.0"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    for command in (
        ["make", "-s", "-C", str(ROOT / "lib"), f"O={directory}"],
        [
            *("gcc", *flags, f"-I{ROOT / 'lib'}", "-o", str(directory / "critical")),
            *(str(ROOT / "tests/programs/critical.c"), str(library)),
        ],
    ):
        made = subprocess.run(command, capture_output=True, text=True, timeout=50)
        assert made.returncode == 0, made.stdout + made.stderr
    return directory


def critical(built: Path, place: Path, language: str, steps: int) -> subprocess.CompletedProcess[str]:
    """Run the example in *place*."""
    program = [str(built / "critical")]
    if language == "Python":
        program = [sys.executable, str(ROOT / "tests/programs/critical.py")]
    return subprocess.run(
        [*program, "saved", str(steps)],
        cwd=place,
        env={**os.environ, "LD_LIBRARY_PATH": str(built), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )


def python(built: Path, place: Path, source: str) -> str:
    """Run *source*, to which `outlast` is imported; return what it says."""
    done = subprocess.run(
        [sys.executable, "-c", f"import outlast\n{source}"],
        cwd=place,
        env={**os.environ, "LD_LIBRARY_PATH": str(built), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("second", LANGUAGES)
@pytest.mark.parametrize("first", LANGUAGES)
def test_program_goes_on_from_what_a_run_in_either_language_saved(
    built: Path, tmp_path: Path, first: str, second: str
) -> None:
    assert critical(built, tmp_path, first, 3).stdout.splitlines()[-1] == f"result {RESULT[3]}"
    # Written after the last save, as by a run that was lost.
    with (tmp_path / "critical.log").open("a") as log:
        log.write("4 lost\n")

    done = critical(built, tmp_path, second, 6)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "goes on after step 3",
        *(f"step {step}" for step in (4, 5, 6)),
        f"result {RESULT[6]}",
    ]
    log_lines = (tmp_path / "critical.log").read_text().splitlines()
    assert [line.split()[0] for line in log_lines] == ["1", "2", "3", "4", "5", "6"]
    assert log_lines[-1] == f"6 {RESULT[6]}"


def test_only_what_is_worth_saving_is_saved(built: Path, tmp_path: Path) -> None:
    critical(built, tmp_path, "C", 6)

    # 64 MiB of memory; the format's own 64 bytes, 16 of state, and the log.
    assert (tmp_path / "saved").stat().st_size == 64 + 16 + (tmp_path / "critical.log").stat().st_size


@pytest.mark.parametrize("offset", [0, 9, 40, 90, -1])
def test_damaged_file_is_refused_and_changes_nothing(built: Path, tmp_path: Path, offset: int) -> None:
    critical(built, tmp_path, "C", 3)
    saved = bytearray((tmp_path / "saved").read_bytes())
    saved[offset] ^= 1
    (tmp_path / "saved").write_bytes(saved)
    (tmp_path / "critical.log").write_text("as it is now\n")

    done = critical(built, tmp_path, "C", 6)

    assert done.returncode == 1
    assert done.stderr.startswith("critical: saved: it is ")
    assert (tmp_path / "critical.log").read_text() == "as it is now\n"


def test_file_with_other_data_than_is_protected_is_refused_and_memory_is_as_it_was(
    built: Path, tmp_path: Path
) -> None:
    said = python(
        built,
        tmp_path,
        """
one, other = bytearray(b"one"), bytearray(b"other")
outlast.protect(1, one)
outlast.save("saved")
one[:] = b"two"
outlast.protect(2, other)
try:
    outlast.load("saved")
except outlast.CheckpointFailed as error:
    print(error, one, other)
outlast.unprotect(2)
outlast.load("saved")
print(one)
""",
    )

    assert said.splitlines() == [
        "saved: it holds less than the program protects bytearray(b'two') bytearray(b'other')",
        "bytearray(b'one')",
    ]


def test_restored_functions_are_called_when_all_is_back_by_growing_id(built: Path, tmp_path: Path) -> None:
    said = python(
        built,
        tmp_path,
        """
one, other = bytearray(b"one"), bytearray(b"other")
outlast.protect(7, other, lambda: print("second", one, other))
outlast.protect(-1, one, lambda: print("first", one, other))
outlast.save("saved")
one[:], other[:] = b"...", b"....."
outlast.load("saved")
""",
    )

    both = "bytearray(b'one') bytearray(b'other')"
    assert said.splitlines() == [f"first {both}", f"second {both}"]


def test_save_that_fails_leaves_what_was_saved_before(built: Path, tmp_path: Path) -> None:
    said = python(
        built,
        tmp_path,
        """
import os
data = bytearray(b"good")
outlast.protect(1, data)
outlast.save("saved")
data[:] = b"new."
outlast.protect_file(2, "no such file")
try:
    outlast.save("saved")
except outlast.CheckpointFailed as error:
    print(error)
outlast.unprotect(2)
outlast.load("saved")
print(data, os.listdir())
""",
    )

    assert said.splitlines() == ["no such file: No such file or directory", "bytearray(b'good') ['saved']"]


def test_calls_do_nothing_without_outlast(built: Path, tmp_path: Path) -> None:
    said = python(
        built,
        tmp_path,
        """
outlast.on_ckpt(lambda: print("before"), lambda restored: print("after"))
scratch = bytearray(1 << 20)
scratch[:] = b"x" * (1 << 20)
outlast.exclude(scratch)
print(outlast.active(), outlast.ckpt(), scratch.count(b"x") == 1 << 20)
""",
    )

    assert said == "False False True\n"
