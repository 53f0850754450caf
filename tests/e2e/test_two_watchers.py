"""Two watchers of one cluster: one acts, the other takes over when nothing is heard of it, and never both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster import Cluster, eventually
from tests.e2e import clocked

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ACTS, STANDS_BY = "this watcher acts from now on", "this watcher stands by from now on"
# A configuration of its own, with another socket; all else is the first one's.
SECOND = """
mkdir -p /etc/outlast-second/conf.d /run/outlast-second
cp /etc/outlast/outlast.toml /etc/outlast-second/
printf '[watcher]\\nsocket = "/run/outlast-second/watcher.sock"\\n' >/etc/outlast-second/conf.d/socket.toml
chown -R slurm /run/outlast-second
exec setpriv --reuid=slurm --regid=slurm --init-groups \
	/usr/bin/outlast --config /etc/outlast-second/outlast.toml watcher >/var/log/outlast-second.log 2>&1 &
"""


class Watchers:
    """What the two say, and how they are stopped."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        logs = cluster.state / "hosts" / "ctl" / "upper" / "var/log"
        self.logs = {"first": logs / "outlast/watcher.log", "second": logs / "outlast-second.log"}
        self.before = {name: self._read(path) for name, path in self.logs.items()}

    @staticmethod
    def _read(path: Path) -> int:
        return len(path.read_text()) if path.exists() else 0

    def said(self, name: str) -> str:
        """What one of them has logged since the test began."""
        path = self.logs[name]
        return path.read_text()[self.before[name] :] if path.exists() else ""

    def send(self, name: str, number: str) -> None:
        """Send a signal to one of them."""
        pattern = "config /etc/outlast-second/outlast.toml watche[r]"
        pids = self.cluster.try_on("ctl", "pgrep", "-f", pattern).stdout.split()
        if name == "first":
            found = self.cluster.on("ctl", "pgrep", "-f", "outlast watche[r]").split()
            pids = [pid for pid in found if pid not in pids]
        if pids:
            self.cluster.try_on("ctl", "kill", f"-{number}", *pids)


@contextmanager
def second_watcher(cluster: Cluster) -> Iterator[Watchers]:
    """Start a second watcher; it stands by."""
    watchers = Watchers(cluster)
    cluster.on("ctl", "sh", stdin=SECOND)
    try:
        eventually(
            lambda: "standing by: the watcher ctl." in watchers.said("second"), within=20, what="the second"
        )
        yield watchers
    finally:
        watchers.send("first", "CONT")
        watchers.send("second", "TERM")


def test_the_second_watcher_takes_over_from_one_that_stands_still_and_keeps_it(
    cluster_to_break: Cluster,
) -> None:
    cluster = cluster_to_break
    job = clocked.start(cluster)
    first = job.node
    with second_watcher(cluster) as watchers:
        watchers.send("first", "STOP")
        eventually(lambda: ACTS in watchers.said("second"), within=20, what="the second watcher at work")
        cluster.cut_power(first)
        clocked.await_other_host(job, first)
        watchers.send("first", "CONT")
        eventually(lambda: STANDS_BY in watchers.said("first"), within=20, what="the first one out of work")
        marked = [one for one in job.events() if one["event"] == "node-marked-down"]
        watchers.send("second", "TERM")
        eventually(lambda: ACTS in watchers.said("first"), within=20, what="the first one at work again")

    assert len(marked) == 1
    assert "node-marked-down" in watchers.said("second")
    assert "node-marked-down" not in watchers.said("first")
    clocked.assert_whole(job)
