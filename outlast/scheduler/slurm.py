"""Slurm behind the scheduler protocol: asked by its commands, and of all jobs and nodes by pyslurm where that is."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from outlast.errors import ConfigError, OutlastError
from outlast.model import SchedulerJob, SchedulerNode
from outlast.scheduler import SchedulerRefused
from outlast.scheduler import _slurm_text as text
from outlast.scheduler._command import ask

log = logging.getLogger(__name__)

COMMAND_SECONDS = 10.0
_PYSLURM = Path(__file__).with_name("_pyslurm.py")
# So many jobs at most are asked after by their ids; of more of them the one query for all is the cheaper.
_MOST_AT_ONCE = 500

# Words in which Slurm's commands say that slurmctld gave no answer, or none yet. Source: Slurm 24.11,
# src/common/slurm_errno.c: SLURM_COMMUNICATIONS_*, SLURMCTLD_COMMUNICATIONS_*, SLURM_PROTOCOL_SOCKET_*,
# ESLURM_IN_STANDBY_*; "Unexpected message" is what "scontrol requeue" says where nothing listens.
_NO_ANSWER = re.compile(
    r"Unable to contact slurm controller|Communication connection failure|Message (?:receive|send) failure|"
    r"Socket timed out|Zero Bytes were transmitted or received|in standby mode|Unexpected message received"
)


class SlurmScheduler:
    """The cluster that this machine's slurm.conf names. See `outlast.scheduler.Scheduler`."""

    def __init__(self, *, timeout: float = COMMAND_SECONDS) -> None:
        """Look the commands up on PATH; *timeout* is in seconds, for each command.

        Raises:
            ConfigError: squeue or scontrol is not installed.
        """
        self._timeout = timeout
        self._programs = {name: _which(name) for name in ("squeue", "scontrol")}
        # Nothing else is passed on: SQUEUE_STATES, SLURM_CLUSTERS and their like change what is printed.
        passed = ("PATH", "SLURM_CONF")
        self._environment = {name: os.environ[name] for name in passed if name in os.environ}
        self._environment |= {"LC_ALL": "C.UTF-8", "SLURM_JSON": "compact"}
        self._has_pyslurm = importlib.util.find_spec("pyslurm") is not None

    def jobs(self) -> tuple[SchedulerJob, ...]:
        """See `Scheduler.jobs`: ended jobs stay known for MinJobAge (300 s unless configured)."""
        if (output := self._ask_pyslurm("jobs")) is not None:
            whole, others = text.in_part(output)
            if len(others) <= _MOST_AT_ONCE:
                return text.parse_jobs(whole) + self._some(others)
        return text.parse_jobs(self._run(text.jobs_command()))

    def nodes(self) -> tuple[SchedulerNode, ...]:
        """See `Scheduler.nodes`."""
        if (output := self._ask_pyslurm("nodes")) is not None:
            return text.parse_nodes(output)
        return text.parse_nodes(self._run(text.nodes_command()))

    def requeue(self, handle: str) -> None:
        """See `Scheduler.requeue`."""
        self._run(text.requeue_command(handle))

    def requeue_hold(self, handle: str) -> None:
        """See `Scheduler.requeue_hold`."""
        self._run(text.requeue_hold_command(handle))

    def hold(self, handle: str) -> None:
        """See `Scheduler.hold`."""
        self._run(text.hold_command(handle))

    def delay(self, handle: str, seconds: float) -> None:
        """See `Scheduler.delay`."""
        self._run(text.delay_command(handle, seconds))

    def release(self, handle: str) -> None:
        """See `Scheduler.release`."""
        self._run(text.release_command(handle))

    def require(self, handle: str, node: str) -> None:
        """See `Scheduler.require`."""
        self._run(text.require_command(handle, node))

    def leave(self, handle: str, *, hold: bool, to: str | None) -> str | None:
        """See `Scheduler.leave`: the job's manager does."""
        return None

    def drain(self, node: str, reason: str) -> None:
        """See `Scheduler.drain`."""
        self._run(text.drain_command(node, reason))

    def kill_wait(self) -> float:
        """Return the seconds between the signal that asks a job to end and the one that ends it."""
        match = re.search(r"^KillWait\s*=\s*([0-9]+)", self._run(text.config_command()), re.MULTILINE)
        if match is None:
            raise OutlastError("scontrol: its configuration names no KillWait")
        return float(match[1])

    def mark_down(self, nodes: Sequence[str], reason: str) -> None:
        """See `Scheduler.mark_down`."""
        self._run(text.mark_down_command(nodes, reason))

    def exclude(self, handles: Sequence[str], nodes: Sequence[str], *, at_once: bool = False) -> None:
        """See `Scheduler.exclude`."""
        self._run(text.exclude_command(handles, nodes, at_once=at_once))

    def job(self, job_id: str) -> SchedulerJob | None:
        """See `Witness.job`."""
        return next(iter(self._some([job_id])), None)

    def users(self) -> frozenset[int]:
        """See `Scheduler.users`: slurmctld runs EpilogSlurmctld as SlurmUser."""
        return frozenset({text.parse_slurm_user(self._run(text.config_command()))})

    def _some(self, job_ids: Sequence[str]) -> tuple[SchedulerJob, ...]:
        """Return those of some jobs that there still are."""
        if not job_ids:
            return ()
        try:
            found = text.parse_jobs(self._run(text.some_jobs_command(job_ids)))
        except SchedulerRefused as error:
            if "Invalid job id" in str(error):
                return ()
            raise
        return tuple(job for job in found if job.job_id in job_ids)

    def _ask_pyslurm(self, what: str) -> str | None:
        """Return what pyslurm tells of "jobs" or "nodes" in their commands' form, or None where it does not."""
        if not self._has_pyslurm:
            return None
        argv = [sys.executable, "-P", str(_PYSLURM), what]
        try:
            return ask(["pyslurm", what], argv, self._environment, self._timeout, _NO_ANSWER)
        except SchedulerRefused as error:
            log.warning("%s; from now on Slurm's commands are asked", error)
            self._has_pyslurm = False
            return None

    def _run(self, command: Sequence[str]) -> str:
        argv = [self._programs[command[0]], *command[1:]]
        return ask(command, argv, self._environment, self._timeout, _NO_ANSWER)


def _which(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ConfigError(
            f"{name}: not on PATH", hint="the watcher runs where Slurm's commands are installed"
        )
    return os.path.abspath(found)  # noqa: PTH100 - resolve() would follow a wrapper's link
