"""The arguments of OpenPBS's commands, and parsers of the JSON that they print: all pure."""

from __future__ import annotations

import json
import pwd
import re
import time
from collections.abc import Mapping
from typing import Any

from outlast.errors import OutlastError
from outlast.model import JobState, SchedulerJob, SchedulerNode

MARK = "outlast: "
# A node that the watcher took out of service is put back when PBS has found it up for so long. PBS takes up to
# a minute to notice that a connection is dead (keepalive 30 s, 3 probes of 10 s), and calls it free till then.
_READMIT_SECONDS = 120


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
# Before, MoM has not told of the job's session, and PBS sets a hold without asking MoM for a checkpoint.
# Source: OpenPBS, src/include/job.h, JOB_SUBSTATE_RUNNING, and src/server/req_holdjob.c.
RUNNING_SUBSTATE = "42"

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

_HOST = re.compile(r":(?:host|vnode)=([^:+]+)")


def jobs_command() -> list[str]:
    """The command whose output `parse_jobs` reads: every job that has not ended, and each task of an array."""
    return ["qstat", "-f", "-t", "-F", "json"]


def nodes_command() -> list[str]:
    """The command whose output `parse_nodes` reads."""
    return ["pbsnodes", "-a", "-F", "json"]


def offline_command(node: str, reason: str) -> list[str]:
    """Take a node out of service: PBS starts nothing on it until `clear_command`."""
    return ["pbsnodes", "-o", "-C", MARK + reason.removeprefix(MARK), node]


def drain_command(node: str, reason: str) -> list[str]:
    """Take a node out of service for a person, who also puts it back: without the mark of what the watcher does."""
    return ["pbsnodes", "-o", "-C", f"{reason.removeprefix(MARK)} by outlast", node]


def clear_command(node: str) -> list[str]:
    """Put a node back into service."""
    return ["pbsnodes", "-r", "-C", "", node]


def requeue_command(handle: str) -> list[str]:
    """Have a running job queued again, though its MoM may not answer; only a manager of PBS may."""
    return ["qrerun", "-W", "force", handle]


def hold_command(handle: str, kind: str) -> list[str]:
    """Hold a job, with a hold of *kind* (u, o or s); MoM first saves one that runs, and ends its run."""
    return ["qhold", "-h", kind, handle]


def release_command(handle: str, kind: str) -> list[str]:
    """Take a hold of *kind* from a job."""
    return ["qrls", "-h", kind, handle]


def select_command(handle: str, select: str) -> list[str]:
    """Give a waiting job another select statement."""
    return ["qalter", "-l", f"select={select}", handle]


def cycle_command() -> list[str]:
    """Have PBS look now at what waits, and not at the end of scheduler_iteration."""
    return ["qmgr", "-c", "set server scheduling = true"]


def bound(select: str, node: str) -> str:
    """Return *select* with each chunk on *node*, or with "" on any: `1:ncpus=2` becomes `1:ncpus=2:host=n1`."""
    free = re.sub(r":host=[^:+]*", "", select)
    return "+".join(f"{chunk}:host={node}" if node else chunk for chunk in free.split("+"))


def job_name(handle: str) -> str:
    """Return what Outlast calls a job of PBS: `17.server`, and `17_3.server` for a task of an array."""
    return handle.replace("[", "_").replace("]", "")


def parse_jobs(
    output: str, uid_of: Mapping[str, int] | None = None, *, ahead: int = 0
) -> tuple[SchedulerJob, ...]:
    """Read the output of `jobs_command`.

    Args:
        uid_of: the users' ids; this machine's, unless given.
        ahead: by how much a job's run_version is more than its run_count, which a manager of PBS may have
            set back. Only managers of PBS are told run_version. Source: OpenPBS, master_job_attr_def.xml.

    Raises:
        OutlastError: it is no such output, or a job is in a state that this version does not know. It is
            never guessed: a wrong guess would start a job twice.
    """
    # An array as a whole, such as 17[].server, runs nothing.
    return tuple(
        _job(handle, row, uid_of, ahead)
        for handle, row in _rows(output, "Jobs", "qstat")
        if "[]" not in handle
    )


def parse_nodes(output: str) -> tuple[SchedulerNode, ...]:
    """Read the output of `nodes_command`. Raises OutlastError like `parse_jobs`."""
    return tuple(_node(name, row) for name, row in _rows(output, "nodes", "pbsnodes"))


def jobs_on(output: str, node: str) -> tuple[str, ...]:
    """Return the handles of the jobs that PBS runs on *node*, from the output of `jobs_command`."""
    rows = _rows(output, "Jobs", "qstat")
    return tuple(handle for handle, row in rows if row["job_state"] == "R" and node in _hosts(row))


def row_of(output: str, handle: str) -> Mapping[str, Any] | None:
    """Return what PBS says of one job, from the output of `jobs_command`; None where it says nothing."""
    return dict(_rows(output, "Jobs", "qstat")).get(handle)


def roomy_node(output: str, row: Mapping[str, Any]) -> str | None:
    """Return a node in service, other than the job's own, with as many free CPUs as the job *row* asks for.

    *output* is that of `nodes_command`. Of several the one with the most.
    """
    wanted, here = int(resources(row).get("ncpus", 1)), _hosts(row)
    room = {}
    for name, node in _rows(output, "nodes", "pbsnodes"):
        has, taken = (node.get(f"resources_{key}", {}).get("ncpus", 0) for key in ("available", "assigned"))
        if node.get("state") == "free" and name not in here:
            room[name] = int(has) - int(taken)
    best = max(room, key=lambda name: room[name], default=None)
    return best if best is not None and room[best] >= wanted else None


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
        ours = str(row.get("comment", "")).startswith(MARK)
        if ours and "offline" in words and not words & _UNREACHABLE and since >= _READMIT_SECONDS:
            found.append(name)
    return tuple(found)


def _rows(output: str, key: str, program: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        # Values such as environment variables hold what their users wrote: control characters, too.
        rows = json.loads(output, strict=False).get(key, {})
    except (ValueError, AttributeError):
        raise OutlastError(f"{program}: its output is no JSON object: {output[:80]!r}") from None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise OutlastError(f"{program}: its {key!r} is not of the known form")
    return list(rows.items())


def _job(handle: str, row: Mapping[str, Any], uid_of: Mapping[str, int] | None, ahead: int) -> SchedulerJob:
    try:
        letter = str(row["job_state"])
        user = str(row.get("euser") or str(row["Job_Owner"]).partition("@")[0])
        state, word = _state(handle, letter, row.get("Exit_status"))
        version = int(row.get("run_version", int(row.get("run_count", 0)) + ahead))
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
            required=tuple(dict.fromkeys(_HOST.findall(str(resources(row).get("select", ""))))),
            end=_end(row) if state is JobState.RUNNING else 0.0,
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


def resources(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found = row.get("Resource_List", {})
    return found if isinstance(found, dict) else {}


def _end(row: Mapping[str, Any]) -> float:
    """Return when PBS ends the job for its walltime, in Unix time; 0 where it has none. qstat tells local time."""
    match = re.fullmatch(r"(?:([0-9]+):)?([0-9]+):([0-9]+)", str(resources(row).get("walltime", "")))
    if match is None or "stime" not in row:
        return 0.0
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    begin = time.mktime(time.strptime(str(row["stime"]), "%a %b %d %H:%M:%S %Y"))
    return begin + hours * 3600 + minutes * 60 + seconds


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
        up=not ("offline" in words and str(row.get("comment", "")).startswith(MARK)),
        responding=not words & _UNREACHABLE,
        address=str(row.get("Mom") or name),
        port=int(row.get("Port", 15002)),
    )
