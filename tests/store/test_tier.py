"""A node's own directory in front of the store: whole at once here, durable when the store has it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import queue
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from outlast.config import StoreConfig
from outlast.errors import ConfigError, CorruptCheckpoint, StoreRefused, StoreUnavailable, UsageError
from outlast.model import CheckpointId, JobKey
from outlast.store import Shipped, Store, _tier, open_store
from outlast.store._backend import Backend
from outlast.store._keys import Keyring
from outlast.store._local import LocalBackend
from tests.store.memories import MadeUpMemory, make_runs
from tests.store.test_checkpoints import Failing

FIRST, SECOND, THIRD = (CheckpointId(0, seq) for seq in (1, 2, 3))
Tree = Callable[[Path], dict[str, tuple[int, bytes]]]
SECONDS = 60.0


@pytest.fixture
def tiered(config: StoreConfig, nvme: Path) -> StoreConfig:
    return dataclasses.replace(config, local=str(nvme))


@pytest.fixture
def told() -> queue.Queue[Shipped]:
    """What a node's store was told of shipping."""
    return queue.Queue()


@pytest.fixture
def node(tiered: StoreConfig, told: queue.Queue[Shipped]) -> Iterator[Store]:
    """The store as the manager on node n1 has it."""
    with open_store(tiered, node="n1", told=told.put) as store:
        yield store


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Nothing is shipped until this is called."""
    ship = _tier.Shipper._ship

    def refuse(self: object, *_: object) -> None:
        raise StoreRefused("the store has no room")

    monkeypatch.setattr(_tier, "_FIRST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(_tier, "_LONGEST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(_tier.Shipper, "_ship", refuse)
    return lambda: monkeypatch.setattr(_tier.Shipper, "_ship", ship)


def test_checkpoint_is_on_the_node_at_once_and_in_the_store_soon(
    node: Store, config: StoreConfig, job: JobKey, source: Path, tmp_path: Path, tree: Tree, nvme: Path
) -> None:
    published = node.publish(job, FIRST, source, {"node": "n1"})

    assert (published.durable, published.where) == (False, ("n1",))
    assert (nvme / "jobs/testbed/17/ckpt/0-1.ck").exists()
    node.fetch(job, FIRST, tmp_path / "here")
    assert tree(tmp_path / "here") == tree(source)
    assert node.await_durable(job, FIRST, SECONDS)
    (one,) = node.checkpoints(job)
    assert (one.durable, one.where) == (True, ("store", "n1"))
    with open_store(config) as elsewhere:
        elsewhere.fetch(job, FIRST, tmp_path / "there")
        assert [one.id for one in elsewhere.checkpoints(job)] == [FIRST]
    assert tree(tmp_path / "there") == tree(source)


def test_both_places_have_the_same_files(
    node: Store, job: JobKey, source: Path, nvme: Path, top: Path
) -> None:
    node.publish(job, FIRST, source, {})
    assert node.await_durable(job, FIRST, SECONDS)

    for kind in ("ckpt", "packs"):
        here, there = (
            {path.name: path.read_bytes() for path in (place / "jobs/testbed/17" / kind).iterdir()}
            for place in (nvme, top)
        )
        assert here == there
        assert here


def test_until_it_is_shipped_everybody_sees_where_it_is(
    node: Store,
    config: StoreConfig,
    job: JobKey,
    source: Path,
    told: queue.Queue[Shipped],
    held_up: Callable[[], None],
) -> None:
    node.publish(job, FIRST, source, {"node": "n1"})

    assert not node.await_durable(job, FIRST, 0.2)
    assert [(one.durable, one.where) for one in node.checkpoints(job)] == [(False, ("n1",))]
    error = told.get(timeout=SECONDS).error
    assert isinstance(error, StoreRefused)
    held_up()
    assert node.await_durable(job, FIRST, SECONDS)
    with open_store(config) as elsewhere:
        assert [(one.durable, one.where) for one in elsewhere.whereabouts(job)] == [(True, ("store", "n1"))]


def test_what_only_the_node_has_is_told_of_and_not_gone_on_from_elsewhere(
    node: Store, config: StoreConfig, job: JobKey, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.publish(job, FIRST, source, {"node": "n1"})
    assert node.await_durable(job, FIRST, SECONDS)
    # The way to the store breaks after the announcement.
    create = LocalBackend.read

    def lost(self: LocalBackend, name: str) -> bytes:
        if name.endswith("0-2.ck"):
            raise StoreRefused("cut off")
        return create(self, name)

    monkeypatch.setattr(LocalBackend, "read", lost)
    node.publish(job, SECOND, source, {"node": "n1", "pause_ms": 4.0})
    assert not node.await_durable(job, SECOND, 1.0)

    with open_store(config) as elsewhere:
        newest, older = elsewhere.whereabouts(job)
        assert (newest.id, newest.durable, newest.where) == (SECOND, False, ("n1",))
        assert newest.meta["pause_ms"] == 4.0
        assert (older.id, older.durable, older.where) == (FIRST, True, ("store",))
        assert [one.id for one in elsewhere.checkpoints(job)] == [FIRST]


def test_node_that_is_lost_leaves_the_newest_durable_one(
    node: Store,
    config: StoreConfig,
    job: JobKey,
    source: Path,
    tmp_path: Path,
    nvme: Path,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node.publish(job, FIRST, source, {})
    assert node.await_durable(job, FIRST, SECONDS)
    before = tree(source)
    monkeypatch.setattr(_tier.Shipper, "ship", lambda *_: None)
    (source / "core.img").write_bytes(os.urandom(9000))
    node.publish(job, SECOND, source, {})
    node.forget(job, 1)
    shutil.rmtree(nvme)

    with open_store(config) as elsewhere:
        assert [one.id for one in elsewhere.checkpoints(job)] == [FIRST]
        elsewhere.fetch(job, FIRST, tmp_path / "there")
        elsewhere.publish(job, CheckpointId(1, 1), tmp_path / "there", {})
        elsewhere.verify(job, CheckpointId(1, 1))
    assert tree(tmp_path / "there") == before


def test_what_was_not_shipped_is_by_the_next_run_on_the_node_but_by_no_later_one(
    tiered: StoreConfig, config: StoreConfig, job: JobKey, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship = _tier.Shipper.ship
    monkeypatch.setattr(_tier.Shipper, "ship", lambda *_: None)
    with open_store(tiered, node="n1") as store:
        store.publish(job, FIRST, source, {})
    monkeypatch.setattr(_tier.Shipper, "ship", ship)
    with open_store(tiered, node="n1") as store:
        store.resume(job, 2)
        assert not store.await_durable(job, FIRST, 0.5)
        store.resume(job, 1)
        assert store.await_durable(job, FIRST, SECONDS)
    with open_store(config) as elsewhere:
        elsewhere.verify(job, FIRST)


def test_run_on_another_node_ships_only_what_is_new_and_has_it_whole(
    tiered: StoreConfig, config: StoreConfig, job: JobKey, tmp_path: Path, nvme: Path
) -> None:
    memory = MadeUpMemory("pages-1.img", make_runs([400, 90]), seed=1)
    (tmp_path / "small").mkdir()
    with open_store(tiered, node="n1") as store:
        store.publish(job, FIRST, tmp_path / "small", {}, [memory])
        assert store.await_durable(job, FIRST, SECONDS)
    shutil.rmtree(nvme)
    nvme.mkdir(mode=0o700)
    memory.change(range(3), seed=2)
    with open_store(tiered, node="n2") as store:
        done = store.publish(job, CheckpointId(1, 1), tmp_path / "small", {}, [memory])
        assert done.stored_bytes < 20_000
        store.fetch(job, CheckpointId(1, 1), tmp_path / "here")  # of both places
        assert store.await_durable(job, CheckpointId(1, 1), SECONDS)
    with open_store(config) as store:
        store.fetch(job, CheckpointId(1, 1), tmp_path / "there")

    assert (tmp_path / "here/pages-1.img").read_bytes() == memory.content()
    assert (tmp_path / "there/pages-1.img").read_bytes() == memory.content()


def test_overtaken_checkpoints_are_left_out_and_the_store_is_whole_at_every_moment(
    tiered: StoreConfig, config: StoreConfig, job: JobKey, tmp_path: Path, told: queue.Queue[Shipped]
) -> None:
    memory = MadeUpMemory("pages-1.img", make_runs([300, 70]), seed=1)
    contents: dict[CheckpointId, bytes] = {}
    (tmp_path / "small").mkdir()
    with open_store(tiered, node="n1", told=told.put) as store, open_store(config) as elsewhere:
        for seq in range(1, 16):
            memory.change(range(seq, 370, 9), seed=seq)
            id = CheckpointId(0, seq)
            contents[id] = memory.content()
            store.publish(job, id, tmp_path / "small", {}, [memory])
            store.forget(job, 2)
            for one in elsewhere.checkpoints(job)[:1]:
                with contextlib.suppress(
                    CorruptCheckpoint, UsageError
                ):  # forgotten while it is read, for a newer one
                    elsewhere.fetch(job, one.id, tmp_path / f"at-{seq}")
                    assert (tmp_path / f"at-{seq}/pages-1.img").read_bytes() == contents[one.id]
        assert store.await_durable(job, CheckpointId(0, 15), SECONDS)
        store.forget(job, 2)
        found = elsewhere.checkpoints(job)
        assert found[0].id == CheckpointId(0, 15)
        assert len(found) <= 2
        for one in found:
            elsewhere.fetch(job, one.id, tmp_path / f"end-{one.id.seq}")
            assert (tmp_path / f"end-{one.id.seq}/pages-1.img").read_bytes() == contents[one.id]
    assert [one.error for one in told.queue] == [None] * len(told.queue)


@pytest.mark.parametrize("after", [False, True])
def test_shipping_that_fails_anywhere_leaves_the_store_whole_and_goes_on(
    backend: Backend,
    keyring: Keyring,
    job: JobKey,
    source: Path,
    nvme: Path,
    tmp_path: Path,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
    after: bool,
) -> None:
    monkeypatch.setattr(_tier.Shipper, "ship", lambda *_: None)
    tier = _tier.Tier(nvme, "n1", lambda: Store(backend, keyring), lambda _: None)
    store = Store(backend, keyring, tier=tier)
    store.put_record(job, "start", {})
    for n in itertools.count(1):
        id, into = CheckpointId(n, 1), tmp_path / f"fetched-{n}"
        (source / "core.img").write_bytes(os.urandom(9000))
        done = store.publish(job, id, source, {})
        failing = Failing(backend, n, after=after)
        with contextlib.suppress(StoreUnavailable):
            tier.shipper._ship(Store(cast(Backend, failing), keyring), job, done)
        if not failing.has_failed:
            break
        elsewhere = Store(backend, keyring)
        found = [one.id for one in elsewhere.checkpoints(job)]
        assert set(found) <= {id, CheckpointId(n - 1, 1)}
        for one in found:
            elsewhere.verify(job, one)
        tier.shipper._ship(elsewhere, job, done)
        elsewhere.fetch(job, id, into)
        assert tree(into) == tree(source)
        store.forget(job, 1)

    assert n > 6


def test_what_a_user_has_is_noted_where_the_users_other_jobs_see_it(
    tiered: StoreConfig, config: StoreConfig, job: JobKey, tmp_path: Path
) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large/a").write_bytes(os.urandom(2 << 20))
    with open_store(dataclasses.replace(tiered, user_quota="3M"), node="n1") as store:
        store.publish(job, FIRST, tmp_path / "large", {"uid": 2000})
        assert store.await_durable(job, FIRST, SECONDS)
    another = JobKey("testbed", "18")
    with open_store(dataclasses.replace(config, user_quota="3M")) as store:
        store.publish(another, FIRST, tmp_path / "large", {"uid": 2001})
        with pytest.raises(StoreRefused, match="quota of user 2000"):
            store.publish(JobKey("testbed", "19"), FIRST, tmp_path / "large", {"uid": 2000})


def test_directory_without_room_costs_no_checkpoint(
    config: StoreConfig, job: JobKey, tmp_path: Path, mounted: Callable[[Path, str], None]
) -> None:
    disk = tmp_path / "tiny"
    disk.mkdir(mode=0o700)
    (tmp_path / "large").mkdir()
    (tmp_path / "large/a").write_bytes(os.urandom(3 << 20))
    mounted(disk, "2m")
    with open_store(dataclasses.replace(config, local=str(disk)), node="n1") as store:
        done = store.publish(job, FIRST, tmp_path / "large", {})
        assert (done.durable, done.where) == (True, ("store",))
        assert store.await_durable(job, FIRST, 0)
        (tmp_path / "large/a").write_bytes(os.urandom(1 << 20))
        assert store.publish(job, SECOND, tmp_path / "large", {}).where == ("n1",)
        assert store.await_durable(job, SECOND, SECONDS)
        store.verify(job, SECOND)


def test_directory_that_is_not_there_or_is_anybodys_is_said(
    tiered: StoreConfig, job: JobKey, source: Path, nvme: Path
) -> None:
    with open_store(dataclasses.replace(tiered, local="/nowhere/nvme"), node="n1") as store:
        assert store.publish(job, FIRST, source, {}).durable
        assert store.await_durable(job, FIRST, 0)
    nvme.chmod(0o777)
    with pytest.raises(ConfigError, match="local = ") as caught:
        open_store(tiered, node="n1")
    assert caught.value.hint is not None


def test_job_whose_work_is_done_leaves_the_node(node: Store, job: JobKey, source: Path, nvme: Path) -> None:
    node.publish(job, FIRST, source, {})
    assert node.await_durable(job, FIRST, SECONDS)
    node.leave_node(job)

    assert not (nvme / "jobs/testbed/17").exists()
    assert [one.where for one in node.checkpoints(job)] == [("store",)]


def test_what_other_jobs_left_on_the_node_goes_after_days(
    tiered: StoreConfig, source: Path, nvme: Path
) -> None:
    old, recent, mine = (JobKey("testbed", name) for name in "123")
    for job in (old, recent):
        with open_store(tiered, node="n1") as store:
            store.publish(job, FIRST, source, {})
            assert store.await_durable(job, FIRST, SECONDS)
    for path in (nvme / "jobs/testbed/1").rglob("*"):
        os.utime(path, (1e9, 1e9))
    with open_store(tiered, node="n1") as store:
        store.publish(mine, FIRST, source, {})

        assert {path.name for path in (nvme / "jobs/testbed").iterdir()} == {"2", "3"}
        assert len(store.checkpoints(old)) == 1
