"""A store says of which format it is, before anything else of it is believed or changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.config import StoreConfig
from outlast.errors import ConfigError
from outlast.model import CheckpointId, JobKey, Lease
from outlast.store import Store, open_store

FIRST = CheckpointId(0, 1)


def test_what_is_written_first_is_the_version(store: Store, job: JobKey, top: Path) -> None:
    store.put_record(job, "start", {})

    assert (top / "format").read_text() == '{"outlast":"store","version":1}\n'
    assert (top / "format").stat().st_mode & 0o777 == 0o600


def test_looking_into_an_empty_store_leaves_it_empty(store: Store, job: JobKey, top: Path) -> None:
    assert store.checkpoints(job) == []
    assert store.jobs("testbed") == []
    assert list(top.iterdir()) == []


@pytest.mark.parametrize(
    ("marker", "why"),
    [
        ({"outlast": "store", "version": 2}, "format version 2, and this Outlast knows 1"),
        ({"outlast": "store"}, "not one that Outlast wrote"),
        ({"outlast": "checkpoint", "version": 1}, "not one that Outlast wrote"),
        ([], "not one that Outlast wrote"),
    ],
)
def test_store_of_another_format_is_refused_and_untouched(
    config: StoreConfig, job: JobKey, source: Path, top: Path, marker: object, why: str
) -> None:
    (top / "format").write_text(json.dumps(marker))
    calls: list[Callable[[Store], object]] = [
        lambda store: store.checkpoints(job),
        lambda store: store.publish(job, FIRST, source, {}),
        lambda store: store.renew_lease(Lease(job, 0, "n1", 2000)),
        lambda store: store.leases("testbed"),
        lambda store: store.prune("testbed", ended=0, lost=0, grace=0),
    ]
    for call in calls:
        with open_store(config) as store, pytest.raises(ConfigError, match=why) as caught:
            call(store)
        assert caught.value.hint is not None
    assert [path.name for path in top.iterdir()] == ["format"]


def test_store_without_a_marker_is_taken_for_one_of_the_first_version(
    config: StoreConfig, job: JobKey, source: Path, top: Path, tmp_path: Path
) -> None:
    with open_store(config) as store:
        store.publish(job, FIRST, source, {})
    (top / "format").unlink()

    with open_store(config) as store:
        store.fetch(job, FIRST, tmp_path / "fetched")
        store.publish(job, CheckpointId(0, 2), source, {})
    assert (top / "format").exists()


def test_of_two_that_begin_a_store_neither_is_refused(config: StoreConfig, job: JobKey, source: Path) -> None:
    with open_store(config) as one, open_store(config) as two:
        assert one.checkpoints(job) == two.checkpoints(job) == []
        one.publish(job, FIRST, source, {})
        two.publish(JobKey("testbed", "18"), FIRST, source, {})
        assert len(two.checkpoints(job)) == 1
