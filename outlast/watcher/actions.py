"""What a decision about a cluster's jobs rests on, and what it may be. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

from outlast.model import CheckpointId, Crash, Lease, LeaseView, SchedulerJob, SchedulerNode
from outlast.policy import RestartPolicy

# The event of a job that was migrated to a node of somebody's choice.
BOUND = "bound"
# That of a restart policy which a job's owner chose after it was submitted.
POLICY = "policy"


class Run(NamedTuple):
    """One run of one job: an action is never taken twice for the same run."""

    job_id: str
    epoch: int


@dataclass(frozen=True)
class Probe:
    """Whether a node answered a TCP connect, and for how many cycles in a row it was so."""

    answered: bool
    times: int


@dataclass(frozen=True)
class Done:
    """An action taken, or a remark made, about a run at *time* (Unix time, the watcher's clock)."""

    time: float
    event: str
    run: Run
    node: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Past:
    """What the store knows of a job whose newest run crashed."""

    crashes: tuple[Crash, ...]  # the oldest first
    checkpoints: tuple[CheckpointId, ...]  # those that there are
    choice: Mapping[str, object] = field(default_factory=dict)  # its owner's: `outlast.policy.parse_choice`


@dataclass(frozen=True)
class Snapshot:
    """All that one decision rests on, taken within one cycle; nothing in it is older news.

    *leases* were read before *jobs*: a job is never judged by a scheduler's view older than its lease.
    *quiet* tells for how many seconds, by the watcher's own clock, a lease that it read again and again had no
    beat. *probes* holds only nodes that were asked in this cycle and of which the answer is certain. *pasts* holds
    those jobs whose newest run crashed, as far as they were looked up.
    """

    now: float  # Unix time, the watcher's clock; compared only with the times of *done*
    leases: tuple[LeaseView, ...]
    jobs: tuple[SchedulerJob, ...]
    nodes: tuple[SchedulerNode, ...]
    probes: Mapping[str, Probe]
    done: tuple[Done, ...]
    quiet: Mapping[Lease, float] = field(default_factory=dict)
    pasts: Mapping[Run, Past] = field(default_factory=dict)

    @cached_property
    def done_for(self) -> Mapping[str, list[Done]]:
        """What was done for each job, the oldest first."""
        found: dict[str, list[Done]] = {}
        for one in self.done:
            found.setdefault(one.run.job_id, []).append(one)
        return found

    @cached_property
    def policies(self) -> dict[str, RestartPolicy]:
        """Those of partitions, once they were looked up."""
        return {}

    @cached_property
    def node_named(self) -> Mapping[str, SchedulerNode]:
        """The nodes by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def quiet_at(self) -> Mapping[str, float]:
        """For how long nothing was heard of any manager on each node."""
        found: dict[str, float] = {}
        for view in self.leases:
            quiet = self.quiet.get(view.lease, 0.0)
            found[view.lease.node] = min(found.get(view.lease.node, quiet), quiet)
        return found


@dataclass(frozen=True)
class MarkDown:
    """Tell the scheduler that *node* is dead; it requeues the jobs that ran there."""

    event: ClassVar[str] = "node-marked-down"
    node: str
    runs: tuple[Run, ...]
    reason: str


@dataclass(frozen=True)
class Requeue:
    """Have the scheduler run a lost job again."""

    event: ClassVar[str] = "requeued"
    job: SchedulerJob
    reason: str
    node: ClassVar[str] = ""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that was lost."""
        return (Run(self.job.job_id, self.job.epoch),)


@dataclass(frozen=True)
class Resume:
    """Have the scheduler run a job again that crashed.

    *checkpoint* is where it goes on, None for the start of the job; *chosen*: that is not what it would take by
    itself. *away* is the node that the next run is kept off, if any, with those of *nodes*.
    """

    event: ClassVar[str] = "resumed-after-crash"
    job: SchedulerJob
    reason: str
    checkpoint: CheckpointId | None
    chosen: bool = False
    wait: float = 0.0  # seconds
    away: str = ""
    node: ClassVar[str] = ""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that crashed."""
        return (Run(self.job.job_id, self.job.epoch),)


@dataclass(frozen=True)
class Hold:
    """Have a job wait, in the scheduler's queue, until a person has looked at it."""

    event: ClassVar[str] = "held-for-a-look"
    job: SchedulerJob
    reason: str
    node: ClassVar[str] = ""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that crashed, or that is to start."""
        return (Run(self.job.job_id, self.job.epoch),)


@dataclass(frozen=True)
class Evacuate:
    """Have the manager of a run save it, and queue it again, before the scheduler ends it."""

    event: ClassVar[str] = "told-to-leave"
    job: SchedulerJob
    reason: str
    node: ClassVar[str] = ""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that is to end."""
        return (Run(self.job.job_id, self.job.epoch),)


@dataclass(frozen=True)
class Exclude:
    """Keep a pending job away from the node that it was lost on, and from those of *nodes* that it is kept from."""

    event: ClassVar[str] = "node-excluded"
    job: SchedulerJob
    node: str
    reason: str
    nodes: tuple[str, ...] = ()
    unbind: bool = False  # somebody had it migrate to this node, which binds it to it
    wait: float = 0.0  # seconds for which it is not to start elsewhere either

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that is to start."""
        return (Run(self.job.job_id, self.job.epoch),)


@dataclass(frozen=True)
class Hasten:
    """End the delay before which a pending job must not start: it is for the node that the job was lost on."""

    event: ClassVar[str] = "hastened"
    job: SchedulerJob
    node: str
    reason: str

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that is to start."""
        return (Run(self.job.job_id, self.job.epoch),)


@dataclass(frozen=True)
class Readmit:
    """Let a job that is still pending have the node again that `Exclude` kept it away from."""

    event: ClassVar[str] = "node-readmitted"
    job: SchedulerJob
    node: str
    reason: str

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that is to start."""
        return (Run(self.job.job_id, self.job.epoch),)


@dataclass(frozen=True)
class DropLease:
    """Take away a lease that nobody will renew again."""

    event: ClassVar[str] = "lease-dropped"
    lease: Lease
    reason: str

    @property
    def node(self) -> str:
        """The node that held the lease."""
        return self.lease.node

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that held the lease."""
        return (Run(self.lease.job.job_id, self.lease.epoch),)


@dataclass(frozen=True)
class Leave:
    """Do nothing. Where *tell* names an event, the job's owner is told once for this run."""

    run: Run
    reason: str
    tell: str = ""


Action = MarkDown | Requeue | Resume | Hold | Evacuate | Exclude | Hasten | Readmit | DropLease
Decision = Action | Leave
