"""The event log of one job's run: kept here until the store has it."""

from __future__ import annotations

import collections
import logging
import threading
import time
from typing import Any

from outlast import audit
from outlast.errors import StoreRefused, StoreUnavailable
from outlast.model import JobKey
from outlast.store import Store

log = logging.getLogger(__name__)

_LONGEST_BACKLOG = 10000
# Events that tell of an image that was written or read, and what the audit log calls that.
_IMAGES = {"checkpoint": "checkpoint", "restored": "restore", "restore-failed": "restore"}
# What a checkpoint's event tells in figures: milliseconds, bytes, bytes, seconds.
_SUMMED = ("pause_ms", "image_bytes", "stored_bytes", "ship_s")


class EventLog:
    """What happened to a job on this node, in order; any thread may add."""

    def __init__(self, job: JobKey, node: str) -> None:
        self._job = job
        self._node = node
        self._lock = threading.Lock()
        self._pending: list[dict[str, Any]] = []
        self.epoch = 0
        self.uid: int | None = None  # the job's owner, once he is known
        self._counts: collections.Counter[str] = collections.Counter()
        self._sums: dict[str, float] = dict.fromkeys(_SUMMED, 0.0)
        self._newest: float | None = None

    def add(self, event: str, text: str, **details: Any) -> None:  # noqa: ANN401 - any JSON value
        """Record *event*, one of the words of docs/operate.md, with *text* for people."""
        log.info("%s: %s", event, text, extra={"event": event, "checkpoint": details.get("checkpoint")})
        if event in _IMAGES:
            refused = event == "restore-failed"
            facts = {"checkpoint": details.get("checkpoint"), "by": "manager"}
            audit.record(_IMAGES[event], job=self._job.job_id, uid=self.uid, refused=refused, **facts)
        now = time.time()
        entry = {"time": now, "node": self._node, "epoch": self.epoch, "event": event, "text": text}
        with self._lock:
            self._pending.append(entry | details)
            self._counts[event] += 1
            if event == "checkpoint":
                self._newest = now
                for key in _SUMMED:
                    self._sums[key] += details.get(key, 0)
            # A store that is away for weeks must not fill this node's memory.
            del self._pending[:-_LONGEST_BACKLOG]

    def tally(self) -> dict[str, Any]:
        """Return what this manager has seen so far: of each event how many, and sums over its checkpoints."""
        with self._lock:
            newest = {} if self._newest is None else {"newest": self._newest}
            return {"events": dict(self._counts), **self._sums, **newest}

    def flush(self, store: Store) -> None:
        """Ship what has been added since the last time.

        Raises:
            StoreUnavailable, StoreRefused: the events stay here, for the next try.
        """
        with self._lock:
            batch, self._pending = self._pending, []
        if not batch:
            return
        try:
            store.append_events(self._job, f"{self.epoch}-{self._node}", batch)
        except (StoreUnavailable, StoreRefused):
            with self._lock:
                self._pending[:0] = batch
            raise
