"""PBS as one user sees it: his jobs, and the commands that he could have typed himself. See _slurm.py."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import re
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outlast.errors import OutlastError
from outlast.launcher._slurm import Job, Partition, Slurm, run
from outlast.launcher._spec import Spec, SpecError
from outlast.scheduler import SchedulerRefused

# MoM saves a job that is held while it runs, within what install-pbs gives its $action checkpoint_abort.
_HOLD_SECONDS = 660.0
# Source: PBS Professional 2022.1 Reference Guide, table "Job States".
_KINDS = {"R": "running", "E": "running", "S": "running", "U": "running", "H": "held"}
_ENDED = "FX"
# A qdel that ended it by SIGTERM or SIGKILL, which PBS counts from 256 on.
_BY_SIGNAL = 256
_TERMINATED = (256 + 15, 256 + 9)


def pbs_script(spec: Spec, home: Path) -> str:
    """Return the script for qsub that is *spec*; output goes at once to where it is to be, so that it can be watched.

    PBS has no working directory for jobs and no names of output files relative to one: both are made here.

    Raises:
        SpecError: a script that is not a shell's cannot be given a working directory or variables.
    """
    directory = Path(spec.directory) if spec.directory else home
    select = ":".join(
        ["1", f"ncpus={spec.cpus or 1}", *([f"mem={_memory(spec.memory)}"] if spec.memory else [])]
    )
    options = [
        ("-N", re.sub(r"\s+", "_", spec.name)),
        ("-q", spec.partition),
        ("-l", f"walltime={_walltime(spec.time)}" if spec.time else ""),
        ("-l", f"select={select}" if spec.cpus or spec.memory else ""),
        ("-o", _output(directory, spec.output) if spec.output or spec.directory else ""),
        ("-e", _output(directory, spec.errors)) if spec.errors else ("-j", "oe"),
        ("-k", "oed"),
        ("-v", f"OUTLAST_INTERVAL={spec.interval}" if spec.interval else ""),
    ]
    lines = [f"#PBS {flag} {_quoted(value)}" for flag, value in options if value]
    first, rest = "#!/bin/sh", spec.text
    if spec.kind == "script":
        first, _, rest = spec.text.partition("\n")
    begin = [f"export {name}={shlex.quote(value)}" for name, value in spec.environment.items()]
    if spec.directory:
        begin.insert(0, f"cd {shlex.quote(spec.directory)} || exit")
    if begin and spec.kind == "script":
        if not re.search(r"\b(ba|da|z|k)?sh(\s|$)", first):
            field = "directory" if spec.directory else "environment"
            raise SpecError({field: "PBS has none for jobs, and only a shell script can be given one here"})
        # qsub reads no option below the first command, so the script's own must come first.
        head = re.match(r"(?:[ \t]*(?:#[^\n]*)?\n)*", rest)
        count = head.end() if head else 0
        lines, rest = [*lines, *rest[:count].splitlines()], rest[count:]
    return "\n".join([first, *lines, *begin, rest.rstrip("\n")]) + "\n"


def parse_jobs(text: str, user: str) -> list[Job]:
    """Return the jobs of *user* that `qstat -f -F json` told in *text*; an array as a whole is none.

    A job that is not of the known form is left out: the others are shown all the same.

    Raises:
        OutlastError: *text* is no answer of qstat's at all.
    """
    try:
        rows = json.loads(text, strict=False).get("Jobs", {})
        listed = list(rows.items())
    except (ValueError, AttributeError):
        raise OutlastError(f"qstat: its output is no JSON object with 'Jobs': {text[:80]!r}") from None
    found = []
    for handle, row in listed:
        try:
            if str(row["Job_Owner"]).partition("@")[0] == user and "[]" not in handle:
                found.append(_job(handle, row))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return found


def parse_queues(text: str, default: str) -> list[Partition]:
    """Return the queues that `qstat -Q -f -F json` told and that take jobs."""
    try:
        queues = json.loads(text, strict=False).get("Queue", {})
        return [
            Partition(name, name == default) for name, row in queues.items() if row.get("enabled") == "True"
        ]
    except (ValueError, AttributeError):
        raise OutlastError(f"qstat -Q: its output is no JSON object: {text[:80]!r}") from None


def _job(handle: str, row: Mapping[str, Any]) -> Job:
    letter = str(row["job_state"])
    status = int(row["Exit_status"]) if "Exit_status" in row else None
    ended = letter in _ENDED
    hosts = dict.fromkeys(part.partition("/")[0] for part in str(row.get("exec_host", "")).split("+") if part)
    variables = row.get("Variable_List", {})
    joined = str(row.get("Join_Path")) == "oe"
    return Job(
        id=handle.replace("[", "_").replace("]", ""),
        handle=handle,
        name=str(row["Job_Name"]),
        state=letter,
        kind=_ended_kind(status) if ended else _KINDS.get(letter, "pending"),
        reason=str(row.get("comment", "")) if letter in "QHW" else "",
        nodes=",".join(hosts),
        partition=str(row.get("queue", "")),
        restarts=max(0, int(row.get("run_count", 0)) - 1),
        submitted=_moment(row.get("ctime")),
        started=_moment(row.get("stime")),
        ended=_moment(row.get("mtime")) if ended else None,
        exit=_exit(status) if ended else "",
        directory=str(variables.get("PBS_O_WORKDIR", "")) if isinstance(variables, dict) else "",
        output=_path(row.get("Output_Path"), handle, "OU"),
        errors=_path(row.get("Output_Path"), handle, "OU")
        if joined
        else _path(row.get("Error_Path"), handle, "ER"),
    )


def _ended_kind(status: int | None) -> str:
    if status == 0:
        return "done"
    return "ended" if status is None or status in _TERMINATED else "failed"


def _exit(status: int | None) -> str:
    if status is None:
        return ""
    return f"signal {status - _BY_SIGNAL}" if status > _BY_SIGNAL else str(status)


def _moment(text: object) -> float | None:
    """Read a time as qstat writes it, in local time."""
    try:
        return time.mktime(time.strptime(str(text), "%a %b %d %H:%M:%S %Y"))
    except ValueError:
        return None


def _path(told: object, handle: str, suffix: str) -> str:
    """Return the path in `ctl:/shared/lu.o17`; what goes to a directory, `ctl:/shared/`, is `17.ctl.OU` there."""
    path = str(told or "").partition(":")[2]
    return f"{path}{handle}.{suffix}" if path.endswith("/") else path


def _output(directory: Path, name: str) -> str:
    """Return the path of a file, or of a directory, which PBS knows by the slash at its end."""
    return str(directory / name) if name else f"{directory}/"


def _walltime(text: str) -> str:
    """Turn what the form takes, minutes, H:M:S or D-H:M:S, into PBS's H:M:S."""
    days, dash, rest = text.partition("-")
    parts = [int(part) for part in (rest if dash else text).split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        hours += int(days) * 24
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    total = hours * 3600 + minutes * 60 + seconds
    return f"{total // 3600:02}:{total // 60 % 60:02}:{total % 60:02}"


def _memory(text: str) -> str:
    """Turn 4G into 4gb; a number alone is of megabytes."""
    return f"{text}mb" if text.isdigit() else f"{text[:-1]}{text[-1].lower()}b"


def _quoted(value: str) -> str:
    """Write *value* as qsub reads it in a #PBS line, which is split as a shell would."""
    return value if re.fullmatch(r"[A-Za-z0-9_./,:@%+=-]+", value) else "'" + value.replace("'", "") + "'"


class Pbs:
    """PBS's commands, run as the user that this process belongs to."""

    # 17.server, and 17_3.server for a task of an array.
    job_id = r"[0-9]{1,12}(?:_[0-9]{1,12})?(?:\.[A-Za-z0-9][A-Za-z0-9.-]{0,255})?"

    def __init__(self) -> None:
        kept = ("PBS_CONF_FILE", "PBS_EXEC")
        self._environment = {
            name: value for name, value in os.environ.items() if name in kept or not name.startswith("PBS")
        }
        self._environment["PATH"] = os.environ.get("PATH", "/usr/bin:/bin") + ":/opt/pbs/bin"
        self._user = getpass.getuser()
        self._history = True

    async def jobs(self) -> list[Job]:
        """Return the user's jobs that PBS knows; ended ones where the server keeps them (job_history_enable)."""
        if self._history:
            try:
                return parse_jobs(await self._run("qstat", "-x", "-f", "-t", "-F", "json"), self._user)
            except SchedulerRefused as error:
                if "history" not in str(error):
                    raise
                self._history = False
        return parse_jobs(await self._run("qstat", "-f", "-t", "-F", "json"), self._user)

    async def partitions(self) -> list[Partition]:
        """Return the queues."""
        queues, server = await asyncio.gather(
            self._run("qstat", "-Q", "-f", "-F", "json"), self._run("qstat", "-B", "-f", "-F", "json")
        )
        default = re.search(r'"default_queue"\s*:\s*"([^"]*)"', server)
        return parse_queues(queues, default[1] if default else "")

    def script(self, spec: Spec) -> str:
        """Return the script that qsub is given."""
        return pbs_script(spec, Path.home())

    async def submit(self, script: str) -> str:
        """Submit *script*; return the new job's id."""
        return (await self._run("qsub", stdin=script, directory=Path.home())).strip()

    async def hold(self, handle: str) -> None:
        """Keep a pending job from being started."""
        await self._run("qhold", handle)

    async def requeue_held(self, handle: str) -> None:
        """Have MoM save a job and end this run of it; it waits, held, to be run again."""
        await run(["qhold", handle], self._environment, seconds=_HOLD_SECONDS)

    async def release(self, handle: str) -> None:
        """Let a held job be started."""
        await self._run("qrls", handle)

    async def cancel(self, handle: str) -> None:
        """End a job for good."""
        await self._run("qdel", handle)

    async def _run(self, *command: str, stdin: str = "", directory: Path | None = None) -> str:
        return await run(command, self._environment, stdin=stdin, directory=directory)


Queue = Slurm | Pbs


def queue_of(scheduler: str) -> Queue:
    """Return what speaks to *scheduler*, as the configuration names it."""
    return Pbs() if scheduler == "pbs" else Slurm()
