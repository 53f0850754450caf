"""What is torn, garbled or forged in a store is refused, and the checkpoint before it serves."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.config import StoreConfig
from outlast.errors import CorruptCheckpoint
from outlast.model import CheckpointId, JobKey
from outlast.store import Store, open_store
from outlast.store._manifest import File, Frame, Manifest, decode, encode

FIRST, SECOND = CheckpointId(0, 1), CheckpointId(0, 2)


# --- damage -------------------------------------------------------------------------------------------


@pytest.fixture
def two(store: Store, job: JobKey, source: Path) -> None:
    """Two complete checkpoints."""
    for id in (FIRST, SECOND):
        store.publish(job, id, source, {})


def expect_fallback(config: StoreConfig, job: JobKey, tmp_path: Path, *, seen: bool = False) -> None:
    """The second checkpoint is refused and leaves nothing behind; the first is whole."""
    with open_store(config) as store:
        ids = [checkpoint.id for checkpoint in store.checkpoints(job)]
        assert ids == ([SECOND, FIRST] if seen else [FIRST])
        before = set(tmp_path.iterdir())
        with pytest.raises(CorruptCheckpoint):
            store.fetch(job, SECOND, tmp_path / "fetched")
        assert set(tmp_path.iterdir()) == before
        store.fetch(job, FIRST, tmp_path / "fetched")
        shutil.rmtree(tmp_path / "fetched")


@pytest.mark.usefixtures("two")
def test_torn_manifest_is_refused(config: StoreConfig, job: JobKey, top: Path, tmp_path: Path) -> None:
    manifest = top / "jobs/testbed/17/ckpt/0-2.json"
    whole = manifest.read_bytes()
    for size in (0, 1, 50, len(whole) // 2, len(whole) - 80, len(whole) - 1):
        manifest.write_bytes(whole[:size])

        expect_fallback(config, job, tmp_path)


@pytest.mark.usefixtures("two")
def test_garbled_manifest_is_refused(config: StoreConfig, job: JobKey, top: Path, tmp_path: Path) -> None:
    manifest = top / "jobs/testbed/17/ckpt/0-2.json"
    whole = manifest.read_bytes()
    for position in (0, 15, len(whole) // 3, len(whole) - 79, len(whole) - 30, len(whole) - 1):
        garbled = bytearray(whole)
        garbled[position] ^= 1
        manifest.write_bytes(garbled)

        expect_fallback(config, job, tmp_path)


@pytest.mark.usefixtures("two")
def test_manifest_of_another_checkpoint_is_refused(
    config: StoreConfig, job: JobKey, top: Path, tmp_path: Path
) -> None:
    directory = top / "jobs/testbed/17/ckpt"
    shutil.copy(directory / "0-1.json", directory / "0-2.json")

    expect_fallback(config, job, tmp_path)


@pytest.mark.usefixtures("two")
def test_torn_or_missing_data_is_refused(config: StoreConfig, job: JobKey, top: Path, tmp_path: Path) -> None:
    data = top / "jobs/testbed/17/data/0-2.bin"
    whole = data.read_bytes()
    for size in (0, len(whole) // 2, len(whole) - 1):
        data.write_bytes(whole[:size])

        expect_fallback(config, job, tmp_path)
    data.unlink()
    expect_fallback(config, job, tmp_path)


@pytest.mark.usefixtures("two")
def test_garbled_data_is_refused(config: StoreConfig, job: JobKey, top: Path, tmp_path: Path) -> None:
    data = top / "jobs/testbed/17/data/0-2.bin"
    whole = data.read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        garbled = bytearray(whole)
        garbled[position] ^= 0x10
        data.write_bytes(garbled)

        expect_fallback(config, job, tmp_path, seen=True)


@pytest.mark.usefixtures("two")
def test_damaged_checkpoint_is_named_in_the_log(
    store: Store, job: JobKey, top: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (top / "jobs/testbed/17/ckpt/0-2.json").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        store.checkpoints(job)

    assert "17@0.2" in caplog.text


# --- manifests with a right digest and wrong content --------------------------------------------------


def plant(top: Path, job: JobKey, data: bytes, *files: File) -> None:
    """Store the checkpoint FIRST with a manifest as somebody would make it who can compute its digest."""
    for name, content in (
        ("ckpt/0-1.json", encode(Manifest(job, FIRST, 1.0, len(data), files, {}))),
        ("data/0-1.bin", data),
    ):
        path = top / "jobs" / str(job) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def raw(data: bytes) -> tuple[Frame, ...]:
    return (Frame("raw", len(data), 0, len(data), hashlib.sha256(data).hexdigest()),)


@pytest.mark.parametrize(
    "path", ["/etc/evil", "../evil", "a/../../evil", "a/..", "", ".", "a//b", "a/", "./a", "a\0b"]
)
def test_path_that_leads_elsewhere_is_refused(
    store: Store, job: JobKey, top: Path, tmp_path: Path, path: str
) -> None:
    plant(top, job, b"evil", File(path, 0o644, 4, raw(b"evil")))

    assert store.checkpoints(job) == []
    with pytest.raises(CorruptCheckpoint):
        store.fetch(job, FIRST, tmp_path / "fetched")
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


@pytest.mark.parametrize("second", ["a", "a/b"])
def test_path_that_comes_twice_is_refused(
    store: Store, job: JobKey, top: Path, tmp_path: Path, second: str
) -> None:
    plant(top, job, b"data", *(File(path, 0o644, 4, raw(b"data")) for path in ("a", second)))

    with pytest.raises(CorruptCheckpoint):
        store.fetch(job, FIRST, tmp_path / "fetched")


@pytest.mark.parametrize("length", [999, 1001, 1 << 20])
def test_frame_that_unpacks_to_another_length_is_refused(
    store: Store, job: JobKey, top: Path, tmp_path: Path, length: int
) -> None:
    packed = zlib.compress(b"x" * 1000)
    frame = dataclasses.replace(raw(packed)[0], codec="zlib", length=length)
    plant(top, job, packed, File("a", 0o644, length, (frame,)))

    with pytest.raises(CorruptCheckpoint):
        store.fetch(job, FIRST, tmp_path / "fetched")


def test_special_permission_bits_are_not_brought_back(
    store: Store, job: JobKey, top: Path, tmp_path: Path
) -> None:
    plant(top, job, b"data", File("a", 0o6755, 4, raw(b"data")))
    store.fetch(job, FIRST, tmp_path / "fetched")

    assert (tmp_path / "fetched/a").stat().st_mode & 0o7777 == 0o755


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300)
@given(st.data())
def test_manifest_with_any_wrong_value_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    job = JobKey("testbed", "17")
    files = (File("a/b", 0o644, 14, (*raw(b"data"), Frame("hole", 10))), File("c", 0o600, 0, ()))
    value = json.loads(encode(Manifest(job, FIRST, 1.0, 4, files, {"x": 1})))
    del value["sha256"]
    place: Any = value
    key: Any = data.draw(st.sampled_from(sorted(value)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(_JSON)
    body = json.dumps(value, separators=(",", ":")).encode()[:-1]
    line = body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'

    with contextlib.suppress(CorruptCheckpoint):
        assert isinstance(decode(line, job, FIRST), Manifest)
