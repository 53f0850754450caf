"""Checkpoints are complete or not there, and come back as they were: on every kind of store."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlast.config import StoreConfig
from outlast.errors import OutlastError, StoreRefused, StoreUnavailable, UsageError
from outlast.model import CheckpointId, JobKey
from outlast.store import Store, open_store
from outlast.store._backend import Backend
from outlast.store._keys import Keyring

Tree = Callable[[Path], dict[str, tuple[int, bytes]]]
T = TypeVar("T")
FIRST, SECOND, THIRD = CheckpointId(0, 1), CheckpointId(0, 2), CheckpointId(1, 1)


def stored_names(top: Path) -> list[str]:
    """Names of all files but the marker of the format."""
    names = (str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != "format")


# --- publish, checkpoints, fetch, forget --------------------------------------------------------------


def test_checkpoint_comes_back_as_it_was(
    store: Store, job: JobKey, source: Path, tree: Tree, tmp_path: Path
) -> None:
    meta = {"node": "n1", "pid": 4711, "files": [{"path": "/tmp/out", "size": 3}]}
    published = store.publish(job, FIRST, source, meta)
    store.fetch(job, FIRST, tmp_path / "fetched")

    assert tree(tmp_path / "fetched") == tree(source)
    assert (tmp_path / "fetched").stat().st_mode & 0o777 == 0o700
    assert store.checkpoints(job) == [published]
    assert published.meta == meta
    assert published.image_bytes == sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".fetched")]


def test_holes_and_zeros_cost_nothing_here_and_there(
    store: Store, job: JobKey, source: Path, top: Path, tmp_path: Path
) -> None:
    os.truncate(source / "deep/hole", 1 << 40)
    published = store.publish(job, FIRST, source, {})
    store.fetch(job, FIRST, tmp_path / "fetched")

    assert published.image_bytes > 1 << 40
    assert published.stored_bytes < 3 << 20
    assert sum((top / name).stat().st_size for name in stored_names(top)) < 3 << 20
    assert (tmp_path / "fetched/deep/hole").stat().st_blocks * 512 < 2 << 20


def test_tree_of_the_store_is_as_documented(store: Store, job: JobKey, source: Path, top: Path) -> None:
    store.publish(job, THIRD, source, {})

    manifest, pack = stored_names(top)
    assert manifest == "jobs/testbed/17/ckpt/1-1.ck"
    assert re.fullmatch(r"jobs/testbed/17/packs/1-1-0-[0-9a-f]{12}\.pack", pack)


def test_only_regular_files_are_shipped_and_the_others_named_in_the_log(
    store: Store, job: JobKey, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "link").symlink_to("/etc/passwd")
    os.mkfifo(source / "pipe")
    store.publish(job, FIRST, source, {})
    store.fetch(job, FIRST, tmp_path / "fetched")

    assert not (tmp_path / "fetched/link").is_symlink()
    assert not (tmp_path / "fetched/pipe").exists()
    assert str(source / "link") in caplog.text
    assert str(source / "pipe") in caplog.text


def test_source_that_is_not_there_is_an_error(store: Store, job: JobKey, tmp_path: Path, top: Path) -> None:
    with pytest.raises(OutlastError, match="no-such"):
        store.publish(job, FIRST, tmp_path / "no-such", {})
    assert stored_names(top) == []


def test_id_that_exists_is_refused_and_untouched(
    store: Store, job: JobKey, source: Path, top: Path, tmp_path: Path, tree: Tree
) -> None:
    store.publish(job, FIRST, source, {"who": "first"})
    before = stored_names(top)
    (source / "more").write_bytes(b"more")

    with pytest.raises(StoreRefused, match=r"17@0\.1"):
        store.publish(job, FIRST, source, {"who": "second"})
    assert stored_names(top) == before
    store.fetch(job, FIRST, tmp_path / "fetched")
    assert "more" not in tree(tmp_path / "fetched")


def test_of_two_that_publish_an_id_at_once_one_wins(
    config: StoreConfig, store: Store, job: JobKey, source: Path, tmp_path: Path, tree: Tree
) -> None:
    sources = {"a": source, "b": tmp_path / "b"}
    shutil.copytree(source, sources["b"])
    (sources["b"] / "more").write_bytes(b"more")
    for seq in range(1, 6):
        id = CheckpointId(0, seq)
        barrier = threading.Barrier(2, timeout=20)
        won: list[str] = []

        def publish(
            name: str, id: CheckpointId = id, won: list[str] = won, barrier: threading.Barrier = barrier
        ) -> None:
            with open_store(config) as mine:
                mine.checkpoints(job)  # connects
                barrier.wait()
                with contextlib.suppress(StoreRefused):
                    mine.publish(job, id, sources[name], {"who": name})
                    won.append(name)

        threads = [threading.Thread(target=publish, args=name) for name in sources]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

        assert len(won) == 1
        assert store.checkpoints(job)[0].meta == {"who": won[0]}
        store.fetch(job, id, tmp_path / f"fetched-{seq}")
        assert tree(tmp_path / f"fetched-{seq}") == tree(sources[won[0]])


def test_newest_checkpoint_comes_first(store: Store, job: JobKey, source: Path) -> None:
    for id in (CheckpointId(0, 9), CheckpointId(1, 1), CheckpointId(0, 10)):
        store.publish(job, id, source, {})

    ids = [checkpoint.id for checkpoint in store.checkpoints(job)]
    assert ids == [CheckpointId(1, 1), CheckpointId(0, 10), CheckpointId(0, 9)]
    assert store.checkpoints(JobKey("testbed", "18")) == []


def test_fetching_what_is_not_there_is_an_error(store: Store, job: JobKey, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"17@0\.1"):
        store.fetch(job, FIRST, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_fetching_into_something_that_exists_is_an_error(
    store: Store, job: JobKey, source: Path, tmp_path: Path
) -> None:
    store.publish(job, FIRST, source, {})
    (tmp_path / "fetched").mkdir()

    with pytest.raises(UsageError, match="exists"):
        store.fetch(job, FIRST, tmp_path / "fetched")
    assert list((tmp_path / "fetched").iterdir()) == []


def test_forgetting_keeps_the_newest_and_their_bytes(
    store: Store, job: JobKey, source: Path, top: Path, tmp_path: Path, tree: Tree
) -> None:
    for seq in range(1, 6):
        store.publish(job, CheckpointId(0, seq), source, {})

    assert store.forget(job, 2) == 3
    assert store.forget(job, 2) == 0
    assert [checkpoint.id.seq for checkpoint in store.checkpoints(job)] == [5, 4]
    assert len(stored_names(top)) == 3  # unchanged files are one pack for both
    store.fetch(job, CheckpointId(0, 4), tmp_path / "fetched")
    assert tree(tmp_path / "fetched") == tree(source)
    with pytest.raises(UsageError):
        store.forget(job, 0)


def test_forgetting_removes_older_leftovers_and_leaves_what_may_be_under_way(
    store: Store, job: JobKey, source: Path, top: Path
) -> None:
    store.publish(job, CheckpointId(1, 5), source, {})
    packs = top / "jobs/testbed/17/packs"
    (own,) = (path.name for path in packs.iterdir())
    newer = ["1-6-0-0123456789ab.pack", "1-7-3-0123456789ab.pack.0123456789ab.tmp", "README"]
    for name in ("1-4-0-0123456789ab.pack", "0-9-1-0123456789ab.pack.0123456789ab.tmp", *newer):
        (packs / name).write_bytes(b"part")
    (top / "jobs/testbed/17/ckpt/1-3.ck").write_bytes(b"{")

    assert store.forget(job, 2) == 0
    assert sorted(path.name for path in packs.iterdir()) == sorted([own, *newer])
    assert [path.name for path in (top / "jobs/testbed/17/ckpt").iterdir()] == ["1-5.ck"]


def test_nothing_is_forgotten_while_no_checkpoint_is_good(store: Store, job: JobKey, top: Path) -> None:
    (top / "jobs/testbed/17/ckpt").mkdir(parents=True)
    (top / "jobs/testbed/17/ckpt/1-3.ck").write_bytes(b"{")

    assert store.forget(job, 1) == 0
    assert stored_names(top) == ["jobs/testbed/17/ckpt/1-3.ck"]


def test_store_without_room_refuses_and_shows_nothing_half_done(
    store: Store, job: JobKey, small_disk: Path, tmp_path: Path
) -> None:
    source = tmp_path / "large"
    source.mkdir()
    (source / "a").write_bytes(os.urandom(10 << 20))

    with pytest.raises(StoreRefused):
        store.publish(job, FIRST, source, {})
    assert stored_names(small_disk) == []
    assert store.checkpoints(job) == []
    (source / "a").write_bytes(os.urandom(2 << 20))
    store.publish(job, SECOND, source, {})
    assert [checkpoint.id for checkpoint in store.checkpoints(job)] == [SECOND]


# --- round trip ---------------------------------------------------------------------------------------

_PARTS = st.binary(min_size=1, max_size=12).filter(
    lambda part: not set(part) & set(b"/\0") and part not in (b".", b"..")
)
_CONTENTS = st.lists(
    st.one_of(
        st.binary(max_size=200),
        st.tuples(st.sampled_from(["zeros", "random", "text", "hole"]), st.integers(1, 3 << 20)),
    ),
    max_size=4,
)
_TREES = st.dictionaries(st.lists(_PARTS, min_size=1, max_size=3).map(tuple), _CONTENTS, max_size=5)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(tree_=_TREES, mode=st.sampled_from([0o600, 0o644, 0o755, 0o400]))
def test_any_tree_of_files_comes_back(
    store: Store, job: JobKey, tree: Tree, tree_: dict[tuple[bytes, ...], list[Any]], mode: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "source").mkdir()
        for parts, contents in tree_.items():
            path = (directory / "source").joinpath(*map(os.fsdecode, parts))
            with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, contents)
                path.chmod(mode)
        id = CheckpointId(0, next(_NUMBERS))
        store.publish(job, id, directory / "source", {})
        store.fetch(job, id, directory / "fetched")

        assert tree(directory / "fetched") == tree(directory / "source")


_NUMBERS = itertools.count(1)


def write(path: Path, contents: list[Any]) -> None:
    with path.open("xb") as file:
        for content in contents:
            if isinstance(content, bytes):
                file.write(content)
                continue
            kind, size = content
            if kind == "hole":
                file.seek(size, os.SEEK_CUR)
            else:
                file.write(
                    {"zeros": bytes(size), "random": os.urandom(size), "text": b"page" * (size // 4)}[kind]
                )
        file.truncate(file.tell())


# --- a store that fails at any of its calls -----------------------------------------------------------


class Failing:
    """Fails a backend once, at its n-th step, before the step or after it. A chunk is a step, too."""

    def __init__(self, backend: Backend, n: int, *, after: bool) -> None:
        self._backend = backend
        self._left = n
        self._after = after

    @property
    def has_failed(self) -> bool:
        return self._left <= 0

    def _step(self, call: Callable[[], T]) -> T:
        self._left -= 1
        failing = self._left == 0
        if failing and not self._after:
            raise StoreUnavailable("the connection broke before it")
        result = call()
        if failing:
            raise StoreUnavailable("the connection broke after it")
        return result

    def create(self, name: str, chunks: Iterable[bytes]) -> int:
        steps = (self._step(functools.partial(bytes, chunk)) for chunk in chunks)
        return self._step(lambda: self._backend.create(name, steps))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._backend, name)
        return lambda *args, **options: self._step(lambda: method(*args, **options))


@pytest.mark.parametrize("after", [False, True])
def test_publish_that_fails_anywhere_leaves_all_or_nothing(
    backend: Backend, keyring: Keyring, job: JobKey, source: Path, tmp_path: Path, tree: Tree, after: bool
) -> None:
    store = Store(backend, keyring)
    store.put_record(job, "start", {})  # the store is one already: it has its marker
    before: list[CheckpointId] = []
    complete = 0
    for n in itertools.count(1):
        id, second = CheckpointId(n, 1), CheckpointId(n, 2)
        (source / "core.img").write_bytes(os.urandom(9000))
        expected = tree(source)
        failing = Failing(backend, n, after=after)
        with contextlib.suppress(StoreUnavailable):
            Store(cast(Backend, failing), keyring).publish(job, id, source, {})
        if not failing.has_failed:
            break
        seen = [checkpoint.id for checkpoint in store.checkpoints(job)]
        assert seen in (before, [id, *before])
        if id in seen:
            complete += 1
            store.fetch(job, id, tmp_path / "fetched")
            assert tree(tmp_path / "fetched") == expected
            shutil.rmtree(tmp_path / "fetched")

        store.publish(job, second, source, {})
        assert store.checkpoints(job)[0].id == second
        store.forget(job, 1)
        assert not [entry.name for entry in backend.list("jobs/testbed/17/packs") if "tmp" in entry.name]
        before = [second]

    assert n > 9
    assert complete == (1 if after else 0)  # the very last step is the one that makes it complete
