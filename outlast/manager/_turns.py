"""Whose turn it is to ship a checkpoint: so many jobs of a node at a time, and so many of all nodes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from outlast.errors import LeaseLost
from outlast.model import JobKey, Lease, LeaseView

log = logging.getLogger(__name__)

# Where jobs queue for the store: as leases of jobs of a cluster that no cluster is called like.
UPLOADS = "_uploads"
# A ticket that nobody has renewed for so long is of a manager that is gone, and keeps nobody waiting.
EXPIRY_SECONDS = 30.0
# How often tickets are renewed, and with each that is ahead a little less often: a long queue asks little.
_RENEW_SECONDS = 5.0
_ASK_SECONDS, _ASK_SECONDS_EACH = 0.5, 0.1
_SHIPS = ":ships"  # after the node's name; no host is called so
_LOOK_SECONDS = 0.25

# Waits for so many seconds, or until somebody waits for the checkpoint; tells whether somebody does.
Hurry = Callable[[float], bool]


class TicketStore(Protocol):
    """What queueing asks of a store; see `outlast.store.Store`."""

    def leases(self, cluster: str) -> list[LeaseView]:
        """Return each job's lease of the highest run."""

    def renew_lease(self, lease: Lease) -> None:
        """Tell everybody that *lease* is held."""

    def drop_lease(self, lease: Lease) -> None:
        """Give *lease* up."""


class StoreTurns:
    """One job's place in the queue of all that ship to a store, served in the order in which they came.

    A ticket is a lease, whose epoch is when its job came, in milliseconds by its node's clock: it only orders those
    that wait. Who takes a turn marks its ticket and looks again: of those that take the last place at the same
    moment whoever marked last sees the others, and goes back. All that is asked of the store is done in `step`, by
    the thread that renews the job's own lease; whoever wants to ship only waits.
    """

    def __init__(self, job: JobKey, node: str, uid: int, most: int) -> None:
        """*most*: 0 for any number."""
        self._job = JobKey(UPLOADS, f"{job.cluster}.{job.job_id}")
        self._node, self._uid = node, uid
        self._most = most
        self._change = threading.Condition()
        self._wanted = False
        self._granted = False
        self._ticket: Lease | None = None
        self._next = 0.0

    @contextlib.contextmanager
    def taken(self, hurry: Hurry) -> Iterator[None]:
        """Have a turn, for which whoever is in a hurry does not wait."""
        if not self._most:
            yield
            return
        with self._change:
            self._wanted = True
        try:
            while not hurry(0.0) and not self._has_turn():
                hurry(_LOOK_SECONDS)
            yield
        finally:
            with self._change:
                self._wanted = False

    def _has_turn(self) -> bool:
        with self._change:
            return self._granted

    def step(self, store: TicketStore, now: float | None = None) -> None:
        """Do what is to be done for the ticket now. Raises as those of the store. *now* is `time.monotonic()`."""
        now = time.monotonic() if now is None else now
        with self._change:
            wanted = self._wanted
        if not wanted:
            self.leave(store)
        elif now >= self._next:
            try:
                self._next = now + (self._renew(store) if self._granted else self._queue(store))
            except LeaseLost as error:
                log.debug("another ticket is asked for: %s", error)
                self._set(None, granted=False)

    def leave(self, store: TicketStore) -> None:
        """Give the place to others."""
        ticket = self._ticket
        if ticket is not None:
            self._set(None, granted=False)
            store.drop_lease(ticket)

    def _set(self, ticket: Lease | None, *, granted: bool) -> None:
        with self._change:
            self._ticket, self._granted = ticket, granted
            self._next = 0.0

    def _renew(self, store: TicketStore) -> float:
        assert self._ticket is not None  # noqa: S101 - it was granted
        store.renew_lease(self._ticket)
        return _RENEW_SECONDS

    def _queue(self, store: TicketStore) -> float:
        """Wait on, or take a turn; return after how many seconds to come again."""
        if self._ticket is None:
            self._set(Lease(self._job, int(time.time() * 1000), self._node, self._uid), granted=False)
        mine = self._ticket
        assert mine is not None  # noqa: S101 - it was just made
        store.renew_lease(mine)
        ahead = [one for one in self._others(store) if _ships(one) or _place(one) < _place(mine)]
        if len(ahead) < self._most:
            mark = Lease(mine.job, mine.epoch, mine.node + _SHIPS, mine.uid)
            store.renew_lease(mark)
            self._set(mark, granted=False)
            ahead = [one for one in self._others(store) if _ships(one)]
            if len(ahead) < self._most:
                self._set(mark, granted=True)
                return _RENEW_SECONDS
            store.drop_lease(mark)
            self._set(mine, granted=False)
            store.renew_lease(mine)
        return min(_RENEW_SECONDS, _ASK_SECONDS + _ASK_SECONDS_EACH * len(ahead))

    def _others(self, store: TicketStore) -> list[Lease]:
        views = store.leases(UPLOADS)
        return [view.lease for view in views if view.age <= EXPIRY_SECONDS and view.lease.job != self._job]


def _ships(ticket: Lease) -> bool:
    return ticket.node.endswith(_SHIPS)


def _place(ticket: Lease) -> tuple[int, JobKey]:
    return ticket.epoch, ticket.job


class NodeTurns:
    """How many jobs of this node ship checkpoints at the same time: each takes one of so many locks."""

    def __init__(self, directory: Path, most: int) -> None:
        """*most*: 0 for any number."""
        self._directory = directory
        self._most = most

    @contextlib.contextmanager
    def taken(self, hurry: Hurry) -> Iterator[None]:
        """Have a turn, for which whoever is in a hurry does not wait."""
        turn = None
        while self._most and not hurry(0.0) and (turn := self.take()) is None:
            hurry(_LOOK_SECONDS)
        try:
            yield
        finally:
            if turn is not None:
                os.close(turn)

    def take(self) -> int | None:
        """Return a file descriptor to be closed afterwards, or None if none is free now.

        Whatever becomes of its holder, a lock does not outlive it.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in range(self._most):
            fd = os.open(self._directory / str(number), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
            else:
                return fd
        return None
