"""Which of several watchers of a cluster acts: the one that holds a lease in the store; the others stand by.

It is a lease like those of jobs, of a job that is called like the cluster, in a cluster of its own; each new holder
has a higher epoch. Beats are counted by each watcher's own clock, as for jobs: no two clocks are compared.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from outlast.errors import LeaseLost, OutlastError
from outlast.model import JobKey, Lease, LeaseView

log = logging.getLogger(__name__)

# Where watchers' leases are; no cluster is called so.
WATCHERS = "_watchers"

# How much sooner than its end the lease is over for its holder.
_MARGIN_SECONDS = 0.5


class LeaseStore(Protocol):
    """What taking turns asks of a store; see `outlast.store.Store`."""

    def leases(self, cluster: str) -> list[LeaseView]:
        """Return each job's lease of the highest run."""

    def renew_lease(self, lease: Lease) -> None:
        """Tell everybody that *lease* is held."""

    def drop_lease(self, lease: Lease) -> None:
        """Give *lease* up."""


class Turn:
    """One watcher's part in it."""

    def __init__(self, store: LeaseStore, cluster: str, ttl: float, name: str = "") -> None:
        """*ttl*: seconds without a beat after which another watcher takes over. *name* is no other watcher's."""
        self._store = store
        self._job = JobKey(WATCHERS, cluster)
        self._ttl = ttl
        self._name = name or f"{socket.gethostname().split('.')[0]}.{os.getpid()}"
        self._mine: Lease | None = None
        self._claimed = 0.0
        self._renewed = float("-inf")
        self._heard: tuple[Lease, int] | None = None
        self._heard_at = 0.0
        self._not_before = 0.0

    def step(self, now: float | None = None) -> bool:
        """Renew the lease, or take it if nobody does; return whether this watcher acts.

        To be called in each cycle. *now* is `time.monotonic()`. Raises as those of the store: then nobody acts.
        """
        now = time.monotonic() if now is None else now
        if self._mine is not None:
            return self._renew(self._mine, now)
        views = [view for view in self._store.leases(WATCHERS) if view.lease.job == self._job]
        beat = (views[0].lease, views[0].beat) if views else None
        if beat != self._heard:
            if beat is not None and (self._heard is None or beat[0] != self._heard[0]):
                log.info("standing by: the watcher %s acts", beat[0].node)
            self._heard, self._heard_at = beat, now
        silent = beat is None or now - self._heard_at > self._ttl
        if silent and now >= self._not_before:
            epoch = 1 if beat is None else beat[0].epoch + 1
            self._claimed = self._renewed = now
            self._mine = Lease(self._job, epoch, self._name, os.getuid())
            self._renew(self._mine, now)
        return False

    def keep(self, ending: threading.Event, pace: float, told: Callable[[], None]) -> None:
        """Do `step` every *pace* seconds until *ending* is set, whatever else this watcher is busy with.

        *told* is called when it begins to act.
        """
        fault = ""
        acted = False
        while not ending.wait(pace):
            try:
                acts = self.step()
                if acts and not acted:
                    told()
                acted = acts
            except OutlastError as error:
                if str(error) != fault:
                    log.warning("whether this watcher acts is not known: %s", error)
                fault = str(error)
            else:
                fault = ""

    def may_act(self, now: float | None = None) -> bool:
        """Whether no other watcher can have taken over by now, whatever held this one up since its last step."""
        now = time.monotonic() if now is None else now
        return self._acts(now) and now - self._renewed < self._ttl - _MARGIN_SECONDS

    def give_up(self) -> None:
        """Let another watcher act at once."""
        if self._mine is not None:
            self._store.drop_lease(self._mine)
            self._mine = None

    def _acts(self, now: float) -> bool:
        # By then whoever had the lease before has known for long that it is over.
        return self._mine is not None and now - self._claimed >= self._ttl

    def _renew(self, mine: Lease, now: float) -> bool:
        acted = self._acts(self._renewed)
        try:
            if now - self._renewed > self._ttl:
                # Others may have taken it meanwhile, and given it up again: it is not this watcher's any more.
                self._store.drop_lease(mine)
                raise LeaseLost(f"the watcher {mine.node} was held up for {now - self._renewed:.1f} s")
            self._store.renew_lease(mine)
        except LeaseLost as error:
            log.info("this watcher stands by from now on: %s", error)
            self._mine, self._heard = None, None
            # Should both have given it up, they do not try again at the same time.
            self._not_before = now + random.uniform(0.0, self._ttl)  # noqa: S311 - no secret
            return False
        self._renewed = now
        if self._acts(now) and not acted:
            log.info("this watcher acts from now on, as number %d", mine.epoch)
        return self._acts(now)
