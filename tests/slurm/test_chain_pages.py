"""While the pages of a restored job follow: its store fails, its manager dies, it ends, it is to be saved again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster import Cluster, Job, eventually
from tests.slurm.test_chain_files import leave
from tests.slurm.test_chain_manager import manager_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

# Its memory, 48 MiB of noise, is hashed in each step, so that no wrong page of it goes unseen.
SCRIPT = """
cat >hash.py <<'END'
import hashlib, os, random, time
memory = random.Random(1).randbytes(48 << 20)
digest = b""
for step in range(STEPS):
    digest = hashlib.sha256(digest + memory).digest()
    print(step, digest.hex(), flush=True)
    while step == 7 and not os.path.exists("go"):
        time.sleep(0.05)
END
exec python3 hash.py
"""
STEPS = 12
# Of it a second carries about 6 MiB: there is time to do something while pages follow.
SLOW = "50mbit"


def expected() -> list[str]:
    """The output of an uninterrupted run."""
    memory, digest, lines = random.Random(1).randbytes(48 << 20), b"", []  # noqa: S311
    for step in range(STEPS):
        digest = hashlib.sha256(digest + memory).digest()
        lines.append(f"{step} {digest.hex()}")
    return lines


def rate(cluster: Cluster, words: str) -> None:
    """Have the store's network carry so much, or with "" all that it can."""
    cluster.try_on("store", "tc", "qdisc", "del", "dev", "eth0", "root")
    if words:
        tbf = ["tbf", "rate", words, "burst", "128kb", "latency", "200ms"]
        cluster.on("store", "tc", "qdisc", "add", "dev", "eth0", "root", *tbf)


@pytest.fixture
def slow(cluster_to_break: Cluster) -> Iterator[Cluster]:
    """The cluster; what its store's network can carry is put right afterwards."""
    try:
        yield cluster_to_break
    finally:
        rate(cluster_to_break, "")


def await_percent(job: Job, node: str, percent: int) -> None:
    """Return when so many of the job's pages are there."""
    look = f"""
import json, time
for _ in range(3000):
    try:
        found = json.load(open("/run/outlast/jobs/{job.id}/pages.json"))
    except OSError:
        time.sleep(0.01)
        continue
    if found["over"]:
        raise SystemExit("all of them are there already")
    if found["pages"] * 100 >= {percent} * found["total"]:
        raise SystemExit(0)
    time.sleep(0.01)
raise SystemExit("they do not come")
"""
    job.cluster.on(node, "python3", "-c", look)


def ask_for_checkpoint(job: Job, node: str) -> None:
    """Have a checkpoint taken, without waiting for it."""
    job.cluster.on(node, "sh", "-c", f"outlast checkpoint {job.id} >/dev/null 2>&1 </dev/null &")


def bring_back(cluster: Cluster) -> tuple[Job, str]:
    """Have a job go on elsewhere, so slowly that its pages follow for a while; return it and where."""
    job = cluster.submit(SCRIPT.replace("STEPS", str(STEPS)))
    job.wait_for("checkpoint", count=2, within=60)
    eventually(lambda: len(job.lines()) >= 8, within=60, what="the job has come to its middle")
    job.wait_for("checkpoint", count=job.checkpoints() + 1)
    rate(cluster, SLOW)
    leave(cluster, job)
    node = job.wait_for("restored", within=90).node
    return job, node


def assert_right(cluster: Cluster, job: Job) -> None:
    """Let it end, and check that it has computed what an uninterrupted run computes."""
    job.path("go").touch()

    assert job.wait_for_end(within=120) == ("COMPLETED", "0:0")
    assert [line for line in job.lines() if not line.startswith("slurmstepd")] == expected()


def kill_sessions(cluster: Cluster) -> None:
    """Kill every process of the store that serves a connection."""
    cluster.on("store", "sh", stdin="kill -9 $(pgrep -f '^sshd(-session)?: outlast')\n")


def cut_cable(cluster: Cluster) -> None:
    """Pull the store's cable for three seconds."""
    with cluster.store_cut_off():
        time.sleep(3)


def slow_down(cluster: Cluster) -> None:
    """Have the store's network all but stop for three seconds."""
    rate(cluster, "2mbit")
    time.sleep(3)
    rate(cluster, SLOW)


FAULTS: dict[str, Callable[[Cluster], None]] = {
    "killed": kill_sessions,
    "cut": cut_cable,
    "slowed": slow_down,
}


def test_result_is_right_when_the_store_is_killed_cut_off_and_slowed_while_pages_follow(
    slow: Cluster,
) -> None:
    job, node = bring_back(slow)
    ask_for_checkpoint(job, node)
    before = job.checkpoints()
    for percent, fault in zip((10, 50, 90), FAULTS.values(), strict=True):
        await_percent(job, node, percent)
        fault(slow)
    arrived = job.wait_for("pages-arrived", within=60)
    taken = job.wait_for("checkpoint", count=before + 1)

    assert_right(slow, job)
    assert job.restarts == 1
    # What was asked for while pages followed is taken when they are in.
    assert taken.time > arrived.time
    assert not job.history("pages-failed")
    # A slow store is no lost lease.
    assert not job.history("frozen")


@pytest.fixture
def with_time(need: Callable[[str, str | None], None]) -> None:
    """Only where there is time for what needs some fifteen minutes more."""
    promised = "matrix" in os.environ.get("OUTLAST_TEST_NEEDS", "").split(",")
    need("matrix", None if promised else "fifteen minutes more, when $OUTLAST_TEST_NEEDS has matrix")


@pytest.mark.long
@pytest.mark.usefixtures("with_time")
@pytest.mark.parametrize("percent", [10, 50, 90])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_result_is_right_whenever_the_store_fails(slow: Cluster, fault: str, percent: int) -> None:
    job, node = bring_back(slow)
    await_percent(job, node, percent)
    FAULTS[fault](slow)
    job.wait_for("pages-arrived", within=60)

    assert_right(slow, job)


@contextlib.contextmanager
def impatient(cluster: Cluster) -> Iterator[None]:
    """Have managers that start meanwhile wait for two seconds only for a store that gives no pages."""
    path = "/etc/outlast/outlast.toml"
    for node in ("n1", "n2", "n3"):
        cluster.on(node, "cp", "-p", path, f"{path}.before")
        cluster.on(node, "sh", "-c", f"printf '\\n[restart]\\npages_wait = 2\\n' >>{path}")
    try:
        yield
    finally:
        for node in ("n1", "n2", "n3"):
            cluster.on(node, "mv", f"{path}.before", path)


def test_job_whose_pages_do_not_come_is_restored_whole_at_once(slow: Cluster) -> None:
    with impatient(slow):
        job, node = bring_back(slow)
        await_percent(job, node, 20)
        slow.testbed("kill-node", "store")
        job.wait_for("pages-failed", within=90)
        slow.testbed("start-node", "store")
        again = job.wait_for("restored", count=2, within=90)

    assert again.node == node
    assert "its pages follow" not in again.text
    assert_right(slow, job)
    assert job.restarts == 1


def test_pages_go_on_coming_when_the_manager_is_killed(slow: Cluster) -> None:
    job, node = bring_back(slow)
    await_percent(job, node, 10)
    slow.on(node, "kill", "-KILL", str(manager_of(job, node)["python3"]))
    job.wait_for("manager-restarted", within=60)
    arrived = job.wait_for("pages-arrived", within=90)
    job.wait_for("checkpoint", count=job.checkpoints() + 1)

    assert job.history("checkpoint")[-1].time > arrived.time
    assert_right(slow, job)
    assert job.restarts == 1
    eventually(lambda: slow.left(node, job.id) == [], within=40, what="nothing left of it")


@pytest.mark.long
@pytest.mark.usefixtures("with_time")
def test_page_server_that_is_killed_costs_the_job_nothing_but_time(slow: Cluster) -> None:
    job, node = bring_back(slow)
    await_percent(job, node, 10)
    slow.on(node, "kill", "-KILL", str(manager_of(job, node)["outlast-pager"]))
    job.wait_for("pages-failed", within=30)
    rate(slow, "")
    job.wait_for("restored", count=2, within=60)

    assert_right(slow, job)
    assert job.restarts == 1


@pytest.mark.long
@pytest.mark.usefixtures("with_time")
def test_job_whose_manager_and_page_server_are_killed_is_run_again(slow: Cluster) -> None:
    job, node = bring_back(slow)
    await_percent(job, node, 10)
    found = manager_of(job, node)
    slow.on(node, "kill", "-KILL", str(found["python3"]), str(found["outlast-pager"]))
    rate(slow, "")
    job.wait_for("restored", count=2, within=180)

    assert_right(slow, job)
    assert job.restarts == 2


@pytest.mark.long
@pytest.mark.usefixtures("with_time")
def test_checkpoint_that_is_asked_for_while_pages_follow_is_taken_when_they_are_in(slow: Cluster) -> None:
    job, node = bring_back(slow)
    await_percent(job, node, 10)
    ask_for_checkpoint(job, node)
    before = job.checkpoints()
    arrived = job.wait_for("pages-arrived", within=60)
    taken = job.wait_for("checkpoint", count=before + 1)
    rate(slow, "")
    leave(slow, job)
    again = job.wait_for("restored", count=2, within=90)

    assert taken.time > arrived.time
    assert again.text.split(",")[0].split("@")[1].startswith("1.")
    assert_right(slow, job)


def test_job_may_end_and_its_restoring_node_may_die_while_pages_follow(slow: Cluster) -> None:
    job, node = bring_back(slow)
    await_percent(job, node, 50)
    slow.cut_power(node)
    again = job.wait_for("restored", count=2, within=120)
    await_percent(job, again.node, 5)
    slow.on("ctl", "scancel", job.id, user=True)

    assert again.node != node
    assert job.wait_for_end(within=60)[0] == "CANCELLED"
    eventually(lambda: slow.left(again.node, job.id) == [], within=60, what="nothing left of it")
    # What it has said is what an uninterrupted run says.
    lines = [line for line in job.lines() if line[:1].isdigit()]
    assert lines == expected()[: len(lines)]


@pytest.mark.long
@pytest.mark.usefixtures("with_time")
def test_guard_stops_a_cut_off_job_whose_pages_follow(slow: Cluster) -> None:
    job, node = bring_back(slow)
    await_percent(job, node, 10)
    slow.testbed("cut", node)
    frozen = job.wait_for("frozen", within=30)
    rate(slow, "")
    again = job.wait_for("restored", count=2, within=90)
    slow.testbed("heal", node)
    eventually(lambda: slow.left(node, job.id) == [], within=60, what="the old copy gone")

    assert again.node != node
    assert again.time > frozen.time
    assert_right(slow, job)
