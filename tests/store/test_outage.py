"""A node with a directory of its own goes on with checkpoints while the store behind it does not answer."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from outlast.config import StoreConfig
from outlast.errors import StoreRefused, StoreUnavailable
from outlast.model import CheckpointId, JobKey
from outlast.store import Quota, Shipped, Store, _tier, open_store
from outlast.store._backend import Backend
from outlast.store._keys import Keyring
from outlast.store._local import LocalBackend
from tests.store.memories import MadeUpMemory, make_runs

if TYPE_CHECKING:
    from tests.conftest import SshServer

FIRST, SECOND, THIRD, FOURTH = (CheckpointId(0, seq) for seq in (1, 2, 3, 4))
SECONDS = 100.0


class Answering:
    """A store behind, which can be told not to answer; counts what it is asked for meanwhile."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.answers = True
        self.asked = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._backend, name)
        if name == "close":
            return method

        def call(*args: Any, **options: Any) -> object:  # noqa: ANN401
            if not self.answers:
                self.asked += 1
                raise StoreUnavailable("no answer")
            return method(*args, **options)

        return call


@pytest.fixture
def small(tmp_path: Path) -> Path:
    directory = tmp_path / "small"
    directory.mkdir()
    (directory / "core-1.img").write_bytes(os.urandom(900))
    return directory


@pytest.fixture
def memory() -> MadeUpMemory:
    return MadeUpMemory("pages-1.img", make_runs([300, 70]), seed=1)


@pytest.fixture
def behind(tmp_path: Path) -> Answering:
    (tmp_path / "behind").mkdir()
    return Answering(LocalBackend(tmp_path / "behind"))


@pytest.fixture
def here(behind: Answering, keyring: Keyring, nvme: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store as the job's manager has it, shipping in between."""
    monkeypatch.setattr(_tier, "_FIRST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(_tier, "_LONGEST_RETRY_SECONDS", 0.05)
    tier = _tier.Tier(nvme, "n1", lambda: Store(cast(Backend, behind), keyring), lambda _: None)
    with Store(cast(Backend, behind), keyring, tier=tier) as store:
        yield store


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def manifests(top: Path) -> set[str]:
    return {path.name for path in top.glob("jobs/testbed/17/ckpt/*.ck")}


def content(config: StoreConfig, job: JobKey, id: CheckpointId, into: Path) -> bytes:
    with open_store(config) as store:
        store.fetch(job, id, into)
    return (into / "pages-1.img").read_bytes()


@pytest.mark.parametrize("silent", [True, False])
def test_server_that_is_away_or_silent_holds_no_checkpoint_up(
    own_server: SshServer,
    job: JobKey,
    small: Path,
    memory: MadeUpMemory,
    nvme: Path,
    tmp_path: Path,
    silent: bool,
) -> None:
    top = own_server.served
    config = own_server.config(top, timeout=2.0)
    only_here = dataclasses.replace(config, url=f"file://{nvme}")
    with open_store(dataclasses.replace(config, local=str(nvme)), node="n1") as store:
        store.publish(job, FIRST, small, {}, [memory])
        assert store.await_durable(job, FIRST, SECONDS)
        store.forget(job, 2)
        if silent:
            own_server.stop()
        else:
            own_server.kill()
        for id in (SECOND, THIRD, FOURTH):
            memory.change(range(id.seq, 370, 5), seed=id.seq)
            assert store.publish(job, id, small, {"uid": 2000}, [memory]).where == ("n1",)
            with contextlib.suppress(StoreUnavailable):
                store.forget(job, 2)

        assert content(only_here, job, FOURTH, tmp_path / "here") == memory.content()
        assert not store.await_durable(job, SECOND, 0)
        # The second may have been on its way when it should have gone.
        assert {"0-3.ck", "0-4.ck"} <= manifests(nvme) <= {"0-2.ck", "0-3.ck", "0-4.ck"}
        if silent:
            own_server.resume()
        else:
            own_server.start()
        assert store.await_durable(job, FOURTH, SECONDS)
        until(lambda: len(manifests(top)) <= 2)
    with open_store(config) as elsewhere:
        assert elsewhere.checkpoints(job)[0].id == FOURTH
        for one in elsewhere.checkpoints(job):
            elsewhere.verify(job, one.id)
    assert content(config, job, FOURTH, tmp_path / "there") == memory.content()


def test_what_the_node_knows_is_not_asked_of_the_store(
    behind: Answering,
    keyring: Keyring,
    job: JobKey,
    small: Path,
    memory: MadeUpMemory,
    nvme: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tier = _tier.Tier(nvme, "n1", lambda: Store(cast(Backend, behind), keyring), lambda _: None)
    with Store(cast(Backend, behind), keyring, Quota(1 << 30, 1 << 30), tier=tier) as here:
        here.publish(job, FIRST, small, {"uid": 2000}, [memory])
        assert here.await_durable(job, FIRST, SECONDS)
        here.forget(job, 2)
        monkeypatch.setattr(_tier.Shipper, "ship", lambda *_: None)
        behind.answers = False
        with pytest.raises(StoreUnavailable):  # what other jobs of the user have is not known here
            here.publish(job, SECOND, small, {"uid": 2000}, [memory])
        here.publish(job, SECOND, small, {"uid": 2000}, [memory])
        tier.shipper.unanswered = True  # as it finds out when it ships
        asked = behind.asked
        for number in range(3, 8):
            memory.change(range(number, 370, 7), seed=number)
            done = here.publish(job, CheckpointId(0, number), small, {"uid": 2000}, [memory])
            here.forget(job, 2)

            assert behind.asked == asked
            assert done.stored_bytes < 400_000  # what changed, not all
            assert len(manifests(nvme)) == 2


def test_run_that_begins_during_an_outage_has_its_checkpoints_here_after_one_try(
    here: Store,
    behind: Answering,
    keyring: Keyring,
    job: JobKey,
    small: Path,
    memory: MadeUpMemory,
    tmp_path: Path,
) -> None:
    with Store(cast(Backend, behind), keyring) as before:
        before.publish(job, FIRST, small, {}, [memory])
    behind.answers = False
    with pytest.raises(StoreUnavailable):
        here.publish(job, CheckpointId(1, 1), small, {}, [memory])
    assert here.publish(job, CheckpointId(1, 1), small, {}, [memory]).where == ("n1",)
    memory.change(range(5), seed=2)
    here.publish(job, CheckpointId(1, 2), small, {}, [memory])
    behind.answers = True

    assert here.await_durable(job, CheckpointId(1, 2), SECONDS)
    with Store(cast(Backend, behind), keyring) as after:
        assert next(one.id for one in after.checkpoints(job)) == CheckpointId(1, 2)
        after.fetch(job, CheckpointId(1, 2), tmp_path / "back")
    assert (tmp_path / "back/pages-1.img").read_bytes() == memory.content()


def test_run_that_was_cut_off_changes_nothing_of_the_one_after_it(
    here: Store,
    behind: Answering,
    keyring: Keyring,
    job: JobKey,
    small: Path,
    memory: MadeUpMemory,
    tmp_path: Path,
) -> None:
    here.publish(job, FIRST, small, {}, [memory])
    assert here.await_durable(job, FIRST, SECONDS)
    here.forget(job, 2)
    behind.answers = False
    memory.change(range(0, 370, 3), seed=2)
    here.publish(job, SECOND, small, {}, [memory])
    until(lambda: here._tier is not None and here._tier.shipper.unanswered)
    # Another node goes on from what is durable, and cleans up.
    elsewhere = MadeUpMemory("pages-1.img", make_runs([300, 70]), seed=1)
    elsewhere.change(range(0, 370, 2), seed=3)
    other = Store(LocalBackend(tmp_path / "behind"), keyring)
    other.publish(job, CheckpointId(1, 1), small, {}, [elsewhere])
    other.forget(job, 1)
    behind.answers = True

    assert here.await_durable(job, SECOND, SECONDS)
    assert other.checkpoints(job)[0].id == CheckpointId(1, 1)
    for one in other.checkpoints(job):
        other.verify(job, one.id)
    other.fetch(job, CheckpointId(1, 1), tmp_path / "back")
    assert (tmp_path / "back/pages-1.img").read_bytes() == elsewhere.content()


def test_pack_that_is_gone_in_the_store_is_missed_and_shipped_again(
    behind: Answering,
    keyring: Keyring,
    job: JobKey,
    small: Path,
    memory: MadeUpMemory,
    nvme: Path,
    tmp_path: Path,
) -> None:
    told: queue.Queue[Shipped] = queue.Queue()
    with Store(cast(Backend, behind), keyring) as before:
        before.publish(job, FIRST, small, {}, [memory])
    tier = _tier.Tier(nvme, "n1", lambda: Store(cast(Backend, behind), keyring), told.put)
    with Store(cast(Backend, behind), keyring, tier=tier) as here:
        here.publish(job, CheckpointId(1, 1), small, {}, [memory])
        assert told.get(timeout=SECONDS).error is None
        here.forget(job, 2)
        for pack in (tmp_path / "behind/jobs/testbed/17/packs").glob("0-1-*"):
            pack.unlink()
        memory.change(range(9), seed=2)
        here.publish(job, CheckpointId(1, 2), small, {}, [memory])
        error = told.get(timeout=SECONDS).error
        assert isinstance(error, StoreRefused)
        assert "was removed meanwhile" in str(error)
        here.forget(job, 2)
        here.publish(job, CheckpointId(1, 3), small, {}, [memory])

        assert here.await_durable(job, CheckpointId(1, 3), SECONDS)
    with Store(cast(Backend, behind), keyring) as after:
        after.verify(job, CheckpointId(1, 3))


def test_name_that_another_took_in_the_store_is_found_out_when_shipped(
    behind: Answering,
    keyring: Keyring,
    job: JobKey,
    small: Path,
    memory: MadeUpMemory,
    nvme: Path,
    tmp_path: Path,
) -> None:
    told: queue.Queue[Shipped] = queue.Queue()
    tier = _tier.Tier(nvme, "n1", lambda: Store(cast(Backend, behind), keyring), told.put)
    theirs = MadeUpMemory("pages-1.img", make_runs([300, 70]), seed=9)
    with Store(cast(Backend, behind), keyring) as other:
        other.publish(job, FIRST, small, {}, [theirs])
    with Store(cast(Backend, behind), keyring, tier=tier) as here:
        here.publish(job, FIRST, small, {}, [memory])
        error = told.get(timeout=SECONDS).error

    assert isinstance(error, StoreRefused)
    assert "another checkpoint 17@0.1 is in the store" in str(error)
    with Store(cast(Backend, behind), keyring) as other:
        other.fetch(job, FIRST, tmp_path / "back")
    assert (tmp_path / "back/pages-1.img").read_bytes() == theirs.content()


def test_store_keeps_no_more_checkpoints_than_it_is_to_once_shipping_is_done(
    here: Store, job: JobKey, small: Path, memory: MadeUpMemory, tmp_path: Path, nvme: Path
) -> None:
    for number in range(1, 6):
        memory.change(range(number, 370, 7), seed=number)
        here.publish(job, CheckpointId(0, number), small, {}, [memory])
        here.forget(job, 2)
        assert here.await_durable(job, CheckpointId(0, number), SECONDS)
        until(lambda: len(manifests(tmp_path / "behind")) <= 2)

    assert manifests(tmp_path / "behind") == manifests(nvme) == {"0-4.ck", "0-5.ck"}
