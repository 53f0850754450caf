"""Jobs that crash by themselves: what is run again from where, what is not, and what is held."""

from __future__ import annotations

import time

import pytest

from tests.cluster import Cluster, Job, eventually, together

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

# Prints a line every 0.2 s; once there is a file `go` in its directory it does *what*.
COUNT = """
i=0
until [ -e go ]; do i=$((i+1)); echo "line $i"; sleep 0.2; done
{what}
"""
# Crashes at its hundredth line, whatever happens: 10 s of computing after its start.
HOPELESS = """
i=0
while :; do i=$((i+1)); echo "line $i"; sleep 0.1; [ $i -lt 100 ] || kill -SEGV $$; done
"""


def choice(text: str) -> str:
    return f"--export=ALL,OUTLAST_RESTART={text}"


@pytest.fixture(scope="module")
def jobs(module_cluster: Cluster) -> dict[str, Job]:
    """Jobs that have crashed after a checkpoint, each in its own way."""
    jobs = {
        "killed": module_cluster.submit(COUNT.format(what="rm go; kill -KILL $$")),
        "not to be requeued": module_cluster.submit(COUNT.format(what="kill -KILL $$"), "--no-requeue"),
        "fails": module_cluster.submit(COUNT.format(what="exit 3")),
        "held": module_cluster.submit(COUNT.format(what="exit 75")),
        "hopeless": module_cluster.submit(
            HOPELESS, "--export=ALL,OUTLAST_RESTART=on_crash=signal backoff=0 when_repeating=fail"
        ),
    }
    together([*jobs.values()], lambda job: job.wait_for("checkpoint", within=60))
    held = jobs["held"]
    module_cluster.on(
        "ctl", "outlast", "policy", held.id, "on_crash=75", "budget=0", "when_repeating=hold", user=True
    )
    for name, job in jobs.items():
        if name != "hopeless":
            job.path("go").touch()
    return jobs


def said(job: Job, event: str) -> list[str]:
    return [one["text"] for one in job.events() if one["event"] == event]


def assert_counted(job: Job) -> int:
    """Check that each line of its counting is there once, in order; return how many."""
    counted = [line for line in job.lines() if line.startswith("line ")]
    assert counted == [f"line {i}" for i in range(1, len(counted) + 1)]
    return len(counted)


def test_a_job_that_was_killed_goes_on_from_its_checkpoint_on_another_node(jobs: dict[str, Job]) -> None:
    job = jobs["killed"]
    restored = job.wait_for("restored", within=60)
    before = assert_counted(job)
    eventually(lambda: assert_counted(job) > before, within=20, what="the count goes on")

    assert job.restarts == 1
    assert restored.node != job.history("started")[0].node
    (why,) = said(job, "resumed-after-crash")
    assert why.startswith("the job ended by signal 9; it goes on from its checkpoint ")


def test_a_job_that_may_not_be_requeued_is_left_as_it_ended(jobs: dict[str, Job]) -> None:
    job = jobs["not to be requeued"]
    eventually(lambda: said(job, "not-restarted"), within=30, what="a word on why not")

    assert job.wait_for_end() == ("FAILED", "0:9")
    assert job.restarts == 0
    assert said(job, "not-restarted") == ["the job ended by signal 9; it may not be requeued (--no-requeue)"]


def test_a_job_that_fails_in_a_way_that_the_policy_does_not_name_is_left_as_it_ended(
    jobs: dict[str, Job],
) -> None:
    job = jobs["fails"]
    eventually(lambda: said(job, "not-restarted"), within=30, what="a word on why not")

    assert job.wait_for_end() == ("FAILED", "3:0")
    assert job.restarts == 0


def test_a_job_whose_budget_is_spent_is_held_where_its_owner_wants_it_so(jobs: dict[str, Job]) -> None:
    job = jobs["held"]
    job.wait_for_state("PENDING")

    assert "held" in job.facts()["Reason"]
    (why,) = said(job, "held-for-a-look")
    assert why.startswith("the job ended with exit code 75, 1 times within a day, and its budget is 0")


def test_a_job_that_crashes_at_the_same_place_again_and_again_is_given_up(jobs: dict[str, Job]) -> None:
    job = jobs["hopeless"]
    eventually(lambda: said(job, "not-restarted"), within=150, what="the end of its restarts")
    time.sleep(2)
    again = said(job, "resumed-after-crash")

    assert job.wait_for_end() == ("FAILED", "0:11")
    assert assert_counted(job) == 100
    assert 1 <= job.restarts == len(again) <= 4
    assert "at the same place, and no checkpoint is left to be tried" in said(job, "not-restarted")[0]
