"""The arguments of Slurm's commands, and parsers of the JSON that they print: all pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from outlast.errors import OutlastError
from outlast.model import JobState, SchedulerJob, SchedulerNode
from outlast.scheduler.hostlist import expand

_T = TypeVar("_T")

# Source of the names: Slurm 24.11, src/plugins/data_parser/v0.0.42/parsers.c, PARSER_FLAG_ARRAY(JOB_STATE);
# of their meaning: squeue(1), "JOB STATE CODES". A job is in exactly one of these.
_BASE_STATES = {
    "PENDING": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "SUSPENDED": JobState.RUNNING,  # stopped, but it keeps its node, and its manager renews the lease
    "COMPLETED": JobState.DONE,
    "CANCELLED": JobState.FAILED,
    "FAILED": JobState.FAILED,
    "TIMEOUT": JobState.FAILED,
    "NODE_FAIL": JobState.LOST,
    "PREEMPTED": JobState.LOST,
    "BOOT_FAIL": JobState.LOST,
    "DEADLINE": JobState.FAILED,
    "OUT_OF_MEMORY": JobState.FAILED,
}

# Flags that come beside a base state. With one of the first group an ended job is about to be pending
# again, whatever its base state says of the run that ended.
_COMING_BACK = frozenset({"REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
_OTHER_FLAGS = frozenset(
    {
        "COMPLETING",
        "CONFIGURING",
        "EXPEDITING",
        "LAUNCH_FAILED",
        "POWER_UP_NODE",
        "RECONFIG_FAIL",
        "RESIZING",
        "RESV_DEL_HOLD",
        "REVOKED",
        "SIGNALING",
        "STAGE_OUT",
        "STOPPED",
        "UPDATE_DB",
    }
)

# Source: the same file, PARSER_FLAG_ARRAY(NODE_STATES); meaning: sinfo(1), "NODE STATE CODES".
_UP = frozenset({"ALLOCATED", "IDLE", "MIXED", "UNKNOWN"})
_DOWN = frozenset({"DOWN", "ERROR", "FUTURE"})
_OFF = frozenset({"POWERED_DOWN", "POWERING_DOWN"})
_NODE_FLAGS = _OFF | {
    "BLOCKED",
    "CLOUD",
    "COMPLETING",
    "DRAIN",
    "DYNAMIC_FUTURE",
    "DYNAMIC_NORM",
    "EXTERNAL",
    "FAIL",
    "INVALID_REG",
    "MAINTENANCE",
    "NOT_RESPONDING",
    "PLANNED",
    "POWERING_UP",
    "POWER_DOWN",
    "POWER_DRAIN",
    "POWER_UP",
    "REBOOT_CANCELED",
    "REBOOT_ISSUED",
    "REBOOT_REQUESTED",
    "RESERVED",
    "RESUME",
    "UNDRAIN",
}


def jobs_command() -> list[str]:
    """The command whose output `parse_jobs` reads: all jobs, ended and hidden ones too, in one query."""
    return ["squeue", "--all", "--states=all", "--json"]


def nodes_command() -> list[str]:
    """The command whose output `parse_nodes` reads."""
    return ["scontrol", "--all", "show", "nodes", "--json"]


def requeue_command(handle: str) -> list[str]:
    """Run an ended job again under its own id."""
    return ["scontrol", "requeue", handle]


def requeue_hold_command(handle: str) -> list[str]:
    """Queue a job again under its own id, and hold it."""
    return ["scontrol", "requeuehold", handle]


def hold_command(handle: str) -> list[str]:
    """Keep a pending job from being started before it is released."""
    return ["scontrol", "hold", handle]


def delay_command(handle: str, seconds: float) -> list[str]:
    """Keep a pending job from being started for so long."""
    return ["scontrol", "update", f"JobId={handle}", f"StartTime=now+{max(1, round(seconds))}seconds"]


def release_command(handle: str) -> list[str]:
    """Let a job that is held run."""
    return ["scontrol", "release", handle]


def require_command(handle: str, node: str) -> list[str]:
    """Have a pending job start at once, on *node* alone; an empty name leaves the node to the scheduler."""
    begin = ["StartTime=now"] if node else []
    return ["scontrol", "update", f"JobId={handle}", f"ReqNodeList={node}", *begin]


def drain_command(node: str, reason: str) -> list[str]:
    """Let nothing more start on a node; what runs there runs on."""
    return ["scontrol", "update", f"NodeName={node}", "State=DRAIN", f"Reason={reason}"]


def mark_down_command(nodes: Sequence[str], reason: str) -> list[str]:
    """Set nodes down: slurmctld requeues their jobs at once, without waiting for SlurmdTimeout."""
    return ["scontrol", "update", f"NodeName={','.join(nodes)}", "State=DOWN", f"Reason={reason}"]


def exclude_command(handles: Sequence[str], nodes: Sequence[str], *, at_once: bool = False) -> list[str]:
    """Set the list of nodes that pending jobs must not have; an empty one takes the list away.

    *at_once* ends the delay of cred_expire + 1 s that a requeued job has, which is for the node that it ran on:
    slurmd there would not take the job back before. So it is only for jobs that are kept away from that node.
    """
    begin = ["StartTime=now"] if at_once else []
    return ["scontrol", "update", f"JobId={','.join(handles)}", f"ExcNodeList={','.join(nodes)}", *begin]


def some_jobs_command(job_ids: Iterable[str]) -> list[str]:
    """The command whose output `parse_jobs` reads, for some jobs; all tasks of an array come with its own id."""
    return ["squeue", "--all", "--states=all", f"--jobs={','.join(job_ids)}", "--json"]


def config_command() -> list[str]:
    """The command whose output `parse_slurm_user` reads."""
    return ["scontrol", "show", "config"]


def parse_slurm_user(output: str) -> int:
    """Return the uid in the line `SlurmUser = slurm(64030)`. Raises OutlastError where there is none."""
    match = re.search(r"^SlurmUser\s*=.*\(([0-9]+)\)\s*$", output, re.MULTILINE)
    if match is None:
        raise OutlastError("scontrol: its configuration names no SlurmUser")
    return int(match[1])


def parse_jobs(output: str) -> tuple[SchedulerJob, ...]:
    """Read the output of `jobs_command`, of Slurm 23.02 (data_parser 0.0.39) and later.

    Raises:
        OutlastError: it is no such output, or a job is in a state that this version does not know. It is
            never guessed: a wrong guess would start a job twice.
    """
    return tuple(_each(output, "jobs", "squeue", _job))


def in_part(output: str) -> tuple[str, tuple[str, ...]]:
    """Return, of the jobs that pyslurm printed, those that `parse_jobs` can read, and the ids of the others.

    Of a state with flags, pyslurm tells one of them alone: COMPLETING, say, but not whether the job failed.
    """
    rows = json.loads(output)["jobs"]
    whole = [row for row in rows if set(row["job_state"]) <= set(_BASE_STATES)]
    others = [str(row["job_id"]) for row in rows if not set(row["job_state"]) <= set(_BASE_STATES)]
    return json.dumps({"jobs": whole}), tuple(others)


def parse_nodes(output: str) -> tuple[SchedulerNode, ...]:
    """Read the output of `nodes_command`. Raises OutlastError like `parse_jobs`."""
    return tuple(_each(output, "nodes", "scontrol", _node))


def _each(output: str, key: str, program: str, parse: Callable[[Any], _T]) -> Iterable[_T]:
    try:
        rows = json.loads(output)[key]
    except (ValueError, KeyError, TypeError):
        raise OutlastError(f"{program}: its output is no JSON object with {key!r}: {output[:80]!r}") from None
    for row in rows:
        try:
            yield parse(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OutlastError(f"{program}: one of its {key} is not of the known form: {error!r}") from None


def _job(row: dict[str, Any]) -> SchedulerJob:
    job_id = str(row["job_id"])
    words = _words(row["job_state"])
    array, task = _number(row.get("array_job_id")), _number(row.get("array_task_id"))
    return SchedulerJob(
        job_id=job_id,
        state=_job_state(job_id, words),
        raw_state="+".join(words),
        epoch=row["restart_cnt"],
        nodes=_hosts(row["nodes"]),
        uid=row["user_id"],
        name=row["name"],
        excluded=_hosts(row["excluded_nodes"]),
        required=_hosts(row["required_nodes"]),
        requeueable=row["requeue"],
        handle=f"{array}_{task}" if array and task is not None else job_id,
        begin=float(_number(row.get("eligible_time")) or 0),
        end=float(_number(row.get("end_time")) or 0),
        preempted=bool(_number(row.get("preempt_time"))),
        partition=str(row.get("partition") or "").partition(",")[0],
    )


def _job_state(job_id: str, words: Sequence[str]) -> JobState:
    base = [word for word in words if word in _BASE_STATES]
    flags = frozenset(words) - frozenset(base)
    unknown = flags - _COMING_BACK - _OTHER_FLAGS
    if unknown or len(base) > 1 or not words:
        raise OutlastError(f"squeue: job {job_id} is in the unknown state {'+'.join(words)!r}")
    if flags & _COMING_BACK:
        return JobState.PENDING
    if "REVOKED" in flags:
        # Another cluster of the federation runs it: this record is not to be brought back.
        return JobState.FAILED
    if not base:
        raise OutlastError(f"squeue: job {job_id} is in the unknown state {'+'.join(words)!r}")
    return _BASE_STATES[base[0]]


def _node(row: dict[str, Any]) -> SchedulerNode:
    words = frozenset(_words(row["state"]))
    base, flags = words & (_UP | _DOWN), words - _UP - _DOWN
    if len(base) != 1 or flags - _NODE_FLAGS:
        raise OutlastError(
            f"scontrol: node {row['name']} is in the unknown state {'+'.join(_words(row['state']))!r}"
        )
    # FAIL beside ALLOCATED or MIXED means "no new jobs"; those on it still run.
    failed = "FAIL" in flags and not words & {"ALLOCATED", "MIXED"}
    return SchedulerNode(
        name=row["name"],
        up=not (base & _DOWN or flags & _OFF or failed),
        responding="NOT_RESPONDING" not in flags,
        address=row["address"] or row["name"],
        port=row["port"],
        started=float(_number(row.get("slurmd_start_time")) or 0),
    )


def _words(state: object) -> tuple[str, ...]:
    """A state of the older schemas is one text, of the newer ones a list."""
    if isinstance(state, str):
        return tuple(state.replace(",", "+").split("+"))
    if isinstance(state, list) and all(isinstance(word, str) for word in state):
        return tuple(state)
    raise ValueError(f"state {state!r}")


def _number(value: object) -> int | None:
    """A number of the older schemas is plain, of the newer ones an object; 0 and "not set" are told apart."""
    if isinstance(value, dict):
        return value["number"] if value["set"] and not value["infinite"] else None
    return value if isinstance(value, int) else None


def _hosts(value: object) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(name for part in value for name in expand(part))
    return expand(value) if isinstance(value, str) else ()
