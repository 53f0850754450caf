"""The interval that --checkpoint=auto chooses, and how checkpoints are spread over time and node."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.config import CheckpointConfig, StoreConfig
from outlast.errors import UsageError
from outlast.manager._events import EventLog
from outlast.manager._interval import Pace, best_interval, phase, site_mtbf
from outlast.manager._run import Run
from outlast.model import SITE, CheckpointId, JobKey, parse_pace
from outlast.store import Store, open_store

JOB = JobKey("c", "17")
DAY = 86400.0


def waste(interval: float, cost: float, mtbf: float) -> float:
    """Part of a long run that is not progress: exact for failures at a constant rate (Daly 2006, eq. 20)."""
    return mtbf * math.expm1((interval + cost) / mtbf) / interval


@given(st.floats(0.001, 600), st.floats(3600, 1e8))
def test_no_other_interval_wastes_noticeably_less(cost: float, mtbf: float) -> None:
    chosen = best_interval(cost, mtbf)
    best = min(waste(chosen * factor, cost, mtbf) for factor in (0.25, 0.5, 0.7, 0.9, 1.1, 1.4, 2, 4))

    assert waste(chosen, cost, mtbf) <= best * 1.001


def test_the_interval_is_youngs_where_a_checkpoint_costs_little() -> None:
    assert best_interval(0.1, 30 * DAY) == pytest.approx(math.sqrt(2 * 0.1 * 30 * DAY), rel=0.01)


def test_a_site_is_as_good_as_its_prior_says_until_failures_are_seen() -> None:
    begin = {"time": 0.0, "event": "watching", "nodes": 100}
    losses = [{"time": DAY * n, "event": "node-lost", "nodes": 100} for n in (1, 2, 3)]

    assert site_mtbf([], 30 * DAY, DAY) == 30 * DAY
    assert site_mtbf([begin], 30 * DAY, 3 * DAY) == 330 * DAY
    assert site_mtbf([begin, *losses], 30 * DAY, 3 * DAY) == pytest.approx(330 * DAY / 4)
    assert site_mtbf([begin], 30 * DAY, 100 * DAY) == 30 * DAY, "what is older than 90 days does not count"


def test_jobs_that_start_together_have_their_checkpoints_at_different_times() -> None:
    early = [phase(JobKey("c", str(number)), 0, 600) for number in range(300)]
    per_minute = [sum(60 * n <= one < 60 * (n + 1) for one in early) for n in range(5)]

    assert all(0 <= one < 300 for one in early)
    assert max(per_minute) < 2 * min(per_minute)
    assert phase(JOB, 0, 600) == phase(JOB, 0, 600)
    assert phase(JOB, 0, 30) == 0.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(StoreConfig(f"file://{tmp_path}"))


def pace_of(tmp_path: Path, config: CheckpointConfig, *, auto: bool = True) -> tuple[Pace, Run]:
    run = Run(JOB, 0, 2000, "n1", 60, ["lu"], tmp_path, auto=auto)
    return Pace(config, run, EventLog(JOB, "n1")), run


def test_the_interval_follows_the_cost_within_its_bounds(store: Store, tmp_path: Path) -> None:
    config = CheckpointConfig(node_mtbf=30 * DAY, auto_least=60, auto_most=3600)
    pace, run = pace_of(tmp_path, config)

    pace.learn(store, 0.1, 0.1)
    cheap = run.interval
    pace.learn(store, 0.11, 0.11)
    hardly_changed = run.interval
    for _ in range(20):
        pace.learn(store, 60.0, 100.0)
    dear = run.interval
    for _ in range(60):
        pace.learn(store, 0.0, 0.0)

    assert cheap == round(best_interval(0.1, 30 * DAY))
    assert hardly_changed == cheap
    assert dear == 3600
    assert run.interval < 60 / 0.8  # what is nearer than that to the bound is near enough


def test_the_sites_failures_make_it_shorter(store: Store, tmp_path: Path) -> None:
    config = CheckpointConfig(auto_least=1)
    sound, sound_run = pace_of(tmp_path, config)
    sound.learn(store, 0.1, 0.1)
    events = [{"time": 0.0, "event": "watching", "nodes": 3}]
    events += [{"time": 1.0 * n, "event": "node-lost", "nodes": 3} for n in range(9)]
    now = time.time()
    store.append_events(
        JobKey("c", SITE), "watcher", [{**one, "time": now - 100 + float(str(one["time"]))} for one in events]
    )
    bad, bad_run = pace_of(tmp_path, config)
    bad.learn(store, 0.1, 0.1)

    assert store.jobs("c") == [], "what concerns all jobs is none"
    assert bad_run.interval == pytest.approx(sound_run.interval / math.sqrt(10), rel=0.02)


def test_a_run_that_goes_on_keeps_the_interval_and_what_a_checkpoint_takes(tmp_path: Path) -> None:
    _, auto = pace_of(tmp_path, CheckpointConfig())
    _, chosen = pace_of(tmp_path, CheckpointConfig(), auto=False)
    for run in (auto, chosen):
        run.goes_on_from(CheckpointId(0, 3), {"interval": 900, "seconds": 4.5, "place": 100.0})

    assert (auto.interval, auto.seconds) == (900, 4.5)
    assert chosen.interval == 60
    assert auto.place >= 100.0


def test_an_interval_that_the_owner_chose_is_left_alone(store: Store, tmp_path: Path) -> None:
    pace, run = pace_of(tmp_path, CheckpointConfig(), auto=False)
    pace.learn(store, 10.0, 100.0)

    assert run.interval == 60


@pytest.mark.parametrize("text", ["Auto", "auto ", "", "5"])
def test_what_is_neither_a_time_nor_auto_is_refused(text: str) -> None:
    assert parse_pace("auto") is None
    assert parse_pace("10m") == 600
    with pytest.raises(UsageError, match="not a time"):
        parse_pace(text)
