"""Files of a job that goes on elsewhere: all are as at its checkpoint; where that cannot be, policy decides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import NODES, Cluster, Job, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

# Writes to a log that is closed between lines, to a file on the node's own disk, to one that is written in
# place, and to shared memory, and compares all of them in each step.
SCRIBE = """
cat >scribe.py <<'END'
import mmap, os, time
here = open("/tmp/scribe-%s" % os.environ["SLURM_JOB_ID"], "w+b", 0)
index = open("index", "w+b", 0)
segment = open("/dev/shm/scribe-%s" % os.environ["SLURM_JOB_ID"], "w+b", 0)
segment.truncate(4096)
memory = mmap.mmap(segment.fileno(), 4096)
for step in range(30):
    line = b"%d\\n" % step
    here.write(line)
    memory[:8] = index_now = b"%08d" % step
    os.pwrite(index.fileno(), index_now, 0)
    with open("steps.log", "ab") as log:
        log.write(line)
    lines = b"".join(b"%d\\n" % one for one in range(step + 1))
    right = [
        os.pread(here.fileno(), 1 << 20, 0) == lines, os.pread(index.fileno(), 99, 0) == index_now,
        memory[:8] == index_now, os.pread(segment.fileno(), 8, 0) == index_now,
        open("steps.log", "rb").read() == lines,
    ]
    print(step, *right, flush=True)
    time.sleep(0.4)
for file in (here, segment):
    os.unlink(file.name)
END
exec python3 scribe.py
"""


def leave(cluster: Cluster, job: Job) -> str:
    """Have *job* go on from its checkpoints on another node; return which it left."""
    node = job.node
    cluster.on("ctl", "scontrol", "requeue", job.id)
    cluster.on("ctl", "scontrol", "update", f"JobId={job.id}", f"ExcNodeList={node}", "StartTime=now")
    return node


def test_files_of_every_kind_go_with_a_job_to_another_node(cluster: Cluster) -> None:
    job = cluster.submit(SCRIBE, "--export=ALL,OUTLAST_APPEND=*.log", checkpoint="2s")
    job.wait_for("checkpoint", count=2, within=60)
    node = leave(cluster, job)
    restored = job.wait_for("restored", within=60)

    assert restored.node != node
    assert job.wait_for_end(within=90) == ("COMPLETED", "0:0")
    lines = [line for line in job.lines() if not line.startswith("slurmstepd")]
    assert lines == [f"{step} True True True True True" for step in range(30)]
    assert job.path("steps.log").read_text() == "".join(f"{step}\n" for step in range(30))


# Its two checkpoints are of no use any more when its file is gone.
KEEPER = """
exec 5>>kept
echo "run ${SLURM_RESTART_COUNT:-0}"
echo x >&5
while :; do sleep 0.2; done
"""


def lose_its_file(job: Job, name: str = "kept") -> None:
    """Have *job* run again, and take its file away when the last checkpoint of this run is in the store."""
    job.requeue()
    job.wait_for("ended")
    job.path(name).unlink()


@pytest.fixture
def settings(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with a policy to begin such jobs again on all nodes."""
    path = "/etc/outlast/outlast.toml"
    for node in NODES:
        cluster.on(node, "cp", path, f"{path}.before")
        cluster.on(node, "sh", "-c", f"printf '\\n[restart]\\nwhen_unrestorable = \"fresh\"\\n' >>{path}")
    try:
        yield cluster
    finally:
        for node in NODES:
            cluster.on(node, "mv", f"{path}.before", path)


def test_job_none_of_whose_checkpoints_can_be_used_is_held_and_its_files_are_named(cluster: Cluster) -> None:
    job = cluster.submit(KEEPER)
    job.wait_for("checkpoint", count=2, within=60)
    lose_its_file(job)
    failed = job.wait_for("restore-failed", count=2, within=60)

    assert f"{job.directory}/kept: No such file or directory" in failed.text
    assert job.wait_for_end(within=60) == ("FAILED", "70:0")
    assert "run 1" not in job.lines()
    listed = cluster.on("ctl", "outlast", "list", job.id, user=True).splitlines()
    assert len(listed) == 3


def test_job_none_of_whose_checkpoints_can_be_used_begins_again_where_that_is_the_policy(
    settings: Cluster,
) -> None:
    job = settings.submit(KEEPER)
    job.wait_for("checkpoint", count=2, within=60)
    lose_its_file(job)
    begun = job.wait_for("begun-again", within=60)
    assert f"{job.id}@0." in begun.text
    job.wait_for("checkpoint", count=job.checkpoints() + 3, within=60)
    assert job.lines()[-1] == "run 1"
    # The newest that could not be used is kept for whoever wants to know why.
    assert f"{job.id}@0." in settings.on("ctl", "outlast", "list", job.id, user=True)
    log = f"/var/log/outlast/jobs/{job.id}.log"
    assert "restore-failed" in settings.on(job.node, "cat", log)
    job.cancel()


# A node whose processors are told to be older than they are.
MASK = "sed 's/ popcnt / /' /proc/cpuinfo >/tmp/cpuinfo && mount --bind /tmp/cpuinfo /proc/cpuinfo"


@pytest.fixture
def older_node(cluster: Cluster) -> Iterator[str]:
    """Node n2, which lacks an instruction."""
    cluster.on("n2", "sh", "-c", MASK)
    try:
        yield "n2"
    finally:
        cluster.on("n2", "sh", "-c", "umount /proc/cpuinfo && rm /tmp/cpuinfo")


def test_node_whose_processors_lack_an_instruction_is_left_for_another_by_itself(
    cluster: Cluster, older_node: str
) -> None:
    job = cluster.submit(SCRIBE.replace("range(30)", "range(20)"), "-w", "n1", checkpoint="2s")
    job.wait_for("checkpoint", count=2, within=60)
    cluster.on("ctl", "scontrol", "update", "NodeName=n3", "State=DRAIN", "Reason=test")
    try:
        cluster.on("ctl", "scontrol", "requeue", job.id)
        update = ["scontrol", "update", f"JobId={job.id}", "ReqNodeList=", "ExcNodeList=n1", "StartTime=now"]
        cluster.on("ctl", *update)
        unfit = job.wait_for("unfit-node", within=60)
        eventually(lambda: older_node in excluded(job), within=40, what=f"{older_node} is excluded")
    finally:
        cluster.on("ctl", "scontrol", "update", "NodeName=n3", "State=RESUME")
    restored = job.wait_for("restored", within=60)

    assert unfit.node == older_node
    assert "lack popcnt" in unfit.text
    assert restored.node == "n3"
    assert not job.history("restore-failed")
    job.cancel()


def excluded(job: Job) -> set[str]:
    """The nodes that Slurm keeps the job off."""
    said = job.facts()["ExcNodeList"]
    return (
        set(job.cluster.on("ctl", "scontrol", "show", "hostnames", said).split())
        if said != "(null)"
        else set()
    )


# It opens a file to read when it is told to, so that only the checkpoints after that hold it.
READER = """
cat >reader.py <<'END'
import os, time
step, kept = 0, None
while True:
    step += 1
    if kept is None and os.path.exists("more"):
        kept = open("more")
        print("opened", flush=True)
    print(step, flush=True)
    time.sleep(0.1)
END
exec python3 reader.py
"""


def test_checkpoint_that_criu_does_not_restore_is_kept_and_the_one_before_is_gone_on_from(
    cluster: Cluster,
) -> None:
    job = cluster.submit(READER, checkpoint="1h")
    job.wait_for_line("3")
    cluster.on("ctl", "outlast", "checkpoint", job.id, user=True)
    job.wait_for("checkpoint", count=1)
    job.path("more").touch()
    job.wait_for_line("opened")
    lose_its_file(job, "more")
    failed = job.wait_for("restore-failed", within=60)
    restored = job.wait_for("restored", within=60)
    for count in range(3, 6):
        cluster.on("ctl", "outlast", "checkpoint", job.id, user=True)
        job.wait_for("checkpoint", count=count)
    listed = cluster.on("ctl", "outlast", "list", job.id, user=True)

    # CRIU's own word.
    assert f"{job.id}@0.2: restore: " in failed.text
    assert "more" in failed.text
    assert f"{job.id}@0.1" in restored.text
    # Once, and never again.
    assert len(job.history("restore-failed")) == 1
    assert job.restarts == 1
    # Kept, though newer ones have taken the other's place, and CRIU's log of it too.
    assert f"{job.id}@0.2" in listed
    assert f"{job.id}@0.1" not in listed
    assert "more" in cluster.on(restored.node, "cat", f"/var/log/outlast/jobs/{job.id}.restore.log")
    assert job.state == "RUNNING"
    job.cancel()
