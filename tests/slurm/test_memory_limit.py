"""Slurm holds jobs to their --mem, and twins count as the job's: no checkpoint may cost a job its life."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import pytest

from tests.cluster import Cluster, Job, eventually

pytestmark = pytest.mark.slurm

# Memory of so many MiB, of which a page in each 16 KiB is written again and again, 20 MiB in a second at most.
_WRITER = """exec python3 -c '
import mmap, os, time
memory = mmap.mmap(-1, {mib} << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for _ in range({mib}): memory.write(os.urandom(1 << 20))
print("ready", flush=True)
turn = 0
while not os.path.exists("stop"):
    turn += 1
    for page in range(0, len(memory), 16384):
        memory[page] = turn % 256
        if page % (1 << 20) == 0: time.sleep(0.0125)
print("done", flush=True)
'"""


@pytest.fixture(scope="module")
def limiting(
    tmp_path_factory: pytest.TempPathFactory, need: Callable[[str, str | None], None]
) -> Iterator[Cluster]:
    """A cluster whose Slurm has the kernel hold each job to its --mem."""
    need("slurm", None if os.geteuid() == 0 else "the testbed must be root")
    cluster = Cluster(tmp_path_factory.mktemp("limiting") / "bed")
    cluster.testbed("up", "--memory", within=500)
    try:
        yield cluster
    finally:
        cluster.testbed("down")


def modes(job: Job) -> list[str]:
    """How each of the job's checkpoints was made."""
    said = (re.search(r"paused [\d.]+ ms \((\w+)\)", event.text) for event in job.history("checkpoint"))
    return [match[1] for match in said if match is not None]


def ends_well(job: Job) -> bool:
    """Whether the job, told to stop, ends as one of which the kernel has killed nothing."""
    job.path("stop").touch()
    assert job.wait_for_end(within=120) == ("COMPLETED", "0:0"), job.report()
    assert job.lines() == ["ready", "done"]
    return True


def test_job_beyond_its_memory_is_killed_and_said_to_be(limiting: Cluster) -> None:
    job = limiting.submit(_WRITER.format(mib=300), "--mem=150M", checkpoint=None)

    assert job.wait_for_end(within=60)[0] == "OUT_OF_MEMORY"


@pytest.mark.timeout(300)
def test_forked_checkpoints_of_a_job_that_rewrites_its_memory_are_within_its_limit(limiting: Cluster) -> None:
    """The job and its twin need up to twice the job's memory, of which --mem leaves a half more.

    Where the store takes the memory too slowly a twin ends before its time, and that checkpoint fails.
    """
    job = limiting.submit(_WRITER.format(mib=180), "--mem=290M")
    job.wait_for_line("ready")
    eventually(
        lambda: "forked" in modes(job) or job.history("checkpoint-failed"),
        within=200,
        what="a forked checkpoint, once the node's self-test is made",
    )
    job.wait_for("checkpoint", count=len(job.history("checkpoint")) + 1, within=60)

    assert ends_well(job)


@pytest.mark.timeout(240)
def test_job_with_no_room_for_twins_is_dumped_plainly_and_is_not_out_of_memory(limiting: Cluster) -> None:
    job = limiting.submit(_WRITER.format(mib=180), "--mem=220M")
    job.wait_for_line("ready")
    job.wait_for("checkpoint", count=2, within=150)

    assert ends_well(job)
    assert set(modes(job)) == {"plain"}
