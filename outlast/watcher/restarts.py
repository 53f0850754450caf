"""Whether a job that crashed is run again, from where and when: pure, like `decisions`.

A crash at the same place as the one before is the job's own doing: to repeat it from the same checkpoint would
repeat it for ever. So each further one goes back to an earlier checkpoint, until there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from outlast.config import Config
from outlast.model import CheckpointId, Crash, JobState, SchedulerJob
from outlast.policy import RestartPolicy, how_ended
from outlast.watcher.actions import Decision, Done, Hold, Leave, MarkDown, Past, Resume, Run, Snapshot

# What counts for the budget and the back-off: crashes and losses of so many seconds.
WINDOW = 86400.0
# A checkpoint from which a job crashed so often is not tried again.
_TRIES = 2
# Two crashes are at the same place when the job had computed for as long, to within so much: a tenth of what it
# had done since its checkpoint, or so many seconds.
_SAME_PLACE_SECONDS = 2.0
_SAME_PLACE_PART = 0.1

NOT_RESTARTED = "not-restarted"


def after_crash(job: SchedulerJob, snapshot: Snapshot, config: Config) -> Decision:
    """What to do about *job*, whose newest run ended by itself and not well."""
    run = Run(job.job_id, job.epoch)
    words = job.raw_state.split("+")
    if not has_crashed(job):
        return Leave(run, f"its run has ended, and the scheduler has the job {job.raw_state}")
    if "COMPLETING" in words:
        return Leave(run, "the scheduler clears up after the run")
    past = snapshot.pasts.get(run)
    if past is None:
        return Leave(run, "how the run ended has not been looked up yet")
    crash = past.crashes[-1] if past.crashes else None
    if crash is None or crash.epoch != job.epoch:
        return Leave(run, "nobody wrote down how the run ended", NOT_RESTARTED)
    try:
        policy = config.restart.policy(job.partition, past.choice)
    except ValueError as error:
        return Leave(run, f"its restart policy cannot be used: {error}", NOT_RESTARTED)
    how = how_ended(crash.status)
    if why_not := _why_not(job, crash, policy, out_of_memory="OUT_OF_MEMORY" in words):
        return Leave(run, f"the job ended {how}; {why_not}", NOT_RESTARTED)
    return _resume(job, how, past, policy, snapshot)


def has_crashed(job: SchedulerJob) -> bool:
    """Whether the scheduler says that a job failed by itself: it was not cancelled, and had time left."""
    return job.state is JobState.FAILED and bool({"FAILED", "OUT_OF_MEMORY"} & {*job.raw_state.split("+")})


def policy_of(job: SchedulerJob, snapshot: Snapshot, config: Config) -> RestartPolicy:
    """Return the policy of the partition of *job*; there may be thousands of jobs, and few partitions."""
    if job.partition not in snapshot.policies:
        snapshot.policies[job.partition] = config.restart.policy(job.partition)
    return snapshot.policies[job.partition]


def losses(done: Iterable[Done], now: float) -> int:
    """Return how many runs of a job were lost with their nodes within a day of *now*, by what was *done* for it."""
    lost = {one.run for one in done if one.event == MarkDown.event and not one.refused}
    times = {one.run: one.time for one in done if one.run in lost}
    return sum(now - time < WINDOW for time in times.values())


def streak(crashes: Sequence[Crash]) -> int:
    """Return how many of the newest crashes were the same: ended alike, and at the same place."""
    count = min(1, len(crashes))
    while count < len(crashes) and _same(crashes[-count - 1], crashes[-count]):
        count += 1
    return count


def _same(one: Crash, other: Crash) -> bool:
    done = min(one.place - one.began, other.place - other.began)
    room = max(_SAME_PLACE_SECONDS, _SAME_PLACE_PART * done)
    return one.status == other.status and abs(one.place - other.place) <= room


def _why_not(job: SchedulerJob, crash: Crash, policy: RestartPolicy, *, out_of_memory: bool) -> str:
    if crash.asked:
        return "it had been asked to end"
    if not policy.covers(crash.status, out_of_memory=out_of_memory):
        return f'its on_crash is "{policy.on_crash}"'
    if not job.requeueable:
        return "it may not be requeued (--no-requeue)"
    return ""


def _resume(
    job: SchedulerJob, how: str, past: Past, policy: RestartPolicy, snapshot: Snapshot
) -> Resume | Hold | Leave:
    recent = [one for one in past.crashes if snapshot.now - one.time < WINDOW]
    again = streak(past.crashes)
    if len(recent) > policy.budget:
        why = f"the job ended {how}, {len(recent)} times within a day, and its budget is {policy.budget}"
        return _give_up(job, why, policy)
    usable = _usable(past, again)
    newest = max(past.checkpoints, default=None)
    repeated = f", {again} times at the same place" if again > 1 else ""
    tries = [one for one in past.crashes if one.source is None]
    if usable is None and (policy.when_repeating != "fresh" or len(tries) >= _TRIES):
        if newest is None:
            why = f"the job ended {how} before its first checkpoint"
        else:
            why = f"the job ended {how}{repeated}, and no checkpoint is left to be tried"
        return _give_up(job, why, policy)
    wait = policy.wait_before(len(recent))
    where = f"its checkpoint {usable.name(job.job_id)}" if usable is not None else "its start"
    reason = f"the job ended {how}{repeated}; it goes on from {where}"
    if wait:
        reason += f" in {wait:.0f} s, as it is crash {len(recent)} within a day"
    return Resume(
        job,
        reason,
        usable,
        chosen=usable != newest,
        wait=wait,
        away=_away(job, past.crashes[-1].node, snapshot),
    )


def _usable(past: Past, again: int) -> CheckpointId | None:
    """Return the newest checkpoint that is worth a try."""
    # Those from which this very crash came may hold its cause, from the second time on.
    sources = [one.source for one in past.crashes[-again:]] if again >= _TRIES else []
    for checkpoint in sorted(past.checkpoints, reverse=True):
        tried = sum(one.source == checkpoint for one in past.crashes)
        older = all(source is not None and checkpoint < source for source in sources[1:])
        if tried < _TRIES and older:
            return checkpoint
    return None


def _away(job: SchedulerJob, node: str, snapshot: Snapshot) -> str:
    """Return *node* if the next run can be elsewhere: the fault may be the node's."""
    others = (
        one for one in snapshot.nodes if one.up and one.responding and one.name not in {node, *job.excluded}
    )
    return node if node and node not in job.required and any(others) else ""


def _give_up(job: SchedulerJob, why: str, policy: RestartPolicy) -> Hold | Leave:
    if policy.when_repeating == "hold":
        return Hold(job, f"{why}; it is held")
    return Leave(Run(job.job_id, job.epoch), why, NOT_RESTARTED)
