"""The workloads in tests/programs: right, the same in C and in Python, and able to find a wrong result."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "programs"
# Small arguments of every workload, and the result that any machine with IEEE doubles must find.
SMALL = {
    "lu": ("60", "4", "d1e8e3894d70135c"),
    "matmul": ("70", "4", "5ac51c44159f8d7d"),
    "cellular": ("100", "8", "b49944b31092f264"),
}
STEP = {"lu": "sweep", "matmul": "repeat", "cellular": "generation"}
WORKLOADS = sorted(SMALL)
PROGRAMS = [*WORKLOADS, *(f"{name}.py" for name in WORKLOADS)]

Command = Callable[..., list[str]]


def build(directory: Path, *variables: str) -> None:
    """Build the C workloads into *directory*."""
    made = subprocess.run(
        ["make", "-C", SOURCE, f"O={directory}", *variables], capture_output=True, text=True, timeout=50
    )
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Return the command of a program with its arguments. The C ones are built once, below a space."""
    directory = tmp_path_factory.mktemp("programs") / "with a space"
    build(directory)

    def command_(program: str, *arguments: str) -> list[str]:
        if program.endswith(".py"):
            return [sys.executable, str(SOURCE / program), *arguments]
        return [str(directory / program), *arguments]

    return command_


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def workload_of(program: str) -> str:
    return program.removesuffix(".py")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_step_has_one_line_in_order_and_the_last_line_is_the_result(
    program: str, command: Command
) -> None:
    size, steps, result = SMALL[workload_of(program)]

    done = run(command(program, size, steps))

    *progress, last = done.stdout.splitlines()
    line = re.compile(rf"{STEP[workload_of(program)]} (\d+) of {steps} checksum ([0-9a-f]{{16}})")
    found = [match for text in progress if (match := line.fullmatch(text))]
    assert len(found) == len(progress)
    assert [int(match[1]) for match in found] == list(range(1, int(steps) + 1))
    assert len({match[2] for match in found}) == int(steps)
    assert found[-1][2] == result
    assert last == f"result {result} ok"
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("program", PROGRAMS)
def test_two_runs_give_the_same_lines(program: str, command: Command) -> None:
    size, steps, _ = SMALL[workload_of(program)]

    assert run(command(program, size, steps)).stdout == run(command(program, size, steps)).stdout


@pytest.mark.parametrize(
    ("workload", "size", "steps"),
    [
        ("lu", "1", "3"),
        ("lu", "2", "3"),
        ("lu", "150", "2"),
        ("matmul", "1", "3"),
        ("matmul", "130", "2"),  # more than two of the blocks that C computes in
        ("cellular", "3", "9"),
        ("cellular", "64", "9"),
        ("cellular", "65", "9"),  # one cell more than a word holds
        ("cellular", "1024", "3"),
    ],
)
def test_c_and_python_agree(workload: str, size: str, steps: str, command: Command) -> None:
    in_c, in_python = (run(command(program, size, steps)) for program in (workload, f"{workload}.py"))

    assert in_c.stdout == in_python.stdout
    assert (in_c.returncode, in_python.returncode) == (0, 0)


@pytest.mark.parametrize("threads", ["1", "2", "3", "64"])
def test_any_number_of_threads_gives_the_same_product(threads: str, command: Command) -> None:
    size, steps, _ = SMALL["matmul"]

    assert (
        run(command("matmul", "--threads", threads, size, steps)).stdout
        == run(command("matmul", size, steps)).stdout
    )


@pytest.mark.parametrize("workload", WORKLOADS)
def test_another_size_gives_another_result(workload: str, command: Command) -> None:
    size, steps, result = SMALL[workload]

    assert run(command(workload, str(int(size) + 1), steps)).stdout.splitlines()[-1] != f"result {result} ok"


def test_flags_of_the_caller_do_not_change_the_bits(tmp_path: Path) -> None:
    build(tmp_path, "CFLAGS=-O3 -march=native -ffast-math -ffp-contract=fast")

    size, steps, result = SMALL["lu"]
    assert run([str(tmp_path / "lu"), size, steps]).stdout.splitlines()[-1] == f"result {result} ok"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_spoiled_result_fails_its_check(program: str, command: Command) -> None:
    size, steps, _ = SMALL[workload_of(program)]

    done = run(command(program, size, steps, "--spoil-at", "3"))

    assert done.returncode == 1
    assert f"{program}: {STEP[workload_of(program)]} 3: check failed: " in done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert "result" not in done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("code", [0, 7, 255])
def test_fail_at_ends_with_the_code_after_the_line_of_its_step(
    program: str, code: int, command: Command
) -> None:
    size, steps, _ = SMALL[workload_of(program)]

    done = run(command(program, "--fail-at", "2", str(code), size, steps))

    assert done.returncode == code
    assert done.stdout.splitlines() == run(command(program, size, steps)).stdout.splitlines()[:2]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("name", "number"), [("TERM", 15), ("SIGKILL", 9), ("10", 10), ("INT", 2)])
def test_signal_at_dies_by_the_signal(program: str, name: str, number: int, command: Command) -> None:
    size, steps, _ = SMALL[workload_of(program)]

    done = run(command(program, size, steps, "--signal-at", "2", name))

    assert done.returncode == -number
    assert done.stdout.splitlines() == run(command(program, size, steps)).stdout.splitlines()[:2]


@pytest.mark.parametrize("program", ["lu", "lu.py"])
def test_signal_at_dies_even_where_its_caller_ignores_the_signal(program: str, command: Command) -> None:
    ignoring = ["sh", "-c", "trap '' TERM; exec \"$@\"", "sh"]

    done = run([*ignoring, *command(program, "9", "3", "--signal-at", "2", "TERM")])

    assert done.returncode == -15


@pytest.mark.parametrize("program", ["lu", "lu.py"])
def test_signal_that_does_not_end_the_program_is_reported(program: str, command: Command) -> None:
    done = run(command(program, "9", "3", "--signal-at", "2", "WINCH"))

    assert done.returncode == 1
    assert done.stderr == f"{program}: signal 28: did not end the program\n"


# One program in each language: the rest share the code that reads arguments.
@pytest.mark.parametrize("program", ["matmul", "lu.py"])
@pytest.mark.parametrize(
    "arguments",
    [
        "0",
        "-5",
        "12x",
        "''",
        "99999",
        "99999999999999999999999",
        "9 0",
        "9 3 3",
        "9 1.5",
        "--pace",
        "--pace -1",
        "--pace nan",
        "--pace 1e3",
        "--pace 86401",
        "9 3 --fail-at 2",
        "9 3 --fail-at 4 7",
        "9 3 --fail-at 0 7",
        "9 3 --fail-at 2 256",
        "9 3 --signal-at 2 NONE",
        "9 3 --signal-at 2 65",
        "9 3 --signal-at 2 0",
        "9 3 --spoil-at 4",
        "9 3 --threads 0",
        "--no-such-option",
    ],
)
def test_wrong_arguments_give_usage_and_2(program: str, arguments: str, command: Command) -> None:
    done = run(command(program, *("" if word == "''" else word for word in arguments.split())))

    assert (done.returncode, done.stdout) == (2, "")
    assert f"usage: {program} " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_size_out_of_the_program_s_own_range_is_refused(program: str, command: Command) -> None:
    smallest, largest = {"lu": (1, 4096), "matmul": (1, 2048), "cellular": (3, 16384)}[workload_of(program)]

    for size in (smallest - 1, largest + 1):
        done = run(command(program, str(size), "1"))

        assert (done.returncode, done.stdout) == (2, "")
        assert f"{size}: must be a whole number, {smallest} to {largest}\n" in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_no_error(program: str, command: Command) -> None:
    done = run(command(program, "--help"))

    assert (done.returncode, done.stderr) == (0, "")
    assert "--signal-at STEP SIG" in done.stdout


def test_usage_shows_the_defaults_whatever_was_given(command: Command) -> None:
    assert "1 to 4096, 400 unless given" in run(command("lu", "9", "3", "one too many")).stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_output_that_cannot_be_written_is_an_error(program: str, command: Command) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(program, "9", "3"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )

    assert done.returncode == 1
    assert done.stderr == f"{program}: standard output: No space left on device\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_line_is_seen_at_once_and_pace_sleeps_after_it(program: str, command: Command) -> None:
    started = time.monotonic()
    with subprocess.Popen(
        command(program, "9", "2", "--pace", "8"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        waited = time.monotonic() - started
        running = process.poll() is None
        process.kill()

    assert line.startswith(f"{STEP[workload_of(program)]} 1 of 2 ")
    assert running
    assert waited < 7


@pytest.mark.parametrize("program", ["lu", "lu.py"])
def test_pace_sleeps_between_steps_only_and_changes_no_line(program: str, command: Command) -> None:
    started = time.monotonic()
    done = run(command(program, "9", "3", "--pace", "0.2"))
    lasted = time.monotonic() - started

    assert done.stdout == run(command(program, "9", "3")).stdout
    assert lasted >= 0.4
    assert time.monotonic() - started < 20


def test_lu_has_about_1_3_megabytes_of_its_own_at_its_default(command: Command) -> None:
    with subprocess.Popen(command("lu", "--pace", "8"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.kill()

    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert match is not None
    assert 1250 <= int(match[1]) <= 1450
