"""The chain on nodes that are virtual machines: kernels of their own, cgroup v2, a home on NFS where root is nobody.

'sudo scripts/test vm' runs these, on 'scripts/testbed up --vm'. QEMU plays the processors in software, so a node
is tens of times slower than this machine: the waits are long, and no figure of here is one of a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.cluster import NODES, Cluster, Job, eventually

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

LONG = 300.0  # seconds that a step may take on a busy machine

PRIVATE = """
umask 077
exec 3>> private
i=0
while [ $i -lt 60 ]; do
    i=$((i + 1)); echo line $i; echo $i >&3; sleep 1
done
exit 7
"""

# Until there is a file "stop": how long it takes is no matter of the machine's speed.
COUNTING = "i=0; while [ ! -e stop ]; do i=$((i + 1)); echo $i; sleep 1; done"

# Has nothing to write while it is cut off, which its node would send once healed: docs/operate.md, "Homes on NFS".
HOLDING = "i=0; while [ ! -e stop ]; do i=$((i + 1)); sleep 1; done; echo $i"

Tested = dict[str, dict[str, str]]  # of each node the verdict on each way of dumping


@pytest.fixture(scope="module")
def vms(need: Callable[[str, str | None], None], module_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster of virtual machines, with alice's home closed to all but her."""
    machines = (module_cluster.state / "machines").exists()
    need("vm", None if machines else "the testbed's nodes are no virtual machines: scripts/testbed up --vm")
    home = module_cluster.file("/shared/alice")
    home.chmod(0o700)
    yield module_cluster


@pytest.fixture(scope="module")
def self_tested(vms: Cluster) -> Tested:
    """Have each node make its self-test, until which a job's dumps are plain; tell what came of it."""
    tested: Tested = {}
    for node in NODES:
        said = json.loads(vms.try_on(node, "outlast", "doctor", "--json", within=LONG).stdout)
        tested[node] = {
            one["what"]: one["verdict"] if one["verdict"] == "ok" else one["fact"]
            for one in said["findings"]
            if one["what"].startswith("dumps")
        }
    return tested


def stop(job: Job) -> tuple[str, str]:
    """End a job that is COUNTING; return state and exit code."""
    # By its own node: what appears behind the back of the server of its home is seen late there.
    job.cluster.on(job.node, "touch", f"{job.directory}/stop", user=True)
    return job.wait_for_end(within=LONG)


def assert_counted(job: Job) -> None:
    """Check that no line of a job that was COUNTING is missing, and none there twice."""
    lines = job.lines()
    assert lines == [str(number) for number in range(1, len(lines) + 1)]


def lose(cluster: Cluster, job: Job, *, after: int) -> str:
    """Cut the power of *job*'s node once it has so many checkpoints, and wait until it is restored; say where."""
    job.wait_for("checkpoint", count=after, within=LONG)
    cluster.cut_power(job.node)
    return job.wait_for("restored", within=LONG).node


def test_each_node_has_cgroup_v2_and_its_home_on_nfs_where_root_is_nobody(vms: Cluster) -> None:
    releases = set()
    for node in NODES:
        kind = vms.on(node, "stat", "--file-system", "--format=%T", "/sys/fs/cgroup", "/shared").split()
        assert kind == ["cgroup2fs", "nfs"]
        assert vms.try_on(node, "ls", "/shared/alice").returncode != 0
        assert vms.on(node, "ls", "-d", "/shared/alice", user=True)
        assert vms.on(node, "which", "criu").strip() == "/usr/sbin/criu", "CRIU as it is, without a shim"
        releases.add(vms.on(node, "uname", "-r").strip())

    assert len(releases) == 2


@pytest.mark.parametrize("program", ["lu", "lu.py"])
def test_job_of_a_node_that_lost_its_power_goes_on_on_another(vms: Cluster, program: str) -> None:
    sizes = {"lu": ("200", "60"), "lu.py": ("24", "60")}[program]
    right = vms.on("ctl", *vms.program(program).split(), *sizes).splitlines()
    command = " ".join([vms.program(program), *sizes, "--pace", "1"])
    job = vms.submit(f"exec {command}", checkpoint="5s")
    first = job.wait_for("started", within=LONG).node
    second = lose(vms, job, after=2)
    try:
        end = job.wait_for_end(within=LONG)
    finally:
        vms.testbed("start-node", first, within=LONG)

    assert second != first
    assert end == ("COMPLETED", "0:0")
    assert job.lines() == right
    assert job.restarts == 1
    assert job.history("restore-failed") == []
    assert job.history("checkpoint-failed") == []


def test_files_that_only_their_owner_may_reach_are_set_back_and_the_exit_code_is_the_jobs(
    vms: Cluster,
) -> None:
    job = vms.submit(PRIVATE, checkpoint="5s")
    vms.file(job.directory).chmod(0o700)
    first = job.wait_for("started", within=LONG).node
    lose(vms, job, after=2)
    try:
        end = job.wait_for_end(within=LONG)
    finally:
        vms.testbed("start-node", first, within=LONG)

    assert end == ("FAILED", "7:0")
    assert job.lines() == [f"line {number}" for number in range(1, 61)]
    assert job.lines("private") == [str(number) for number in range(1, 61)]
    assert job.path("private").stat().st_mode & 0o777 == 0o600


def test_lock_on_nfs_is_held_again_after_its_node_lost_its_power(vms: Cluster) -> None:
    job = vms.submit(f"exec 3> lock; flock 3; {COUNTING}", checkpoint="5s")
    first = job.wait_for("started", within=LONG).node
    second = lose(vms, job, after=2)
    lock = f"{job.directory}/lock"
    others = [
        vms.try_on(node, "flock", "--nonblock", lock, "true", user=True).returncode
        for node in NODES
        if node != first
    ]
    end = stop(job)
    vms.testbed("start-node", first, within=LONG)

    assert second != first
    assert others == [1, 1]
    assert end == ("COMPLETED", "0:0")
    assert_counted(job)


def test_file_on_nfs_that_is_deleted_and_open_is_named_and_costs_the_job_nothing(vms: Cluster) -> None:
    job = vms.submit(f"exec 3> doomed; rm doomed; {COUNTING}", "-e", "err", checkpoint="5s")
    failed = job.wait_for("checkpoint-failed", within=LONG)
    explained = vms.on(job.node, "outlast", "explain", job.id, user=True, within=LONG)
    end = stop(job)

    assert f"{job.directory[1:]}/.nfs" in failed.text
    assert f"{job.directory}/.nfs" in explained
    assert "deleted on NFS while it is open" in explained
    assert "deleted on NFS while it is open" in job.path("err").read_text()
    assert job.checkpoints() == 0
    assert end == ("COMPLETED", "0:0")
    assert_counted(job)


def test_every_way_of_dumping_works_on_every_kernel(vms: Cluster, self_tested: Tested) -> None:
    works = {"dumps, plain": "ok", "dumps, lazy": "ok", "dumps, forked": "ok"}

    assert self_tested == dict.fromkeys(NODES, works)


def test_forked_image_of_one_kernel_is_restored_on_another(vms: Cluster, self_tested: Tested) -> None:
    release = {node: vms.on(node, "uname", "-r").strip() for node in NODES}
    newer = next(node for node in NODES if list(release.values()).count(release[node]) == 1)
    older = next(node for node in NODES if node != newer)
    job = vms.submit(COUNTING, "-w", older)
    for target in (newer, older):
        seen = len(job.history("restored"))
        job.wait_for("checkpoint", count=len(job.history("checkpoint")) + 1, within=LONG)
        vms.on("ctl", "outlast", "migrate", job.id, "--to", target, user=True, within=LONG)
        there = job.wait_for("restored", count=seen + 1, within=LONG)
        assert there.node == target
    job.wait_for("checkpoint", count=len(job.history("checkpoint")) + 1, within=LONG)
    end = stop(job)

    assert end == ("COMPLETED", "0:0")
    assert_counted(job)
    dumped = job.history("checkpoint")
    assert {one.node for one in dumped} == {older, newer}
    assert [one.text for one in dumped if "(forked)" not in one.text] == []


def test_node_that_is_cut_off_stops_its_job_before_another_begins(vms: Cluster) -> None:
    # None of its own comes in the way: CRIU would hang on the file system that is gone, and hold the job meanwhile.
    job = vms.submit(HOLDING, checkpoint="1h")
    first = job.wait_for("started", within=LONG).node
    vms.on("ctl", "outlast", "checkpoint", job.id, user=True, within=LONG)
    vms.testbed("cut", first)
    try:
        frozen = job.wait_for("frozen", within=LONG)
        again = job.wait_for("restored", within=LONG)
    finally:
        vms.testbed("heal", first)
        # Slurm asks a node that was down only at every 20th ping. An operator would not wait; it may be back by now.
        vms.try_on("ctl", "scontrol", "update", f"NodeName={first}", "State=RESUME")
    eventually(lambda: vms.left(first, job.id) == [], within=LONG, what="the old copy gone")
    end = stop(job)

    assert frozen.node == first
    assert again.node != first
    assert again.time > frozen.time
    assert job.history("thawed") == []
    assert end == ("COMPLETED", "0:0")
    assert len(job.lines()) == 1
    assert job.restarts == 1
