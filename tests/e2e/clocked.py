"""A job whose every line says when and where it was written, and what its lines tell of its copies."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from tests.cluster import Cluster, Job, eventually

SCRIPT = 'i=0; while :; do echo "$i $(date +%s.%N) $(hostname)"; i=$((i+1)); sleep 0.1; done'


@dataclass(frozen=True)
class Line:
    """One line of output."""

    number: int
    time: float  # Unix time; all hosts of the testbed have one clock
    host: str


def lines(job: Job, name: str = "out") -> list[Line]:
    """What the job's output holds now, or another file beside it."""
    found = []
    for text in job.path(name).read_text(errors="replace").splitlines():
        words = text.split()
        if len(words) == 3 and words[0].isdecimal():
            found.append(Line(int(words[0]), float(words[1]), words[2]))
    return found


def lost_lines(job: Job, name: str = "out") -> list[Line]:
    """What was cut off when the job went back to a checkpoint."""
    paths = sorted(job.path().parent.glob(f"{name}.outlast-lost.*"))
    return [line for path in paths for line in lines(job, path.name)]


def start(cluster: Cluster, *options: str, interval: str = "2s") -> Job:
    """Submit the job; return when its first checkpoint is stored."""
    job = cluster.submit(SCRIPT, *options, checkpoint=interval)
    job.wait_for("checkpoint")
    return job


def await_other_host(job: Job, host: str, *, within: float = 40) -> Line:
    """Return the first line that the job wrote on another host than *host*."""
    eventually(
        lambda: [line for line in lines(job) if line.host != host],
        within=within,
        what="a line from elsewhere",
    )
    return next(line for line in lines(job) if line.host != host)


def assert_whole(job: Job) -> None:
    """Check that no line of the output is missing, and none there twice."""
    numbers = [line.number for line in lines(job)]
    assert numbers == list(range(len(numbers)))


def longest_gap(job: Job, since: float) -> float:
    """For how many seconds at most the job wrote nothing after *since*, until now."""
    times = [since, *(line.time for line in lines(job) if line.time > since), time.time()]
    return max(later - earlier for earlier, later in itertools.pairwise(times))
