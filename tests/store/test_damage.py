"""What is torn, garbled, forged or swapped in a store is refused, and the checkpoint before it serves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlast.config import StoreConfig
from outlast.errors import ConfigError, CorruptCheckpoint, OutlastError
from outlast.model import CheckpointId, JobKey
from outlast.store import Store, add_key, open_store
from outlast.store._keys import read_keyring
from outlast.store._pack import MAGIC

FIRST, SECOND = CheckpointId(0, 1), CheckpointId(0, 2)
OTHER = JobKey("testbed", "18")
MARKER = b"the job's secret, and nobody else's "


@pytest.fixture
def two(store: Store, job: JobKey, source: Path) -> None:
    """Two complete checkpoints; the second has a pack of its own, and needs that of the first, too."""
    store.publish(job, FIRST, source, {"node": "n1", "files": ["/shared/alice/out"]})
    (source / "core.img").write_bytes(MARKER * 500)
    store.publish(job, SECOND, source, {"node": "n1"})


def refused(config: StoreConfig, job: JobKey, id: CheckpointId, tmp_path: Path) -> OutlastError:
    """Fetch checkpoint *id*, which must be refused and leave nothing behind."""
    before = set(tmp_path.iterdir())
    with open_store(config) as store, pytest.raises(CorruptCheckpoint) as caught:
        store.fetch(job, id, tmp_path / "fetched")
    assert set(tmp_path.iterdir()) == before
    return caught.value


def expect_fallback(config: StoreConfig, job: JobKey, tmp_path: Path, *, seen: bool = False) -> None:
    """The second checkpoint is refused and leaves nothing behind; the first is whole."""
    refused(config, job, SECOND, tmp_path)
    with open_store(config) as store:
        ids = [checkpoint.id for checkpoint in store.checkpoints(job)]
        assert ids == ([SECOND, FIRST] if seen else [FIRST])
        store.fetch(job, FIRST, tmp_path / "fetched")
        shutil.rmtree(tmp_path / "fetched")


def manifest_of(top: Path, id: CheckpointId = SECOND, job: str = "17") -> Path:
    return top / f"jobs/testbed/{job}/ckpt/{id.epoch}-{id.seq}.ck"


def pack_of(top: Path, id: CheckpointId = SECOND, job: str = "17") -> Path:
    (path,) = (top / f"jobs/testbed/{job}/packs").glob(f"{id.epoch}-{id.seq}-*.pack")
    return path


# --- damage -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two")
def test_torn_manifest_is_refused(config: StoreConfig, job: JobKey, top: Path, tmp_path: Path) -> None:
    manifest = manifest_of(top)
    whole = manifest.read_bytes()
    head = whole.index(b"\n") + 1
    for size in (0, 1, 50, head - 1, head, head + 1, len(whole) // 2, len(whole) - 1):
        manifest.write_bytes(whole[:size])

        expect_fallback(config, job, tmp_path)
    manifest.write_bytes(whole + b"\0")
    expect_fallback(config, job, tmp_path)


@pytest.mark.usefixtures("two")
def test_garbled_pack_is_refused(config: StoreConfig, job: JobKey, top: Path, tmp_path: Path) -> None:
    pack = pack_of(top)
    whole = pack.read_bytes()
    for position in (len(MAGIC) + 20, len(MAGIC) + 21, len(whole) // 3):
        garbled = bytearray(whole)
        garbled[position] ^= 0x10
        pack.write_bytes(garbled)

        expect_fallback(config, job, tmp_path, seen=True)


@pytest.mark.usefixtures("two")
def test_torn_or_missing_pack_is_refused(config: StoreConfig, job: JobKey, top: Path, tmp_path: Path) -> None:
    pack = pack_of(top)
    whole = pack.read_bytes()
    for size in (0, len(MAGIC) + 40):
        pack.write_bytes(whole[:size])

        expect_fallback(config, job, tmp_path)
    pack.unlink()
    expect_fallback(config, job, tmp_path)


@pytest.mark.timeout(240)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_flip_of_any_bit_is_refused_or_changes_nothing(
    store: Store,
    config: StoreConfig,
    job: JobKey,
    source: Path,
    top: Path,
    tmp_path: Path,
    tree: Callable[[Path], Any],
    data: st.DataObject,
) -> None:
    with contextlib.suppress(OutlastError):
        store.publish(job, FIRST, source, {"node": "n1"})
    files = sorted(path for path in (top / "jobs").rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    garbled = bytearray(whole)
    garbled[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(garbled)
    try:
        with open_store(config) as reader:
            # What no restore reads (a pack's head, its trailer) may be anything.
            with contextlib.suppress(CorruptCheckpoint, ConfigError):
                reader.fetch(job, FIRST, tmp_path / "fetched")
                assert path.suffix == ".pack"
                assert tree(tmp_path / "fetched") == tree(source)
                shutil.rmtree(tmp_path / "fetched")
            assert not (tmp_path / "fetched").exists()
    finally:
        path.write_bytes(whole)


@pytest.mark.usefixtures("two")
def test_damaged_checkpoint_is_named_in_the_log(
    store: Store, job: JobKey, top: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest_of(top).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        store.checkpoints(job)

    assert "17@0.2" in caplog.text


@pytest.mark.usefixtures("two")
def test_writer_whose_pack_went_away_ships_its_pages_again(
    store: Store, job: JobKey, source: Path, top: Path, tmp_path: Path, tree: Callable[[Path], Any]
) -> None:
    for pack in (top / "jobs/testbed/17/packs").iterdir():
        pack.unlink()
    assert store.checkpoints(job) == []

    store.publish(job, CheckpointId(0, 3), source, {})
    store.fetch(job, CheckpointId(0, 3), tmp_path / "fetched")
    assert tree(tmp_path / "fetched") == tree(source)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("part", ["head", "frame", "trailer", "footer"])
def test_new_writer_does_not_build_on_a_damaged_pack(
    config: StoreConfig,
    job: JobKey,
    source: Path,
    top: Path,
    tmp_path: Path,
    tree: Callable[[Path], Any],
    part: str,
) -> None:
    pack = pack_of(top)
    garbled = bytearray(pack.read_bytes())
    trailer, length = struct.unpack_from("<QI", garbled, len(garbled) - 16)
    positions = {"head": 3, "frame": len(MAGIC) + 30, "trailer": trailer + length // 2, "footer": -1}
    garbled[positions[part]] ^= 1
    pack.write_bytes(garbled)
    third = CheckpointId(1, 1)
    with open_store(config) as store:
        store.publish(job, third, source, {})
        if part == "frame":
            # Nobody can know before the frame is read: a restore then takes an older checkpoint.
            with pytest.raises(CorruptCheckpoint):
                store.fetch(job, third, tmp_path / "fetched")
        else:
            store.fetch(job, third, tmp_path / "fetched")
            assert tree(tmp_path / "fetched") == tree(source)


# --- a server, or somebody on it, who means harm ------------------------------------------------------


@pytest.mark.usefixtures("two")
def test_manifest_under_another_name_is_refused(
    config: StoreConfig, job: JobKey, top: Path, tmp_path: Path
) -> None:
    old, new = manifest_of(top, FIRST), manifest_of(top, SECOND)
    shutil.copy(old, new)
    expect_fallback(config, job, tmp_path)

    line, _, body = old.read_bytes().partition(b"\n")
    new.write_bytes(line.replace(b'"seq":1', b'"seq":2') + b"\n" + body)
    expect_fallback(config, job, tmp_path)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("old", "new"), [(b'"node":"n1"', b'"node":"n2"'), (b'"created":1', b'"created":2'), (b"{", b"{ ")]
)
def test_manifest_with_an_edited_header_is_refused(
    config: StoreConfig, job: JobKey, top: Path, tmp_path: Path, old: bytes, new: bytes
) -> None:
    manifest = manifest_of(top)
    whole = manifest.read_bytes()
    assert old in whole
    manifest.write_bytes(whole.replace(old, new, 1))

    expect_fallback(config, job, tmp_path)


@pytest.mark.usefixtures("two")
def test_checkpoint_of_another_job_is_refused(
    config: StoreConfig, job: JobKey, top: Path, tmp_path: Path
) -> None:
    shutil.copytree(top / "jobs/testbed/17", top / "jobs/testbed/18")
    refused(config, OTHER, SECOND, tmp_path)

    manifest = manifest_of(top, job="18")
    line, _, body = manifest.read_bytes().partition(b"\n")
    manifest.write_bytes(line.replace(b"testbed/17", b"testbed/18") + b"\n" + body)
    refused(config, OTHER, SECOND, tmp_path)


def test_pack_of_another_job_or_checkpoint_is_refused(
    config: StoreConfig, job: JobKey, source: Path, top: Path, tmp_path: Path
) -> None:
    with open_store(config) as store:
        store.publish(job, FIRST, source, {})
    with open_store(config) as store:
        store.publish(OTHER, FIRST, source, {})
    mine, other = pack_of(top, FIRST), pack_of(top, FIRST, "18")
    assert mine.stat().st_size == other.stat().st_size
    whole = mine.read_bytes()
    shutil.copy(other, mine)
    refused(config, job, FIRST, tmp_path)

    # Not even with the salt that the manifest expects in its head.
    mine.write_bytes(whole[: len(MAGIC) + 20] + other.read_bytes()[len(MAGIC) + 20 :])
    refused(config, job, FIRST, tmp_path)


def test_frames_in_another_order_are_refused(
    config: StoreConfig, job: JobKey, source: Path, top: Path, tmp_path: Path
) -> None:
    for path in sorted(source.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (source / "a").write_bytes(np.random.default_rng(1).bytes(64 * 4096 * 2))
    with open_store(config) as store:
        store.publish(job, FIRST, source, {})
    pack = pack_of(top, FIRST)
    whole = pack.read_bytes()
    start, length = len(MAGIC) + 20, 1 + 64 * 4096 + 16
    first, second = whole[start : start + length], whole[start + length : start + 2 * length]
    pack.write_bytes(whole[:start] + second + first + whole[start + 2 * length :])

    refused(config, job, FIRST, tmp_path)


@pytest.mark.usefixtures("two")
def test_record_that_was_edited_or_moved_is_refused(
    config: StoreConfig, store: Store, job: JobKey, top: Path
) -> None:
    store.put_record(
        job, "start", {"uid": 2000, "argv": ["lu-factorization"], "files": [{"path": "/x", "size": 0}]}
    )
    record = top / "jobs/testbed/17/records/start.json"
    whole = record.read_bytes()
    assert b"lu-factorization" not in whole
    for forged in (
        whole.replace(b"2000", b"2001"),
        whole.replace(b'"data":"', b'"data":"A'),
        json.dumps({"public": {"uid": 2000}}).encode(),
    ):
        record.write_bytes(forged)
        with open_store(config) as reader, pytest.raises(CorruptCheckpoint):
            reader.get_record(job, "start")
    record.write_bytes(whole)
    shutil.copy(record, record.with_name("ended.json"))
    with open_store(config) as reader, pytest.raises(CorruptCheckpoint):
        reader.get_record(job, "ended")


# --- keys ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two")
def test_without_the_key_checkpoints_can_be_listed_and_nothing_else(
    config: StoreConfig, job: JobKey, source: Path, tmp_path: Path, store: Store
) -> None:
    store.put_record(job, "start", {"uid": 2000, "argv": ["lu-factorization"]})
    with open_store(dataclasses.replace(config, key=tmp_path / "absent")) as watcher:
        seen = watcher.checkpoints(job)
        assert [checkpoint.id for checkpoint in seen] == [SECOND, FIRST]
        assert [checkpoint.meta for checkpoint in seen] == [{"node": "n1"}] * 2
        assert watcher.get_record(job, "start") == {"uid": 2000}
        for call in (
            lambda: watcher.fetch(job, FIRST, tmp_path / "fetched"),
            lambda: watcher.open(job, FIRST),
            lambda: watcher.publish(job, CheckpointId(0, 3), source, {}),
            lambda: watcher.put_record(job, "start", {"uid": 1}),
        ):
            with pytest.raises(ConfigError, match="absent"):
                call()
    assert not (tmp_path / "fetched").exists()


@pytest.mark.usefixtures("two")
def test_job_whose_checkpoints_are_of_a_foreign_key_is_never_taken_for_one_without(
    config: StoreConfig, job: JobKey, tmp_path: Path
) -> None:
    add_key(tmp_path / "foreign")
    with open_store(dataclasses.replace(config, key=tmp_path / "foreign")) as store:
        with pytest.raises(ConfigError, match="does not have"):
            store.checkpoints(job)
        with pytest.raises(ConfigError, match="does not have"):
            store.fetch(job, FIRST, tmp_path / "fetched")


@pytest.mark.usefixtures("two")
def test_old_checkpoints_stay_readable_when_the_key_is_rotated(
    config: StoreConfig, job: JobKey, source: Path, top: Path, tmp_path: Path, tree: Callable[[Path], Any]
) -> None:
    old = read_keyring(config.key)
    new = add_key(config.key)
    third = CheckpointId(1, 1)
    try:
        with open_store(config) as store:
            (source / "more").write_bytes(MARKER)
            store.publish(job, third, source, {})
            for id in (FIRST, SECOND, third):
                store.verify(job, id)
            store.fetch(job, third, tmp_path / "fetched")
            assert tree(tmp_path / "fetched") == tree(source)
        assert read_keyring(config.key).newest == new != old.newest
        assert f'"key":"{new}"'.encode() in manifest_of(top, third).read_bytes()
        assert bytes.fromhex(new) == pack_of(top, third).read_bytes()[len(MAGIC) + 16 : len(MAGIC) + 20]
    finally:
        lines = config.key.read_text().splitlines(keepends=True)
        config.key.write_text("".join(lines[1:]))  # the server's other tests have a key of their own


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "holds no key"), ("abc\n", "line 1: no key"), ("01234567 " + "0" * 63 + "\n", "line 1: no key")],
)
def test_key_file_that_is_none_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_keyring(path)


def test_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    add_key(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(ConfigError, match="others than its owner"):
        read_keyring(tmp_path / "key")


@pytest.mark.usefixtures("two")
def test_nothing_of_a_job_is_in_clear_on_the_server(store: Store, job: JobKey, top: Path) -> None:
    store.put_record(job, "start", {"uid": 2000, "argv": [MARKER.decode()]})
    stored = b"".join(path.read_bytes() for path in top.rglob("*") if path.is_file())

    assert len(stored) > 1 << 20
    for text in (b"the job's secret", b"/shared/alice", b"core.img", b"text text"):
        assert text not in stored
