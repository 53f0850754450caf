"""A large job runs again before its memory has been fetched, and its result is that of an uninterrupted run."""

from __future__ import annotations

import pytest

from tests.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

# Its memory, 80 MB that no compression makes smaller, is hashed anew in every step.
HASHER = """
cat >hash.py <<'END'
import hashlib, os, random, time
memory = random.Random(1).randbytes(80 << 20)
digest = b""
for step in range(24):
    digest = hashlib.sha256(digest + memory).digest()
    print(step, digest.hex(), flush=True)
    time.sleep(0.5)
END
exec python3 hash.py
"""


def test_pages_follow_a_restored_job_and_its_result_is_right(cluster: Cluster) -> None:
    job = cluster.submit(HASHER, checkpoint="3s")
    reference = cluster.submit(HASHER, checkpoint=None)
    job.wait_for("checkpoint", count=2, within=60)
    job.requeue()
    job.wait_for("pages-arrived", within=60)
    job.wait_for("checkpoint", count=4, within=60)
    facts = {event["event"]: event for event in job.events()}

    assert facts["restored"]["post_copy"] is True
    assert facts["pages-arrived"]["pages"] * 4096 > 70 << 20
    assert job.wait_for_end(within=90) == ("COMPLETED", "0:0")
    assert reference.wait_for_end(within=60) == ("COMPLETED", "0:0")
    # Slurm writes a line of its own when it requeues a job.
    assert [line for line in job.lines() if not line.startswith("slurmstepd")] == reference.lines()
