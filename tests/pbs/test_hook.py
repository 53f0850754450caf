"""The hook, run as MoM runs it, on inputs that a real MoM wrote: by pbs_python where there is one, or its double."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import eventually

HERE = Path(__file__).resolve().parent
HOOK = HERE.parents[1] / "plugins" / "pbs" / "outlast_hook.py"
PROGRAM = shutil.which("pbs_python") or str(HERE / "double" / "pbs_python")
SERVER_EVENTS = not shutil.which("pbs_python")  # pbs_python runs the events of the server in the server only

FAKE = """#!/bin/sh
{ echo "$*"; env | grep ^OUTLAST_ | sort; } >> "$0.calls"
[ ! -e "$0.fails" ] || { echo "it does not work" >&2; exit 1; }
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the hook decided, in the words in which MoM reads it."""

    code: int
    text: str

    def value(self, name: str) -> str | None:
        """The value of `pbs.event().NAME`."""
        match = re.search(rf'^pbs\.event\(\)\.{re.escape(name)}=("""(?s:.*?)"""|.*)$', self.text, re.M)
        return match[1].strip('"') if match else None

    @property
    def argv(self) -> list[str]:
        """The task's arguments."""
        return re.findall(r"^pbs\.event\(\)\.argv\[[0-9]+\]=(.*)$", self.text, re.M)


class Site:
    """A host with the product on it, or rather with a program that writes down how it was called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runtime = directory / "jobs"
        self.runtime.mkdir()
        self.outlast, self.shim = directory / "outlast", directory / "outlast-shim"
        for program in (self.outlast, self.shim):
            program.write_text(FAKE)
            program.chmod(0o755)
        self.config = directory / "config.json"
        self.config.write_text(
            json.dumps({"outlast": str(self.outlast), "shim": str(self.shim), "runtime": str(self.runtime)})
        )

    @property
    def calls(self) -> str:
        """How the product's command was called, and with which variables."""
        path = self.outlast.with_name("outlast.calls")
        return path.read_text() if path.exists() else ""

    def run(self, event: str, *changes: tuple[str, str], hook: Path = HOOK) -> Outcome:
        """Run the hook on the captured input of *event*, in which *changes* (old, new) were made."""
        text = (HERE / "data" / f"{event}.in").read_text()
        # The captured job is of a user who is not on this machine.
        text = text.replace("euser=alice", f"euser={pwd.getpwuid(os.geteuid()).pw_name}")
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        source, output = self.directory / "event.in", self.directory / "event.out"
        source.write_text(text)
        done = subprocess.run(
            [
                PROGRAM,
                "--hook",
                "-i",
                str(source),
                "-o",
                str(output),
                "-L",
                str(self.directory),
                "-e",
                "4095",
                str(hook),
            ],
            env={"PATH": "/bin:/usr/bin", "PBS_HOOK_CONFIG_FILE": str(self.config)},
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return Outcome(done.returncode, output.read_text())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A host of its own for each test."""
    return Site(tmp_path)


ASKS = ("Checkpoint=w=1", "Checkpoint=w=7")
IS_OURS = (",N=3,", ",N=3,OUTLAST_INTERVAL=30s,")


def marked(site: Site, why: str) -> Path:
    """The file by which a manager asks for another run of the captured job."""
    marker = site.runtime / "48.h3srv.requeue"
    marker.write_text(why + "\n")
    return marker


def test_the_shim_takes_the_place_of_the_jobs_shell(site: Site) -> None:
    outcome = site.run("execjob_launch", ASKS)
    assert (outcome.code, outcome.value("accept")) == (0, "True")
    assert outcome.value("progname") == str(site.shim)
    # MoM leaves out the first, and takes the program's own name for it.
    assert outcome.argv == [str(site.shim), "--interval", "7m", "--", "/bin/bash", "-l"]
    variables = str(outcome.value("env")).split(",")
    assert {"OUTLAST_JOB_ID=48.h3srv", "OUTLAST_EPOCH=0", "TMPDIR=/var/tmp/pbs.48.h3srv"} <= set(variables)


def test_the_manager_is_told_of_moms_ways(site: Site) -> None:
    site.run("execjob_launch", ASKS)
    first, *variables = site.calls.splitlines()
    assert first == "hook pbs-launch"
    assert f"OUTLAST_JOB_UID={os.geteuid()}" in variables
    assert "OUTLAST_PBS_ID=48.h3srv" in variables
    assert "OUTLAST_KEEP=/var/tmp/pbs.48.h3srv" in variables, "home is no directory of this run's"
    assert "OUTLAST_RUNS_AHEAD=0" in variables, (
        "by which the manager knows a run whose run_version it is not told"
    )
    assert any(re.fullmatch(r"OUTLAST_ATTACH=/.*/bin/pbs_attach", one) for one in variables)
    assert any(re.fullmatch(r"OUTLAST_SPOOL=/.*/spool", one) for one in variables)


def test_the_epoch_is_the_number_of_runs_before_this_one(site: Site) -> None:
    outcome = site.run("execjob_launch", ASKS, ("run_version=1", "run_version=4"))
    assert "OUTLAST_EPOCH=3" in str(outcome.value("env")).split(",")


def test_the_end_of_the_walltime_is_told(site: Site) -> None:
    assert "OUTLAST_END_TIME" not in str(site.run("execjob_launch", ASKS).value("env")), "there is none"
    limit = (
        "Resource_List[ncpus]=1",
        "Resource_List[ncpus]=1\npbs.event().job.Resource_List[walltime]=01:00:00",
    )
    used = ("resources_used[walltime]=00:00:00", "resources_used[walltime]=00:10:00")
    # The captured job began at 1795304613.
    for changes, end in (([limit], 1795308213), ([limit, used], 1795307613)):
        outcome = site.run("execjob_launch", ASKS, *changes)
        assert f"OUTLAST_END_TIME={end}" in str(outcome.value("env")).split(",")


def test_seconds_are_asked_for_with_a_variable(site: Site) -> None:
    outcome = site.run("execjob_launch", ("Checkpoint=w=1", "Checkpoint=u"), IS_OURS)
    assert outcome.argv[1:3] == ["--interval", "30s"]


@pytest.mark.parametrize(
    "changes",
    [
        [("Checkpoint=w=1", "Checkpoint=u")],
        [("Checkpoint=w=1", "Checkpoint=n"), IS_OURS],
        [("Checkpoint=w=1", "Checkpoint=s")],
        [ASKS, ("PBS_TASKNUM=1", "PBS_TASKNUM=2")],
        [ASKS, ("exec_host2=h3m1:15002/0", "exec_host2=h3m1:15002/0+h3m2:15002/0")],
        [ASKS, ("PBS_ENVIRONMENT=PBS_BATCH", "PBS_ENVIRONMENT=PBS_INTERACTIVE")],
    ],
    ids=["asked-for-none", "never", "at-shutdown", "second-task", "two-hosts", "interactive"],
)
def test_other_tasks_are_left_as_they_are(site: Site, changes: list[tuple[str, str]]) -> None:
    outcome = site.run("execjob_launch", *changes)
    assert (outcome.value("accept"), outcome.value("progname")) == ("True", "/bin/bash")
    assert outcome.argv == []
    assert site.calls == ""


def test_a_manager_that_does_not_start_is_left_to_the_shim(site: Site) -> None:
    site.outlast.with_name("outlast.fails").touch()
    outcome = site.run("execjob_launch", ASKS)
    assert (outcome.value("accept"), outcome.value("progname")) == ("True", str(site.shim))


def test_a_first_run_needs_no_shim_and_a_later_one_is_not_begun_without(site: Site) -> None:
    site.shim.unlink()
    first = site.run("execjob_launch", ASKS)
    assert (first.value("accept"), first.value("progname"), first.argv) == ("True", "/bin/bash", [])
    later = site.run("execjob_launch", ASKS, ("run_version=1", "run_version=2"))
    assert (later.value("accept"), later.value("progname")) == ("True", "/bin/sh")
    done = subprocess.run(
        [str(later.value("progname")), *later.argv[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 75
    assert "not begun from its start" in done.stderr


@pytest.mark.parametrize("event", ["execjob_launch", "execjob_epilogue"])
@pytest.mark.parametrize("fault", ["config", "run_version", "user"])
def test_no_fault_of_the_hook_ends_a_job(site: Site, event: str, fault: str) -> None:
    changes = {"config": ASKS, "run_version": ("run_version=1", "run_count=1"), "user": ("egroup", "egroup")}[
        fault
    ]
    if fault == "config":
        site.config.write_text("{")
        changes = ("Checkpoint=w=1", "Checkpoint=w=1")
    if fault == "user":
        changes = (f"euser={pwd.getpwuid(os.geteuid()).pw_name}", "euser=nobody-of-that-name")
    outcome = site.run(event, changes)
    assert (outcome.code, outcome.value("accept")) == (0, "True")
    if event == "execjob_launch":
        assert outcome.value("progname") == "/bin/bash"


@pytest.mark.parametrize("why", ["held", "left its host in good time"])
def test_a_job_that_ended_its_run_with_a_checkpoint_is_given_back_to_the_queue(site: Site, why: str) -> None:
    marker = marked(site, why)
    assert site.run("execjob_epilogue", ("run_count=1", "run_count=99")).value("job._rerun") == "True"
    assert not marker.exists()
    assert site.run("execjob_epilogue").value("job._rerun") is None, "the marker counts once"


@pytest.mark.parametrize(("runs", "again"), [(15, "True"), (16, None)])
def test_a_job_that_cannot_be_brought_back_has_a_budget_below_pbss_own(
    site: Site, runs: int, again: str | None
) -> None:
    marked(site, "the store does not answer")
    outcome = site.run("execjob_epilogue", ("run_count=1", f"run_count={runs}"))
    assert outcome.value("job._rerun") == again


@pytest.mark.parametrize(
    ("status", "changes", "again"),
    [
        (7, [IS_OURS], None),
        (271, [IS_OURS], None),
        (-29, [IS_OURS], None),
        (-5, [IS_OURS], "True"),
        (-5, [], None),
        (75, [IS_OURS], None),
        (75, [IS_OURS, ("run_version=1", "run_version=2")], "True"),
    ],
    ids=["own-exit", "killed", "walltime", "host-came-back", "not-ours", "own-75", "no-manager"],
)
def test_only_what_the_job_did_not_do_itself_is_run_again(
    site: Site, status: int, changes: list[tuple[str, str]], again: str | None
) -> None:
    outcome = site.run("execjob_epilogue", ("Exit_status=7", f"Exit_status={status}"), *changes)
    assert outcome.value("job._rerun") == again


def test_the_manager_is_told_of_the_end(site: Site) -> None:
    (site.runtime / "48.h3srv").mkdir()
    site.run("execjob_epilogue")
    assert site.calls.splitlines() == ["hook pbs-end", "OUTLAST_JOB_ID=48.h3srv"]


def test_the_manager_of_a_job_that_is_discarded_is_told_but_not_beside_a_hold(site: Site) -> None:
    (site.runtime / "48.h3srv").mkdir()
    marked(site, "held")
    assert site.run("execjob_end").value("accept") == "True"
    assert site.calls == "", "MoM would answer PBS no more"
    (site.runtime / "48.h3srv.requeue").unlink()
    site.run("execjob_end")
    assert site.calls.splitlines() == ["hook pbs-end", "OUTLAST_JOB_ID=48.h3srv"]


def test_a_host_that_starts_is_cleared(site: Site) -> None:
    outcome = site.run("exechost_periodic", ("type=exechost_periodic", "type=exechost_startup"))
    assert outcome.value("accept") == "True"
    assert site.calls.splitlines() == ["hook pbs-startup"]


@pytest.fixture
def submit(site: Site) -> Callable[..., Outcome]:
    """Run the hook for a new job."""
    if not SERVER_EVENTS:
        pytest.skip("pbs_python runs the events of the server inside the server: test_chain.py has them")
    return lambda *changes: site.run("queuejob", *changes)


@pytest.mark.parametrize(
    ("asked", "stands", "interval"),
    [
        ("w=5", "w", "5m"),
        ("c=90", "c", "90m"),
        ("c", None, "10m"),
        ("w", None, "10m"),
        ("u", None, None),
        ("n", None, None),
    ],
)
def test_minutes_become_an_interval(
    submit: Callable[..., Outcome], asked: str, stands: str | None, interval: str | None
) -> None:
    outcome = submit(("Checkpoint=w=5", f"Checkpoint={asked}"))
    assert outcome.value("accept") == "True"
    # Outlast keeps the time: with a number MoM's own timer would run beside it.
    assert outcome.value("job.Checkpoint") == stands
    wanted = None if interval is None else f"OUTLAST_INTERVAL={interval}"
    assert wanted is None or wanted in str(outcome.value("job.Variable_List")).split(",")
    assert wanted is not None or outcome.value("job.Variable_List") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("N=3", "OUTLAST_INTERVAL=3"), "not a time between 1s and 30d"),
        (("Checkpoint=w=5", "Checkpoint=w=99999"), "not a time between 1s and 30d"),
        (("Priority=0", "interactive=1"), "interactive"),
        (("Rerunable=True", "Rerunable=False"), "-r n"),
        (
            ("select]=1:ncpus=1", "select]=2:ncpus=1\npbs.event().job.Resource_List[place]=scatter"),
            "several hosts",
        ),
    ],
    ids=["no-unit", "too-long", "interactive", "not-rerunnable", "several-hosts"],
)
def test_what_cannot_be_had_is_refused_with_the_reason(
    submit: Callable[..., Outcome], change: tuple[str, str], words: str
) -> None:
    changes = [("Checkpoint=w=5", "Checkpoint=u")] if "OUTLAST" in change[1] else []
    changes += [("place]=pack", "ncpus]=2")] if "scatter" in change[1] else []
    outcome = submit(*changes, change)
    assert outcome.value("accept") == "False"
    assert words in str(outcome.value("reject_msg"))


@pytest.mark.parametrize(
    ("running", "had", "asked", "told"),
    [
        (True, True, "w=2", "2m"),
        (True, True, "n", "never"),
        (False, True, "w=2", None),
    ],
    ids=["a-running-job", "no-more", "a-waiting-job"],
)
def test_qalter_reaches_the_manager_of_a_running_job(
    site: Site, running: bool, had: bool, asked: str, told: str | None
) -> None:
    if not SERVER_EVENTS:
        pytest.skip("pbs_python runs the events of the server inside the server")
    outcome = site.run(
        "modifyjob",
        ("Checkpoint=w=9", f"Checkpoint={asked}"),
        ("state=R", "state=R" if running else "state=Q"),
    )
    assert outcome.value("accept") == "True"
    if told is None:
        assert "OUTLAST_INTERVAL=2m" in str(outcome.value("job.Variable_List")).split(",")
        assert site.calls == ""
        return
    assert outcome.value("job.Variable_List") is None, "PBS does not let a running job's variables be changed"
    eventually(lambda: "OUTLAST_INTERVAL" in site.calls, within=10, what="a call of the product")
    assert site.calls.splitlines() == [
        "hook pbs-interval",
        f"OUTLAST_INTERVAL={told}",
        "OUTLAST_JOB_ID=48.h3srv",
    ]


def test_a_running_job_without_checkpoints_is_refused_an_interval(site: Site) -> None:
    if not SERVER_EVENTS:
        pytest.skip("pbs_python runs the events of the server inside the server")
    outcome = site.run("modifyjob", ("OUTLAST_INTERVAL=30s", "M=1"))
    assert outcome.value("accept") == "False"
    assert "before its next run" in str(outcome.value("reject_msg"))
