"""Which crashed jobs are run again, from where and when."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.config import Config, RestartConfig
from outlast.errors import UsageError
from outlast.model import CheckpointId, Crash, JobKey, JobState, Lease, LeaseView, SchedulerJob, SchedulerNode
from outlast.policy import RestartPolicy, parse_choice
from outlast.watcher.actions import Decision, Done, DropLease, Hold, Leave, Past, Resume, Run, Snapshot
from outlast.watcher.decisions import decide
from outlast.watcher.restarts import streak

NOW = 100000.0
JOB = SchedulerJob("17", JobState.FAILED, "FAILED", 0, ("n1",), 2000, "lu", handle="17", partition="main")
NODES = tuple(SchedulerNode(name, up=True, responding=True, address=name) for name in ("n1", "n2"))
SITE = RestartConfig(on_crash="kill oom signal 75", budget=10, backoff=30.0)


def at(epoch: int, seq: int) -> CheckpointId:
    return CheckpointId(epoch, seq)


def crash(epoch: int, source: CheckpointId | None = None, place: float = 100.0, **more: object) -> Crash:
    facts = {"status": -11, "asked": False, "node": "n1", "time": NOW - 60, "began": place - 50, **more}
    return Crash(epoch=epoch, source=source, place=place, **facts)  # type: ignore[arg-type]


def decided(
    *crashes: Crash,
    checkpoints: tuple[CheckpointId, ...] = (at(0, 1), at(0, 2)),
    site: RestartConfig = SITE,
    choice: str = "",
    age: float = 1.0,
    done: tuple[Done, ...] = (),
    **job: object,
) -> Decision:
    epoch = crashes[-1].epoch if crashes else 0
    failed = dataclasses.replace(JOB, epoch=epoch, **job)  # type: ignore[arg-type]
    lease = Lease(JobKey("c", "17"), epoch, "n1", 2000).ended()
    past = Past(crashes, checkpoints, parse_choice(choice))
    seen = Snapshot(
        NOW, (LeaseView(lease, age),), (failed,), NODES, {}, done, {lease: age}, {Run("17", epoch): past}
    )
    (decision,) = decide(seen, Config(cluster="c", restart=site))
    return decision


def test_a_crashed_job_goes_on_from_its_newest_checkpoint_on_another_node() -> None:
    decision = decided(crash(0))

    assert isinstance(decision, Resume)
    assert (decision.checkpoint, decision.chosen, decision.wait, decision.away) == (
        at(0, 2),
        False,
        0.0,
        "n1",
    )
    assert decision.reason == "the job ended by signal 11; it goes on from its checkpoint 17@0.2"


@pytest.mark.parametrize(
    ("status", "on_crash", "again"),
    [
        (-9, "kill", True),
        (137, "kill", True),  # as a shell tells of it
        (-9, "signal", False),
        (-11, "signal", True),
        (139, "signal", True),
        (-15, "kill signal", False),  # somebody's wish
        (143, "kill signal", False),
        (75, "75", True),
        (75, "kill signal oom", False),
        (1, "kill signal oom 75", False),
        (-11, "", False),
    ],
)
def test_only_crashes_that_the_policy_names_are_run_again(status: int, on_crash: str, again: bool) -> None:
    site = dataclasses.replace(SITE, on_crash=on_crash)

    assert isinstance(decided(crash(0, status=status), site=site), Resume) is again


def test_a_job_without_memory_is_run_again_where_the_policy_says_so() -> None:
    site = dataclasses.replace(SITE, on_crash="oom")

    assert isinstance(decided(crash(0, status=1), site=site, raw_state="OUT_OF_MEMORY"), Resume)
    assert isinstance(decided(crash(0, status=1), site=site), Leave)


def test_a_job_that_may_not_be_requeued_is_left_alone_and_its_owner_told_why() -> None:
    decision = decided(crash(0), requeueable=False)

    assert isinstance(decision, Leave)
    assert decision.tell == "not-restarted"
    assert decision.reason == "the job ended by signal 11; it may not be requeued (--no-requeue)"


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT", "DEADLINE", "CANCELLED+COMPLETING"])
def test_of_a_job_that_did_not_end_by_itself_nothing_is_said(state: str) -> None:
    decision = decided(crash(0), raw_state=state)

    assert isinstance(decision, Leave)
    assert not decision.tell
    assert isinstance(decided(crash(0), raw_state=state, age=61.0), DropLease)


def test_a_job_that_was_asked_to_end_is_left_alone() -> None:
    decision = decided(crash(0, asked=True))

    assert isinstance(decision, Leave)
    assert "it had been asked to end" in decision.reason


def test_nothing_is_done_while_the_scheduler_clears_up() -> None:
    assert decided(crash(0), raw_state="FAILED+COMPLETING") == Leave(
        Run("17", 0), "the scheduler clears up after the run"
    )


def test_a_job_that_crashed_twice_at_the_same_place_goes_on_from_the_checkpoint_before() -> None:
    decision = decided(crash(0), crash(1, at(0, 2)))

    assert isinstance(decision, Resume)
    assert (decision.checkpoint, decision.chosen) == (at(0, 1), True)
    assert "2 times at the same place" in decision.reason


def test_a_checkpoint_that_a_later_run_made_on_its_way_to_the_same_crash_is_not_trusted_either() -> None:
    checkpoints = (at(0, 2), at(1, 1))
    decision = decided(crash(0), crash(1, at(0, 1), began=90.0), checkpoints=checkpoints)

    assert isinstance(decision, Leave)
    assert "no checkpoint is left to be tried" in decision.reason


def test_a_job_that_got_further_each_time_goes_on_from_the_newest() -> None:
    decision = decided(
        crash(0), crash(1, at(0, 1), place=400.0), crash(2, at(1, 5), place=900.0, began=500.0)
    )

    assert isinstance(decision, Resume)
    assert decision.checkpoint == at(0, 2)  # the newest that there is
    assert not decision.chosen


def test_a_checkpoint_that_failed_twice_at_different_places_is_not_tried_a_third_time() -> None:
    decision = decided(crash(0, place=30.0), crash(1, at(0, 2), place=200.0), crash(2, at(0, 2), place=300.0))

    assert isinstance(decision, Resume)
    assert decision.checkpoint == at(0, 1)


@pytest.mark.parametrize(("policy", "kind"), [("fail", Leave), ("hold", Hold), ("fresh", Resume)])
def test_what_becomes_of_a_job_that_has_no_checkpoint_left_is_a_matter_of_policy(
    policy: str, kind: type
) -> None:
    site = dataclasses.replace(SITE, when_repeating=policy)
    decision = decided(crash(0), crash(1, at(0, 2)), crash(2, at(0, 1)), site=site)

    assert isinstance(decision, kind)
    if isinstance(decision, Resume):
        assert (decision.checkpoint, decision.chosen) == (None, True)


def test_a_fresh_start_is_tried_once_only() -> None:
    site = dataclasses.replace(SITE, when_repeating="fresh")
    decision = decided(crash(0), crash(1, at(0, 2)), crash(2, at(0, 1)), crash(3), site=site)

    assert isinstance(decision, Leave)


def test_each_further_restart_waits_twice_as_long() -> None:
    waits = []
    for count in range(1, 6):
        crashes = [crash(n, at(0, 0), place=1000.0 * n) for n in range(count)]
        decision = decided(*crashes)
        assert isinstance(decision, Resume)
        waits.append(decision.wait)

    assert waits == [0, 30, 60, 120, 240]


def test_the_budget_ends_and_old_crashes_do_not_count() -> None:
    site = dataclasses.replace(SITE, budget=2)
    crashes = [crash(n, place=1000.0 * n) for n in range(3)]
    old = [crash(0, time=NOW - 90000.0), *crashes[1:]]

    spent, fine = decided(*crashes, site=site), decided(*old, site=site)

    assert isinstance(spent, Leave)
    assert "3 times within a day, and its budget is 2" in spent.reason
    assert isinstance(fine, Resume)


def test_a_job_that_crashes_before_its_first_checkpoint_is_not_begun_again_unless_the_policy_says_so() -> (
    None
):
    fresh = dataclasses.replace(SITE, when_repeating="fresh")

    assert isinstance(decided(crash(0), checkpoints=()), Leave)
    assert isinstance(decided(crash(0), checkpoints=(), site=fresh), Resume)


def test_what_is_narrower_counts_the_job_before_the_partition_before_the_site() -> None:
    site = RestartConfig(on_crash="", partition={"main": {"on_crash": "signal", "backoff": "1m"}})

    assert isinstance(decided(crash(0), site=site), Resume)
    assert isinstance(decided(crash(0), site=site, partition="other"), Leave)
    assert isinstance(decided(crash(0), site=site, choice="on_crash=75"), Leave)
    assert site.policy("main") == RestartPolicy(on_crash="signal", backoff=60.0)


@pytest.mark.parametrize(
    "text", ["budget=-1", "budget", "on_crash=often", "when_repeating=x", "backoff=1y", "a=1"]
)
def test_a_choice_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="restart policy"):
        parse_choice(text)


def test_the_mark_of_a_crash_is_taken_away_when_all_is_said() -> None:
    said = (Done(NOW - 61, "not-restarted", Run("17", 0)),)

    assert isinstance(decided(crash(0, status=1), done=said, age=61.0), DropLease)
    assert isinstance(decided(crash(0, status=1), done=said, age=30.0), Leave)


CRASHES = st.lists(
    st.builds(
        crash,
        epoch=st.just(0),
        source=st.sampled_from([None, at(0, 1), at(0, 2), at(1, 1)]),
        place=st.floats(0, 300),
        status=st.sampled_from([-11, -9, 137, 75]),
        time=st.floats(NOW - 172800, NOW),
    ),
    min_size=1,
    max_size=12,
).map(lambda found: [dataclasses.replace(one, epoch=n) for n, one in enumerate(found)])


@given(CRASHES, st.sampled_from(["fail", "hold", "fresh"]))
def test_no_job_is_run_again_more_often_than_its_budget(crashes: list[Crash], policy: str) -> None:
    site = dataclasses.replace(SITE, budget=3, when_repeating=policy)
    recent = [one for one in crashes if NOW - one.time < 86400]

    assert not (isinstance(decided(*crashes, site=site), Resume) and len(recent) > 3)


@given(CRASHES)
def test_no_checkpoint_is_tried_again_that_failed_twice(crashes: list[Crash]) -> None:
    decision = decided(*crashes)

    if isinstance(decision, Resume):
        assert sum(one.source == decision.checkpoint for one in crashes) < 2


@given(st.sampled_from(["fail", "hold", "fresh"]), st.integers(1, 5), st.floats(1, 1000))
def test_a_job_that_crashes_at_the_same_place_for_ever_is_run_again_so_often_only(
    policy: str, kept: int, place: float
) -> None:
    """Without any budget: each run goes on from what was decided, makes new checkpoints, and crashes there."""
    site = dataclasses.replace(SITE, budget=1000, when_repeating=policy)
    checkpoints = [at(0, seq) for seq in range(1, kept + 1)]
    crashes = [crash(0, place=place, began=0.0)]
    for epoch in range(1, 100):
        decision = decided(*crashes, checkpoints=tuple(checkpoints), site=site)
        if not isinstance(decision, Resume):
            break
        crashes.append(crash(epoch, decision.checkpoint, place=place, began=place - min(place, 1.0)))
        checkpoints = [*checkpoints, at(epoch, 1)]
    else:
        pytest.fail("it is run again and again")

    assert len(crashes) <= kept + 3
    assert streak(crashes) == len(crashes)
