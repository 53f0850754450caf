"""The calls of programs, and checkpoints started anywhere, on one machine without a scheduler."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.criu.waiting import eventually

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

SOURCE = Path(__file__).parents[1] / "programs"
LOGS = Path("/var/log/outlast/jobs")
LANGUAGES = ["C", "Python"]
COUNTER = """
import os, sys, time
number = 0
while not os.path.exists("stop"):
    number += 1
    os.write(1, b"%d\\n" % number)
    time.sleep(0.02)
sys.exit(5)
"""


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[str]]:
    """The command line of an example of tests/programs in a language."""
    built = tmp_path_factory.mktemp("programs")
    made = subprocess.run(
        ["make", "-s", "-C", SOURCE, f"O={built}", "steps", "mark"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr

    def command(name: str, language: str) -> list[str]:
        return [str(built / name)] if language == "C" else ["/usr/bin/python3", str(SOURCE / f"{name}.py")]

    return command


class Machine:
    """A directory with a store, and what was started there with `outlast`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self._running: list[subprocess.Popen[bytes]] = []

    def name(self) -> str:
        """A name for a job that no other has."""
        self.names.append("test-" + uuid.uuid4().hex[:8])
        return self.names[-1]

    def outlast(self, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command that ends by itself."""
        command = ["outlast", verb, "--store", f"{self.path}/store", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def begin(self, verb: str, *words: str) -> subprocess.Popen[bytes]:
        """Start an `outlast run` or `recover`; what it says is added to the file `out`."""
        with (self.path / "out").open("ab") as out:
            self._running.append(
                subprocess.Popen(
                    ["outlast", verb, "--store", f"{self.path}/store", *words],
                    cwd=self.path,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
            )
        return self._running[-1]

    def run(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start *command*, or have it go on, under checkpoints that are only taken when asked for."""
        return self.begin("run", "--name", name, "--interval", "30d", "--", *command)

    def said(self) -> list[str]:
        """The lines of `out`, without those of Outlast."""
        path = self.path / "out"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not line.startswith("outlast:")]

    def says(self, line: str) -> None:
        """Wait until it is said."""
        eventually(lambda: line in self.said(), f"{line!r}; it said {self.said()[-5:]}", 60)

    def sizes(self, name: str) -> list[int]:
        """How large each of the job's checkpoints was, in bytes, as its manager's log tells."""
        log = LOGS / f"{name}.log"
        text = log.read_text() if log.exists() else ""
        return [int(size) for size in re.findall(r"outlast: checkpoint: .*?, (\d+) bytes", text)]

    def crash(self, process: subprocess.Popen[bytes]) -> None:
        """Kill what was started, as a crash would, and wait until nothing of it is left."""
        process.kill()
        process.wait(timeout=20)

    def close(self) -> None:
        """End all that was started."""
        for process in self._running:
            if process.poll() is None:
                process.kill()
                process.wait(timeout=20)
        for name in self.names:
            eventually(lambda name=name: not Path("/run/outlast/jobs", name).exists(), f"{name} is over", 60)  # type: ignore[misc]
        shutil.rmtree(self.path)


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A place for the test; all that it starts ends with it."""
    path = Path(tempfile.mkdtemp(prefix="calls-", dir="/tmp"))
    path.chmod(0o755)
    machine = Machine(path)
    try:
        yield machine
    finally:
        machine.close()


def is_over(name: str) -> bool:
    """Whether the job's manager has ended."""
    return not Path("/run/outlast/jobs", name).exists()


@pytest.mark.parametrize("language", LANGUAGES)
def test_ckpt_returns_nothing_special_after_a_checkpoint_and_tells_of_a_restore(
    machine: Machine, program: Callable[[str, str], list[str]], language: str
) -> None:
    name = machine.name()
    process = machine.run(name, [*program("steps", language), "6"])
    eventually(lambda: len(machine.sizes(name)) >= 2, "two checkpoints", 60)
    machine.crash(process)
    eventually(lambda: is_over(name), "the first run is over", 60)
    again = machine.run(name, [*program("steps", language), "6"])

    machine.says("done")
    assert again.wait(timeout=20) == 0
    lines = machine.said()
    (restored,) = [line for line in lines if line.startswith("restored in step")]
    number = int(restored.split()[-1])
    assert number >= 2
    # The functions after a checkpoint were told of the restore, once; and no step was lost or done twice.
    assert [line for line in lines if "opened again" in line] == ["connection: opened again"]
    assert [line for line in lines if line.startswith("step")] == [f"step {step}" for step in range(1, 7)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_excluded_memory_is_in_no_checkpoint_that_the_program_takes(
    machine: Machine, program: Callable[[str, str], list[str]], language: str
) -> None:
    sizes: dict[str, int] = {}
    for how in ("exclude", "include"):
        name = machine.name()
        process = machine.run(name, [*program("steps", language), "2", how])
        assert process.wait(timeout=60) == 0
        assert len(machine.sizes(name)) == 2
        sizes[how] = max(machine.sizes(name))

    assert sizes["include"] > 64 << 20
    assert sizes["exclude"] < sizes["include"] - (60 << 20)


@pytest.mark.parametrize("language", LANGUAGES)
def test_tckpt_has_a_job_checkpointed_that_does_not_notice(
    machine: Machine, program: Callable[[str, str], list[str]], language: str
) -> None:
    name = machine.name()
    machine.run(name, ["/usr/bin/python3", "-ISc", COUNTER])
    machine.says("5")
    pid = job_of(name)

    done = subprocess.run([*program("mark", language), str(pid)], capture_output=True, text=True, timeout=20)

    assert (done.returncode, done.stderr) == (0, "")
    eventually(lambda: len(machine.sizes(name)) == 1, "a checkpoint")
    (machine.path / "stop").touch()
    eventually(lambda: is_over(name), "the job has ended", 60)
    said = machine.said()
    assert said == [str(number) for number in range(1, len(said) + 1)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_tckpt_from_inside_the_job(
    machine: Machine, program: Callable[[str, str], list[str]], language: str
) -> None:
    name = machine.name()
    mark = " ".join(program("mark", language))
    process = machine.run(name, ["sh", "-c", f"{mark} && echo marked; until [ -e stop ]; do sleep 0.1; done"])
    machine.says("marked")
    eventually(lambda: len(machine.sizes(name)) == 1, "a checkpoint")
    (machine.path / "stop").touch()

    assert process.wait(timeout=20) == 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_tckpt_of_a_process_without_checkpoints_says_so(
    program: Callable[[str, str], list[str]], language: str
) -> None:
    for who in ("0", str(os.getpid())):
        done = subprocess.run([*program("mark", language), who], capture_output=True, text=True, timeout=20)

        assert done.returncode == 1
        assert "not of a job that is checkpointed" in done.stderr


def job_of(name: str) -> int:
    """The PID, on this machine, of the root of the job *name*."""
    variable = f"OUTLAST_JOB=/run/outlast/jobs/{name}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable in path.read_bytes().split(b"\0"):
                return int(path.parent.name)
    raise AssertionError(f"no process of {name}")


@pytest.mark.parametrize("language", LANGUAGES)
def test_recover_starts_a_checkpoint_under_another_name(
    machine: Machine, program: Callable[[str, str], list[str]], language: str
) -> None:
    name, again = machine.name(), machine.name()
    process = machine.run(name, [*program("steps", language), "6"])
    eventually(lambda: len(machine.sizes(name)) >= 2, "two checkpoints", 60)
    machine.crash(process)
    eventually(lambda: is_over(name), "the first run is over", 60)

    recovered = machine.begin("recover", f"{name}@0.2", "--name", again, "--interval", "30d")

    machine.says("done")
    assert recovered.wait(timeout=20) == 0
    assert "restored in step 2" in machine.said()
    # Its own calls are checkpoints of the job that it is now.
    assert len(machine.sizes(again)) == 4


def test_recover_of_what_is_not_there_says_so(machine: Machine) -> None:
    (machine.path / "store").mkdir()
    done = machine.outlast("recover", "nothing@0.1", "--name", machine.name())

    assert done.returncode != 0
    assert done.stderr.startswith("outlast: nothing@0.1: no such checkpoint")


def test_process_that_outlast_did_not_start_is_checkpointed_and_recovered(machine: Machine) -> None:
    name, again = machine.name(), machine.name()
    (machine.path / "store").mkdir()
    with (machine.path / "alien").open("wb") as out:
        alien = subprocess.Popen(
            ["/usr/bin/python3", "-ISc", COUNTER],
            cwd=machine.path,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        lines = machine.path / "alien"
        eventually(lambda: len(lines.read_text().split()) > 5, "the process counts")
        done = machine.outlast("checkpoint", "--pid", str(alien.pid), name)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{name}@0.1\n"
        before = len(lines.read_text().split())
        eventually(lambda: len(lines.read_text().split()) > before + 5, "the process runs on")
    finally:
        alien.send_signal(signal.SIGKILL)
        alien.wait(timeout=20)

    recovered = machine.begin("recover", name, "--name", again)
    last = len(lines.read_text().split())
    eventually(lambda: len(lines.read_text().split()) > last + 5, "the recovered process counts on")
    (machine.path / "stop").touch()

    assert recovered.wait(timeout=20) == 5
    said = lines.read_text().split()
    assert said == [str(number) for number in range(1, len(said) + 1)]


def test_process_that_cannot_be_checkpointed_is_refused_with_a_way_out_and_runs_on(machine: Machine) -> None:
    (machine.path / "store").mkdir()
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as alien:
        done = machine.outlast("checkpoint", "--pid", str(alien.pid), machine.name())

        assert done.returncode == os.EX_DATAERR
        assert "setsid PROGRAM" in done.stderr
        assert alien.poll() is None
        alien.kill()
