"""How often checkpoints are taken, and whose turn it is to ship, as sites and `--checkpoint=auto` choose it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from outlast.manager._interval import best_interval
from tests.cluster import NODES, Cluster, Job, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

COUNT = "until [ -e go ]; do sleep 0.2; done; exit 3"
# Nodes that fail so often are worth a checkpoint every few seconds.
CONFIG = """\
[store]
uploads = 1
[checkpoint]
auto_least = 1
node_mtbf = 600
"""
QUEUE = "/srv/outlast/ckpt/leases/_uploads"


@pytest.fixture(scope="module")
def site(module_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster whose nodes are of such a configuration."""
    path = "/etc/outlast/conf.d/pace.toml"
    for node in NODES:
        module_cluster.on(node, "sh", "-c", f"mkdir -p ${{0%/*}}; cat >{path}", path, stdin=CONFIG)
    yield module_cluster
    for node in NODES:
        module_cluster.on(node, "rm", "-f", path)


def queue(cluster: Cluster) -> list[str]:
    """The tickets of those that ship, or wait for their turn."""
    said = cluster.try_on("store", "ls", QUEUE).stdout
    return said.split()


def end(job: Job) -> None:
    job.path("go").touch()
    assert job.wait_for_end() == ("FAILED", "3:0")


def test_who_has_no_turn_at_the_store_waits_unless_it_is_asked_for_a_checkpoint(site: Cluster) -> None:
    # Somebody else ships, for as long as the file is there.
    other = f"{QUEUE}/elsewhere.x9@1@n9:ships@0"
    site.on("store", "sh", "-c", f"mkdir -p {QUEUE} && : >{other} && chown -R outlast: {QUEUE}")
    beats = f"while [ -e {other} ]; do touch -c {other}; sleep 1; done"
    site.on("store", "sh", "-c", f"({beats}) </dev/null >/dev/null 2>&1 &")
    job = site.submit(COUNT, checkpoint="1s")
    eventually(lambda: any(f".{job.id}@" in name for name in queue(site)), within=20, what="its ticket")
    site.on("ctl", "outlast", "checkpoint", job.id, user=True)
    first = job.wait_for("checkpoint")
    asked = job.history("asked")
    site.on("store", "rm", other)
    job.wait_for("checkpoint", count=3)
    end(job)
    eventually(lambda: queue(site) == [], within=30, what="nobody in the queue")

    assert len(asked) == 1
    assert first.text.startswith(f"{job.id}@0.1:")
    assert first.time >= asked[0].time


def test_auto_takes_what_checkpoints_cost_and_nodes_fail(site: Cluster) -> None:
    job = site.submit(COUNT, checkpoint="auto")
    job.wait_for("interval", within=90)
    job.wait_for("checkpoint", count=2, within=120)
    (shown,) = [
        one
        for one in json.loads(site.on("ctl", "outlast", "status", "--json", user=True))["jobs"]
        if one["job_id"] == job.id
    ]
    told = [one for one in job.events() if one["event"] == "interval"]
    end(job)

    cost, mtbf = told[0]["cost_s"], told[0]["mtbf_s"]
    best = best_interval(cost, mtbf)
    # On a busy machine it is twice the time that a checkpoint takes, of which a twentieth is in its cost.
    assert best - 1 <= told[0]["seconds"] <= max(best, 40 * cost) + 1
    assert shown["auto"] is True
    assert shown["interval"] in {one["seconds"] for one in told}
