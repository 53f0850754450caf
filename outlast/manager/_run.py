"""One run of a job on this node, and what another manager needs to take it over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from criu_backend import Capsule
from outlast.manager._guard import boottime
from outlast.manager._mom import Mom
from outlast.model import CheckpointId, JobKey

# Where the managers' own logs are, for the operator.
LOGS = Path("/var/log/outlast/jobs")


@dataclass
class Run:
    """One run of a job on this node: what it was started with, and its capsule."""

    job: JobKey
    epoch: int
    uid: int
    node: str
    interval: int  # seconds
    argv: list[str]
    directory: Path
    # Standard descriptors that lead out of the capsule: see passed_through().
    passed: list[dict[str, Any]] = field(default_factory=list)
    capsule: Capsule | None = None
    seq: int = 0  # of the newest checkpoint that was begun
    mom: Mom | None = None  # under PBS
    shim_pid: int = 0
    workdir: str = ""
    pager: int | None = None  # PID of the process that gives the job its pages, while some are to come
    globs: list[str] = field(default_factory=list)  # of files below it that the job appends to and closes
    auto: bool = False  # *interval* is chosen anew after each checkpoint
    source: CheckpointId | None = None  # where this run went on, None for the job's start
    seconds: float = (
        0.0  # that a checkpoint takes until it is stored: the longest of the last ones, of any run
    )
    begun: tuple[float, float] = (0.0, 0.0)  # `place` then, and when that was (boottime)

    def goes_on_from(self, source: CheckpointId | None, meta: Mapping[str, Any]) -> None:
        """The job computes from now on, from *source*, whose manifest tells of it as *meta*."""
        self.source, self.begun = source, (float(meta.get("place", 0.0)), boottime())
        self.seconds = float(meta.get("seconds", 0.0))
        if self.auto:
            self.interval = int(meta.get("interval") or self.interval)

    @property
    def place(self) -> float:
        """For how many seconds the job has computed, in this run and those that it goes on from."""
        place, since = self.begun
        return round(place + boottime() - since, 3)

    def progress(self) -> dict[str, Any]:
        """Return what the event of this run's end tells of how far the job has come: see `model.Crash`."""
        source = None if self.source is None else [self.source.epoch, self.source.seq]
        return {"source": source, "began": self.begun[0], "place": self.place}

    def save(self) -> None:
        """Write down what another manager needs to take over, should this one die."""
        if self.capsule is None:
            return
        state = {
            "epoch": self.epoch,
            "uid": self.uid,
            "interval": self.interval,
            "argv": self.argv,
            "passed": self.passed,
            "seq": self.seq,
            "capsule": [self.capsule.init_pid, self.capsule.init_start, self.capsule.job_pid],
            "shim_pid": self.shim_pid,
            "workdir": self.workdir,
            "globs": self.globs,
            "pager": self.pager,
            "auto": self.auto,
            "source": self.source and [self.source.epoch, self.source.seq],
            "begun": self.begun,
            "seconds": self.seconds,
        }
        part = self.directory / "state.new"
        part.touch(mode=0o600)
        part.write_text(json.dumps(state))
        part.rename(self.directory / "state.json")

    @classmethod
    def load(cls, job: JobKey, node: str, directory: Path) -> Run | None:
        """Return the run that `save` wrote down in *directory*; its capsule may have ended since."""
        try:
            state = json.loads((directory / "state.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return cls(
            job,
            state["epoch"],
            state["uid"],
            node,
            state["interval"],
            state["argv"],
            directory,
            state["passed"],
            Capsule(*state["capsule"]),
            state["seq"],
            shim_pid=state["shim_pid"],
            workdir=state["workdir"],
            globs=state["globs"],
            pager=state["pager"],
            auto=state["auto"],
            source=state["source"] and CheckpointId(*state["source"]),
            begun=tuple(state["begun"]),
            seconds=state["seconds"],
        )


def keep_log(log_file: Path, run: Run, *, failed: bool = False) -> None:
    """Keep CRIU's newest log of its kind beside the job's sockets; with *failed*, where it outlives the job."""
    if log_file.exists():
        kept = run.directory / log_file.name
        if failed and LOGS.is_dir():
            kept = LOGS / f"{run.job.job_id}.{log_file.name}"
        kept.touch(mode=0o600)
        shutil.copyfile(log_file, kept)
