"""Of several watchers one acts, whatever becomes of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from outlast.config import StoreConfig
from outlast.errors import LeaseLost, StoreUnavailable
from outlast.model import Lease, LeaseView
from outlast.store import open_store
from outlast.store._leases import Leases
from outlast.watcher.turns import Turn
from tests.unit.test_lease_model import Files

TTL = 3.0


class Link:
    """One watcher's connection to the store, which may be cut."""

    def __init__(self, files: Files) -> None:
        self._leases = Leases(files)  # type: ignore[arg-type]
        self.cut = False

    def _answer(self) -> Leases:
        if self.cut:
            raise StoreUnavailable("cut")
        return self._leases

    def leases(self, cluster: str) -> list[LeaseView]:
        return self._answer().views(cluster)

    def renew_lease(self, lease: Lease) -> None:
        self._answer().renew(lease)

    def drop_lease(self, lease: Lease) -> None:
        self._answer().drop(lease)


class OneActs(RuleBasedStateMachine):
    """Three watchers, whose links break and who stand still for as long as it pleases."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        files = Files(self)  # type: ignore[arg-type]
        self.links = [Link(files) for _ in range(3)]
        self.turns = [Turn(link, "c", TTL, f"w{n}") for n, link in enumerate(self.links)]

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.5]))
    def time_passes(self, seconds: float) -> None:
        """Nothing happens for a while."""
        self.now += seconds

    @rule(number=st.integers(0, 2))
    def one_has_its_cycle(self, number: int) -> None:
        """It acts only if it may."""
        try:
            acts = self.turns[number].step(self.now)
        except StoreUnavailable:
            return
        assert acts is self.turns[number].may_act(self.now)

    @rule(number=st.integers(0, 2))
    def a_link_breaks_or_heals(self, number: int) -> None:
        """That of one watcher to the store."""
        self.links[number].cut = not self.links[number].cut

    @rule(number=st.integers(0, 2))
    def one_is_ended(self, number: int) -> None:
        """By SIGTERM, if it can still tell the others."""
        if not self.links[number].cut:
            self.turns[number].give_up()

    @invariant()
    def at_most_one_may_act(self) -> None:
        """What it is for."""
        assert sum(turn.may_act(self.now) for turn in self.turns) <= 1


class TestOneActs(OneActs.TestCase):  # type: ignore[misc, valid-type]
    """No order of events lets two watchers act at once."""

    settings = settings(
        max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture
def two(tmp_path: Path) -> list[Turn]:
    config = StoreConfig(f"file://{tmp_path}")
    return [Turn(open_store(config), "c", TTL, name) for name in ("a", "b")]


def run(turns: list[Turn], start: float, seconds: float) -> list[set[int]]:
    """Let each have a cycle every half second; return who acted in each."""
    steps = range(round(seconds * 2))
    return [{n for n, turn in enumerate(turns) if turn.step(start + step / 2)} for step in steps]


def test_the_first_acts_after_a_while_and_the_second_stands_by(two: list[Turn]) -> None:
    acted = run(two, 100.0, 10.0)

    assert acted == [set()] * 6 + [{0}] * 14


def test_the_second_takes_over_within_seconds_of_the_firsts_death(two: list[Turn]) -> None:
    run(two, 100.0, 5.0)
    acted = run(two[1:], 105.0, 9.0)

    assert acted.index({0}) / 2 <= 2 * TTL + 1


def test_the_second_takes_over_at_once_when_the_first_is_ended(two: list[Turn]) -> None:
    run(two, 100.0, 5.0)
    two[0].give_up()
    acted = run(two[1:], 105.0, 5.0)

    assert acted.index({0}) / 2 <= TTL


def test_one_that_was_held_up_may_not_act_and_stands_by_from_then_on(two: list[Turn]) -> None:
    run(two, 100.0, 5.0)
    run(two[1:], 105.0, 9.0)

    assert not two[0].may_act(114.0)
    assert run(two, 114.0, 5.0) == [{1}] * 10


def test_the_lease_of_a_watcher_is_none_of_a_job(tmp_path: Path) -> None:
    store = open_store(StoreConfig(f"file://{tmp_path}"))
    Turn(store, "c", TTL, "a").step(100.0)

    assert store.leases("c") == []
    with pytest.raises(LeaseLost):
        store.renew_lease(Lease(store.leases("_watchers")[0].lease.job, 0, "old", 0))
