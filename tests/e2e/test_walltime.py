"""A job that needs longer than its time limit is saved and queued again before it comes."""

from __future__ import annotations

import pytest

from tests.cluster import Cluster
from tests.e2e import clocked

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def test_a_job_outlasts_its_time_limit(cluster_to_break: Cluster) -> None:
    job = clocked.start(cluster_to_break, "--time=1", interval="20s")
    left = job.wait_for("left", within=80)
    job.wait_for("restored", within=60)

    assert "checkpoint" in left.text
    assert job.restarts == 1
    clocked.assert_whole(job)
