"""When a job's checkpoints are due: as often as its owner chose, or as often as they are worth what they cost."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from outlast.config import CheckpointConfig
from outlast.errors import OutlastError
from outlast.manager._events import EventLog
from outlast.manager._run import Run
from outlast.model import SITE, JobKey
from outlast.store import Store

# While a checkpoint is shipped the job runs; for compression and the network it is slowed by about so much of
# that time. An upper estimate: where a core is free it is nothing.
_SHIPPING_SHARE = 0.05
# How much of the old estimate of the cost is kept at each checkpoint.
_FADING = 0.7
# An interval is changed when the better one differs by so much.
_WORTH_A_CHANGE = 0.2
# How long the site's failures are believed without another look, and how far back they count.
_SITE_SECONDS = 3600.0
_SITE_WINDOW = 90 * 86400.0
# Jobs with shorter intervals than this begin with a whole one: there is little to be spread.
_SPREAD_FROM = 60


def best_interval(cost: float, mtbf: float) -> float:
    """Return the seconds of computing between two checkpoints that lose the least time in the long run.

    Args:
        cost: seconds that one checkpoint takes from the job.
        mtbf: mean seconds between two failures of what the job runs on.

    Source:
        J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future
        Generation Computer Systems 22 (2006), equation 37; its first term is J. W. Young's, CACM 17 (1974).
    """
    if cost >= 2 * mtbf:
        return mtbf
    part = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(part) / 3 + part / 9) - cost


def site_mtbf(events: Iterable[Mapping[str, Any]], prior: float, now: float) -> float:
    """Return the mean seconds between two failures of one node, by what the watcher has seen of the site.

    It begins with *prior*, which weighs as much as one failure seen; what is older than 90 days does not count.
    """
    seen = sorted(
        (one for one in events if now - one["time"] < _SITE_WINDOW), key=lambda one: float(one["time"])
    )
    if not seen:
        return prior
    lost = sum(1 for one in seen if one["event"] == "node-lost")
    watched = int(seen[-1].get("nodes", 1)) * (now - float(seen[0]["time"]))
    return (prior + max(0.0, watched)) / (1 + lost)


def phase(job: JobKey, epoch: int, interval: float) -> float:
    """Return by how many seconds the first checkpoint of a run comes early.

    Jobs that start at the same time, as those of an array, so have their checkpoints at different times.
    """
    if interval < _SPREAD_FROM:
        return 0.0
    digest = hashlib.blake2b(f"{job} {epoch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32 * interval / 2


class Pace:
    """The interval of one run's checkpoints."""

    def __init__(self, config: CheckpointConfig, run: Run, events: EventLog) -> None:
        self._config = config
        self._run = run
        self._events = events
        self._cost: float | None = None
        self._mtbf = config.node_mtbf
        self._asked = float("-inf")

    def learn(self, store: Store, pause: float, took: float) -> None:
        """Choose the interval anew after a checkpoint that stopped the job for *pause* seconds and *took* some."""
        if not self._run.auto:
            return
        cost = pause + _SHIPPING_SHARE * max(0.0, took - pause)
        self._cost = cost if self._cost is None else _FADING * self._cost + (1 - _FADING) * cost
        self._ask_site(store)
        best = best_interval(self._cost, self._mtbf)
        # Never more than half of the time is spent on them, whatever it costs.
        chosen = round(min(max(best, self._config.auto_least, 2 * took), self._config.auto_most))
        if abs(chosen - self._run.interval) <= _WORTH_A_CHANGE * self._run.interval:
            return
        self._run.interval = chosen
        self._run.save()
        self._events.add(
            "interval",
            f"every {chosen} s from now on: a checkpoint costs the job {self._cost:.3g} s, "
            f"and a node fails every {self._mtbf / 86400:.3g} days",
            seconds=chosen,
            auto=True,
            cost_s=round(self._cost, 4),
            mtbf_s=round(self._mtbf),
        )

    def _ask_site(self, store: Store) -> None:
        if time.monotonic() - self._asked < _SITE_SECONDS:
            return
        self._asked = time.monotonic()
        try:
            events = store.events(JobKey(self._run.job.cluster, SITE))
            self._mtbf = site_mtbf(events, self._config.node_mtbf, time.time())
        except (OutlastError, KeyError, TypeError, ValueError):
            return  # what was known before is good enough
