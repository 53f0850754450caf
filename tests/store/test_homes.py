"""A site with several stores: each job's checkpoints are in its own, and everybody finds them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from outlast.config import OtherStore, StoreConfig
from outlast.errors import ConfigError, StoreRefused
from outlast.model import CheckpointId, JobKey
from outlast.store import KeyMissing, add_key, open_store

FIRST, SECOND = CheckpointId(0, 1), CheckpointId(0, 2)


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    """The top directory of a second store."""
    directory = tmp_path / "fast"
    directory.mkdir()
    return directory


@pytest.fixture
def both(config: StoreConfig, fast: Path) -> StoreConfig:
    return dataclasses.replace(config, other={"fast": OtherStore(url=f"file://{fast}", partitions="gpu*")})


def test_job_with_a_store_of_its_own_has_its_checkpoints_there_and_its_records_here(
    both: StoreConfig, job: JobKey, source: Path, top: Path, fast: Path, tmp_path: Path
) -> None:
    with open_store(both) as store:
        store.put_record(job, "start", {"uid": 2000, "store": "fast"})
        published = store.publish(job, FIRST, source, {"node": "n1"})
        store.append_events(job, "0-n1", [{"time": 1}])
    with open_store(both) as store:
        assert store.checkpoints(job) == [published]
        assert published.where == ("fast",)
        store.fetch(job, FIRST, tmp_path / "fetched")
        store.verify(job, FIRST)
        store.pin(job, FIRST)
        assert store.pins(job) == {FIRST}
        assert store.jobs("testbed") == [job]
        assert store.usage(job).stored_bytes > 2 << 20

    kinds = {path.name for path in (top / "jobs/testbed/17").iterdir()}
    assert kinds == {"records", "events"}
    assert {path.name for path in (fast / "jobs/testbed/17").iterdir()} == {"ckpt", "packs", "pins"}


def test_job_without_one_is_in_the_main_store(
    both: StoreConfig, job: JobKey, source: Path, top: Path, fast: Path
) -> None:
    with open_store(both) as store:
        store.put_record(job, "start", {"uid": 2000, "store": ""})
        assert store.publish(job, FIRST, source, {}).where == ("store",)

    assert (top / "jobs/testbed/17/ckpt/0-1.ck").exists()
    assert not (fast / "jobs").exists()


def test_reader_without_the_key_finds_the_store_too(
    both: StoreConfig, job: JobKey, source: Path, tmp_path: Path
) -> None:
    with open_store(both) as store:
        store.put_record(job, "start", {"uid": 2000, "store": "fast"})
        store.publish(job, FIRST, source, {})

    with open_store(dataclasses.replace(both, key=tmp_path / "absent")) as watcher:
        assert [one.id for one in watcher.checkpoints(job)] == [FIRST]


def test_store_that_left_the_configuration_is_named_and_the_job_not_taken_for_a_new_one(
    both: StoreConfig, config: StoreConfig, job: JobKey, source: Path
) -> None:
    with open_store(both) as store:
        store.put_record(job, "start", {"uid": 2000, "store": "fast"})
        store.publish(job, FIRST, source, {})

    with open_store(config) as store, pytest.raises(ConfigError, match="in the store 'fast'") as caught:
        store.require_home(job)
    assert caught.value.hint is not None
    assert "[store.other.fast]" in caught.value.hint
    renamed = dataclasses.replace(both, other={"slow": both.other["fast"]})
    with open_store(renamed) as store, pytest.raises(ConfigError, match="in the store 'fast'"):
        store.checkpoints(job)


def test_retired_job_gives_its_name_back_in_both_stores(
    both: StoreConfig, job: JobKey, source: Path, top: Path, fast: Path
) -> None:
    with open_store(both) as store:
        store.put_record(job, "start", {"uid": 2000, "store": "fast"})
        store.publish(job, FIRST, source, {})
        assert store.retire(job)
        assert store.checkpoints(job) == []
        store.put_record(job, "start", {"uid": 2001, "store": ""})
        store.publish(job, FIRST, source, {})

    assert (
        len(list((top / "retired/testbed").iterdir())) == len(list((fast / "retired/testbed").iterdir())) == 1
    )


def test_prune_puts_a_job_away_in_both_stores_and_leaves_pinned_ones(
    both: StoreConfig, source: Path, top: Path, fast: Path
) -> None:
    over, pinned, running = (JobKey("testbed", name) for name in "123")
    with open_store(both) as store:
        for job in (over, pinned, running):
            store.put_record(job, "start", {"uid": 2000, "store": "fast"})
            store.publish(job, FIRST, source, {})
        store.pin(pinned, FIRST)
        for job in (over, pinned):
            store.put_record(job, "ended", {"status": 0})
        for path in [*top.rglob("*"), *fast.rglob("*")]:
            if path.is_file() and path.parts[-3] != "3":
                os.utime(path, (1e9, 1e9))
        seen: list[tuple[int, int]] = []
        done = store.prune("testbed", ended=9e5, lost=9e6, grace=9e5, progress=lambda *one: seen.append(one))

        assert done.trashed == ("jobs/testbed/1", "fast: jobs/testbed/1")
        assert store.jobs("testbed") == [pinned, running]
        assert len(store.checkpoints(pinned)) == len(store.checkpoints(running)) == 1
        assert seen[0] == (0, 3)
        assert seen[-1] == (3, 3)


def test_each_store_has_its_quota(both: StoreConfig, tmp_path: Path, job: JobKey) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large/a").write_bytes(os.urandom(2 << 20))
    small = dataclasses.replace(both.other["fast"], quota="1M")
    with open_store(dataclasses.replace(both, other={"fast": small})) as store:
        store.put_record(job, "start", {"uid": 2000, "store": "fast"})
        with pytest.raises(StoreRefused, match="quota of 1048576 bytes"):
            store.publish(job, FIRST, tmp_path / "large", {})
        store.publish(JobKey("testbed", "18"), FIRST, tmp_path / "large", {})


# --- which store is whose -----------------------------------------------------------------------------


RULES = StoreConfig(
    url="file:///a",
    other={
        "gpu": OtherStore(url="file:///b", partitions="gpu gpu-*"),
        "big": OtherStore(url="file:///c", users="alice bob", jobs="train*"),
        "alice": OtherStore(url="file:///d", users="alice", quota="5G"),
    },
)


@pytest.mark.parametrize(
    ("partition", "user", "job", "store"),
    [
        ("gpu", "alice", "train", "gpu"),
        ("gpu-large", "carol", "x", "gpu"),
        ("cpu", "bob", "train-7", "big"),
        ("cpu", "bob", "other", ""),
        ("cpu", "alice", "other", "alice"),
        ("", "carol", "train", ""),
    ],
)
def test_first_store_whose_rules_all_hold_is_the_jobs(
    partition: str, user: str, job: str, store: str
) -> None:
    assert RULES.store_of(partition=partition, user=user, job=job) == store


def test_other_store_takes_from_the_main_one_what_it_does_not_say() -> None:
    main = dataclasses.replace(RULES, quota="1G", identity=Path("/k"), local="/nvme")
    alice, gpu = main.named("alice"), main.named("gpu")

    assert (alice.url, alice.quota_bytes, alice.identity) == ("file:///d", 5 << 30, Path("/k"))
    assert (gpu.quota_bytes, gpu.local, gpu.other) == (1 << 30, "", {})


def test_store_with_a_key_of_its_own_needs_that_and_no_other(
    config: StoreConfig, job: JobKey, source: Path, fast: Path, tmp_path: Path
) -> None:
    add_key(tmp_path / "fast.key")
    other = OtherStore(url=f"file://{fast}", partitions="gpu*", key=str(tmp_path / "fast.key"))
    mine = JobKey("testbed", "18")
    with open_store(dataclasses.replace(config, other={"fast": other})) as store:
        store.put_record(job, "start", {"uid": 2000, "store": "fast"})
        store.put_record(mine, "start", {"uid": 2000, "store": ""})
        store.publish(job, FIRST, source, {})
        store.publish(mine, FIRST, source, {})
        store.fetch(job, FIRST, tmp_path / "fetched")
    other = dataclasses.replace(other, key="")
    with open_store(dataclasses.replace(config, other={"fast": other})) as store:
        store.verify(mine, FIRST)
        with pytest.raises(KeyMissing):
            store.checkpoints(job)
