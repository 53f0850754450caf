"""A cluster that is up (scripts/testbed), its jobs and what they leave behind, for tests of the whole chain.

The fixtures and the hook here are those of every conftest.py that imports them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "testbed"
DEFAULT_STATE = Path("/var/lib/outlast-testbed")
NODES = ("n1", "n2", "n3")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

_LOG_LINE = re.compile(r"(?P<time>[-0-9]{10} [0-9:]{8},[0-9]{3}) outlast: (?P<event>[a-z-]+): (?P<text>.*)")


@dataclasses.dataclass(frozen=True, order=True)
class Event:
    """One line of a manager's log on one node; *time* is Unix time, and all hosts have one clock."""

    time: float
    node: str
    event: str
    text: str


def eventually(true: Callable[[], object], *, within: float, what: str) -> None:
    """Return as soon as *true* is; fail after *within* seconds, saying that there was no *what*."""
    until = time.monotonic() + within
    while not true():
        assert time.monotonic() < until, f"not within {within:g} s: {what}"
        time.sleep(0.05)


_CLUSTER = pytest.StashKey["Cluster"]()


class Cluster:
    """The testbed that is up, as its users and its operator see it, and as its hosts' disks show it."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.touched: dict[str, Job] = {}  # what a failed test tells of
        self._programs: dict[str, str] = {}

    def testbed(self, *words: str, within: float = 60) -> str:
        """Run scripts/testbed with *words*."""
        done = subprocess.run(
            [SCRIPT, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=within,
            env=os.environ | {"OUTLAST_TESTBED_DIR": str(self.state)},
        )
        assert done.returncode == 0, (
            f"testbed {' '.join(words)}: {done.returncode}: {done.stdout}{done.stderr}"
        )
        return done.stdout

    def try_on(
        self, host: str, *command: str, user: bool = False, stdin: str = "", within: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run *command* on *host* as root or as alice; whatever comes of it."""
        return subprocess.run(
            [SCRIPT, "user" if user else "exec", host, *command],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=within,
            env=os.environ | {"OUTLAST_TESTBED_DIR": str(self.state)},
        )

    def on(self, host: str, *command: str, user: bool = False, stdin: str = "", within: float = 60) -> str:
        """Run *command* on *host*, which must succeed; return what it said."""
        done = self.try_on(host, *command, user=user, stdin=stdin, within=within)
        assert done.returncode == 0, f"{host}: {shlex.join(command)}: {done.returncode}: {done.stderr}"
        return done.stdout

    def submit(
        self, script: str, *options: str, checkpoint: str | None = "2s", directory: str | None = None
    ) -> Job:
        """Submit *script*, a program for /bin/sh, as alice, in a directory of its own unless one is given."""
        directory = directory or self.new_directory()
        flag = [f"--checkpoint={checkpoint}"] if checkpoint is not None else []
        command = ["sbatch", "--parsable", "-D", directory, "-o", "out", *flag, *options]
        job_id = self.on("ctl", *command, user=True, stdin=f"#!/bin/sh\n{script}\n").strip()
        return Job(self, job_id, directory)

    def new_directory(self) -> str:
        """Make a directory of alice's that all hosts see; return its path there."""
        directory = f"/shared/alice/{uuid.uuid4().hex[:8]}"
        self.on("ctl", "mkdir", directory, user=True)
        return directory

    def file(self, path: str) -> Path:
        """Where this machine sees the cluster's file *path*, which is below /shared."""
        return self.state / "shared" / Path(path).relative_to("/shared")

    def program(self, name: str) -> str:
        """The path, on all hosts, of a program of tests/programs: `lu`, built there, or `lu.py`."""
        if not self._programs:
            source, built = self.file("/shared/programs.source"), "/shared/programs"
            source.mkdir(exist_ok=True)
            for file in (ROOT / "tests" / "programs").iterdir():
                if file.is_file():
                    (source / file.name).write_bytes(file.read_bytes())
            self.on("ctl", "make", "-s", "-C", "/shared/programs.source", f"O={built}")
            for path in source.glob("*.py"):
                self._programs[path.name] = f"/usr/bin/python3 /shared/programs.source/{path.name}"
            for path in self.file(built).iterdir():
                self._programs[path.name] = f"{built}/{path.name}"
        return self._programs[name]

    # --- faults ------------------------------------------------------------------------------------------

    def cut_power(self, node: str) -> float:
        """Cut *node*'s power in this very moment; return when that was (Unix time)."""
        pid = int((self.state / "hosts" / node / "pid").read_text().split()[0])
        now = time.time()
        os.kill(pid, signal.SIGKILL)
        self.testbed("kill-node", node)
        return now

    @contextlib.contextmanager
    def store_cut_off(self) -> Iterator[None]:
        """Pull the store's cable for a while."""
        self.testbed("cut", "store")
        try:
            yield
        finally:
            self.testbed("heal", "store")

    def mend(self) -> None:
        """Bring all hosts back, end all jobs, and wait until every node is idle."""
        within = 300 if (self.state / "machines").exists() else 60
        for host in json.loads(self.testbed("status", "--json"))["hosts"]:
            if host["cut"]:
                self.testbed("heal", host["host"])
            if host["state"] == "down":
                self.testbed("start-node", host["host"], within=within)
        self.on("ctl", "scancel", "--user=alice", within=within)
        eventually(lambda: self.idle() == set(NODES), within=within, what="all nodes idle")

    def idle(self) -> set[str]:
        """The nodes that Slurm would give to a job, and that have none."""
        lines = self.on("ctl", "sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
        return {line.split()[0] for line in lines if line.endswith(" idle")}

    def left(self, node: str, job_id: str) -> list[str]:
        """What there still is of a job on *node*: processes of it and of its manager, files of theirs."""
        # By standard input, that its own words are not found.
        command = f"ls -d /run/outlast/jobs/{job_id} /run/outlast/jobs/{job_id}.*; ps -ww -eo pid,cgroup,args"
        lines = self.try_on(node, "sh", stdin=command).stdout.splitlines()
        marks = (f"/run/outlast/jobs/{job_id}", f"/job_{job_id}/", f"manager --job {job_id} ")
        return [line for line in lines if any(mark in line + " " for mark in marks)]


class Job:
    """One job. What is told of it here comes from Slurm, from its output and from its managers' logs."""

    def __init__(self, cluster: Cluster, job_id: str, directory: str) -> None:
        self.cluster = cluster
        self.id = job_id
        self.directory = directory
        cluster.touched[job_id] = self

    def facts(self) -> dict[str, str]:
        """What "scontrol show job" says."""
        self.cluster.touched[self.id] = self
        # An array shares its id with one of its tasks, and all of them are shown.
        lines = self.cluster.on("ctl", "scontrol", "show", "job", "-o", self.id).splitlines()
        mine = next(line for line in lines if line.startswith(f"JobId={self.id} "))
        return dict(re.findall(r"([A-Za-z:/]+)=(\S*)", mine))

    @property
    def state(self) -> str:
        """Slurm's word for the state that it is in."""
        return self.facts()["JobState"]

    @property
    def node(self) -> str:
        """The node that it runs on, or ran on last."""
        return self.facts()["NodeList"]

    @property
    def restarts(self) -> int:
        """How often it was requeued."""
        return int(self.facts()["Restarts"])

    @property
    def exit_code(self) -> str:
        """Exit code and signal as Slurm writes them, such as 7:0."""
        return self.facts()["ExitCode"]

    def path(self, name: str = "out") -> Path:
        """Where this machine sees the file *name* of its directory."""
        return self.cluster.file(f"{self.directory}/{name}")

    def lines(self, name: str = "out") -> list[str]:
        """The lines of its output; of a line that is being written nothing."""
        try:
            return self.path(name).read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []

    def history(self, event: str = "") -> list[Event]:
        """What its managers have logged on all nodes, or only of one kind, in order."""
        self.cluster.touched[self.id] = self
        found = []
        for node in NODES:
            log = self.cluster.state / "hosts" / node / "upper" / f"var/log/outlast/jobs/{self.id}.log"
            if not log.exists():
                continue
            for line in log.read_text().splitlines():
                if (match := _LOG_LINE.match(line)) and event in ("", match["event"]):
                    moment = datetime.strptime(match["time"] + "000", "%Y-%m-%d %H:%M:%S,%f")
                    when = moment.replace(tzinfo=UTC).timestamp()
                    found.append(Event(when, node, match["event"], match["text"]))
        return sorted(found)

    def checkpoints(self) -> int:
        """How many of its checkpoints have reached the store."""
        return len(self.history("checkpoint"))

    def events(self) -> list[dict[str, Any]]:
        """What "outlast events" says, to its owner."""
        said = self.cluster.on("ctl", "outlast", "events", "--json", self.id, user=True)
        return list(json.loads(said)["events"])

    def wait_for(self, event: str, *, count: int = 1, within: float = 30) -> Event:
        """Wait until its managers have logged *event* so many times; return the last of these."""
        eventually(
            lambda: len(self.history(event)) >= count,
            within=within,
            what=f"{count} times {event!r} of job {self.id}",
        )
        return self.history(event)[count - 1]

    def wait_for_line(self, line: str, *, within: float = 30) -> None:
        """Wait until its output has *line*."""
        eventually(lambda: line in self.lines(), within=within, what=f"line {line!r} of job {self.id}")

    def wait_for_state(self, *states: str, within: float = 60) -> str:
        """Wait until Slurm says one of *states*; return which."""
        eventually(
            lambda: self.state in states, within=within, what=f"job {self.id} in {' or '.join(states)}"
        )
        return self.state

    def wait_for_end(self, *, within: float = 60) -> tuple[str, str]:
        """Wait until it has ended for good; return state and exit code."""
        self.wait_for_state(*ENDED, within=within)
        facts = self.facts()
        return facts["JobState"], facts["ExitCode"]

    def cancel(self) -> None:
        """Have Slurm end it, as its owner."""
        self.cluster.on("ctl", "scancel", self.id, user=True)

    def requeue(self) -> None:
        """Have Slurm end this run of it and begin another, as its owner."""
        self.cluster.on("ctl", "scontrol", "requeue", self.id, user=True)

    def tree(self) -> dict[int, str]:
        """Its processes as "scontrol listpids" tells them on its node: their PIDs there and command lines."""
        node = self.node
        said = self.cluster.try_on(node, "scontrol", "listpids", self.id).stdout
        pids = [line.split()[0] for line in said.splitlines()[1:]]
        shown = self.cluster.try_on(node, "ps", "-o", "pid=,args=", "-p", ",".join(pids) or "0").stdout
        rows = (line.split(None, 1) for line in shown.splitlines())
        return {int(pid): arguments for pid, arguments in rows}

    def report(self) -> str:
        """All that there is to know of it, for somebody who reads of a failed test."""
        parts = [f"{shlex.join(f'{key}={value}' for key, value in self.facts().items())}"]
        parts += ["--- out", *self.lines()[-30:]]
        parts += ["--- outlast events", self.cluster.try_on("ctl", "outlast", "events", self.id).stdout]
        for node in NODES:
            log = self.cluster.state / "hosts" / node / "upper" / f"var/log/outlast/jobs/{self.id}.log"
            if log.exists():
                parts += [f"--- manager's log on {node}", *log.read_text().splitlines()[-60:]]
        return "\n".join(parts)


def together(jobs: Sequence[Job], act: Callable[[Job], object]) -> None:
    """Do *act* with each of *jobs*."""
    for job in jobs:
        act(job)


@pytest.fixture(scope="session")
def shared_cluster(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    need: Callable[[str, str | None], None],
) -> Iterator[Cluster]:
    """The testbed in $OUTLAST_TESTBED_DIR if it is up, else one that is up for these tests only."""
    need("slurm", None if os.geteuid() == 0 else "the testbed must be root")
    state = Path(os.environ.get("OUTLAST_TESTBED_DIR") or DEFAULT_STATE).resolve()
    if (state / "up").exists():
        yield request.config.stash.setdefault(_CLUSTER, Cluster(state))
        return
    own = request.config.stash.setdefault(_CLUSTER, Cluster(tmp_path_factory.mktemp("cluster") / "bed"))
    own.testbed("up", within=500)
    try:
        yield own
    finally:
        own.testbed("down")


@pytest.fixture(scope="module")
def module_cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster for fixtures whose jobs serve all tests of a module; nothing is left when it is done."""
    shared_cluster.mend()
    yield shared_cluster
    shared_cluster.mend()


@pytest.fixture
def cluster(module_cluster: Cluster) -> Cluster:
    """The cluster, for a test that leaves all hosts on."""
    return module_cluster


@pytest.fixture
def cluster_to_break(module_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, for a test that breaks it: all is mended afterwards, and no job is left."""
    yield module_cluster
    module_cluster.mend()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to a failed test's report what the jobs that it looked at have been through."""
    report = yield
    cluster = item.config.stash.get(_CLUSTER, None)
    if cluster is not None and (report.failed or report.when == "call"):
        for job in cluster.touched.values() if report.failed else ():
            with contextlib.suppress(Exception):
                report.sections.append((f"job {job.id}", job.report()))
        cluster.touched.clear()
    return report
