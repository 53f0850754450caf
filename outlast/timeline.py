"""What a job has been through, read from its event log: its runs, checkpoints, failures, and what they cost."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Source: docs/operate.md, "The event log".
_STARTS = frozenset({"started", "restored", "no-capsule"})
_ENDS = frozenset({"ended", "killed", "cancelled", "fenced", "not-started", "left", "held"})
_LOST = frozenset({"node-marked-down", "requeued"})
_FAILURES = frozenset(
    {"checkpoint-failed", "restore-failed", "not-started", "node-marked-down", "pages-failed", "not-saved"}
)
_DUMP = re.compile(r" ([0-9]+\.[0-9]+) ")


@dataclass
class Run:
    """The time that a job spent on one node in one go. Times are Unix times.

    *how* it ended: an event's word, or `lost`, `running`, `unknown`. *origin* is the checkpoint that it went on
    from, or None. What was computed from *again* on was computed once more by the next run.
    """

    node: str
    epoch: int
    start: float
    end: float
    how: str
    origin: str | None
    again: float | None = None
    restore_s: float = 0.0


@dataclass
class Taken:
    """A checkpoint that reached the store; *begin* is when the job was stopped for it, *end* when it was safe."""

    name: str
    node: str
    begin: float
    end: float
    pause_s: float
    upload_s: float
    stored_bytes: int
    image_bytes: int


@dataclass
class Failure:
    """Something that went wrong: an event's word, or `lost`."""

    time: float
    node: str
    event: str
    text: str


@dataclass
class Cost:
    """What checkpoints cost a job and what they gave it; seconds and bytes."""

    elapsed_s: float = 0.0  # from the first start to the last end
    run_s: float = 0.0  # of it, on a node
    down_s: float = 0.0  # of it, between two runs
    pause_s: float = 0.0  # stood still for checkpoints
    upload_s: float = 0.0  # while the job ran on
    restore_s: float = 0.0  # fetching and restoring
    again_s: float = 0.0  # computed a second time
    saved_s: float = 0.0  # computed before a checkpoint that the job went on from: not computed again
    checkpoints: int = 0
    failed: int = 0  # checkpoints that came to nothing
    restarts: int = 0
    shipped_bytes: int = 0
    image_bytes: int = 0


@dataclass
class History:
    """All of it; lists are in the order of time."""

    job: str
    runs: list[Run] = field(default_factory=list)
    checkpoints: list[Taken] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def as_dictionary(self) -> dict[str, Any]:
        """Return it as JSON values, with the names of the fields here."""
        return asdict(self)

    @property
    def nodes(self) -> list[str]:
        """The nodes that it ran on, the first one first."""
        return list(dict.fromkeys(run.node for run in self.runs))

    @property
    def begin(self) -> float:
        """When its first run began."""
        return self.runs[0].start

    @property
    def end(self) -> float:
        """When the last thing happened that is known of it."""
        return max([run.end for run in self.runs] + [one.time for one in self.failures] + [self.begin + 1])


def read_history(
    job: str,
    events: Sequence[Mapping[str, Any]],
    stored: Iterable[Mapping[str, Any]] = (),
    *,
    running_at: float | None = None,
) -> History:
    """Return what *events* tell of *job*.

    Args:
        job: its id.
        events: as `outlast events --json` has them, in order.
        stored: as `outlast list --json` has them: a node that died may not have told of its last checkpoint.
        running_at: now, if the job is running.
    """
    history = History(job)
    begun: dict[str, tuple[str, float]] = {}
    last_dump: dict[str, float] = {}
    open_: Run | None = None
    heard = 0.0

    def close(at: float, how: str) -> None:
        nonlocal open_
        if open_ is not None:
            open_.end, open_.how = max(at, open_.start), how
        open_ = None

    for event in events:
        word, node, at = str(event["event"]), str(event["node"]), float(event["time"])
        if word in _STARTS:
            if open_ is not None:
                # Nobody has told of its end: the scheduler itself may have found its node dead.
                history.failures.append(
                    Failure(heard, open_.node, "lost", "nothing more was heard of this run")
                )
                close(heard, "lost")
            restore = float(event.get("fetch_s") or 0) + float(event.get("restore_s") or 0)
            epoch = int(event.get("epoch") or 0)
            open_ = Run(node, epoch, at, at, "unknown", event.get("checkpoint"), None, restore)
            history.runs.append(open_)
            if "made" in event:
                # The node that made it may have died before it could tell.
                name = str(event["checkpoint"]).partition("@")[2]
                begun.setdefault(name, (str(event["made_on"]), float(event["made"])))
        elif word in _ENDS and open_ is not None and node == open_.node:
            close(at, word)
        elif word in _LOST:
            close(at, "lost")
        if open_ is not None and node == open_.node:
            heard = at
        if word == "dump":
            last_dump[node] = at
            if match := _DUMP.search(str(event["text"])):
                begun[match[1]] = (node, at)
        elif word == "checkpoint":
            history.checkpoints.append(_taken(event, node, at, last_dump.get(node)))
        if word in _FAILURES:
            where = open_.node if open_ else history.runs[-1].node if history.runs else node
            history.failures.append(Failure(at, where, word, str(event["text"])))
    if running_at is not None:
        close(running_at, "running")
    else:
        close(heard, "unknown")
    for one in stored:
        begun.setdefault(str(one["name"]).partition("@")[2], (str(one["node"]), float(one["created"])))
    for taken in history.checkpoints:
        begun[taken.name.partition("@")[2]] = (taken.node, taken.begin)
    _mark_again(history.runs, begun)
    history.cost = _cost(history, begun)
    return history


def _taken(event: Mapping[str, Any], node: str, at: float, dump: float | None) -> Taken:
    upload = float(event.get("ship_s") or 0)
    return Taken(
        name=str(event["checkpoint"]),
        node=node,
        begin=dump if dump is not None else at - upload,
        end=at,
        pause_s=float(event.get("pause_ms") or 0) / 1000,
        upload_s=upload,
        stored_bytes=int(event.get("stored_bytes") or 0),
        image_bytes=int(event.get("image_bytes") or 0),
    )


def _mark_again(runs: Sequence[Run], begun: Mapping[str, tuple[str, float]]) -> None:
    """Find from when on each run was computed once more by the next."""
    for run, following in itertools.pairwise(runs):
        if following.origin is None:
            run.again = run.start
            continue
        node, at = begun.get(following.origin.partition("@")[2], ("", 0.0))
        if node == run.node and run.start <= at <= run.end:
            run.again = at


def _cost(history: History, begun: Mapping[str, tuple[str, float]]) -> Cost:
    runs, taken = history.runs, history.checkpoints
    cost = Cost(
        checkpoints=len(taken),
        failed=sum(one.event == "checkpoint-failed" for one in history.failures),
        restarts=max(0, len(runs) - 1),
        pause_s=sum(one.pause_s for one in taken),
        upload_s=sum(one.upload_s for one in taken),
        shipped_bytes=sum(one.stored_bytes for one in taken),
        image_bytes=taken[-1].image_bytes if taken else 0,
        restore_s=sum(run.restore_s for run in runs),
        run_s=sum(run.end - run.start for run in runs),
        again_s=sum(run.end - run.again for run in runs if run.again is not None),
    )
    if runs:
        cost.elapsed_s = runs[-1].end - runs[0].start
        cost.down_s = max(0.0, cost.elapsed_s - cost.run_s)
    # How much had been computed when a checkpoint was begun, counted from the job's own beginning.
    done_at_start: list[float] = []
    for index, run in enumerate(runs):
        done = 0.0
        if run.origin is not None:
            node, at = begun.get(run.origin.partition("@")[2], ("", 0.0))
            for earlier in range(index - 1, -1, -1):
                if runs[earlier].node == node and runs[earlier].start <= at <= runs[earlier].end:
                    done = done_at_start[earlier] + at - runs[earlier].start
                    break
        done_at_start.append(done)
        cost.saved_s += done
    return cost
