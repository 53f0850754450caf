"""What a store holds of a job at most, and what is shipped again to keep it so (docs/adr/0007)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.model import CheckpointId, JobKey
from outlast.store import Store
from outlast.store import _writer as writer
from outlast.store._keys import Keyring
from outlast.store._local import LocalBackend
from outlast.store._manifest import Pack
from outlast.store._pack import Trailer
from outlast.store._pages import FRAME_PAGES, UNKNOWN, Numbers, pages_in_frames, runs_of
from tests.store.memories import PAGE, MadeUpMemory

MOST = writer._MOST_HELD
PACK_PAGES = 4 * FRAME_PAGES


class Job:
    """A job's pages as a writer knows them, each a number that says what it holds; nothing is stored."""

    def __init__(self, pages: int) -> None:
        self.content = np.arange(1, pages + 1)
        self.known = writer.Known()
        self.changed = self.shipped = self.again = 0  # bytes; again: of pages that the store had had
        self._next = pages + 1
        self._had = 0  # what is below has been shipped before

    def change(self, pages: Numbers) -> None:
        """Write to *pages*."""
        self.content = self.content.copy()
        self.content[pages] = self._next + np.arange(len(pages))
        self._next += len(pages)

    def checkpoint(self) -> tuple[int, int, int]:
        """Publish; return the bytes needed, those known afterwards, and those needed that are no longer known."""
        spread = self.content.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        hashes = np.stack([spread, spread], axis=1)
        new = np.flatnonzero(self.known.table.find(hashes) == UNKNOWN)
        for start in range(0, len(new), PACK_PAGES):
            mine = new[start : start + PACK_PAGES]
            pages = np.bincount(np.arange(len(mine)) // FRAME_PAGES)
            trailer = Trailer(np.zeros(len(pages), np.int64), pages * PAGE, pages, hashes[mine])
            self.known.add_pack(Pack("", b"", "", 0), trailer)
        self.known.table.settle()
        live = pages_in_frames(runs_of(self.known.table.find(hashes)), len(self.known.frames))
        self.changed += PAGE * int((self.content[new] >= self._had).sum())
        self.again += PAGE * int((self.content[new] < self._had).sum())
        self.shipped += PAGE * len(new)
        self._had = self._next
        self.known.drop_sparse(live)
        gone = int((self.known.table.find(hashes) == UNKNOWN).sum())
        return PAGE * len(self.content), int(self.known.frames[:, 3].sum()), PAGE * gone


@given(
    st.integers(1, 4000),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), max_size=30),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_store_holds_a_bounded_multiple_of_what_is_needed_and_little_is_shipped_again(
    pages: int, steps: list[tuple[float, float, float]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    job = Job(pages)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer, "_MOST_SMALL", 1 << 30)  # its own limit, and no matter of bytes
        job.checkpoint()
        for begin, length, share in steps:
            part = np.arange(int(begin * pages), min(pages, int((begin + length) * pages) + 1))
            job.change(part[random.random(len(part)) < share])
            needed, held, gone = job.checkpoint()

            assert held + gone <= MOST * needed
            assert job.again * MOST <= job.shipped


@pytest.mark.parametrize(("share", "most"), [(0.5, 1.02), (0.1, 1.06), (0.02, 1.06)])
def test_job_that_writes_anywhere_ships_hardly_more_than_it_wrote(share: float, most: float) -> None:
    random = np.random.default_rng(1)
    job = Job(8192)
    job.checkpoint()
    for _ in range(int(6 / share)):
        job.change(random.choice(8192, int(8192 * share), replace=False))
        job.checkpoint()

    assert job.again > 0
    assert job.shipped <= most * job.changed


def test_job_that_writes_little_has_few_packs() -> None:
    random = np.random.default_rng(1)
    job = Job(8192)
    for _ in range(700):
        job.change(random.choice(8192, 4, replace=False))
        job.checkpoint()

    assert len(job.known.packs) <= writer._MOST_SMALL + MOST * 8192 / PACK_PAGES
    assert job.shipped <= 1.6 * job.changed


def test_files_of_a_job_take_what_was_promised(
    tmp_path: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PACK_SIZE", 1 << 18)
    monkeypatch.setattr(writer, "_AHEAD", 1)
    (tmp_path / "store").mkdir()
    (tmp_path / "small").mkdir()
    store, job = Store(LocalBackend(tmp_path / "store"), keyring), JobKey("testbed", "17")
    memory = MadeUpMemory("pages-1.img", [(1, 0x1000, 500)], seed=4)
    random = np.random.default_rng(5)
    keep, shipped = 2, []
    for number in range(1, 41):
        for page in range(500) if number == 1 else random.choice(500, 60, replace=False):
            memory.data[page] = np.frombuffer(random.bytes(PAGE), np.uint8)
        done = store.publish(job, CheckpointId(0, number), tmp_path / "small", {}, [memory])
        store.forget(job, keep)
        shipped.append(done.stored_bytes)
        held = sum(path.stat().st_size for path in (tmp_path / "store/jobs").rglob("*.pack"))

        assert held <= MOST * 500 * PAGE * 1.01 + sum(shipped[-keep:])
    assert held > 1.5 * 500 * PAGE
    assert sum(shipped[1:]) < 39 * 60 * PAGE * 1.12
    store.fetch(job, CheckpointId(0, 40), tmp_path / "back")
    assert (tmp_path / "back/pages-1.img").read_bytes() == memory.content()
