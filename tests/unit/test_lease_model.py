"""Never two copies: leases, guards, fences and takeovers, in every order that Hypothesis can think of.

The rules here are the world: time, links that break, managers that stand still, a scheduler that takes any run
for lost whenever it likes, a watcher that follows it. What they call is the product's own: `Leases`, `Takeover`,
`lease_end`, `is_this_run`. The guard is a deadline, as outlast-guard is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outlast.config import LeaseConfig
from outlast.errors import LeaseLost
from outlast.manager._holding import Takeover, is_this_run, lease_end
from outlast.model import JobKey, JobState, Lease, LeaseView, SchedulerJob
from outlast.store._backend import Entry
from outlast.store._leases import Leases

TTL = LeaseConfig().ttl
JOB = JobKey("c", "17")
NODES = ("n1", "n2", "n3")


class Files:
    """The store's machine: a directory of leases, and a clock that tells whole seconds, as SFTP does."""

    mtime_step = 1.0

    def __init__(self, world: NeverTwoCopies) -> None:
        self._world = world
        self.files: dict[str, tuple[int, float]] = {}

    def clock(self) -> float:
        """See `Backend.clock`."""
        return float(math.floor(self._world.now))

    def touch(self, name: str, *, create: bool) -> bool:
        """See `Backend.touch`."""
        if name not in self.files and not create:
            return False
        size, _ = self.files.get(name, (0, 0.0))
        self.files[name] = (size + 1, self.clock())
        return True

    def list(self, _directory: str) -> list[Entry]:
        """See `Backend.list`."""
        return [
            Entry(name.rpartition("/")[2], size, mtime, False)
            for name, (size, mtime) in sorted(self.files.items())
        ]

    def remove(self, name: str) -> bool:
        """See `Backend.remove`."""
        return self.files.pop(name, None) is not None


class View:
    """One connection to the store."""

    def __init__(self, files: Files) -> None:
        self._leases = Leases(files)  # type: ignore[arg-type]

    def leases(self, cluster: str) -> list[LeaseView]:
        """See `Store.leases`."""
        return self._leases.views(cluster)

    def renew_lease(self, lease: Lease) -> None:
        """See `Store.renew_lease`."""
        self._leases.renew(lease)

    def drop_lease(self, lease: Lease) -> None:
        """See `Store.drop_lease`."""
        self._leases.drop(lease)


@dataclass
class Copy:
    """One run of the job on a node, with its manager and its guard."""

    lease: Lease
    view: View
    takeover: Takeover
    rate: float  # how fast its node's clock goes
    reaches_store: bool = True
    reaches_scheduler: bool = True
    manager_stands_still: bool = False
    computing: bool = False  # it was started, and has not been ended
    guard: float = 0.0  # until when it may compute, by its node's clock
    begun: dict[str, float] = field(default_factory=dict)  # what its manager is doing, and since when


class NeverTwoCopies(RuleBasedStateMachine):
    """One job, whose runs come one after the other; each on another node than the last."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.files = Files(self)
        self.watcher = View(self.files)
        self.fences: dict[Lease, float] = {}
        self.marked: list[Lease] = []
        self.copies: list[Copy] = []
        self.seen = 0  # how many runs were ever computing
        self.epoch, self.state, self.node = 0, JobState.RUNNING, NODES[0]
        self._start(1.0)

    def _start(self, rate: float) -> None:
        lease = Lease(JOB, self.epoch, self.node, 2000)
        self.copies.append(Copy(lease, View(self.files), Takeover(lease, TTL), rate))

    def _clock(self, copy: Copy) -> float:
        return self.now * copy.rate

    def _runs(self, copy: Copy) -> bool:
        return copy.computing and self._clock(copy) < copy.guard

    @rule(seconds=st.sampled_from([0.05, 0.3, 0.5, 1.0, 2.0, TTL]))
    def time_passes(self, seconds: float) -> None:
        """Nothing happens for a while."""
        self.now += seconds

    @rule(
        data=st.data(), what=st.sampled_from(["reaches_store", "reaches_scheduler", "manager_stands_still"])
    )
    def something_breaks_or_heals(self, data: st.DataObject, what: str) -> None:
        """A link of a node, or its manager."""
        copy = data.draw(st.sampled_from(self.copies))
        setattr(copy, what, not getattr(copy, what))

    @rule(data=st.data(), what=st.sampled_from(["renew", "ask"]))
    def a_manager_begins_to_extend_its_lease(self, data: st.DataObject, what: str) -> None:
        """Its message is on its way from now on; the answer may come much later."""
        copy = data.draw(st.sampled_from(self.copies))
        if copy.computing and not copy.manager_stands_still:
            copy.begun.setdefault(what, self._clock(copy))

    @rule(data=st.data())
    def a_renewal_arrives(self, data: st.DataObject) -> None:
        """The store does it, and the manager learns of it."""
        copy = data.draw(st.sampled_from(self.copies))
        if not copy.reaches_store or copy.manager_stands_still or "renew" not in copy.begun:
            return
        since = copy.begun.pop("renew")
        try:
            copy.view.renew_lease(copy.lease)
        except LeaseLost:
            copy.computing = False
        else:
            copy.guard = max(copy.guard, lease_end(since, TTL))

    @rule(data=st.data())
    def the_scheduler_answers(self, data: st.DataObject) -> None:
        """A manager that asked whether its run goes on learns it."""
        copy = data.draw(st.sampled_from(self.copies))
        if not copy.reaches_scheduler or copy.manager_stands_still or "ask" not in copy.begun:
            return
        since = copy.begun.pop("ask")
        nodes = (self.node,) if self.state is JobState.RUNNING else ()
        word = SchedulerJob("17", self.state, "", self.epoch, nodes, 2000, "lu")
        if is_this_run(word, copy.lease.epoch, copy.lease.node):
            copy.guard = max(copy.guard, lease_end(since, TTL))

    @precondition(lambda self: self.state is JobState.RUNNING)
    @rule(by_watcher=st.booleans())
    def the_run_is_taken_for_lost(self, by_watcher: bool) -> None:
        """Rightly or not. The watcher has its node marked down, or the scheduler does it by itself."""
        self.state = JobState.PENDING
        self.epoch += 1
        if by_watcher:
            self.marked += [view.lease for view in self.watcher.leases("c") if view.lease.node == self.node]

    @rule()
    def the_watcher_puts_up_a_fence(self) -> None:
        """As `Loop._put_up_fences` does, some time after it had the node marked down."""
        for lease in self.marked:
            if lease.epoch < self.epoch and not lease.is_fence:
                self.fences[lease.fence()] = self.now + TTL
                self.watcher.renew_lease(lease.fence())
                self.watcher.drop_lease(lease)
        self.marked = []

    @rule()
    def the_watcher_lifts_fences(self) -> None:
        """As `Loop._lift_fences` does."""
        for fence in [fence for fence, until in self.fences.items() if self.now >= until]:
            self.watcher.renew_lease(fence.lifted())
            self.watcher.drop_lease(fence)
            del self.fences[fence]

    @rule()
    def the_watcher_is_started_anew(self) -> None:
        """It remembers no fence."""
        self.fences, self.marked, self.watcher = {}, [], View(self.files)

    @precondition(lambda self: self.state is JobState.PENDING)
    @rule(rate=st.sampled_from([0.98, 1.0, 1.02]))
    def the_scheduler_starts_the_next_run(self, rate: float) -> None:
        """On another node."""
        self.state, self.node = JobState.RUNNING, NODES[self.epoch % len(NODES)]
        self._start(rate)

    @rule(data=st.data())
    def a_manager_tries_to_begin_its_run(self, data: st.DataObject) -> None:
        """As `Holding.await_turn` does."""
        copy = data.draw(st.sampled_from(self.copies))
        if copy.computing or copy.guard or not copy.reaches_store or copy.manager_stands_still:
            return
        try:
            if copy.takeover.step(copy.view, lambda: self._clock(copy)) == 0.0:
                copy.computing = True
                copy.guard = lease_end(copy.takeover.taken, TTL)
                self.seen += 1
        except LeaseLost:
            copy.guard = -1.0

    @rule(data=st.data())
    def a_run_ends(self, data: st.DataObject) -> None:
        """By itself, and gives up its lease if it can."""
        copy = data.draw(st.sampled_from(self.copies))
        if copy.computing and copy.lease.epoch < self.epoch:
            copy.computing = False
            if copy.reaches_store and not copy.manager_stands_still:
                copy.view.drop_lease(copy.lease)

    @invariant()
    def at_most_one_copy_computes(self) -> None:
        """What all of it is for."""
        assert sum(self._runs(copy) for copy in self.copies) <= 1


class TestNeverTwoCopies(NeverTwoCopies.TestCase):  # type: ignore[misc, valid-type]
    """No order of events makes two copies compute at once."""

    settings = settings(
        max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
    )


def behind_a_fence() -> tuple[NeverTwoCopies, Copy, Copy]:
    """A first run that computes and is taken for lost, and a second that the scheduler has started."""
    world = NeverTwoCopies()
    first = world.copies[0]
    first.takeover.step(first.view, lambda: world.now)
    first.computing, first.guard = True, lease_end(world.now, TTL)
    world.marked = [view.lease for view in world.watcher.leases("c")]
    world.state, world.epoch = JobState.PENDING, 1
    world.the_watcher_puts_up_a_fence()
    world.state, world.node = JobState.RUNNING, "n2"
    world._start(1.0)
    return world, first, world.copies[1]


def third_run(world: NeverTwoCopies) -> Copy:
    """The scheduler takes the second run for lost as well, and starts a third."""
    world.state, world.epoch, world.node = JobState.RUNNING, 2, "n3"
    world._start(1.0)
    return world.copies[2]


def test_a_fence_before_the_second_run_lets_no_third_begin_while_the_first_computes() -> None:
    world, first, _ = behind_a_fence()
    third = third_run(world)

    assert third.takeover.step(third.view, lambda: world.now) > 0
    while world._runs(first):
        assert third.takeover.step(third.view, lambda: world.now) > 0
        world.now += 0.1
    world.now += TTL
    assert third.takeover.step(third.view, lambda: world.now) == 0.0


def test_a_fence_that_is_lifted_late_does_not_hide_the_run_that_began_behind_it() -> None:
    world, _, second = behind_a_fence()
    world.now += TTL + 2.0
    assert second.takeover.step(second.view, lambda: world.now) == 0.0
    world.the_watcher_lifts_fences()
    third = third_run(world)

    assert [view.lease for view in world.watcher.leases("c")] == [second.lease]
    assert third.takeover.step(third.view, lambda: world.now) > 0


def test_a_lost_run_is_followed_by_another_in_the_model() -> None:
    world, first, second = behind_a_fence()

    assert second.takeover.step(second.view, lambda: world.now) > 0
    world.now += TTL
    assert not world._runs(first)
    world.the_watcher_lifts_fences()
    assert second.takeover.step(second.view, lambda: world.now) == 0.0
    with pytest.raises(LeaseLost):
        first.view.renew_lease(first.lease)
