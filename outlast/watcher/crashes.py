"""What the store knows of jobs that crashed, and how one is run again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from outlast.errors import UsageError
from outlast.model import CheckpointId, Crash, JobKey
from outlast.policy import parse_choice
from outlast.scheduler import Scheduler
from outlast.store import Store
from outlast.watcher.actions import POLICY, Past, Resume


def past_of(store: Store, job: JobKey) -> Past:
    """Read what `outlast.watcher.restarts` decides by. Raises as `Store.events`."""
    events = store.events(job)
    return Past(crashes_in(events), tuple(one.id for one in store.checkpoints(job)), _choice(events))


def crashes_in(events: Iterable[Mapping[str, Any]]) -> tuple[Crash, ...]:
    """Return the crashes that a job's events tell of, the oldest first.

    Of the runs that ended because they were asked to, which is no crash, only the newest run is there.
    """
    ends: dict[int, Crash] = {}
    for event in events:
        if event.get("event") in ("ended", "killed") and "place" in event:
            crash = _crash(event)
            ends[crash.epoch] = crash
    newest = max(ends, default=None)
    wanted = [crash for crash in ends.values() if crash.status != 0]
    return tuple(
        sorted(
            (one for one in wanted if one.epoch == newest or not (one.asked or one.status is None)),
            key=lambda one: one.epoch,
        )
    )


def _crash(event: Mapping[str, Any]) -> Crash:
    source = event.get("source")
    return Crash(
        epoch=int(event["epoch"]),
        status=event.get("status"),
        asked=bool(event.get("asked", False)),
        node=str(event["node"]),
        time=float(event["time"]),
        source=None if source is None else CheckpointId(*source),
        began=float(event["began"]),
        place=float(event["place"]),
    )


def _choice(events: Iterable[Mapping[str, Any]]) -> Mapping[str, object]:
    """Return what the job's owner chose last: when it was submitted, or since."""
    text = ""
    for event in events:
        if event.get("event") == "started":
            text = str(event.get("restart") or text)
        elif event.get("event") == POLICY:
            text = str(event.get("target", ""))
    try:
        return parse_choice(text)
    except UsageError:
        return {}  # both were checked before they were written down


def resume(store: Store, scheduler: Scheduler, job: JobKey, one: Resume) -> None:
    """Do what *one* says; to do it twice does no harm. Raises as those of `Scheduler` and `Store`."""
    if one.chosen:
        source = None if one.checkpoint is None else [one.checkpoint.epoch, one.checkpoint.seq]
        # The manager of the next run reads it before anything else.
        store.post_request(job, {"op": "restart", "uid": 0, "checkpoint": source})
    handle = one.job.handle
    scheduler.requeue(handle)
    # A requeued job waits for some seconds before it may start, so both of these come in time.
    if one.away:
        scheduler.exclude([handle], sorted({*one.job.excluded, one.away}), at_once=not one.wait)
    if one.wait:
        scheduler.delay(handle, one.wait)
