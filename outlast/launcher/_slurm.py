"""Slurm as one user sees it: his jobs, and the commands that he could have typed himself.

Every command is a list of words, started without a shell; what a person wrote is never a word of it, but
stands in the script that sbatch reads from its standard input. Job ids are those that squeue told.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outlast.errors import OutlastError
from outlast.launcher._spec import Spec
from outlast.scheduler import SchedulerRefused, SchedulerUnavailable

_SECONDS = 20.0
# Source: squeue(1), "JOB STATE CODES"; each word's meaning to somebody who waits for a result.
_KINDS = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUSPENDED": "running",
    "COMPLETED": "done",
    "CANCELLED": "ended",
    "PREEMPTED": "lost",
    "NODE_FAIL": "lost",
}
_COMING_BACK = {"REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}


@dataclass(frozen=True)
class Job:
    """One job of the user's. Times are Unix times, None where not set.

    *kind* is pending, held, running, done, failed, ended (by the user) or lost (with its node);
    *state* Slurm's own words. *handle* is what Slurm's commands call it.
    """

    id: str
    handle: str
    name: str
    state: str
    kind: str
    reason: str
    nodes: str
    partition: str
    restarts: int
    submitted: float | None
    started: float | None
    ended: float | None
    exit: str
    directory: str
    output: str
    errors: str

    def row(self) -> dict[str, Any]:
        """Return it as the page is told of it."""
        return asdict(self)


@dataclass(frozen=True)
class Partition:
    """A partition that jobs may be sent to."""

    name: str
    default: bool


def parse_jobs(text: str, uid: int) -> list[Job]:
    """Return the jobs of the user *uid* that `squeue --json` told in *text*.

    A job that is not of the known form is left out: the others are shown all the same.

    Raises:
        OutlastError: *text* is no answer of squeue's at all.
    """
    try:
        rows = json.loads(text)["jobs"]
    except (ValueError, KeyError, TypeError):
        raise OutlastError(f"squeue: its output is no JSON object with 'jobs': {text[:80]!r}") from None
    found = []
    for row in rows:
        try:
            if row["user_id"] == uid:
                found.append(_job(row))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return found


def parse_partitions(text: str) -> list[Partition]:
    """Return the partitions that `sinfo --noheader --format=%P` told."""
    names = dict.fromkeys(filter(None, map(str.strip, text.splitlines())))
    return [Partition(name.rstrip("*"), name.endswith("*")) for name in names]


def _job(row: Mapping[str, Any]) -> Job:
    state = row["job_state"]
    words = state.replace(",", "+").split("+") if isinstance(state, str) else list(state)
    array, task = _number(row.get("array_job_id")), _number(row.get("array_task_id"))
    tasks = str(row.get("array_task_string") or "")
    job_id = str(row["job_id"])
    ended = _ended(words)
    return Job(
        id=job_id,
        handle=f"{array}_{task}" if array and task is not None else job_id,
        name=str(row["name"]) + (f" [{tasks}]" if tasks else ""),
        state="+".join(words),
        kind=_kind(words, held=bool(row.get("hold"))),
        reason="" if row.get("state_reason") in (None, "None") else str(row["state_reason"]),
        nodes=row["nodes"] if isinstance(row.get("nodes"), str) else "",
        partition=str(row.get("partition") or ""),
        restarts=int(row["restart_cnt"]),
        submitted=_number(row.get("submit_time")) or None,
        started=_number(row.get("start_time")) or None,
        ended=(_number(row.get("end_time")) or None) if ended else None,
        exit=_exit(row.get("exit_code")) if ended else "",
        directory=str(row.get("current_working_directory") or ""),
        output=str(row.get("standard_output") or ""),
        errors=str(row.get("standard_error") or ""),
    )


def _ended(words: Sequence[str]) -> bool:
    return not {"PENDING", "RUNNING", "SUSPENDED"} & set(words) and not _COMING_BACK & set(words)


def _kind(words: Sequence[str], *, held: bool) -> str:
    if _COMING_BACK & set(words) or "PENDING" in words:
        return "held" if held else "pending"
    return next((_KINDS[word] for word in words if word in _KINDS), "failed")


def _exit(value: object) -> str:
    """Return an exit code as squeue's JSON has it, as people write it: "0", "7" or "signal 9"."""
    if not isinstance(value, dict):
        return ""
    code, number = _number(value.get("return_code")), _number((value.get("signal") or {}).get("id"))
    return f"signal {number}" if number else str(code if code is not None else "")


def _number(value: object) -> int | None:
    """A number of the older schemas is plain, of the newer ones an object that may be "not set"."""
    if isinstance(value, dict):
        return int(value["number"]) if value.get("set") and not value.get("infinite") else None
    return value if isinstance(value, int) else None


class Slurm:
    """Slurm's commands, run as the user that this process belongs to."""

    job_id = r"[0-9]{1,12}(?:_[0-9]{1,12})?"  # 17, and 17_3 for a task of an array

    def __init__(self) -> None:
        # A launcher that runs in a job itself must not have its jobs inherit that job's settings.
        kept = ("SLURM_CONF",)
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if name in kept
            or not name.startswith(("SLURM", "SBATCH", "SQUEUE", "SINFO", "SCANCEL", "SCONTROL"))
        }

    async def jobs(self) -> list[Job]:
        """Return the user's jobs that Slurm knows; ended ones stay known for MinJobAge."""
        text = await self._run("squeue", "--me", "--states=all", "--json")
        return parse_jobs(text, os.getuid())

    async def partitions(self) -> list[Partition]:
        """Return the partitions that the user may see."""
        return parse_partitions(await self._run("sinfo", "--noheader", "--format=%P"))

    def script(self, spec: Spec) -> str:
        """Return the script that sbatch is given."""
        return spec.script()

    async def submit(self, script: str) -> str:
        """Submit *script*; return the new job's id."""
        said = await self._run("sbatch", "--parsable", stdin=script, directory=Path.home())
        return said.strip().partition(";")[0]

    async def hold(self, handle: str) -> None:
        """Keep a pending job from being started."""
        await self._run("scontrol", "hold", handle)

    async def requeue_held(self, handle: str) -> None:
        """End this run of a job; it waits, held, to be run again."""
        await self._run("scontrol", "requeuehold", handle)

    async def release(self, handle: str) -> None:
        """Let a held job be started."""
        await self._run("scontrol", "release", handle)

    async def cancel(self, handle: str) -> None:
        """End a job for good."""
        await self._run("scancel", handle)

    async def _run(self, *command: str, stdin: str = "", directory: Path | None = None) -> str:
        return await run(command, self._environment, stdin=stdin, directory=directory)


async def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdin: str = "",
    directory: Path | None = None,
    seconds: float = _SECONDS,
) -> str:
    """Run one of a scheduler's commands, for *seconds* at most, and return what it printed.

    Raises:
        SchedulerUnavailable: it did not end in time, or is not installed.
        SchedulerRefused: it said no; the message is its own.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd=directory,
        )
    except OSError as error:
        raise SchedulerUnavailable(
            f"{command[0]}: {error.strerror}", hint="the launcher runs where the scheduler's commands are"
        ) from None
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate(stdin.encode(errors="replace"))
    except TimeoutError:
        raise SchedulerUnavailable(f"{command[0]}: no answer within {seconds:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return out.decode(errors="replace")
    words = "; ".join(err.decode(errors="replace").strip().splitlines())
    raise SchedulerRefused(words or f"{command[0]}: ended with {process.returncode} and no word")
