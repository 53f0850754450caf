"""What a holder of the key wrote must make sense all the same: a fault of its must not become this node's."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlast.config import StoreConfig
from outlast.errors import ConfigError, CorruptCheckpoint, UsageError
from outlast.model import CheckpointId, JobKey
from outlast.store import Store
from outlast.store import _manifest as manifests
from outlast.store._keys import Keyring, read_keyring
from outlast.store._manifest import Item, Manifest, Pack, decode, encode, pack_purpose
from outlast.store._pack import seal, unseal

FIRST, SECOND = CheckpointId(0, 1), CheckpointId(0, 2)


def plant(top: Path, job: JobKey, keyring: Keyring, pages: bytes, *items: Item) -> None:
    """Store the checkpoint FIRST with a manifest as somebody would make it who has the key."""
    salt, name = bytes(16), "0-1-0-0123456789ab"
    stored = seal(keyring.cipher(keyring.newest, salt, pack_purpose(job, name)), 0, pages)
    frames = np.array([[0, 0, 0, len(stored), len(pages) // 4096]], np.int64)
    pack = Pack(name, salt, keyring.newest, len(stored))
    manifest = Manifest(job, FIRST, 1.0, len(stored), 0, (pack,), frames, items, {})
    for path, content in (("ckpt/0-1.ck", encode(manifest, keyring)), (f"packs/{name}.pack", stored)):
        target = top / "jobs" / str(job) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def item(path: str, size: int, *runs: tuple[int, int], mode: int = 0o644) -> Item:
    return Item(path, mode, size, np.empty((0, 3), np.int64), np.array(runs, np.int64).reshape(-1, 2))


@pytest.fixture
def own(config: StoreConfig) -> Keyring:
    return read_keyring(config.key)


@pytest.mark.parametrize(
    "path", ["/etc/evil", "../evil", "a/../../evil", "a/..", "", ".", "a//b", "a/", "./a", "a\0b"]
)
def test_path_that_leads_elsewhere_is_refused(
    store: Store, own: Keyring, job: JobKey, top: Path, tmp_path: Path, path: str
) -> None:
    plant(top, job, own, bytes(4096), item(path, 4, (0, 1)))

    assert store.checkpoints(job) == []
    with pytest.raises(CorruptCheckpoint):
        store.fetch(job, FIRST, tmp_path / "fetched")
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


@pytest.mark.parametrize("second", ["a", "a/b"])
def test_path_that_comes_twice_is_refused(
    store: Store, own: Keyring, job: JobKey, top: Path, tmp_path: Path, second: str
) -> None:
    plant(top, job, own, bytes(4096), *(item(path, 4, (0, 1)) for path in ("a", second)))

    with pytest.raises(CorruptCheckpoint):
        store.fetch(job, FIRST, tmp_path / "fetched")


@pytest.mark.parametrize("run", [(0, 2), (1, 1), (64, 1), (-2, 1), (0, 0), (63, 2), (1 << 62, 1)])
def test_run_that_lies_nowhere_is_refused(
    store: Store, own: Keyring, job: JobKey, top: Path, tmp_path: Path, run: tuple[int, int]
) -> None:
    plant(top, job, own, bytes(4096), item("a", run[1] * 4096, run))

    with pytest.raises(CorruptCheckpoint):
        store.fetch(job, FIRST, tmp_path / "fetched")


def test_special_permission_bits_are_not_brought_back(
    store: Store, own: Keyring, job: JobKey, top: Path, tmp_path: Path
) -> None:
    plant(top, job, own, bytes(4096), item("a", 4, (0, 1), mode=0o6755))
    store.fetch(job, FIRST, tmp_path / "fetched")

    assert (tmp_path / "fetched/a").stat().st_mode & 0o7777 == 0o755


def test_frame_that_unpacks_to_more_than_it_may_is_refused(
    store: Store, own: Keyring, job: JobKey, top: Path, tmp_path: Path
) -> None:
    plant(top, job, own, bytes(65 * 4096), item("a", 4096, (0, 1)))

    with pytest.raises(CorruptCheckpoint):
        store.fetch(job, FIRST, tmp_path / "fetched")
    with pytest.raises(UsageError):
        store.open(job, SECOND)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_manifest_with_any_wrong_value_is_read_or_refused_and_nothing_else(
    keyring: Keyring, job: JobKey, data: st.DataObject
) -> None:
    frames = np.array([[0, 0, 44, 900, 3]], np.int64)
    items = (item("a/b", 9000, (0, 2), (-1, 1)), item("c", 0))
    pack = Pack("0-1-0-0123456789ab", bytes(16), keyring.newest, 2000)
    whole = encode(Manifest(job, FIRST, 1.0, 4, 9000, (pack,), frames, items, {"node": "n"}), keyring)
    line, _, sealed = whole.partition(b"\n")
    values = json.loads(line)
    cipher = keyring.cipher(keyring.newest, bytes.fromhex(values["salt"]), manifests.purpose(job, FIRST))
    body = bytearray(unseal(cipher, 0, sealed, largest=1 << 20, what="", header=line + b"\n"))
    length = struct.unpack_from("<Q", body)[0]
    inner = json.loads(body[32 : 32 + length])
    value = data.draw(st.sampled_from([values, inner]))
    place: Any = value
    key: Any = data.draw(st.sampled_from(sorted(value)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(_JSON | st.integers(-(1 << 70), 1 << 70))
    text = json.dumps(inner).encode()
    numbers = bytearray(body[32 + length :])
    if data.draw(st.booleans()):
        at = 8 * data.draw(st.integers(0, len(numbers) // 8 - 1))
        struct.pack_into("<q", numbers, at, data.draw(_LONG))
    forged = struct.pack("<Q", len(text)) + body[8:32] + text + numbers
    head = json.dumps(values).encode() + b"\n"

    with contextlib.suppress(CorruptCheckpoint, ConfigError):
        assert isinstance(decode(head + seal(cipher, 0, forged, head), job, FIRST, keyring), Manifest)


_LONG = st.integers(-(1 << 63), (1 << 63) - 1)
