"""Whose turn it is to ship: so many jobs of a node, and so many of all that share a store, in order of arrival."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.config import StoreConfig
from outlast.manager._turns import EXPIRY_SECONDS, UPLOADS, NodeTurns, StoreTurns
from outlast.model import JobKey, Lease, LeaseView
from outlast.store import Store, add_key, open_store

calm: Callable[[float], bool] = lambda _: False  # noqa: E731
hurried: Callable[[float], bool] = lambda _: True  # noqa: E731


class Queue:
    """Jobs with a place at one store, each with a connection of its own; time goes on with each step."""

    def __init__(self, directory: Path, most: int) -> None:
        key = directory / "data.key"
        add_key(key)
        (directory / "store").mkdir()
        self.directory = directory / "store"
        self.config = StoreConfig(f"file://{self.directory}", key=key)
        self.most = most
        self.now = 0.0
        self.turns: dict[str, StoreTurns] = {}
        self.stores: dict[str, Store] = {}

    def come(self, name: str) -> StoreTurns:
        """Have a job come that wants to ship."""
        turns = self.turns.get(name) or StoreTurns(JobKey("c", name), f"n{name}", 1000, self.most)
        self.turns[name] = turns
        self.stores.setdefault(name, open_store(self.config))
        turns._wanted = True
        self.step(name)
        time.sleep(0.002)  # who comes is told by the millisecond
        return turns

    def step(self, name: str, store: object = None) -> None:
        """Do what the job's manager does at a beat; enough time has passed for it to do all that it does."""
        self.now += 60
        self.turns[name].step(store or self.stores[name], self.now)  # type: ignore[arg-type]

    def go(self, name: str) -> None:
        """Have a job be done with its checkpoint."""
        self.turns[name]._wanted = False
        self.step(name)

    @property
    def shipping(self) -> set[str]:
        return {name for name, turns in self.turns.items() if turns._has_turn()}


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path, 1)


def test_those_that_wait_ship_in_the_order_in_which_they_came(queue: Queue) -> None:
    for name in "4213":
        queue.come(name)
    order = []
    while queue.shipping:
        (one,) = queue.shipping
        order.append(one)
        queue.go(one)
        for name in "1234":
            queue.step(name)

    assert order == ["4", "2", "1", "3"]


def test_who_has_shipped_comes_last_when_it_comes_again(queue: Queue) -> None:
    for name in "12":
        queue.come(name)
    queue.go("1")
    queue.come("1")
    queue.step("2")

    assert queue.shipping == {"2"}


def test_what_is_left_of_a_manager_that_died_keeps_nobody_waiting_for_long(queue: Queue) -> None:
    queue.come("1")
    queue.come("2")
    queue.step("2")
    assert queue.shipping == {"1"}
    (ticket,) = queue.directory.glob(f"leases/{UPLOADS}/c.1@*")
    past = time.time() - EXPIRY_SECONDS - 2
    os.utime(ticket, (past, past))
    del queue.turns["1"]
    queue.step("2")

    assert queue.shipping == {"2"}


class Late:
    """A store as a job sees it whose network is slow: after its first look *meanwhile* happens."""

    def __init__(self, store: Store, meanwhile: Callable[[], object]) -> None:
        self.store = store
        self.meanwhile: Callable[[], object] | None = meanwhile
        self.renew_lease, self.drop_lease = store.renew_lease, store.drop_lease

    def leases(self, cluster: str) -> list[LeaseView]:
        found = self.store.leases(cluster)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return found


def test_who_did_not_see_another_take_the_last_place_goes_back_when_it_does(queue: Queue) -> None:
    early, late = (StoreTurns(JobKey("c", name), f"n{name}", 1000, 1) for name in "12")
    queue.turns |= {"1": early, "2": late}
    for name, turns in queue.turns.items():
        queue.stores[name] = open_store(queue.config)
        turns._wanted = True
    # It came first by its clock, and is heard of only when the other has looked.
    early._ticket = Lease(JobKey(UPLOADS, "c.1"), 1, "n1", 1000)
    queue.step("2", Late(queue.stores["2"], lambda: queue.step("1")))

    assert queue.shipping == {"1"}
    queue.go("1")
    queue.step("2")
    assert queue.shipping == {"2"}


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=40), most=st.integers(1, 3)
)
def test_never_more_ship_than_may_and_never_fewer_for_long(
    steps: list[tuple[str, bool]], most: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    queue = Queue(tmp_path_factory.mktemp("queue"), most)
    here: set[str] = set()
    for name, comes in steps:
        if comes:
            queue.come(name)
            here.add(name)
        elif name in here:
            queue.go(name)
            here.discard(name)
        assert len(queue.shipping) <= most
    for name in sorted(here) * 2:
        queue.step(name)

    assert len(queue.shipping) == min(most, len(here))


def test_who_is_in_a_hurry_does_not_wait(queue: Queue) -> None:
    queue.come("1")
    turns = StoreTurns(JobKey("c", "2"), "n2", 1000, 1)
    with turns.taken(hurried):
        assert not turns._has_turn()


def test_without_a_limit_nobody_asks_the_store() -> None:
    turns = StoreTurns(JobKey("c", "1"), "n1", 1000, 0)
    with turns.taken(calm):
        turns.step(None)  # type: ignore[arg-type]


def test_a_place_is_given_back_at_the_jobs_end(queue: Queue) -> None:
    queue.come("1")
    queue.turns["1"].leave(queue.stores["1"])

    assert queue.stores["1"].leases(UPLOADS) == []


def test_no_more_jobs_of_a_node_than_may_ship_at_the_same_time(tmp_path: Path) -> None:
    def waits(turns: NodeTurns) -> bool:
        asked: Iterator[bool] = iter([False, False, True])
        with turns.taken(lambda _: next(asked)):
            return next(asked, None) is None

    turns = [NodeTurns(tmp_path / "uploads", 2) for _ in range(3)]
    with turns[0].taken(calm), turns[1].taken(calm):
        assert turns[2].take() is None
        assert waits(turns[2])
    assert not waits(turns[2])


@pytest.mark.parametrize("most", [-1, 100001])
def test_a_limit_that_cannot_be_meant_is_refused(most: int) -> None:
    with pytest.raises(ValueError, match="uploads"):
        StoreConfig(uploads=most)
