"""What is kept, what goes, and that nothing goes that somebody needs."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outlast.config import StoreConfig
from outlast.errors import ConfigError, OutlastError, StoreRefused, StoreUnavailable, UsageError
from outlast.model import Checkpoint, CheckpointId, JobKey, Lease
from outlast.store import Policy, Store, add_key, open_store
from outlast.store import _writer as writer
from outlast.store._backend import Backend
from outlast.store._keys import Keyring, read_keyring
from outlast.store._local import LocalBackend
from tests.store.memories import MadeUpMemory, make_runs
from tests.store.test_checkpoints import Failing

HOUR, DAY = 3600, 86400


@pytest.fixture
def small(tmp_path: Path) -> Path:
    directory = tmp_path / "small"
    directory.mkdir()
    (directory / "core-1000.img").write_bytes(os.urandom(900))
    return directory


# --- what is kept -------------------------------------------------------------------------------------


def made(*times: float) -> list[Checkpoint]:
    """Return checkpoints made at *times*, which go backwards; the first is number len(times)."""
    return [Checkpoint(CheckpointId(0, len(times) - n), time, 0, 0, {}) for n, time in enumerate(times)]


@pytest.mark.parametrize(
    ("policy", "times", "kept"),
    [
        (Policy(), (30.0, 20.0, 10.0), {3}),
        (Policy(last=2), (30.0, 20.0, 10.0), {3, 2}),
        (Policy(last=0), (30.0, 20.0), {2}),
        (Policy(last=9), (30.0, 20.0), {2, 1}),
        (Policy(within=15), (30.0, 20.0, 10.0), {3, 2}),
        (Policy(hourly=2), (2 * HOUR + 9, 2 * HOUR + 1, HOUR + 5, HOUR + 1, 7), {5, 3}),
        (Policy(hourly=3), (9 * HOUR, 7 * HOUR + 1, 7 * HOUR, 5), {4, 3, 1}),
        (Policy(daily=2), (3 * DAY + 5, 3 * DAY + 1, DAY + 9, DAY, 8), {5, 3}),
        (Policy(last=2, daily=3), (3 * DAY + 5, 3 * DAY + 1, DAY + 9, DAY, 8), {5, 4, 3, 1}),
    ],
)
def test_policy_keeps_what_any_of_its_rules_wants(
    policy: Policy, times: tuple[float, ...], kept: set[int]
) -> None:
    assert {id.seq for id in policy.choose(made(*times))} == kept


def test_policy_has_nothing_to_keep_where_there_is_nothing() -> None:
    assert Policy(last=3, hourly=3).choose([]) == set()


def test_pinned_checkpoint_stays(store: Store, job: JobKey, small: Path, tmp_path: Path) -> None:
    for seq in range(1, 6):
        store.publish(job, CheckpointId(0, seq), small, {})
    store.pin(job, CheckpointId(0, 2))
    assert store.pins(job) == {CheckpointId(0, 2)}
    assert store.forget(job, 1) == 3
    assert [one.id.seq for one in store.checkpoints(job)] == [5, 2]
    store.fetch(job, CheckpointId(0, 2), tmp_path / "fetched")

    assert store.unpin(job, CheckpointId(0, 2))
    assert not store.unpin(job, CheckpointId(0, 2))
    assert store.forget(job, 1) == 1
    with pytest.raises(UsageError, match=r"17@0\.2"):
        store.pin(job, CheckpointId(0, 2))


def test_nothing_is_forgotten_without_the_key(
    config: StoreConfig, store: Store, job: JobKey, small: Path, tmp_path: Path
) -> None:
    for seq in (1, 2, 3):
        store.publish(job, CheckpointId(0, seq), small, {})
    without = StoreConfig(**{**vars(config), "key": tmp_path / "absent"})
    add_key(tmp_path / "foreign")
    foreign = StoreConfig(**{**vars(config), "key": tmp_path / "foreign"})
    for wrong in (without, foreign):
        with open_store(wrong) as other, pytest.raises(ConfigError):
            other.forget(job, 1)

    assert len(store.checkpoints(job)) == 3


# --- room ---------------------------------------------------------------------------------------------


def test_quota_refuses_clearly_and_the_newest_checkpoint_stays_whole(
    config: StoreConfig, job: JobKey, tmp_path: Path
) -> None:
    source = tmp_path / "large"
    source.mkdir()
    (source / "a").write_bytes(os.urandom(3 << 20))
    with open_store(StoreConfig(**{**vars(config), "quota": "5M"})) as store:
        store.publish(job, CheckpointId(0, 1), source, {})
        (source / "a").write_bytes(os.urandom(3 << 20))
        with pytest.raises(StoreRefused, match="quota of 5242880 bytes") as caught:
            store.publish(job, CheckpointId(0, 2), source, {})
        assert caught.value.hint is not None
        assert store.usage(job).stored_bytes < 5 << 20
        assert [one.id.seq for one in store.checkpoints(job)] == [1]
        store.verify(job, CheckpointId(0, 1))
        (source / "a").write_bytes(os.urandom(1 << 20))
        store.publish(job, CheckpointId(0, 3), source, {})
        store.publish(JobKey("testbed", "18"), CheckpointId(0, 1), source, {})


def test_quota_of_a_user_counts_all_jobs_of_the_user_and_nobody_elses(
    config: StoreConfig, top: Path, tmp_path: Path
) -> None:
    source = tmp_path / "large"
    source.mkdir()
    (source / "a").write_bytes(os.urandom(2 << 20))
    mine, another, theirs = (JobKey("testbed", name) for name in ("1", "2.a", "3"))
    with open_store(dataclasses.replace(config, user_quota="5M")) as store:
        store.publish(mine, CheckpointId(0, 1), source, {"uid": 2000})
        store.publish(theirs, CheckpointId(0, 1), source, {"uid": 2001})
        store.publish(another, CheckpointId(0, 1), source, {"uid": 2000})
        (source / "a").write_bytes(os.urandom(2 << 20))
        with pytest.raises(StoreRefused, match="quota of user 2000, 5242880 bytes") as caught:
            store.publish(another, CheckpointId(0, 2), source, {"uid": 2000})
        assert caught.value.hint is not None
        assert [one.id.seq for one in store.checkpoints(another)] == [1]
        store.publish(theirs, CheckpointId(0, 2), source, {"uid": 2001})
        sizes = {job: store.usage(job).stored_bytes for job in (mine, another, theirs)}
    notes = {str(path.relative_to(top / "usage/testbed")) for path in (top / "usage").rglob("*.*")}

    assert notes == {f"2000/1.{sizes[mine]}", f"2000/2.a.{sizes[another]}", f"2001/3.{sizes[theirs]}"}
    assert all(path.stat().st_size == 0 for path in (top / "usage").rglob("*.*"))


def test_what_is_forgotten_or_put_away_counts_no_longer(
    config: StoreConfig, top: Path, tmp_path: Path
) -> None:
    source = tmp_path / "large"
    source.mkdir()
    mine, another = JobKey("testbed", "1"), JobKey("testbed", "2")
    with open_store(dataclasses.replace(config, user_quota="5M")) as store:
        for seq in (1, 2):
            (source / "a").write_bytes(os.urandom(2 << 20))
            store.publish(mine, CheckpointId(0, seq), source, {"uid": 2000})
        with pytest.raises(StoreRefused, match="quota of user 2000"):
            store.publish(another, CheckpointId(0, 1), source, {"uid": 2000})
        store.forget(mine, 1)
        store.publish(another, CheckpointId(0, 1), source, {"uid": 2000})
        age(top / "jobs/testbed/1", 9e6)
        store.prune("testbed", ended=9e5, lost=9e5, grace=9e5)

        assert [path.name.partition(".")[0] for path in (top / "usage/testbed/2000").iterdir()] == ["2"]
        (source / "a").write_bytes(os.urandom(2 << 20))
        store.publish(another, CheckpointId(0, 2), source, {"uid": 2000})


@pytest.mark.parametrize("text", ["50X", "-1", "1.5G", "G", "5 G"])
def test_quota_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="quota"):
        StoreConfig(quota=text)


def test_checkpoint_of_several_packs_that_finds_no_room_leaves_none_of_them(
    store: Store, job: JobKey, small_disk: Path, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PACK_SIZE", 1 << 18)
    monkeypatch.setattr(writer, "_AHEAD", 2)
    store.publish(job, CheckpointId(0, 1), small, {})
    memory = MadeUpMemory("pages-1.img", [(1, 0x1000, 4000)], seed=4)
    with pytest.raises(StoreRefused):
        store.publish(job, CheckpointId(0, 2), small, {}, [memory])

    assert len([path for path in (small_disk / "jobs").rglob("*") if path.is_file()]) == 2
    assert [one.id.seq for one in store.checkpoints(job)] == [1]
    store.publish(job, CheckpointId(0, 3), small, {})
    store.verify(job, CheckpointId(0, 3))


# --- jobs that are over -------------------------------------------------------------------------------


def age(top: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in top.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def test_jobs_that_are_long_over_go_in_two_steps(store: Store, top: Path, small: Path) -> None:
    for job_id in ("1", "2", "3", "4", "5"):
        store.publish(JobKey("c", job_id), CheckpointId(0, 1), small, {})
    for job_id in ("1", "3", "5"):
        store.put_record(JobKey("c", job_id), "ended", {"status": 1})
    store.pin(JobKey("c", "3"), CheckpointId(0, 1))
    age(top, 8 * DAY)
    store.put_record(JobKey("c", "5"), "start", {"uid": 1})  # 5 goes on
    store.renew_lease(Lease(JobKey("c", "4"), 1, "n1", 2000))
    times: dict[str, Any] = {"ended": 7.0 * DAY, "lost": 30.0 * DAY, "grace": 2.0 * DAY}

    first = store.prune("c", **times)
    assert first.trashed == ("jobs/c/1",)
    assert first.removed == ()
    assert [job.job_id for job in store.jobs("c")] == ["2", "3", "4", "5"]
    (trashed,) = (top / "trash/c").iterdir()
    assert len(list(trashed.rglob("*.pack"))) == 1
    assert store.prune("c", **times).trashed == ()

    age(top, 31 * DAY)
    store.put_record(JobKey("c", "5"), "start", {"uid": 1})
    assert store.prune("c", **{**times, "grace": 0.0}).trashed == ("jobs/c/2",)
    assert sorted(job.job_id for job in store.jobs("c")) == ["3", "4", "5"]
    time.sleep(2.1)
    store.prune("c", **{**times, "grace": 0.0})
    assert list((top / "trash/c").iterdir()) == []
    for job_id in ("3", "4", "5"):
        store.verify(JobKey("c", job_id), CheckpointId(0, 1))


def test_retired_jobs_go_too(store: Store, job: JobKey, top: Path, small: Path) -> None:
    store.publish(job, CheckpointId(0, 1), small, {})
    store.retire(job)
    assert store.prune("testbed", ended=7 * DAY, lost=30 * DAY, grace=DAY).trashed == ()
    age(top, 8 * DAY)
    (name,) = store.prune("testbed", ended=7 * DAY, lost=30 * DAY, grace=DAY).trashed

    assert name.startswith("retired/testbed/17.")


def test_prune_and_forget_race_with_a_writer_and_take_nothing_it_needs(
    config: StoreConfig, job: JobKey, small: Path, tmp_path: Path
) -> None:
    memory = MadeUpMemory("pages-1.img", make_runs([200, 80, 90]), seed=6)
    done = threading.Event()
    failed: list[OutlastError] = []

    def tidy() -> None:
        with open_store(config) as mine:
            while not done.is_set():
                try:
                    mine.forget(job, 1)
                    mine.prune("testbed", ended=7 * DAY, lost=30 * DAY, grace=DAY)
                except OutlastError as error:
                    failed.append(error)

    threads = [threading.Thread(target=tidy) for _ in range(2)]
    with open_store(config) as store:
        store.publish(job, CheckpointId(0, 1), small, {}, [memory])
        for thread in threads:
            thread.start()
        try:
            for seq in range(2, 16):
                memory.change(range(seq, 370, 5), seed=seq)
                store.publish(job, CheckpointId(0, seq), small, {}, [memory])
                store.forget(job, 2)
                assert store.checkpoints(job)[0].id.seq == seq
        finally:
            done.set()
            for thread in threads:
                thread.join(30)
        assert failed == []
        store.fetch(job, CheckpointId(0, 15), tmp_path / "fetched")
    assert (tmp_path / "fetched/pages-1.img").read_bytes() == memory.content()


# --- all of it, against a dict ------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Publishing, crashing, restarting, forgetting and pinning, beside a dict of what must be there."""

    job = JobKey("c", "1")

    @initialize()
    def begin(self) -> None:
        self.here = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        (self.here / "store").mkdir()
        (self.here / "small").mkdir()
        (self.here / "small/a").write_bytes(b"small")
        add_key(self.here / "key")
        self.memory = MadeUpMemory("pages-1.img", make_runs([40, 7, 90, 64]), seed=1)
        self.model: dict[CheckpointId, bytes] = {}
        self.pinned: set[CheckpointId] = set()
        self.newest = CheckpointId(0, 0)
        self.restart(takes_over=False)

    @property
    def keyring(self) -> Keyring:
        return read_keyring(self.here / "key")

    @rule(takes_over=st.booleans())
    def restart(self, takes_over: bool) -> None:
        self.store = Store(LocalBackend(self.here / "store"), self.keyring)
        if takes_over:
            self.newest = CheckpointId(self.newest.epoch + 1, 0)

    @rule()
    def rotate(self) -> None:
        add_key(self.here / "key")
        self.restart(takes_over=False)

    @rule(pages=st.lists(st.integers(0, 200), max_size=60), seed=st.integers(0, 1000))
    def work(self, pages: list[int], seed: int) -> None:
        self.memory.change(pages, seed)

    @rule()
    def publish(self) -> None:
        self.newest = CheckpointId(self.newest.epoch, self.newest.seq + 1)
        self.store.publish(self.job, self.newest, self.here / "small", {}, [self.memory])
        self.model[self.newest] = self.memory.content()

    @rule(step=st.integers(1, 25), after=st.booleans(), retries=st.booleans())
    def publish_and_crash(self, step: int, after: bool, retries: bool) -> None:
        failing = Failing(LocalBackend(self.here / "store"), step, after=after)
        store = Store(cast(Backend, failing), self.keyring)
        self.newest = CheckpointId(self.newest.epoch, self.newest.seq + 1)
        for _ in range(2 if retries else 1):
            try:
                store.publish(self.job, self.newest, self.here / "small", {}, [self.memory])
            except (StoreUnavailable, StoreRefused):
                continue
            break
        # Where the answer to the last step got lost, it is there and its writer does not know.
        if self.newest in self.store.published(self.job):
            self.model[self.newest] = self.memory.content()

    @rule(keep=st.integers(1, 3), crash=st.integers(0, 12))
    def forget(self, keep: int, crash: int) -> None:
        store = self.store
        if crash:
            backend = Failing(LocalBackend(self.here / "store"), crash, after=True)
            store = Store(cast(Backend, backend), self.keyring)
        try:
            store.forget(self.job, keep)
        except StoreUnavailable:
            self.store.forget(self.job, keep)
        ids = sorted(self.model, reverse=True)
        stays = set(ids[:keep]) | self.pinned
        self.model = {id: content for id, content in self.model.items() if id in stays}

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def pin_or_unpin(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.model)))
        if id in self.pinned:
            self.store.unpin(self.job, id)
        else:
            self.store.pin(self.job, id)
        self.pinned ^= {id}

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        self.assert_back(data.draw(st.sampled_from(sorted(self.model))))

    @invariant()
    def there_is_what_must_be_there(self) -> None:
        if hasattr(self, "store"):
            found = [checkpoint.id for checkpoint in self.store.checkpoints(self.job)]
            assert found == sorted(self.model, reverse=True)

    def assert_back(self, id: CheckpointId) -> None:
        into = self.here / "fetched"
        self.store.fetch(self.job, id, into)
        try:
            assert (into / "pages-1.img").read_bytes() == self.model[id]
        finally:
            shutil.rmtree(into)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            for id in self.model:
                self.assert_back(id)
            if self.model:
                self.store.forget(self.job, 1)
                kept = {max(self.model)} | (self.pinned & set(self.model))
                packs = {path.name for path in (self.here / "store/jobs/c/1/packs").iterdir()}
                assert len(packs) <= 40 * len(kept)
        finally:
            shutil.rmtree(self.here)


@pytest.fixture(autouse=True, scope="module")
def _small_packs() -> Iterable[None]:
    """Several packs to a checkpoint; module-wide, as hypothesis has no room for a fixture."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer, "PACK_SIZE", 1 << 17)
        patched.setattr(writer, "_AHEAD", 3)
        yield


Life.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestLife: Any = Life.TestCase
