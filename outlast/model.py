"""What the manager, the store and the watcher tell each other. Plain values; no input or output."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outlast.errors import UsageError

_INTERVAL = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_INTERVAL = 30 * 86400

# In the place of an interval: Outlast chooses it.
AUTO = "auto"
# In the place of a job's id: what concerns all jobs of a cluster.
SITE = "_site"

_CHECKPOINT_NAME = re.compile(r"(?P<job>[^@/]+)@(?P<epoch>[0-9]+)\.(?P<seq>[0-9]+)")


def parse_interval(text: str) -> int:
    """Return the seconds that *text* means: a whole number and one unit, such as 30s, 10m, 1h, 2d.

    The SPANK plugin holds to the same grammar (plugins/slurm/spank_outlast.c).

    Raises:
        UsageError: it is anything else, or not between 1s and 30d.
    """
    match = _INTERVAL.fullmatch(text)
    seconds = int(match[1]) * _UNIT_SECONDS[match[2]] if match else 0
    if not 1 <= seconds <= _LONGEST_INTERVAL:
        raise UsageError(
            f"checkpoint interval {text!r}: not a time between 1s and 30d",
            hint="write a whole number and a unit: 30s, 10m, 1h or 2d",
        )
    return seconds


def parse_pace(text: str) -> int | None:
    """Return the seconds between two checkpoints that *text* asks for, or None where it is `auto`.

    Raises:
        UsageError: it is neither that nor what `parse_interval` reads.
    """
    if text == AUTO:
        return None
    try:
        return parse_interval(text)
    except UsageError as error:
        raise UsageError(str(error), hint=f"{error.hint}; or auto") from None


@dataclass(frozen=True, order=True)
class JobKey:
    """A job's name in the store: its cluster and the scheduler's id (`17`; each array task has its own)."""

    cluster: str
    job_id: str

    def __post_init__(self) -> None:
        for part in (self.cluster, self.job_id):
            # Both become names of directories on the store.
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}", part):
                raise UsageError(f"{part!r}: not a name for a job or a cluster")

    def __str__(self) -> str:
        return f"{self.cluster}/{self.job_id}"


@dataclass(frozen=True, order=True)
class CheckpointId:
    """One checkpoint of a job: *epoch* is the run that wrote it (from 0), *seq* its number in that run.

    A larger (epoch, seq) is newer.
    """

    epoch: int
    seq: int

    def name(self, job_id: str) -> str:
        """Return the name that people use: `17@1.4` is job 17, epoch 1, sequence 4."""
        return f"{job_id}@{self.epoch}.{self.seq}"


def parse_checkpoint_name(text: str) -> tuple[str, CheckpointId]:
    """Split `17@1.4` into the job's id and the checkpoint's. Raises UsageError where it is no such name."""
    match = _CHECKPOINT_NAME.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{text!r}: not a checkpoint's name", hint="names look like 17@1.4: 'outlast list JOB'"
        )
    return match["job"], CheckpointId(int(match["epoch"]), int(match["seq"]))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint as its manifest describes it.

    *meta* is the manager's own part of the manifest (JSON values): when and where it was made, the open
    files, CRIU's version and figures. *stored_bytes* is what this checkpoint added to the store,
    *image_bytes* the size of all its files. *durable*: it is in the job's store, whatever becomes of the node;
    *where* names the places that have it: the store ("store", or the name of another one) and a node.
    """

    id: CheckpointId
    created: float  # seconds, Unix time, the node's clock
    stored_bytes: int
    image_bytes: int
    meta: Mapping[str, Any]
    durable: bool = True
    where: tuple[str, ...] = ()


class JobState(enum.Enum):
    """A job as its scheduler sees it, with every scheduler's own words folded into five."""

    PENDING = "pending"
    RUNNING = "running"
    LOST = "lost"  # the node failed or the job was preempted: may be requeued
    DONE = "done"  # ended with exit code 0
    FAILED = "failed"  # ended by its own fault, or was cancelled: must not be requeued


@dataclass(frozen=True)
class Lease:
    """The right of one run of a job to write checkpoints; its manager renews it every few seconds."""

    job: JobKey
    epoch: int
    node: str
    uid: int

    @property
    def is_fence(self) -> bool:
        """Whether nobody holds it: it tells that the run before was lost, and when *epoch* may begin."""
        return self.node in (FENCE_NODE, LIFTED_NODE)

    @property
    def is_lifted(self) -> bool:
        """Whether it is a fence that keeps nobody out any more."""
        return self.node == LIFTED_NODE

    @property
    def has_ended(self) -> bool:
        """Whether nobody holds it, since the run ended by itself and not well: the watcher is to look into it."""
        return self.node == ENDED_NODE

    @property
    def is_held(self) -> bool:
        """Whether a manager renews it."""
        return not self.is_fence and not self.has_ended

    def ended(self) -> Lease:
        """Return what stands in the place of this lease when its run has crashed."""
        return Lease(self.job, self.epoch, ENDED_NODE, self.uid)

    def fence(self) -> Lease:
        """Return the fence between this run and the next."""
        return Lease(self.job, self.epoch + 1, FENCE_NODE, self.uid)

    def lifted(self) -> Lease:
        """Return what this fence becomes when the next run may begin."""
        return Lease(self.job, self.epoch, LIFTED_NODE, self.uid)


# No host is called so: a lease of one of the first two is a fence.
FENCE_NODE = "_"
LIFTED_NODE = "_lifted"
ENDED_NODE = "_ended"


@dataclass(frozen=True)
class Crash:
    """How one run of a job ended that ended by itself, and not well.

    *status* is as Python writes it (-11: SIGSEGV), or None where all of it was killed at once. *source* is the
    checkpoint that the run went on from, None where it began from the start. *place* tells how far the job had
    come: for how many seconds it had computed, not counting what was lost and done again.
    """

    epoch: int
    status: int | None
    asked: bool  # somebody had sent it a signal to end it
    node: str
    time: float  # Unix time, the node's clock
    source: CheckpointId | None = None
    began: float = 0.0  # *place* when this run began
    place: float = 0.0


@dataclass(frozen=True)
class LeaseView:
    """A lease as a reader of the store finds it; *age* is in seconds by the store's own clock.

    *beat* grows with each renewal.
    """

    lease: Lease
    age: float
    beat: int = 0


@dataclass(frozen=True)
class SchedulerJob:
    """One job as the scheduler tells it.

    *epoch* is the restart count, *excluded* the nodes that the job must not have, *required* those that it
    must have. *begin* is before when a pending job must not start (Unix time; 0 where there is no such time),
    *end* when a running one must have ended. *handle* is what the scheduler's commands call this one job: an
    array's first task shares its id with the whole array, so there it is `17_1`. *partition* is that of a running
    job, or the first that a pending one may have. *preempted*: it was told to make room.
    """

    job_id: str
    state: JobState
    raw_state: str
    epoch: int
    nodes: tuple[str, ...]
    uid: int
    name: str
    excluded: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    requeueable: bool = True
    handle: str = ""
    begin: float = 0.0
    end: float = 0.0
    partition: str = ""
    preempted: bool = False


@dataclass(frozen=True)
class SchedulerNode:
    """One node as the scheduler tells it. *up*: neither down, failed nor powered off.

    *address* and *port* are where the scheduler's daemon on that node listens, *started* is when it was started (Unix
    time, by the node's clock; 0 where that is not known).
    """

    name: str
    up: bool
    responding: bool
    address: str
    port: int = 6818  # slurmd's own default
    started: float = 0.0
