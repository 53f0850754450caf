"""What was done for jobs: in this process's memory, in its log, and in the jobs' own logs in the store."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from outlast.model import SITE, JobKey
from outlast.store import Store
from outlast.watcher.actions import Done, Run

log = logging.getLogger(__name__)

# The stream of a job's events that watchers write.
STREAM = "watcher"
# How long the store is told in one cycle what was done: where much was, acting on it goes first.
_SAY_SECONDS = 0.3


class Notes:
    """What this watcher did, and those before it; losing it costs a look into the store."""

    def __init__(self, store: Store, cluster: str) -> None:
        self._store = store
        self._cluster = cluster
        self._host = socket.gethostname().split(".")[0]
        self._recalled: set[str] = set()
        self._unsaid: deque[tuple[JobKey, Mapping[str, Any]]] = deque()
        self.done: list[Done] = []
        # How often: the event, and whether it was refused.
        self.acted: Counter[tuple[str, bool]] = Counter()

    def record(
        self, event: str, runs: tuple[Run, ...], reason: str, target: str = "", *, refused: bool = False
    ) -> None:
        """Note what was done about *runs* and why; what is refused again and again is told once."""
        now = time.time()
        for run in runs:
            seen = refused and any(
                (one.event, one.run, one.node, one.refused) == (event, run, target, True) for one in self.done
            )
            self.done.append(Done(now, event, run, target, refused))
            self.acted[event, refused] += 1
            if refused and seen:
                continue
            text = f"{target}: {reason}" if target else reason
            level = logging.WARNING if refused else logging.INFO
            fields = {"job_id": run.job_id, "event": event}
            log.log(level, "job %s: %s: %s", run.job_id, event, text, extra=fields)
            entry = {
                "time": now,
                "node": self._host,
                "event": event,
                "text": text,
                "by": STREAM,
                "epoch": run.epoch,
                "target": target,
                "refused": refused,
            }
            self._unsaid.append((JobKey(self._cluster, run.job_id), entry))

    def tell_site(self, event: str, node: str, nodes: int) -> None:
        """Note what managers estimate the failure rate of the site, of so many *nodes*, by."""
        entry = {"time": time.time(), "node": self._host, "event": event, "text": node, "nodes": nodes}
        self._unsaid.append((JobKey(self._cluster, SITE), entry))

    def say(self) -> None:
        """Append to the jobs' logs what is not yet there; what the store does not take soon waits."""
        deadline = time.monotonic() + _SAY_SECONDS
        while self._unsaid and time.monotonic() < deadline:
            job, entry = self._unsaid[0]
            self._store.append_events(job, STREAM, [entry])
            self._unsaid.popleft()

    def recall(self, job_ids: Iterable[str]) -> bool:
        """Read, once, what was done for jobs by watchers before; return whether there was anything."""
        found = []
        for job_id in sorted({*job_ids} - self._recalled):
            for event in self._store.events(JobKey(self._cluster, job_id)):
                if event.get("by") == STREAM:
                    run = Run(job_id, event["epoch"])
                    found.append(Done(event["time"], event["event"], run, event["target"], event["refused"]))
            self._recalled.add(job_id)
        self.done = found + self.done
        return bool(found)

    def forget_all_but(self, job_ids: Iterable[str]) -> None:
        """Forget what was done for jobs that are no more."""
        known = {*job_ids}
        self.done = [one for one in self.done if one.run.job_id in known]
        self._recalled &= known
