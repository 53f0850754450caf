"""The SPANK plugin and the scheduler hooks on a real Slurm cluster (scripts/testbed)."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "/usr/lib/x86_64-linux-gnu/slurm-wlm/spank_outlast.so"
HOOKS = "/usr/libexec/outlast/slurm"

BATCH_ONLY = "outlast: --checkpoint acts on batch jobs only; this runs without checkpoints"
TRUNCATES = "outlast: --open-mode=truncate: every restart empties the job's output file"
NOT_RESTARTED = "outlast: --no-requeue: the job is not restarted when its node fails"

pytestmark = pytest.mark.slurm


def on(
    host: str, *command: str, user: bool = False, script: str = "", check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run *command* on a host of the testbed, as root or as its user, with *script* as standard input."""
    done = subprocess.run(
        [ROOT / "scripts" / "testbed", "user" if user else "exec", host, *command],
        input=script,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def _cluster(need: Callable[[str, str | None], None]) -> None:
    found = on("ctl", "test", "-e", PLUGIN, check=False)
    need("slurm", f"no testbed with the plugin: {found.stderr.strip()}" if found.returncode else None)


@pytest.fixture
def directory() -> Iterator[str]:
    """A new directory of the user's on the shared file system."""
    path = f"/shared/alice/plugin-{uuid.uuid4().hex[:8]}"
    on("ctl", "mkdir", path, user=True)
    yield path
    on("ctl", "rm", "-r", path)


@dataclass(frozen=True)
class Ended:
    """A batch job that has ended: what sbatch said and with which code, and the job's output."""

    code: int
    said: str
    output: str


def batch(directory: str, script: str, *options: str, kept: str = "") -> Ended:
    """Submit *script* and wait for its end; its output file holds *kept* before it starts."""
    on("ctl", "tee", f"{directory}/out", user=True, script=kept)
    command = ["sbatch", "--wait", "--parsable", "-D", directory, "-o", f"{directory}/out", *options]
    done = on("ctl", *command, user=True, script=script, check=False)
    return Ended(done.returncode, done.stderr, on("ctl", "cat", f"{directory}/out").stdout)


def held(*options: str, script: str = "#!/bin/sh\ntrue\n") -> tuple[str, str]:
    """Submit a job that is not to start, and return what Slurm knows of it and what sbatch said."""
    submitted = on("ctl", "sbatch", "--parsable", "--hold", *options, user=True, script=script)
    job_id = submitted.stdout.strip()
    try:
        return on("ctl", "scontrol", "show", "job", job_id).stdout, submitted.stderr
    finally:
        on("ctl", "scancel", job_id)


@contextmanager
def edited(host: str, path: str, expression: str, *, then: tuple[str, ...] = ("true",)) -> Iterator[None]:
    """Change a file on *host* by sed's *expression* for a while; *then* is run after each change."""
    on(host, "cp", "-p", path, path + ".kept")
    try:
        on(host, "sed", "-i", expression, path)
        on(host, *then)
        yield
    finally:
        on(host, "mv", path + ".kept", path)
        on(host, *then)


@pytest.mark.parametrize("command", ["sbatch", "salloc", "srun"])
def test_help_lists_the_flag(command: str) -> None:
    assert "--checkpoint=INTERVAL" in on("ctl", command, "--help", user=True).stdout


@pytest.mark.parametrize("command", [("sbatch", "--wrap=true"), ("salloc", "true"), ("srun", "true")])
@pytest.mark.parametrize("interval", ["soon", "", "0s", "31d", "10"])
def test_bad_interval_is_refused_at_submission(command: tuple[str, str], interval: str) -> None:
    program, what = command
    done = on("ctl", program, f"--checkpoint={interval}", what, user=True, check=False)

    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == (
        f"{program}: error: outlast: --checkpoint={interval}: not a time between 1s and 30d; "
        "write a whole number and a unit: 30s, 10m, 1h or 2d; or auto"
    )


def test_bad_interval_in_a_script_is_refused_at_submission() -> None:
    script = "#!/bin/sh\n#SBATCH --checkpoint=10min\ntrue\n"
    done = on("ctl", "sbatch", user=True, script=script, check=False)

    assert done.returncode != 0
    assert "--checkpoint=10min: not a time between 1s and 30d" in done.stderr


@pytest.mark.parametrize("way", ["command line", "script"])
def test_batch_script_is_put_behind_the_shim(directory: str, way: str) -> None:
    line = "#SBATCH --checkpoint=10m\n" if way == "script" else ""
    options = ["--checkpoint=10m"] if way == "command line" else []
    job_id = on(
        "ctl",
        *("sbatch", "--parsable", "-w", "n1", "-D", directory, *options),
        user=True,
        script=f"#!/bin/sh\n{line}sleep 300\n",
    ).stdout.strip()
    try:
        shim = f"outlast-shim --interval 10m -- /var/spool/slurmd/job{int(job_id):05d}/slurm_script"
        deadline = time.monotonic() + 30
        while on("n1", "pgrep", "-f", shim, check=False).returncode:
            assert time.monotonic() < deadline, on("n1", "ps", "axf").stdout
            time.sleep(0.2)
    finally:
        on("ctl", "scancel", job_id)


@pytest.mark.parametrize("way", ["command line", "script"])
def test_output_of_a_checkpointed_job_is_appended(directory: str, way: str) -> None:
    line = "#SBATCH --checkpoint=10m\n" if way == "script" else ""
    options = ["--checkpoint=10m"] if way == "command line" else []
    ended = batch(directory, f"#!/bin/sh\n{line}echo after\n", *options, kept="before\n")

    assert ended == Ended(0, "", "before\nafter\n")


def test_job_without_the_flag_is_not_touched(directory: str) -> None:
    script = "#!/bin/sh\ntr '\\0' ' ' </proc/$$/cmdline; echo; env | grep -e SPANK -e OPEN_MODE; exit 0\n"
    ended = batch(directory, script, kept="before\n")

    assert ended.code == 0
    assert ended.said == ""
    (command_line,) = ended.output.splitlines()
    assert command_line.startswith("/bin/sh /var/spool/slurmd/job")


@pytest.mark.parametrize(
    ("options", "line", "requeue"),
    [
        ([], "", 0),
        (["--checkpoint=10m"], "", 1),
        ([], "#SBATCH --checkpoint=10m", 1),
        (["--checkpoint=10m", "--no-requeue"], "", 0),
    ],
)
def test_only_a_checkpointed_job_is_made_requeueable_where_jobs_are_not(
    options: list[str], line: str, requeue: int
) -> None:
    reconfigure = ("scontrol", "reconfigure")
    with edited("ctl", "/etc/slurm/slurm.conf", "s/^JobRequeue=.*/JobRequeue=0/", then=reconfigure):
        job, _ = held(*options, script=f"#!/bin/sh\n{line}\ntrue\n")

    assert f"Requeue={requeue} " in job


@pytest.mark.parametrize("way", ["command line", "script"])
def test_users_own_choice_stands_and_its_cost_is_said(directory: str, way: str) -> None:
    choice = ["--open-mode=truncate", "--no-requeue"]
    lines = "".join(f"#SBATCH {option}\n" for option in choice) if way == "script" else ""
    options = choice if way == "command line" else []
    script = f"#!/bin/sh\n{lines}scontrol show job $SLURM_JOB_ID | grep -o Requeue=.\n"
    ended = batch(directory, script, "--checkpoint=10m", *options, kept="before\n")

    assert ended.output == "Requeue=0\n"
    assert TRUNCATES in ended.said
    assert NOT_RESTARTED in ended.said


def test_job_on_two_nodes_runs_without_checkpoints_and_says_why(directory: str) -> None:
    script = "#!/bin/sh\ntr '\\0' ' ' </proc/$PPID/cmdline; echo; srun hostname | sort; exit 5\n"
    ended = batch(directory, script, "--checkpoint=10m", "-w", "n[1-2]", "-N", "2")

    assert ended.code == 5
    why, parent, *hosts = ended.output.splitlines()
    assert why == (
        "outlast: runs without checkpoints: "
        "the job has 2 nodes, and only jobs on one node can be checkpointed"
    )
    assert "slurmstepd" in parent
    assert hosts == ["n1", "n2"]
    assert "this runs without checkpoints: only jobs on one node can be checkpointed" in ended.said


def test_heterogeneous_job_runs_without_checkpoints_and_says_so_at_submission(directory: str) -> None:
    script = "#!/bin/sh\n#SBATCH -n1\n#SBATCH hetjob\n#SBATCH -n1\nexit 5\n"
    ended = batch(directory, script, "--checkpoint=10m")

    assert ended.code == 5
    assert ended.said.count("this runs without checkpoints: heterogeneous jobs cannot be checkpointed") == 1
    assert "runs without checkpoints: heterogeneous jobs cannot be checkpointed" in ended.output


def test_job_whose_node_lacks_the_shim_runs_without_checkpoints_and_says_why(directory: str) -> None:
    line = r"1,$s!^optional spank_outlast.so.*!optional spank_outlast.so shim=/no/shim!"
    with edited("n1", "/etc/slurm/plugstack.conf", line):
        ended = batch(directory, "#!/bin/sh\necho ran\nexit 6\n", "--checkpoint=10m", "-w", "n1")

    assert ended.code == 6
    assert ended.output == "outlast: runs without checkpoints: /no/shim: No such file or directory\nran\n"


def test_job_whose_node_lacks_the_plugin_runs(directory: str) -> None:
    with edited("n1", "/etc/slurm/plugstack.conf", "s/spank_outlast/no_such_plugin/"):
        ended = batch(directory, "#!/bin/sh\necho ran\nexit 6\n", "--checkpoint=10m", "-w", "n1")

    assert (ended.code, ended.output) == (6, "ran\n")


@pytest.mark.parametrize("command", [("srun", "hostname"), ("salloc", "srun", "hostname")])
def test_flag_given_to_srun_and_salloc_is_answered_once(command: tuple[str, ...]) -> None:
    program, *rest = command
    done = on("ctl", program, "--checkpoint=10m", "-w", "n2", *rest, user=True)

    assert done.stdout == "n2\n"
    assert done.stderr.count(BATCH_ONLY) == 1


def test_what_a_checkpointed_job_starts_does_not_inherit_the_flag(directory: str) -> None:
    script = (
        "#!/bin/sh\nsrun sh -c 'env | grep SPANK; echo step'\n"
        'sbatch -Q --wait -D . -o child --wrap \'tr "\\0" " " </proc/$PPID/cmdline; env | grep SPANK\'\n'
        "cat child\n"
    )
    ended = batch(directory, script, "--checkpoint=10m", "-w", "n1")

    assert ended.said == ""
    step, child = ended.output.splitlines()
    assert step == "step"
    assert child.startswith("slurmstepd")


@pytest.mark.parametrize(
    ("hook", "host", "bound"), [("prolog", "n1", 15), ("epilog", "n1", 10), ("epilog-slurmctld", "ctl", 3)]
)
class TestHook:
    def run(self, hook: str, host: str, program: str, *environment: str) -> tuple[int, float]:
        """Start an installed hook as Slurm does, with *program* in the place of /usr/bin/outlast."""
        script = (
            f"mount --bind {program} /usr/bin/outlast && exec env -i {' '.join(environment)} {HOOKS}/{hook}"
        )
        began = time.monotonic()
        done = on(host, "unshare", "--mount", "sh", "-c", script, check=False)
        assert done.stdout + done.stderr == ""
        return done.returncode, time.monotonic() - began

    ASKED = ("SPANK__SLURM_SPANK_OPTION_outlast_checkpoint=10m", "SLURM_JOB_ID=4294967")

    def test_job_without_the_flag_costs_no_program(self, hook: str, host: str, bound: int) -> None:
        marker = f"/tmp/{uuid.uuid4().hex}"
        on(host, "sh", "-c", f"printf '#!/bin/sh\\ntouch {marker}.called\\n' >{marker}; chmod 755 {marker}")
        try:
            assert self.run(hook, host, marker, "SLURM_JOB_ID=4294967")[0] == 0
            assert on(host, "test", "-e", f"{marker}.called", check=False).returncode == 1
            assert self.run(hook, host, marker, *self.ASKED)[0] == 0
            assert on(host, "test", "-e", f"{marker}.called", check=False).returncode == 0
        finally:
            on(host, "rm", "-f", marker, f"{marker}.called")

    def test_failure_is_not_slurms(self, hook: str, host: str, bound: int) -> None:
        assert self.run(hook, host, "/bin/false", *self.ASKED)[0] == 0

    def test_program_that_cannot_be_started_is_not_slurms(self, hook: str, host: str, bound: int) -> None:
        assert self.run(hook, host, "/etc/passwd", *self.ASKED)[0] == 0

    def test_program_that_hangs_is_ended_in_time(self, hook: str, host: str, bound: int) -> None:
        sleeper = f"/tmp/{uuid.uuid4().hex}"
        on(host, "sh", "-c", f"printf '#!/bin/sh\\nexec sleep 40\\n' >{sleeper}; chmod 755 {sleeper}")
        try:
            code, seconds = self.run(hook, host, sleeper, *self.ASKED)
        finally:
            on(host, "rm", "-f", sleeper)

        assert code == 0
        assert bound <= seconds < 35, "it would have slept 40 s"
