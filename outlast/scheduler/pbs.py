"""OpenPBS behind the scheduler protocol: its commands' arguments, and parsers of their JSON, all pure."""

from __future__ import annotations

import json
import logging
import os
import pwd
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outlast.errors import ConfigError, OutlastError
from outlast.model import JobState, SchedulerJob, SchedulerNode
from outlast.scheduler import SchedulerRefused
from outlast.scheduler._command import ask

log = logging.getLogger(__name__)

COMMAND_SECONDS = 10.0
# Where the commands are if not on PATH, as under a service.
_PLACES = ("/opt/pbs/bin", "/usr/pbs/bin")
_MARK = "outlast: "
# A node that the watcher took out of service is put back when PBS has found it up for so long. PBS takes up to
# a minute to notice that a connection is dead (keepalive 30 s, 3 probes of 10 s), and calls it free till then.
_READMIT_SECONDS = 120
_READMIT_CYCLE = 15.0  # seconds between two looks

# Source: PBS Professional 2022.1 Reference Guide, table "Job States"; S and U keep their host and renew the
# lease. F, finished, and X, a finished task of an array, are told apart by Exit_status.
_STATES = {
    "Q": JobState.PENDING,
    "H": JobState.PENDING,
    "W": JobState.PENDING,
    "T": JobState.PENDING,
    "R": JobState.RUNNING,
    "E": JobState.RUNNING,
    "S": JobState.RUNNING,
    "U": JobState.RUNNING,
    "M": JobState.FAILED,  # moved to another server: not this one's to bring back
}
_FINISHED = frozenset("FX")

# A negative Exit_status is PBS's own word on why a job ended. Source: OpenPBS, src/include/job.h, JOB_EXEC_*.
EXIT_WORDS = {
    -1: "FAIL1",
    -2: "FAIL2",
    -3: "RETRY",
    -4: "INITABT",
    -5: "INITRST",
    -6: "INITRMG",
    -7: "BADRESRT",
    -10: "FAILUID",
    -11: "RERUN",
    -12: "CHKP",
    -13: "FAIL_PASSWORD",
    -14: "RERUN_SIS_FAIL",
    -15: "QUERST",
    -16: "FAILHOOK_RERUN",
    -17: "FAILHOOK_DELETE",
    -18: "HOOK_RERUN",
    -19: "HOOK_DELETE",
    -20: "RERUN_MS_FAIL",
    -21: "FAIL_SECURITY",
    -22: "HOOKERROR",
    -23: "FAIL_KRB5",
    -24: "KILL_NCPUS_BURST",
    -25: "KILL_NCPUS_SUM",
    -26: "KILL_VMEM",
    -27: "KILL_MEM",
    -28: "KILL_CPUT",
    -29: "KILL_WALLTIME",
    -30: "JOINJOB",
}

# Words of a node's state with which its MoM cannot be talked to. Source: OpenPBS, src/include/pbs_internal.h, ND_*.
_UNREACHABLE = frozenset({"down", "stale", "state-unknown", "unresolvable", "provisioning"})

_NO_ANSWER = re.compile(
    r"cannot connect to server|Connection refused|No Permission to connect|timed out|errno=1501[0-9]|"
    r"Communication failure|End of File"
)


def jobs_command() -> list[str]:
    """The command whose output `parse_jobs` reads: every job that has not ended, and each task of an array."""
    return ["qstat", "-f", "-t", "-F", "json"]


def nodes_command() -> list[str]:
    """The command whose output `parse_nodes` reads."""
    return ["pbsnodes", "-a", "-F", "json"]


def offline_command(node: str, reason: str) -> list[str]:
    """Take a node out of service: PBS starts nothing on it until `clear_command`."""
    return ["pbsnodes", "-o", "-C", _MARK + reason.removeprefix(_MARK), node]


def clear_command(node: str) -> list[str]:
    """Put a node back into service."""
    return ["pbsnodes", "-r", "-C", "", node]


def requeue_command(handle: str) -> list[str]:
    """Have a running job queued again, though its MoM may not answer; only a manager of PBS may."""
    return ["qrerun", "-W", "force", handle]


def job_name(handle: str) -> str:
    """Return what Outlast calls a job of PBS: `17.server`, and `17_3.server` for a task of an array."""
    return handle.replace("[", "_").replace("]", "")


def parse_jobs(output: str, uid_of: Mapping[str, int] | None = None) -> tuple[SchedulerJob, ...]:
    """Read the output of `jobs_command`.

    Args:
        uid_of: the users' ids; this machine's, unless given.

    Raises:
        OutlastError: it is no such output, or a job is in a state that this version does not know. It is
            never guessed: a wrong guess would start a job twice.
    """
    # An array as a whole, such as 17[].server, runs nothing.
    return tuple(
        _job(handle, row, uid_of) for handle, row in _rows(output, "Jobs", "qstat") if "[]" not in handle
    )


def parse_nodes(output: str) -> tuple[SchedulerNode, ...]:
    """Read the output of `nodes_command`. Raises OutlastError like `parse_jobs`."""
    return tuple(_node(name, row) for name, row in _rows(output, "nodes", "pbsnodes"))


def jobs_on(output: str, node: str) -> tuple[str, ...]:
    """Return the handles of the jobs that PBS runs on *node*, from the output of `jobs_command`."""
    rows = _rows(output, "Jobs", "qstat")
    return tuple(handle for handle, row in rows if row["job_state"] == "R" and node in _hosts(row))


def down_nodes(output: str) -> frozenset[str]:
    """Return the nodes whose MoM PBS knows to be down, from the output of `nodes_command`."""
    rows = _rows(output, "nodes", "pbsnodes")
    return frozenset(name for name, row in rows if set(str(row["state"]).split(",")) & _UNREACHABLE)


def to_readmit(output: str, now: float) -> tuple[str, ...]:
    """Return the nodes that the watcher took out of service and that PBS has found up since, at time *now*.

    *output* is that of `nodes_command`, *now* in seconds, Unix time.
    """
    found = []
    for name, row in _rows(output, "nodes", "pbsnodes"):
        words = set(str(row["state"]).split(","))
        since = now - float(row.get("last_state_change_time", now))
        ours = str(row.get("comment", "")).startswith(_MARK)
        if ours and "offline" in words and not words & _UNREACHABLE and since >= _READMIT_SECONDS:
            found.append(name)
    return tuple(found)


class PbsScheduler:
    """The cluster that this machine's pbs.conf names. See `outlast.scheduler.Scheduler`."""

    def __init__(self, *, timeout: float = COMMAND_SECONDS) -> None:
        """Look the commands up; *timeout* is in seconds, for each command.

        Raises:
            ConfigError: a command is not installed.
        """
        self._timeout = timeout
        self._readmitting: threading.Thread | None = None
        self._programs = {name: _which(name) for name in ("qstat", "pbsnodes", "qrerun")}
        passed = ("PATH", "PBS_CONF_FILE")
        self._environment = {name: os.environ[name] for name in passed if name in os.environ}
        self._environment["LC_ALL"] = "C.UTF-8"

    def jobs(self) -> tuple[SchedulerJob, ...]:
        """See `Scheduler.jobs`: a job that has ended is not known any more."""
        return parse_jobs(self._run(jobs_command()))

    def nodes(self) -> tuple[SchedulerNode, ...]:
        """See `Scheduler.nodes`. A node that `mark_down` took out of service, and that is up, is put back."""
        output = self._run(nodes_command())
        nodes = parse_nodes(output)
        if not all(node.up for node in nodes):
            self._readmit_later()
        return nodes

    def requeue(self, handle: str) -> None:
        """See `Scheduler.requeue`."""
        self._run(requeue_command(handle))

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
        self._run(offline_command(node, reason))
        self._readmit_later()
        if node in down_nodes(self._run(nodes_command())):
            # PBS knows, and queues them node_fail_requeue seconds after it did. A qrerun now would queue them
            # at once, but PBS then waits for that MoM's answer before it runs them: they would be stuck until
            # the host is back. Source: OpenPBS 23.06, req_rerun.c, req_rerunjob2(): ji_discarding.
            return
        for handle in jobs_on(self._run(jobs_command()), node):
            self._run(requeue_command(handle))

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
                output = self._run(nodes_command())
                for name in to_readmit(output, time.time()):
                    self._run(clear_command(name))
                left = not all(node.up for node in parse_nodes(output))
            except OutlastError as error:
                log.warning("no node is put back into service now: %s", error)

    def exclude(self, handles: Sequence[str], nodes: Sequence[str], *, at_once: bool = False) -> None:
        """See `Scheduler.exclude`: a node that was marked down is out of service for all: nothing is left to do."""

    def require(self, handle: str, node: str) -> None:
        """See `Scheduler.require`."""
        raise SchedulerRefused("PBS lets nobody choose the host of a job that was submitted without it")

    def release(self, handle: str) -> None:
        """See `Scheduler.release`."""
        raise SchedulerRefused(f"release the job with PBS's own command: qrls {handle}")

    def drain(self, node: str, reason: str) -> None:
        """See `Scheduler.drain`."""
        self._run(offline_command(node, reason))

    def users(self) -> frozenset[int]:
        """See `Scheduler.users`: PBS runs its hooks as root."""
        return frozenset()

    def _run(self, command: Sequence[str]) -> str:
        argv = [self._programs[command[0]], *command[1:]]
        return ask(command, argv, self._environment, self._timeout, _NO_ANSWER)


def _which(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(_PLACES))
    if found is None:
        raise ConfigError(f"{name}: not on PATH", hint="the watcher runs where PBS's commands are installed")
    return str(Path(found).absolute())


def _rows(output: str, key: str, program: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        # Values such as environment variables hold what their users wrote: control characters, too.
        rows = json.loads(output, strict=False).get(key, {})
    except (ValueError, AttributeError):
        raise OutlastError(f"{program}: its output is no JSON object: {output[:80]!r}") from None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise OutlastError(f"{program}: its {key!r} is not of the known form")
    return list(rows.items())


def _job(handle: str, row: Mapping[str, Any], uid_of: Mapping[str, int] | None) -> SchedulerJob:
    try:
        letter = str(row["job_state"])
        user = str(row.get("euser") or str(row["Job_Owner"]).partition("@")[0])
        state, word = _state(handle, letter, row.get("Exit_status"))
        version = int(row.get("run_version", 0))
        return SchedulerJob(
            job_id=job_name(handle),
            state=state,
            raw_state=word,
            # A run is numbered when it begins: a waiting job's next run is one more than its last.
            epoch=version if state is JobState.PENDING else max(0, version - 1),
            nodes=_hosts(row) if state is JobState.RUNNING else (),
            uid=_uid(user, uid_of),
            name=str(row["Job_Name"]),
            requeueable=str(row.get("Rerunable", "True")) == "True",
            handle=handle,
        )
    except (KeyError, ValueError) as error:
        raise OutlastError(f"qstat: job {handle} is not of the known form: {error!r}") from None


def _state(handle: str, letter: str, status: object) -> tuple[JobState, str]:
    if letter in _STATES:
        return _STATES[letter], letter
    if letter in _FINISHED:
        code = int(str(status)) if status is not None else 0
        if code == 0:
            return JobState.DONE, letter
        # What has finished cannot be queued again, whatever it was that ended it.
        return JobState.FAILED, f"{letter}({EXIT_WORDS.get(code, code)})"
    raise OutlastError(f"qstat: job {handle} is in the unknown state {letter!r}")


def _uid(user: str, uid_of: Mapping[str, int] | None) -> int:
    if uid_of is not None:
        return uid_of[user]
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return -1  # nobody's here: the job is shown to root only


def _hosts(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the hosts in an exec_host such as `n1/0*2+n2/1`, each once."""
    text = str(row.get("exec_host", ""))
    return tuple(dict.fromkeys(part.partition("/")[0] for part in text.split("+") if part))


def _node(name: str, row: Mapping[str, Any]) -> SchedulerNode:
    words = frozenset(str(row.get("state", "")).split(",")) - {""}
    if not words:
        raise OutlastError(f"pbsnodes: node {name} has no state")
    return SchedulerNode(
        name=name,
        # PBS leaves jobs on a node that is down for all of node_fail_requeue: not up is what mark_down has seen to.
        up=not ("offline" in words and str(row.get("comment", "")).startswith(_MARK)),
        responding=not words & _UNREACHABLE,
        address=str(row.get("Mom") or name),
        port=int(row.get("Port", 15002)),
    )
