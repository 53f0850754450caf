"""Prints what pyslurm tells of all jobs, or nodes, in the form of squeue's and scontrol's JSON: a program of its own.

It is a program since pyslurm holds Python's lock while it waits for slurmctld, and the watcher must renew its own
lease meanwhile; and so that it can be ended. What it prints is a twentieth of what squeue does, which tells more of
a job than anybody asks for. It imports nothing of outlast.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def job_row(job: Any) -> dict[str, Any]:  # noqa: ANN401 - pyslurm has no types
    """Return a `pyslurm.Job` as squeue would have it; but of its state only a flag, where it has any."""
    task = job.array_task_id
    if job.array_id and task is None and not job.array_tasks_waiting:
        task = (
            0  # pyslurm takes 0 for no number; the rest of an array, which has none, says which tasks it has
        )
    return {
        "job_id": job.id,
        "job_state": [job.state],
        "restart_cnt": job.requeue_count or 0,
        "nodes": job.allocated_nodes or "",
        "user_id": job.user_id,
        "name": job.name or "",
        "excluded_nodes": job.excluded_nodes or "",
        "required_nodes": job.required_nodes or "",
        "requeue": bool(job.is_requeueable),
        "array_job_id": job.array_id or 0,
        "array_task_id": task,
        "eligible_time": job.eligible_time or 0,
        "end_time": job.end_time or 0,
        "preempt_time": job.preempt_time or 0,
        "partition": job.partition or "",
    }


def node_row(node: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a `pyslurm.Node` as scontrol would have it."""
    return {
        "name": node.name,
        "state": node.state,
        "address": node.address or "",
        "port": node.slurmd_port or 0,
        "slurmd_start_time": node.slurmd_start_time or 0,
    }


def main(what: str) -> int:
    """Print all "jobs" or "nodes"; return the program's exit code."""
    try:
        import pyslurm
    except ImportError as error:
        sys.stderr.write(f"it cannot be imported: {error}\n")
        return os.EX_CONFIG
    kind, row = (pyslurm.Jobs, job_row) if what == "jobs" else (pyslurm.Nodes, node_row)
    try:
        rows = [row(one) for one in kind.load().values()]
    except pyslurm.RPCError as error:
        sys.stderr.write(f"{error}\n")
        return os.EX_UNAVAILABLE
    json.dump({what: rows}, sys.stdout, separators=(",", ":"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
