"""What a released version has stored can be read by every later one."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlast.config import StoreConfig
from outlast.model import CheckpointId, JobKey
from outlast.store import Store, open_store, read_keyring
from outlast.store._codec import unpacked
from outlast.store._manifest import decode, pack_purpose
from outlast.store._pages import PAGE

GOLDEN = Path(__file__).parents[1] / "golden/store-v1"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
FRAMES: dict[str, Any] = json.loads((GOLDEN.with_name("frames-v1") / "expected.json").read_text())
JOB = JobKey("golden", "17")


@pytest.fixture
def golden(tmp_path: Path) -> Store:
    shutil.copytree(GOLDEN, tmp_path / "golden")
    key = tmp_path / "golden/data.key"
    key.chmod(0o600)  # git keeps no such mode
    return open_store(StoreConfig(url=f"file://{tmp_path}/golden/store", key=key))


def id_of(name: str) -> CheckpointId:
    epoch, _, seq = name.partition("-")
    return CheckpointId(int(epoch), int(seq))


def test_checkpoints_of_version_1_are_listed(golden: Store) -> None:
    found = {f"{one.id.epoch}-{one.id.seq}": one for one in golden.checkpoints(JOB)}

    assert list(found) == ["1-1", "0-2", "0-1"]
    for name, one in found.items():
        for key in ("created", "image_bytes", "stored_bytes", "meta"):
            assert getattr(one, key) == EXPECTED[name][key]
    assert golden.pins(JOB) == {CheckpointId(0, 1)}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_checkpoint_of_version_1_comes_back(golden: Store, tmp_path: Path, name: str) -> None:
    golden.fetch(JOB, id_of(name), tmp_path / "fetched")
    files = (path for path in sorted((tmp_path / "fetched").rglob("*")) if path.is_file())

    assert {
        str(path.relative_to(tmp_path / "fetched")): [
            oct(path.stat().st_mode & 0o777),
            hashlib.sha256(path.read_bytes()).hexdigest(),
        ]
        for path in files
    } == EXPECTED[name]["files"]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_pages_of_version_1_can_be_had_alone(golden: Store, tmp_path: Path, name: str) -> None:
    golden.fetch(JOB, id_of(name), tmp_path / "fetched")
    stored = golden.open(JOB, id_of(name))
    for memory, runs in EXPECTED[name]["memories"].items():
        assert np.array_equal(stored.memories[memory], np.array(runs, np.uint64))
        content = (tmp_path / "fetched" / memory).read_bytes()
        at = 0
        for space, vaddr, pages in runs:
            for page in range(pages):
                assert stored.read(space, vaddr + page * PAGE, 1) == content[at : at + PAGE]
                at += PAGE


def test_frames_of_version_1_are_packed_in_every_way_that_it_knows(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "golden")
    (tmp_path / "golden/data.key").chmod(0o600)
    keyring = read_keyring(tmp_path / "golden/data.key")
    job = tmp_path / "golden/store/jobs/golden/17"
    forms = set()
    for name in EXPECTED:
        manifest = decode((job / f"ckpt/{name}.ck").read_bytes(), JOB, id_of(name), keyring)
        for number, frame, offset, length, _ in manifest.frames.tolist():
            pack = manifest.packs[number]
            stored = (job / f"packs/{pack.name}.pack").read_bytes()[offset : offset + length]
            cipher = keyring.cipher(pack.key_id, pack.salt, pack_purpose(JOB, pack.name))
            forms.add(cipher.decrypt(frame.to_bytes(12, "little"), stored, None)[0])

    alone = {(GOLDEN.with_name("frames-v1") / name).read_bytes()[0] for name in FRAMES}
    assert forms | alone == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("name", sorted(FRAMES))
def test_packed_text_of_version_1_comes_back(name: str) -> None:
    stored = (GOLDEN.with_name("frames-v1") / name).read_bytes()

    assert stored[0] == FRAMES[name]["form"]
    plain = unpacked(stored, largest=1 << 18, what=name)
    assert hashlib.sha256(plain).hexdigest() == FRAMES[name]["sha256"]


def test_records_and_events_of_version_1_are_read(golden: Store) -> None:
    start = golden.get_record(JOB, "start")

    assert start is not None
    assert start["argv"] == ["lu", "2000"]
    assert start["uid"] == 2000
    assert [event["event"] for event in golden.events(JOB)] == ["started"]


def test_job_of_version_1_goes_on(golden: Store, tmp_path: Path) -> None:
    golden.fetch(JOB, CheckpointId(1, 1), tmp_path / "fetched")
    published = golden.publish(JOB, CheckpointId(2, 1), tmp_path / "fetched", {})

    assert published.stored_bytes < 3000
    golden.fetch(JOB, CheckpointId(2, 1), tmp_path / "again")
    assert (tmp_path / "again/pages-1.img").read_bytes() == (tmp_path / "fetched/pages-1.img").read_bytes()
