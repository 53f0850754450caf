"""The event log of one job's run: kept here until the store has it."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from outlast.errors import StoreRefused, StoreUnavailable
from outlast.model import JobKey
from outlast.store import Store

log = logging.getLogger(__name__)

_LONGEST_BACKLOG = 10000


class EventLog:
    """What happened to a job on this node, in order; any thread may add."""

    def __init__(self, job: JobKey, node: str) -> None:
        self._job = job
        self._node = node
        self._lock = threading.Lock()
        self._pending: list[dict[str, Any]] = []
        self.epoch = 0

    def add(self, event: str, text: str, **details: Any) -> None:  # noqa: ANN401 - any JSON value
        """Record *event*, one of the words of docs/operate.md, with *text* for people."""
        log.info("%s: %s", event, text)
        entry = {"time": time.time(), "node": self._node, "epoch": self.epoch, "event": event, "text": text}
        with self._lock:
            self._pending.append(entry | details)
            # A store that is away for weeks must not fill this node's memory.
            del self._pending[:-_LONGEST_BACKLOG]

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
