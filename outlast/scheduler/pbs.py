"""OpenPBS behind the scheduler protocol. What its commands are given, and what they print, is in _pbs_text.py."""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from outlast.errors import ConfigError, OutlastError
from outlast.model import SchedulerJob, SchedulerNode
from outlast.scheduler import SchedulerRefused
from outlast.scheduler import _pbs_text as pbs
from outlast.scheduler._command import ask

log = logging.getLogger(__name__)

COMMAND_SECONDS = 10.0
# Where the commands are if not on PATH, as under a service.
_PLACES = ("/opt/pbs/bin", "/usr/pbs/bin")
_COMMANDS = ("qstat", "pbsnodes", "qrerun", "qhold", "qrls", "qalter", "qmgr")
_READMIT_CYCLE = 15.0  # seconds between two looks
# For as long MoM's $action checkpoint_abort may take, as install-pbs writes it; then the job must soon be held.
_ACTION_SECONDS = 660.0
_HELD_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_LOOKS = 3
_NO_ANSWER = re.compile(
    r"cannot connect to server|Connection refused|No Permission to connect|timed out|errno=1501[0-9]|"
    r"Communication failure|End of File"
)


class PbsScheduler:
    """The cluster that this machine's pbs.conf names. See `outlast.scheduler.Scheduler`."""

    def __init__(self, *, timeout: float = COMMAND_SECONDS, ahead: int = 0) -> None:
        """Look the commands up; *timeout* is in seconds, for each command, *ahead* as in `parse_jobs`.

        Raises:
            ConfigError: a command is not installed.
        """
        self._timeout = timeout
        self._ahead = ahead
        self._readmitting: threading.Thread | None = None
        self._programs = {name: _which(name) for name in _COMMANDS}
        passed = ("PATH", "PBS_CONF_FILE")
        self._environment = {name: os.environ[name] for name in passed if name in os.environ}
        self._environment["LC_ALL"] = "C.UTF-8"

    def jobs(self) -> tuple[SchedulerJob, ...]:
        """See `Scheduler.jobs`: a job that has ended is not known any more."""
        return pbs.parse_jobs(self._run(pbs.jobs_command()), ahead=self._ahead)

    def nodes(self) -> tuple[SchedulerNode, ...]:
        """See `Scheduler.nodes`. A node that `mark_down` took out of service, and that is up, is put back."""
        output = self._run(pbs.nodes_command())
        nodes = pbs.parse_nodes(output)
        if not all(node.up for node in nodes):
            self._readmit_later()
        return nodes

    def requeue(self, handle: str) -> None:
        """See `Scheduler.requeue`."""
        self._run(pbs.requeue_command(handle))

    def job(self, job_id: str) -> SchedulerJob | None:
        """See `Witness.job`."""
        return next((job for job in self.jobs() if job.job_id == job_id), None)

    def mark_down(self, nodes: Sequence[str], reason: str) -> None:
        """See `Scheduler.mark_down`: takes the nodes out of service, and has each of their jobs queued again.

        PBS queues them as soon as it has noticed that nothing answers there, which takes it up to a minute.
        """
        for node in nodes:
            self._mark_one_down(node, reason)

    def _mark_one_down(self, node: str, reason: str) -> None:
        self._run(pbs.offline_command(node, reason))
        self._readmit_later()
        if node in pbs.down_nodes(self._run(pbs.nodes_command())):
            # PBS knows, and queues them node_fail_requeue seconds after it did. A qrerun now would queue them
            # at once, but PBS then waits for that MoM's answer before it runs them: they would be stuck until
            # the host is back. Source: OpenPBS 23.06, req_rerun.c, req_rerunjob2(): ji_discarding.
            return
        for handle in pbs.jobs_on(self._run(pbs.jobs_command()), node):
            self._run(pbs.requeue_command(handle))

    def _readmit_later(self) -> None:
        """Put back what was taken out of service when it is up again, whether or not the watcher looks then."""
        if self._readmitting is None or not self._readmitting.is_alive():
            self._readmitting = threading.Thread(target=self._readmit, daemon=True)
            self._readmitting.start()

    def _readmit(self) -> None:
        left = True
        while left:
            time.sleep(_READMIT_CYCLE)
            try:
                output = self._run(pbs.nodes_command())
                for name in pbs.to_readmit(output, time.time()):
                    self._run(pbs.clear_command(name))
                left = not all(node.up for node in pbs.parse_nodes(output))
            except OutlastError as error:
                log.warning("no node is put back into service now: %s", error)

    def exclude(self, handles: Sequence[str], nodes: Sequence[str], *, at_once: bool = False) -> None:
        """See `Scheduler.exclude`: a node that was marked down is out of service for all: nothing is left to do."""

    def require(self, handle: str, node: str) -> None:
        """See `Scheduler.require`: the node is part of each chunk of the job's select statement."""
        row = pbs.row_of(self._run(pbs.jobs_command()), handle)
        if row is not None:
            self._run(pbs.select_command(handle, pbs.bound(str(pbs.resources(row)["select"]), node)))
            self.look()  # PBS takes a change of what a job asks for as no reason to look

    def requeue_hold(self, handle: str) -> None:
        """See `Scheduler.requeue_hold`."""
        raise SchedulerRefused(f"hold the job with PBS's own command: qhold {handle}")

    def hold(self, handle: str) -> None:
        """See `Scheduler.hold`."""
        raise SchedulerRefused(f"hold the job with PBS's own command: qhold {handle}")

    def delay(self, handle: str, seconds: float) -> None:
        """See `Scheduler.delay`."""
        raise SchedulerRefused(f"put the job off with PBS's own command: qalter -a TIME {handle}")

    def release(self, handle: str) -> None:
        """See `Scheduler.release`."""
        self._run(pbs.release_command(handle, "u"))
        self.look()
        # PBS refuses the first attempt to run a job that was held while it ran.
        threading.Timer(_LOOK_SECONDS, self.look).start()

    def leave(self, handle: str, *, hold: bool, to: str | None) -> str | None:
        """See `Scheduler.leave`: MoM has the job saved when PBS holds it; then it is bound to *to*, and released."""
        if "[" in handle:
            raise SchedulerRefused(
                "PBS holds no single task of an array", hint="'outlast drain' of its node moves it, too"
            )
        row = pbs.row_of(self._run(pbs.jobs_command()), handle)
        if row is None or str(row.get("substate")) != pbs.RUNNING_SUBSTATE:
            raise SchedulerRefused("the job's run has not begun, or is over", hint="try again in a moment")
        if str(row.get("Checkpoint")) == "n":
            raise SchedulerRefused("the job asked for no checkpoints (-c n)", hint="qalter -c w JOB")
        if not hold and to is None:
            to = pbs.roomy_node(self._run(pbs.nodes_command()), row)
            if to is None:
                raise SchedulerRefused("no other node has room for the job now", hint="name one with --to")
        Move(self._run, handle, str(pbs.resources(row)["select"]), to, self.look).start()
        return to or ""

    def look(self) -> None:
        """Have PBS look now at what waits; where it does not let us, it does so in its own time."""
        try:
            self._run(pbs.cycle_command())
        except OutlastError as error:
            log.warning("the job starts when PBS looks again: %s", error)

    def drain(self, node: str, reason: str) -> None:
        """See `Scheduler.drain`."""
        self._run(pbs.drain_command(node, reason))

    def users(self) -> frozenset[int]:
        """See `Scheduler.users`: PBS runs its hooks as root."""
        return frozenset()

    def _run(self, command: Sequence[str], timeout: float = 0.0) -> str:
        argv = [self._programs[command[0]], *command[1:]]
        return ask(command, argv, self._environment, timeout or self._timeout, _NO_ANSWER)


class Move(threading.Thread):
    """Has MoM save a job that runs and end its run, which takes as long as a checkpoint does; and what comes then."""

    def __init__(
        self, run: Callable[..., str], handle: str, select: str, to: str | None, look: Callable[[], None]
    ) -> None:
        """*to* is where the job goes on, or None for a job that stays held, by its owner's own kind of hold."""
        super().__init__(name="move", daemon=True)
        self._ask = run
        self._job_handle = handle
        self._job_select = select
        self._to = to
        self._look = look

    def run(self) -> None:
        """Hold the job; one that is to move is then bound to its new node, and released."""
        # A hold of its own kind, so that one of the owner's or of an operator's is not taken away with it.
        kind = "u" if self._to is None else "s"
        try:
            self._ask(pbs.hold_command(self._job_handle, kind), _ACTION_SECONDS)
            if self._to is None:
                return
            self._await("H")
            self._ask(pbs.select_command(self._job_handle, pbs.bound(self._job_select, self._to)))
        except OutlastError as error:
            log.warning("job %s is not moved: %s", self._job_handle, error)
        self._release(kind)

    def _release(self, kind: str) -> None:
        """Let the job run; after a hold that failed PBS keeps the job held, though it runs on."""
        try:
            self._ask(pbs.release_command(self._job_handle, kind))
            # PBS refuses the first attempt after a hold, so it must look twice.
            for _ in range(_LOOKS):
                time.sleep(_LOOK_SECONDS)
                self._look()
        except OutlastError as error:
            log.warning(
                "job %s stays held: qrls -h %s %s: %s", self._job_handle, kind, self._job_handle, error
            )

    def _await(self, letter: str) -> None:
        deadline = time.monotonic() + _HELD_SECONDS
        while time.monotonic() < deadline:
            row = pbs.row_of(self._ask(pbs.jobs_command()), self._job_handle)
            if row is not None and row["job_state"] == letter:
                return
            time.sleep(_LOOK_SECONDS)
        raise OutlastError(f"PBS does not show it as held within {_HELD_SECONDS:.0f} s")


def _which(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(_PLACES))
    if found is None:
        raise ConfigError(f"{name}: not on PATH", hint="the watcher runs where PBS's commands are installed")
    return str(Path(found).absolute())
