"""Files of a job that goes on elsewhere: all are as at its checkpoint; where that cannot be, policy decides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import NODES, Cluster, Job, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

# Writes in each step to a log that is closed between lines, to a file on the node's own disk, in place, to shared
# memory, to the ends of two files, to a mapped one and to one without a name, and compares all of them with what
# they must hold.
SCRIBE = """
cat >scribe.py <<'END'
import mmap, os, time
here = open("/tmp/scribe-%s" % os.environ["SLURM_JOB_ID"], "w+b", 0)
index = open("index", "w+b", 0)
segment = open("/dev/shm/scribe-%s" % os.environ["SLURM_JOB_ID"], "w+b", 0)
segment.truncate(4096)
memory = mmap.mmap(segment.fileno(), 4096)
written, appended = open("written", "w+b", 0), open("appended", "a+b", 0)
table = open("table", "w+b", 0)
table.truncate(8192)
mapped = mmap.mmap(table.fileno(), 8192)
ghost = open("ghost", "w+b", 0)
os.unlink("ghost")
os.link("written", "other-name")
step = -1
while step < 40 or not os.path.exists("go"):
    step += 1
    line = b"%d\\n" % step
    for file in (here, written, appended, ghost):
        file.write(line)
    memory[:8] = mapped[4096:4104] = index_now = b"%08d" % step
    os.pwrite(index.fileno(), index_now, 0)
    with open("steps.log", "ab") as log:
        log.write(line)
    if step % 4 == 3:
        open("new-%d.log" % step, "wb").close()
    os.chmod("written", 0o600 + step % 8)
    lines = b"".join(b"%d\\n" % one for one in range(step + 1))
    right = [os.pread(file.fileno(), 1 << 20, 0) == lines for file in (here, written, appended, ghost)]
    right += [
        os.pread(index.fileno(), 99, 0) == index_now, memory[:8] == index_now,
        os.pread(segment.fileno(), 8, 0) == index_now, mapped[4096:4104] == index_now,
        os.pread(table.fileno(), 8, 4096) == index_now, open("steps.log", "rb").read() == lines,
        open("other-name", "rb").read() == lines,
        sorted(one for one in os.listdir() if one.endswith(".log") and one.startswith("new"))
        == sorted("new-%d.log" % one for one in range(3, step + 1, 4)),
    ]
    print(step, *(number for number, one in enumerate(right) if not one), flush=True)
    time.sleep(0.1)
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


@pytest.mark.parametrize("how", ["requeued", "power cut"])
def test_files_of_every_kind_go_with_a_job_to_another_node(cluster_to_break: Cluster, how: str) -> None:
    cluster = cluster_to_break
    job = cluster.submit(SCRIBE, "--export=ALL,OUTLAST_APPEND=*.log", checkpoint="1h")
    job.wait_for_line("5")
    cluster.on("ctl", "outlast", "checkpoint", job.id, user=True)
    job.wait_for("checkpoint", within=60)
    seen = len(job.lines())
    eventually(lambda: len(job.lines()) > seen + 8, within=30, what="the job changes all files after it")
    node = job.node
    written: list[str] = []
    if how == "requeued":
        leave(cluster, job)
    else:
        cluster.cut_power(node)
        written = job.lines()
    restored = job.wait_for("restored", within=90)
    job.path("go").touch()

    assert restored.node != node
    assert job.wait_for_end(within=90) == ("COMPLETED", "0:0")
    # A number behind a step's would be that of a file that is not as it was.
    lines = [line for line in job.lines() if not line.startswith("slurmstepd")]
    assert lines == [str(step) for step in range(len(lines))]
    assert job.path("steps.log").read_text() == "".join(f"{line}\n" for line in lines)
    if how == "power cut":
        for name in ("written", "appended", "steps.log", "table"):
            assert job.path(f"{name}.outlast-lost.0").exists(), f"what was cut off of {name} is kept"
        # All that followed the checkpoint, to the last line before the power went.
        lost = job.lines("out.outlast-lost.0")
        assert len(lost) >= 8
        assert lost == written[-len(lost) :]


def test_files_that_shrank_or_were_written_anew_are_named_and_the_job_is_held(cluster: Cluster) -> None:
    script = "head -c 20000 /dev/zero >kept\n" + KEEPER
    jobs = {name: cluster.submit(script) for name in ("shrunk", "overwritten")}
    for job in jobs.values():
        job.wait_for("checkpoint", within=60)
        job.requeue()
    for job in jobs.values():
        job.wait_for("ended", within=60)
    jobs["shrunk"].path("kept").write_bytes(b"")
    with jobs["overwritten"].path("kept").open("r+b") as file:
        file.write(b"something else")
    for name, why in (
        ("shrunk", "it has 0 bytes, and had 20002"),
        ("overwritten", "has been overwritten since"),
    ):
        job = jobs[name]
        failed = job.wait_for("restore-failed", within=60)

        assert f"{job.directory}/kept: " in failed.text
        assert why in failed.text
        assert job.wait_for_end(within=60) == ("FAILED", "70:0")


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
    job = cluster.submit(SCRIBE, "-w", "n1", checkpoint="2s")
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
