"""What the watcher needs of a scheduler, whichever it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from outlast.errors import OutlastError
from outlast.model import SchedulerJob, SchedulerNode


class SchedulerUnavailable(OutlastError):
    """Nobody must do anything: the scheduler did not answer, and the next try may succeed."""

    exit_code = os.EX_TEMPFAIL


class SchedulerRefused(OutlastError):
    """The scheduler answered no, in its own words."""

    exit_code = os.EX_UNAVAILABLE


class Witness(Protocol):
    """Whoever can say which run of a job is the one that goes on."""

    def job(self, job_id: str) -> SchedulerJob | None:
        """Return the job as it stands now, or None where there is none. Raises as those of `Scheduler`."""


class Scheduler(Protocol):
    """A scheduler's view of its jobs and nodes, and the few things that the watcher asks of it.

    Every call is bounded in time. Each raises SchedulerUnavailable where no answer came, and SchedulerRefused
    where the answer was no; a state that the adapter does not know is an OutlastError, never a guess.
    *handle* is `SchedulerJob.handle`.
    """

    def jobs(self) -> tuple[SchedulerJob, ...]:
        """Return every job that the scheduler knows, those that ended a short while ago too."""

    def nodes(self) -> tuple[SchedulerNode, ...]:
        """Return every node of the cluster."""

    def requeue(self, handle: str) -> None:
        """Make the scheduler run an ended job again under its own id."""

    def mark_down(self, nodes: Sequence[str], reason: str) -> None:
        """Tell the scheduler that *nodes* are dead, so that it takes their jobs away from them at once."""

    def exclude(self, handles: Sequence[str], nodes: Sequence[str], *, at_once: bool = False) -> None:
        """Keep pending jobs off exactly *nodes*; those named before and not here are allowed again.

        *at_once*: let them start as soon as there is place, where the scheduler would have them wait.
        """

    def require(self, handle: str, node: str) -> None:
        """Have a pending job start on *node* alone, or with "" anywhere."""

    def requeue_hold(self, handle: str) -> None:
        """Queue a running or an ended job again under its own id, and hold it."""

    def hold(self, handle: str) -> None:
        """Keep a pending job from being started before it is released."""

    def delay(self, handle: str, seconds: float) -> None:
        """Keep a pending job from being started for *seconds*."""

    def release(self, handle: str) -> None:
        """Let a job that is held run."""

    def leave(self, handle: str, *, hold: bool, to: str | None) -> str | None:
        """Have a running job saved and its run ended by the scheduler itself, where it is the one that does so.

        The job then waits until it is released (*hold*), or goes on, on *to* or else on another node.

        Returns:
            None: this scheduler does not; the job's manager sees to it. Else the node where the job is to go
            on, "" for a job that is held; what happens takes as long as a checkpoint, and is not waited for.
        """

    def drain(self, node: str, reason: str) -> None:
        """Let nothing more start on *node*; what runs there runs on."""

    def users(self) -> frozenset[int]:
        """Return the uids, beside root, under which the scheduler itself runs its hooks."""
