"""Networks that break and managers that stand still: never do two copies of a job compute at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster import Cluster, Job, eventually
from tests.e2e import clocked

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ADDRESSES = {"ctl": "198.18.0.1", "store": "198.18.0.2"}
TTL = 4.0


@contextmanager
def out_of_reach(cluster: Cluster, node: str, *hosts: str) -> Iterator[None]:
    """Have *node*, and nobody else, not reach *hosts*."""
    for host in hosts:
        cluster.on(node, "ip", "route", "add", "blackhole", ADDRESSES[host])
    try:
        yield
    finally:
        for host in hosts:
            cluster.on(node, "ip", "route", "del", "blackhole", ADDRESSES[host])


def assert_one_copy(job: Job, first: str) -> None:
    """Check that nothing was written on *first* after something was on another node."""
    written = [*clocked.lines(job), *clocked.lost_lines(job)]
    assert max(line.time for line in written if line.host == first) < min(
        line.time for line in written if line.host != first
    )


def test_a_copy_that_is_cut_off_stops_before_the_next_begins_and_never_goes_on(
    cluster_to_break: Cluster,
) -> None:
    job = clocked.start(cluster_to_break)
    first = job.node
    cut = time.time()
    cluster_to_break.testbed("cut", first)
    clocked.await_other_host(job, first)
    cluster_to_break.testbed("heal", first)
    eventually(lambda: cluster_to_break.left(first, job.id) == [], within=60, what="the old copy gone")

    assert_one_copy(job, first)
    stopped = max(line.time for line in clocked.lost_lines(job) if line.host == first)
    assert stopped - cut < TTL + 1.5
    assert job.history("frozen")
    assert job.history("thawed") == []
    clocked.assert_whole(job)
    assert job.restarts == 1


def test_a_copy_that_reaches_neither_store_nor_scheduler_is_ended_when_it_does_again(
    cluster_to_break: Cluster,
) -> None:
    job = clocked.start(cluster_to_break)
    first = job.node
    with out_of_reach(cluster_to_break, first, "store", "ctl"):
        clocked.await_other_host(job, first)
    eventually(lambda: cluster_to_break.left(first, job.id) == [], within=60, what="the old copy gone")

    assert_one_copy(job, first)
    assert job.restarts == 1


def test_a_node_that_does_not_reach_the_store_alone_keeps_its_job_running(cluster_to_break: Cluster) -> None:
    job = clocked.start(cluster_to_break)
    cut = time.time()
    with out_of_reach(cluster_to_break, job.node, "store"):
        time.sleep(3 * TTL)
        gap = clocked.longest_gap(job, cut)

    assert gap < 1.5
    assert job.restarts == 0


def test_a_store_that_is_away_stops_no_job(cluster_to_break: Cluster) -> None:
    job = clocked.start(cluster_to_break)
    cut = time.time()
    with cluster_to_break.store_cut_off():
        time.sleep(3 * TTL)
        gap = clocked.longest_gap(job, cut)

    assert gap < 1.5
    assert job.restarts == 0


def test_a_manager_that_stands_still_does_not_leave_its_job_running(cluster_to_break: Cluster) -> None:
    job = clocked.start(cluster_to_break)
    node = job.node
    found = cluster_to_break.on(node, "pgrep", "-f", f"python.* manager --job {job.id} ").split()
    stopped = time.time()
    cluster_to_break.on(node, "kill", "-STOP", *found)
    time.sleep(TTL + 3)
    stood = max(line.time for line in clocked.lines(job))
    cluster_to_break.on(node, "kill", "-CONT", *found)
    eventually(lambda: clocked.lines(job)[-1].time > stood + 1, within=20, what="a line after it went on")

    assert TTL - 1.5 < stood - stopped < TTL + 0.5
    assert job.restarts == 0
    clocked.assert_whole(job)
