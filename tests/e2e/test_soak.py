"""Nodes that lose their power again and again, whatever their jobs are at: it shows nowhere in what the jobs do.

Other than in test_node_kills.py nobody waits between two kills until all is well again. $OUTLAST_E2E_SOAK says how
many kills there are, $OUTLAST_E2E_SEED which moments these are.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator

import pytest

from tests.cluster import NODES, Cluster, eventually
from tests.e2e import clocked
from tests.e2e.conftest import KILLS_DONE, Kills
from tests.e2e.soaking import Soak, Task, Work

KILLS = int(os.environ.get("OUTLAST_E2E_SOAK", "2"))
SEED = int(os.environ.get("OUTLAST_E2E_SEED", random.SystemRandom().randrange(10**6)))
# As many as take a job of the soak about 40 s without a kill, or less where there are few kills.
STEPS = min(160, 10 * KILLS)
PROGRAMS = {
    "lu": (f"400 {STEPS}", ("COMPLETED", "0:0")),
    "cellular.py": (f"64 {STEPS + 20} --fail-at {STEPS} 7", ("FAILED", "7:0")),
    "matmul": (f"200 {STEPS} --threads 2", ("COMPLETED", "0:0")),
    "lu.py": (f"40 {STEPS}", ("COMPLETED", "0:0")),
    "cellular": (f"256 {STEPS} --signal-at {STEPS} ABRT", ("FAILED", "0:6")),
}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400 + 30 * KILLS)]

# The loss of a node is no fault of the job's, but so many within a day are beyond what sites allow by default.
PATIENT = "[restart]\nbudget = 1000\nbackoff = 0\n"
WATCHER = "/etc/outlast/conf.d/soak.toml"


def configure(cluster: Cluster, text: str) -> None:
    """Have the watcher start again with *text* beside its configuration."""
    script = 'mkdir -p "${0%/*}"; cat >"$0"; [ -s "$0" ] || rm "$0"; kill $(pgrep -f "[o]utlast watcher")'
    log = cluster.state / "hosts/ctl/upper/var/log/outlast/watcher.log"
    before = log.read_text().count("acts from now on")
    cluster.on("ctl", "sh", "-c", script, WATCHER, stdin=text)
    eventually(
        lambda: log.read_text().count("acts from now on") > before, within=30, what="the watcher at work"
    )


@pytest.fixture(scope="module")
def soak(module_cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Soak]:
    """All of it, with every job at its end."""
    done = request.config.stash.setdefault(KILLS_DONE, {})
    kills = done.setdefault("soak", Kills(SEED))
    works = []
    for name, (arguments, end) in PROGRAMS.items():
        program = module_cluster.program(name)
        alone = module_cluster.try_on("ctl", "sh", "-c", f"{program} {arguments}", within=240)
        works.append(Work(f"{program} {arguments}", alone.stdout.splitlines(), end))
    configure(module_cluster, PATIENT)
    try:
        soak = Soak(module_cluster, random.Random(SEED), kills)  # noqa: S311 - no secret
        soak.go(KILLS, works, at_once=2)
        yield soak
    finally:
        configure(module_cluster, "")


def test_every_job_ends_as_if_nothing_had_happened(soak: Soak) -> None:
    assert {task.job.id: task.ended for task in soak.tasks} == {task.job.id: task.end for task in soak.tasks}


def test_every_line_is_written_once(soak: Soak) -> None:
    for task in soak.tasks:
        if task.work is not None:
            assert task.lines() == task.work.lines
        else:
            numbers = [line.number for line in clocked.lines(task.job, task.out)]
            assert numbers == list(range(len(task.lines())))


def test_a_run_that_loses_its_node_is_followed_by_another_and_nothing_else_ends_one(soak: Soak) -> None:
    for task in soak.tasks:
        *lost, last = soak.runs[task.job.id]
        assert task.restarts == len(lost)
        # Slurm, too, takes a node for lost at times, which has power: one beside one that has none. PENDING is what
        # the watcher queued again, whose node was back before it was missed.
        assert {run.state for run in lost} <= {"NODE_FAIL", "PENDING"}, (task.job.id, lost)
        assert not any(node == last.node and last.had(when, -1) for when, node in soak.killed), task.job.id


def test_no_two_copies_of_a_job_compute(soak: Soak) -> None:
    for task in soak.tasks:
        if task.work is None:
            assert_one_at_a_time(soak, task)


def assert_one_at_a_time(soak: Soak, task: Task) -> None:
    """Check that each line was written where Slurm had the job at that time, and that places do not alternate."""
    runs = soak.runs[task.job.id]
    written = [*clocked.lines(task.job, task.out), *clocked.lost_lines(task.job, task.out)]
    for line in written:
        assert any(run.node == line.host and run.had(line.time) for run in runs), (task.job.id, line)
    hosts = [line.host for line in sorted(written, key=lambda line: line.time)]
    places = [host for number, host in enumerate(hosts) if number == 0 or hosts[number - 1] != host]
    nodes = iter(run.node for run in runs)
    assert all(place in nodes for place in places), (places, [run.node for run in runs])


def test_a_job_goes_on_from_the_newest_checkpoint_that_it_has(soak: Soak) -> None:
    for task in soak.tasks:
        newest = (-1, -1)
        for event in task.job.history():
            found = re.match(r"[0-9]+@([0-9]+)\.([0-9]+)", event.text)
            name = (int(found[1]), int(found[2])) if found else newest
            if event.event == "checkpoint":
                newest = name
            elif event.event == "restored":
                assert name >= newest, (task.job.id, event)
            elif event.event == "begun-again":
                assert newest == (-1, -1), (task.job.id, event)


def test_no_checkpoint_and_no_restore_failed(soak: Soak) -> None:
    failures = {"checkpoint-failed", "restore-failed", "not-durable", "no-capsule", "no-guard", "not-started"}
    found = [
        (task.job.id, event)
        for task in soak.tasks
        for event in task.job.history()
        # The processes of a node whose power is cut here end one after the other, and not at once.
        if event.event in failures
        and not any(node == event.node and abs(when - event.time) < 2 for when, node in soak.killed)
    ]
    assert found == []


def test_nothing_of_the_jobs_is_left_anywhere(soak: Soak) -> None:
    command = "ls /run/outlast/jobs; ps -ww -eo user,args | grep -E '^alice |[o]utlast|[c]riu'"

    def left() -> list[str]:
        found = [
            line
            for node in NODES
            for line in soak.cluster.try_on(node, "sh", stdin=command).stdout.splitlines()
        ]
        leases = soak.cluster.state / "hosts/store/upper/srv/outlast/ckpt/leases/testbed"
        # What tells of a crash stays for a minute after it was looked into.
        return found + [path.name for path in leases.glob("*") if "@_ended@" not in path.name]

    eventually(lambda: not left(), within=120, what="nothing left on the nodes, and no lease")
