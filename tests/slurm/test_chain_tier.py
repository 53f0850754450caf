"""Nodes with a directory of their own before the store, and a second store for some jobs: everybody finds all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import Cluster, Job, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

COUNT = "i=0; until [ -e go ]; do i=$((i+1)); echo $i; sleep 0.2; done; exit 3"
OWN = "/var/lib/outlast-own"
CONFIG = f"""\
[store]
local = "{OWN}"

[store.other.fast]
url = "sftp://outlast@store/ckpt/fast"
jobs = "fast*"
"""
NODES = ("n1", "n2", "n3")


@pytest.fixture(scope="module")
def site(module_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster of such a configuration."""
    cluster = module_cluster
    cluster.on(
        "store", "install", "-d", "-o", "outlast", "-g", "outlast", "-m", "700", "/srv/outlast/ckpt/fast"
    )
    for host in ("ctl", *NODES):
        cluster.on(host, "mkdir", "-p", "/etc/outlast/conf.d")
        cluster.on(host, "sh", "-c", "cat >/etc/outlast/conf.d/tier.toml", stdin=CONFIG)
    for node in NODES:
        cluster.on(node, "install", "-d", "-m", "700", OWN)
    restart_watcher(cluster)
    yield cluster
    for host in ("ctl", *NODES):
        cluster.on(host, "rm", "-f", "/etc/outlast/conf.d/tier.toml")
    restart_watcher(cluster)


def restart_watcher(cluster: Cluster) -> None:
    """Have the watcher read its configuration; it is started again when it ends."""
    cluster.on("ctl", "sh", "-c", "kill $(pgrep -f '[o]utlast watcher')")
    eventually(
        lambda: cluster.try_on("ctl", "outlast", "status", user=True).returncode == 0,
        within=30,
        what="the watcher is back",
    )


def listed(cluster: Cluster, job: Job) -> list[dict[str, Any]]:
    said = json.loads(cluster.on("ctl", "outlast", "list", job.id, "--json", user=True))
    found: list[dict[str, Any]] = said["checkpoints"]
    return found


def assert_ends_well(job: Job) -> None:
    job.path("go").touch()

    assert job.wait_for_end() == ("FAILED", "3:0")
    counted = [line for line in job.lines() if line.isdigit()]
    assert counted == [str(i) for i in range(1, len(counted) + 1)]


def test_list_says_that_a_checkpoint_is_on_the_node_and_in_the_jobs_store(site: Cluster) -> None:
    job = site.submit(COUNT, "-w", "n2", "-J", "fast-1")
    job.wait_for("durable")
    (newest, *_) = eventually_listed(site, job)

    assert newest["where"] == ["fast", "n2"]
    assert newest["durable"]
    stored = site.on("store", "find", "/srv/outlast/ckpt", "-name", "*.ck")
    assert f"/srv/outlast/ckpt/fast/jobs/testbed/{job.id}/ckpt/" in stored
    assert f"/srv/outlast/ckpt/jobs/testbed/{job.id}/ckpt/" not in stored
    assert site.on("n2", "find", f"{OWN}/jobs/testbed/{job.id}", "-name", "*.ck")
    assert site.on("n3", "outlast", "store", "check", job.id, "--read-data").startswith(tuple("123456789"))
    assert_ends_well(job)


def eventually_listed(cluster: Cluster, job: Job) -> list[dict[str, Any]]:
    """The listing at a moment when the newest checkpoint has come to the store."""
    found: list[dict[str, Any]] = []

    def is_durable() -> bool:
        found[:] = listed(cluster, job)
        return bool(found) and len(found[0]["where"]) == 2

    eventually(is_durable, within=30, what="the newest checkpoint is in the store")
    return found


@pytest.mark.parametrize("name", ["fast-2", "plain"])
def test_job_whose_node_is_lost_goes_on_from_the_newest_durable_checkpoint(site: Cluster, name: str) -> None:
    job = site.submit(COUNT, "-J", name)
    job.wait_for("durable", count=2)
    lost = job.node
    site.cut_power(lost)
    restored = job.wait_for("restored", within=60)
    before = len(job.lines())
    eventually(lambda: len(job.lines()) > before, within=30, what="the job goes on")

    assert restored.node != lost
    assert_ends_well(job)
    site.mend()


def test_requeued_job_goes_on_where_it_was_from_a_checkpoint_that_the_store_has(site: Cluster) -> None:
    job = site.submit(COUNT, "-w", "n3")
    job.wait_for("checkpoint")
    job.requeue()
    job.wait_for("restored", within=60)

    assert listed(site, job)[-1]["durable"]
    assert_ends_well(job)
