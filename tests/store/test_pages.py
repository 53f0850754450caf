"""Pages: only those that changed are shipped, and each can be had alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.config import StoreConfig
from outlast.errors import OutlastError, StoreUnavailable, UsageError
from outlast.model import CheckpointId, JobKey
from outlast.store import Store, open_store
from outlast.store import _checkpoints as checkpoints
from outlast.store import _writer as writer
from outlast.store._keys import Keyring
from outlast.store._local import LocalBackend
from outlast.store._pages import FRAME_PAGES, ZERO, joined, pages_in_frames, runs_of
from tests.store.memories import PAGE, MadeUpMemory, make_runs

# What a checkpoint may cost besides its pages: a manifest, a pack's head and trailer.
OVERHEAD = 6000


@pytest.fixture
def memory() -> MadeUpMemory:
    return MadeUpMemory("pages-1.img", make_runs([3, 700, 1, 64, 200, 90]), seed=1)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """CRIU's small files of a dump whose memory is elsewhere."""
    directory = tmp_path / "small"
    directory.mkdir()
    (directory / "core-1000.img").write_bytes(os.urandom(900))
    (directory / "pagemap-1000.img").write_bytes(os.urandom(3000))
    return directory


def id_of(number: int, epoch: int = 0) -> CheckpointId:
    return CheckpointId(epoch, number)


def assert_back(
    store: Store, job: JobKey, id: CheckpointId, into: Path, small: Path, *memories: MadeUpMemory
) -> None:
    store.fetch(job, id, into)
    assert {path.name for path in into.iterdir()} == {
        *(path.name for path in small.iterdir()),
        *(memory.name for memory in memories),
    }
    for memory in memories:
        assert (into / memory.name).read_bytes() == memory.content()
        assert (into / memory.name).stat().st_mode & 0o777 == 0o600


def test_memories_come_back_as_files(
    store: Store, job: JobKey, small: Path, memory: MadeUpMemory, tmp_path: Path
) -> None:
    second = MadeUpMemory("pages-2.img", make_runs([5, 5], space=7), seed=2)
    published = store.publish(job, id_of(1), small, {}, [memory, second])

    assert published.image_bytes == 3900 + len(memory.content()) + len(second.content())
    assert_back(store, job, id_of(1), tmp_path / "fetched", small, memory, second)


def test_unchanged_pages_cost_nothing_not_even_after_a_restart_elsewhere(
    config: StoreConfig, job: JobKey, small: Path, memory: MadeUpMemory, tmp_path: Path
) -> None:
    with open_store(config) as store:
        first = store.publish(job, id_of(1), small, {}, [memory])
        second = store.publish(job, id_of(2), small, {}, [memory])
    # Another node, and there the same pages lie in another order.
    memory.runs.reverse()
    for number, (_, _, pages) in enumerate(memory.runs):
        memory.runs[number] = (5000 + number, 0x7F0000000000 + number * (1 << 30), pages)
    with open_store(config) as store:
        third = store.publish(job, id_of(1, epoch=1), small, {}, [memory])
        assert_back(store, job, id_of(1, epoch=1), tmp_path / "fetched", small, memory)

    assert first.stored_bytes > 400 * PAGE
    assert second.stored_bytes < OVERHEAD
    assert third.stored_bytes < OVERHEAD


def test_changed_pages_cost_what_they_are(
    store: Store, job: JobKey, small: Path, memory: MadeUpMemory, tmp_path: Path
) -> None:
    store.publish(job, id_of(1), small, {}, [memory])
    random = np.random.default_rng(5)
    changed = [7, 8, 9, 500, *range(700, 764)]
    for page in changed:
        memory.data[page] = np.frombuffer(random.bytes(PAGE), np.uint8)
    published = store.publish(job, id_of(2), small, {}, [memory])

    assert published.stored_bytes < len(changed) * PAGE * 1.005 + OVERHEAD
    assert_back(store, job, id_of(2), tmp_path / "fetched", small, memory)


def test_single_pages_are_those_of_the_file(
    store: Store, job: JobKey, small: Path, memory: MadeUpMemory, tmp_path: Path
) -> None:
    store.publish(job, id_of(1), small, {}, [memory])
    memory.change(range(100, 300, 3), seed=9)
    store.publish(job, id_of(2), small, {}, [memory])
    stored = store.open(job, id_of(2))
    assert stored.memories["pages-1.img"].tolist() == [list(run) for run in memory.runs]
    stored.fetch_files(tmp_path / "files")
    assert {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()} == {
        path.name: path.read_bytes() for path in small.iterdir()
    }

    random = np.random.default_rng(3)
    for _ in range(200):
        space, vaddr, pages = memory.runs[random.integers(len(memory.runs))]
        start = int(random.integers(pages))
        count = int(random.integers(1, pages - start + 1))
        expected = memoryview(bytearray(count * PAGE))
        memory.readinto(space, vaddr + start * PAGE, expected)
        assert stored.read(space, vaddr + start * PAGE, count) == expected
    space, vaddr, pages = memory.runs[1]
    for wrong in ((space, vaddr, pages + 1), (space, vaddr - PAGE, 1), (space + 5, vaddr, 1)):
        with pytest.raises(UsageError):
            stored.read(*wrong)


def test_pages_may_be_read_from_several_threads(
    store: Store, job: JobKey, small: Path, memory: MadeUpMemory
) -> None:
    store.publish(job, id_of(1), small, {}, [memory])
    stored = store.open(job, id_of(1))
    space, vaddr, pages = memory.runs[1]
    wrong: list[int] = []

    def read(seed: int) -> None:
        for page in np.random.default_rng(seed).integers(0, pages, 60).tolist():
            expected = memoryview(bytearray(PAGE))
            memory.readinto(space, vaddr + page * PAGE, expected)
            if stored.read(space, vaddr + page * PAGE, 1) != expected:
                wrong.append(page)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_memory_that_is_gone_is_an_error_and_costs_no_checkpoint(
    store: Store, job: JobKey, small: Path, memory: MadeUpMemory, tmp_path: Path
) -> None:
    store.publish(job, id_of(1), small, {}, [memory])
    broken = MadeUpMemory("pages-1.img", [(1, 0x1000, 2000)], seed=3)
    broken.runs.append((2, 0x1000, 3))
    broken.gone_after = 1500
    with pytest.raises(OutlastError, match=r"pages-1\.img"):
        store.publish(job, id_of(2), small, {}, [broken])

    assert [checkpoint.id for checkpoint in store.checkpoints(job)] == [id_of(1)]
    assert_back(store, job, id_of(1), tmp_path / "fetched", small, memory)


# --- packs --------------------------------------------------------------------------------------------


class Counting(LocalBackend):
    """Counts what is sent; breaks off once after so many bytes."""

    sent = 0
    breaks_at: float = float("inf")

    def create(self, name: str, chunks: Iterable[bytes]) -> int:
        def counted() -> Iterator[bytes]:
            for chunk in chunks:
                self.sent += len(chunk)
                if self.sent > self.breaks_at:
                    self.breaks_at = float("inf")
                    raise StoreUnavailable("the connection broke")
                yield chunk

        return super().create(name, counted())


def test_interrupted_upload_ships_at_most_the_open_pack_again(
    tmp_path: Path, keyring: Keyring, job: JobKey, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PACK_SIZE", 4 << 20)
    (tmp_path / "store").mkdir()
    memory = MadeUpMemory("pages-1.img", [(1, 0x1000, 12000)], seed=4)
    whole = Counting(tmp_path / "store")
    total = Store(whole, keyring).publish(JobKey("c", "0"), id_of(1), small, {}, [memory]).stored_bytes
    assert total > 20 << 20
    # Up to 24 frames that are ready when a pack is full go into it as well.
    open_pack = (4 << 20) + 25 * FRAME_PAGES * PAGE

    for number, share in enumerate((0.1, 0.5, 0.9)):
        backend = Counting(tmp_path / "store")
        backend.breaks_at = share * total
        store = Store(backend, keyring)
        mine = JobKey("c", str(number + 1))
        with pytest.raises(StoreUnavailable):
            store.publish(mine, id_of(1), small, {}, [memory])
        store.publish(mine, id_of(1), small, {}, [memory])

        assert backend.sent < total + open_pack
        assert_back(store, mine, id_of(1), tmp_path / f"fetched-{number}", small, memory)


def test_overtaken_checkpoint_leaves_its_packs_to_the_next(
    tmp_path: Path, keyring: Keyring, job: JobKey, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PACK_SIZE", 1 << 20)
    (tmp_path / "store").mkdir()
    backend = Counting(tmp_path / "store")
    store = Store(backend, keyring)
    memory = MadeUpMemory("pages-1.img", [(1, 0x1000, 6000)], seed=4)
    total = (
        Store(Counting(tmp_path / "store"), keyring)
        .publish(JobKey("c", "0"), id_of(1), small, {}, [memory])
        .stored_bytes
    )
    backend.breaks_at = 0.65 * total
    with pytest.raises(StoreUnavailable):
        store.publish(job, id_of(1), small, {}, [memory])
    before = backend.sent
    memory.change(range(10), seed=8)
    store.publish(job, id_of(2), small, {}, [memory])

    assert backend.sent - before < 0.65 * total
    assert_back(store, job, id_of(2), tmp_path / "fetched", small, memory)


def test_packs_of_which_little_is_left_go_and_the_store_stays_small(
    store: Store, job: JobKey, small: Path, memory: MadeUpMemory, top: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(1)
    for number in range(1, 25):
        for page in random.integers(0, len(memory.data), 150).tolist():
            memory.data[page] = np.frombuffer(random.bytes(PAGE), np.uint8)
        store.publish(job, id_of(number), small, {}, [memory])
        store.forget(job, 2)

    stored = sum(path.stat().st_size for path in top.rglob("*") if path.is_file())
    assert stored < 3.5 * len(memory.content())
    assert_back(store, job, id_of(24), tmp_path / "fetched", small, memory)


def test_two_runs_that_write_at_once_both_have_whole_checkpoints(
    config: StoreConfig, job: JobKey, small: Path, tmp_path: Path
) -> None:
    memories = [MadeUpMemory("pages-1.img", make_runs([300, 80]), seed=6) for _ in range(2)]
    with open_store(config) as store:
        store.publish(job, id_of(1), small, {}, [memories[0]])
    failed: list[OutlastError] = []

    def write(epoch: int) -> None:
        try:
            with open_store(config) as mine:
                for number in range(2, 8):
                    memories[epoch].change(range(epoch, 380, 7), seed=100 * epoch + number)
                    mine.publish(job, id_of(number, epoch), small, {}, [memories[epoch]])
        except OutlastError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(epoch,)) for epoch in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not failed
    assert not any(thread.is_alive() for thread in threads)
    with open_store(config) as store:
        found = [checkpoint.id for checkpoint in store.checkpoints(job)]
        assert found == [id_of(n, 1) for n in range(7, 1, -1)] + [id_of(n) for n in range(7, 0, -1)]
        for epoch in (0, 1):
            assert_back(store, job, id_of(7, epoch), tmp_path / f"fetched-{epoch}", small, memories[epoch])
        for id in found:
            store.verify(job, id)


def test_new_run_does_not_refer_to_a_pack_that_the_old_one_removed(
    config: StoreConfig,
    job: JobKey,
    small: Path,
    memory: MadeUpMemory,
    top: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_store(config) as store:
        store.publish(job, id_of(1), small, {}, [memory])
    finish = writer.finish_items

    def removing(*args: Any) -> object:  # noqa: ANN401
        for pack in (top / "jobs/testbed/17/packs").glob("0-*"):
            pack.unlink()
        return finish(*args)

    with open_store(config) as store:
        with monkeypatch.context() as patched, pytest.raises(StoreUnavailable, match="removed"):
            patched.setattr(checkpoints, "finish_items", removing)
            store.publish(job, id_of(1, epoch=1), small, {}, [memory])
        store.publish(job, id_of(1, epoch=1), small, {}, [memory])
        assert_back(store, job, id_of(1, epoch=1), tmp_path / "fetched", small, memory)


def test_many_small_packs_become_one_and_large_ones_stay(
    tmp_path: Path, keyring: Keyring, job: JobKey, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PACK_SIZE", 1 << 20)
    monkeypatch.setattr(writer, "_AHEAD", 2)
    monkeypatch.setattr(writer, "_MOST_SMALL", 6)
    (tmp_path / "store").mkdir()
    store = Store(LocalBackend(tmp_path / "store"), keyring)
    memory = MadeUpMemory("pages-1.img", [(1, 0x1000, 6000)], seed=4)
    first = store.publish(job, id_of(1), small, {}, [memory])
    assert first.stored_bytes > 10 << 20
    random = np.random.default_rng(2)
    shipped = []
    for number in range(2, 40):
        memory.data[number] = np.frombuffer(random.bytes(PAGE), np.uint8)
        shipped.append(store.publish(job, id_of(number), small, {}, [memory]).stored_bytes)
        store.forget(job, 1)

    packs = list((tmp_path / "store/jobs/testbed/17/packs").iterdir())
    assert len([pack for pack in packs if pack.stat().st_size < 100_000]) <= 8
    assert max(shipped) < 60_000  # a page, sometimes those of some small packs, never a large pack's
    assert_back(store, job, id_of(39), tmp_path / "fetched", small, memory)


# --- the arithmetic of runs ---------------------------------------------------------------------------

_PLACES = st.lists(st.one_of(st.just(ZERO), st.integers(0, 400)), max_size=300)


@given(_PLACES, st.integers(1, 20))
def test_runs_stand_for_the_places_that_they_were_made_of(values: list[int], parts: int) -> None:
    places = np.array(values, np.int64)
    runs = joined(np.concatenate([runs_of(part) for part in np.array_split(places, parts)]))
    back = [start if start == ZERO else start + k for start, count in runs.tolist() for k in range(count)]

    assert back == values
    assert len(runs) == len(runs_of(places))


@given(_PLACES)
def test_pages_are_counted_in_their_frames(values: list[int]) -> None:
    stored = [value for value in values if value != ZERO]
    expected = np.bincount(np.array(stored, np.int64) // FRAME_PAGES, minlength=7)

    assert pages_in_frames(runs_of(np.array(values, np.int64)), 7).tolist() == expected.tolist()


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    rounds=st.lists(
        st.tuples(st.lists(st.integers(0, 10**6), max_size=60), st.booleans(), st.integers(0, 3)), max_size=6
    ),
)
def test_any_memory_comes_back_whatever_changes_and_restarts_there_were(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], rounds: list[Any]
) -> None:
    here = tmp_path_factory.mktemp("store")
    (here / "store").mkdir()
    (here / "small").mkdir()
    (here / "small/a").write_bytes(b"small")
    config = _local(here)
    job = JobKey("c", "1")
    memory = MadeUpMemory("pages-1.img", make_runs(sizes), seed=len(sizes))
    store = open_store(config)
    epoch, seq = 0, 1
    store.publish(job, id_of(1), here / "small", {}, [memory])
    for number, (pages, restarts, keep) in enumerate(rounds):
        memory.change([page % len(memory.data) for page in pages], seed=number)
        if restarts:
            store.close()
            store = open_store(config)
            epoch, seq = epoch + 1, 0
        seq += 1
        store.publish(job, id_of(seq, epoch), here / "small", {}, [memory])
        if keep:
            store.forget(job, keep)
        assert_back(store, job, id_of(seq, epoch), here / f"fetched-{number}", here / "small", memory)
    store.close()


def _local(here: Path) -> StoreConfig:
    from outlast.store import add_key

    add_key(here / "key")
    return StoreConfig(url=f"file://{here}/store", key=here / "key")
