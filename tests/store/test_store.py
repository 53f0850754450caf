"""What a store promises its users, run against every place that it can be in; checkpoints are next door."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from outlast.config import StoreConfig
from outlast.errors import CorruptCheckpoint, StoreRefused, UsageError
from outlast.model import CheckpointId, JobKey, Lease, LeaseView
from outlast.store import Store, open_store


@pytest.fixture
def other(config: StoreConfig) -> Iterator[Store]:
    """The same store, opened by somebody else."""
    with open_store(config) as opened:
        yield opened


# --- records ------------------------------------------------------------------------------------------


def test_record_is_read_as_it_was_put_last(store: Store, other: Store, job: JobKey) -> None:
    assert store.get_record(job, "start") is None
    store.put_record(job, "start", {"argv": ["lu", "2000"], "Größe": 1.5})
    store.put_record(job, "start", {"argv": ["lu"], "nested": {"a": [None, True]}})

    assert other.get_record(job, "start") == {"argv": ["lu"], "nested": {"a": [None, True]}}
    assert other.get_record(job, "ended") is None


def test_reader_sees_the_old_record_or_the_new_one_whole(store: Store, other: Store, job: JobKey) -> None:
    values = [{"number": number, "rest": [number] * 5000} for number in range(2)]
    store.put_record(job, "start", values[0])
    seen: list[Mapping[str, Any] | None] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(other.get_record(job, "start"))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        store.put_record(job, "start", values[number % 2])
    done.set()
    reader.join(30)

    assert seen
    assert all(value in values for value in seen)


def test_garbled_record_is_never_taken_for_none(store: Store, job: JobKey, top: Path) -> None:
    store.put_record(job, "start", {})
    (top / "jobs/testbed/17/records/start.json").write_bytes(b'{"argv": ["l')

    with pytest.raises(CorruptCheckpoint, match="start"):
        store.get_record(job, "start")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 200])
def test_names_that_could_lead_elsewhere_are_refused(store: Store, job: JobKey, name: str, top: Path) -> None:
    with pytest.raises(UsageError):
        store.put_record(job, name, {})
    with pytest.raises(UsageError):
        store.append_events(job, name, [{}])
    with pytest.raises(UsageError):
        store.leases(name)
    assert list(top.iterdir()) == []


# --- jobs ---------------------------------------------------------------------------------------------


def test_jobs_are_listed_by_cluster(store: Store) -> None:
    for cluster, job_id in (("testbed", "9"), ("testbed", "10_3"), ("other", "1")):
        store.put_record(JobKey(cluster, job_id), "start", {})

    assert store.jobs("testbed") == [JobKey("testbed", "10_3"), JobKey("testbed", "9")]
    assert store.jobs("nowhere") == []


def test_retired_job_leaves_a_free_name_and_keeps_its_bytes(store: Store, job: JobKey, top: Path) -> None:
    store.put_record(job, "start", {"run": 1})
    store.append_events(job, "m0", [{"time": 1}])
    store.renew_lease(Lease(job, 3, "n1", 2000))
    store.renew_lease(Lease(JobKey("testbed", "18"), 0, "n1", 2000))

    assert store.retire(job)
    assert not store.retire(job)
    assert store.jobs("testbed") == []
    assert store.get_record(job, "start") is None
    assert store.events(job) == []
    assert [view.lease.job.job_id for view in store.leases("testbed")] == ["18"]
    kept = [path for path in (top / "retired/testbed").rglob("*") if path.is_file()]
    assert {path.name for path in kept} == {"start.json", "m0.jsonl"}

    store.put_record(job, "start", {"run": 2})
    store.renew_lease(Lease(job, 0, "n1", 2000))
    assert store.retire(job)


# --- events -------------------------------------------------------------------------------------------


def test_events_of_all_streams_come_in_the_order_of_time(store: Store, other: Store, job: JobKey) -> None:
    store.append_events(job, "m0", [{"time": 1.5, "event": "b"}, {"time": 4, "event": "d"}])
    other.append_events(job, "watcher", [{"time": 3, "event": "c"}])
    store.append_events(job, "m0", [{"time": 5, "event": "e"}, {"event": "a"}])
    store.append_events(job, "m0", [])

    assert "".join(event["event"] for event in other.events(job)) == "abcde"
    assert store.events(JobKey("testbed", "18")) == []


def test_torn_line_is_left_out_and_spoils_no_other(
    store: Store, other: Store, job: JobKey, top: Path
) -> None:
    store.append_events(job, "m0", [{"time": 1}, {"time": 2}])
    stream = top / "jobs/testbed/17/events/m0.jsonl"
    stream.write_bytes(stream.read_bytes() + b'{"time": 3, "ev')

    assert [event["time"] for event in store.events(job)] == [1, 2]
    other.append_events(job, "m0", [{"time": 4}])
    assert [event["time"] for event in store.events(job)] == [1, 2, 4]


def test_event_that_is_stored_twice_is_read_once(store: Store, job: JobKey) -> None:
    for _ in range(2):
        store.append_events(job, "m0", [{"time": 1, "event": "a"}, {"time": 1, "event": "b"}])

    assert store.events(job) == [{"time": 1, "event": "a"}, {"time": 1, "event": "b"}]


# --- requests -----------------------------------------------------------------------------------------


def test_requests_are_taken_once_in_their_order(store: Store, other: Store, job: JobKey, top: Path) -> None:
    assert store.take_requests(job) == []
    ids = [other.post_request(job, {"do": word}) for word in ("checkpoint", "stop")]

    assert store.take_requests(job) == [
        {"do": "checkpoint", "id": ids[0]},
        {"do": "stop", "id": ids[1]},
    ]
    assert store.take_requests(job) == []
    assert other.take_requests(job) == []
    assert [path for path in (top / "jobs").rglob("*") if path.is_file()] == []


def test_request_is_taken_by_one_of_two_who_ask_at_once(
    store: Store, other: Store, job: JobKey, config: StoreConfig
) -> None:
    taken: list[str] = []

    def take(mine: Store) -> None:
        deadline = time.monotonic() + 20
        while len(taken) < 40 and time.monotonic() < deadline:
            taken.extend(request["id"] for request in mine.take_requests(job))

    takers = [threading.Thread(target=take, args=(each,)) for each in (store, other)]
    for taker in takers:
        taker.start()
    with open_store(config) as poster:
        posted = [poster.post_request(job, {"number": number}) for number in range(40)]
    for taker in takers:
        taker.join(30)

    assert sorted(taken) == sorted(posted)


def test_garbled_request_is_dropped(store: Store, job: JobKey, top: Path) -> None:
    store.post_request(job, {"do": "stop"})
    (top / "jobs/testbed/17/requests/0.json").write_bytes(b"{")

    assert [request["do"] for request in store.take_requests(job)] == ["stop"]
    assert store.take_requests(job) == []


# --- leases -------------------------------------------------------------------------------------------


def ages(views: list[LeaseView]) -> dict[tuple[str, int, str], float]:
    return {(view.lease.job.job_id, view.lease.epoch, view.lease.node): view.age for view in views}


def test_leases_of_a_cluster_are_listed_with_their_holders(store: Store, other: Store, job: JobKey) -> None:
    held = [
        Lease(job, 2, "n1", 2000),
        Lease(JobKey("testbed", "18_4"), 0, "n2.example.org", 0),
    ]
    for lease in [*held, Lease(JobKey("other", "5"), 0, "n9", 0)]:
        store.renew_lease(lease)

    assert [view.lease for view in other.leases("testbed")] == held
    assert other.leases("nowhere") == []


def test_age_is_told_by_the_stores_clock_alone(
    store: Store, other: Store, job: JobKey, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(job, 0, "n1", 2000)
    store.renew_lease(lease)
    (file,) = (top / "leases/testbed").iterdir()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 1e6)  # this node's clock is far off

    os.utime(file, (real() - 100, real() - 100))
    (old,) = other.leases("testbed")
    assert 97.5 <= old.age <= 100.5  # a lower bound, of whole seconds

    store.renew_lease(lease)
    (fresh,) = other.leases("testbed")
    assert fresh.age < 1


def test_age_is_never_more_than_the_time_since_the_renewal(store: Store, other: Store, job: JobKey) -> None:
    lease = Lease(job, 0, "n1", 2000)
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        before = time.monotonic()
        store.renew_lease(lease)
        time.sleep(0.17)
        (view,) = other.leases("testbed")

        assert view.age <= time.monotonic() - before


def test_lease_of_a_higher_epoch_ends_the_lower_for_good(store: Store, other: Store, job: JobKey) -> None:
    old, new = Lease(job, 1, "n1", 2000), Lease(job, 2, "n2", 2000)
    store.renew_lease(old)
    other.renew_lease(new)

    for _ in range(2):
        with pytest.raises(StoreRefused, match="run 2 on n2"):
            store.renew_lease(old)
    other.renew_lease(new)
    assert [view.lease for view in store.leases("testbed")] == [new]


def test_lower_epoch_cannot_begin_where_a_higher_one_is(store: Store, other: Store, job: JobKey) -> None:
    new = Lease(job, 2, "n2", 2000)
    other.renew_lease(new)

    with pytest.raises(StoreRefused, match="run 2 on n2"):
        store.renew_lease(Lease(job, 1, "n1", 2000))
    other.renew_lease(new)
    assert [view.lease for view in store.leases("testbed")] == [new]


def test_later_node_takes_the_lease_of_the_same_epoch(store: Store, other: Store, job: JobKey) -> None:
    first, later = Lease(job, 1, "n1", 2000), Lease(job, 1, "n2", 2000)
    store.renew_lease(first)
    other.renew_lease(later)

    with pytest.raises(StoreRefused, match="run 1 on n2"):
        store.renew_lease(first)
    other.renew_lease(later)
    assert [view.lease for view in store.leases("testbed")] == [later]


def test_of_two_epochs_that_begin_at_once_only_the_higher_stays(
    store: Store, other: Store, job: JobKey
) -> None:
    for round_ in range(10):
        leases = [Lease(job, 2 * round_, "n1", 0), Lease(job, 2 * round_ + 1, "n2", 0)]
        barrier = threading.Barrier(2, timeout=20)

        def begin(mine: Store, lease: Lease, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                mine.renew_lease(lease)
            except StoreRefused:
                assert lease.epoch % 2 == 0

        threads = [
            threading.Thread(target=begin, args=each) for each in zip((store, other), leases, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

        with pytest.raises(StoreRefused):
            store.renew_lease(leases[0])
        other.renew_lease(leases[1])
        assert [view.lease for view in other.leases("testbed")] == [leases[1]]


def test_lease_that_somebody_removed_is_made_again(store: Store, job: JobKey, top: Path) -> None:
    lease = Lease(job, 0, "n1", 2000)
    store.renew_lease(lease)
    store.renew_lease(lease)
    for file in (top / "leases/testbed").iterdir():
        file.unlink()

    assert store.leases("testbed") == []
    store.renew_lease(lease)
    assert [view.lease for view in store.leases("testbed")] == [lease]


def test_manager_that_starts_again_goes_on_with_its_lease(store: Store, other: Store, job: JobKey) -> None:
    lease = Lease(job, 0, "n1", 2000)
    store.renew_lease(lease)
    other.renew_lease(lease)

    store.renew_lease(lease)
    assert [view.lease for view in store.leases("testbed")] == [lease]


def test_dropping_a_lease_drops_no_other_run_of_the_job(store: Store, other: Store, job: JobKey) -> None:
    old, new = Lease(job, 1, "n1", 2000), Lease(job, 2, "n2", 2000)
    store.renew_lease(old)
    other.renew_lease(new)

    store.drop_lease(old)
    assert [view.lease for view in store.leases("testbed")] == [new]
    other.drop_lease(new)
    other.drop_lease(new)
    assert store.leases("testbed") == []


def test_foreign_files_among_the_leases_are_left_alone(store: Store, job: JobKey, top: Path) -> None:
    store.renew_lease(Lease(job, 0, "n1", 2000))
    for name in ("README", "17@x@n1@0", "17@1", ".hidden@1@n1@0"):
        (top / "leases/testbed" / name).touch()

    assert len(store.leases("testbed")) == 1
    store.renew_lease(Lease(job, 1, "n1", 2000))
    assert (top / "leases/testbed/README").exists()


def test_lease_that_is_no_file_name_is_refused(store: Store, job: JobKey) -> None:
    for lease in (Lease(job, 0, "../n1", 0), Lease(job, -1, "n1", 0), Lease(job, 0, "", 0)):
        with pytest.raises(UsageError):
            store.renew_lease(lease)


def test_stored_json_is_plain(store: Store, job: JobKey, top: Path) -> None:
    store.put_record(job, "start", {"a": "ü\n", "node": "ü"})

    stored = json.loads((top / "jobs/testbed/17/records/start.json").read_text("ascii"))
    assert stored["public"] == {"node": "ü"}
    assert set(stored) == {"public", "sealed"}


def test_closed_store_opens_itself_again(store: Store, job: JobKey, source: Path) -> None:
    store.renew_lease(Lease(job, 0, "n1", 2000))
    store.leases("testbed")
    store.close()

    store.renew_lease(Lease(job, 0, "n1", 2000))
    assert len(store.leases("testbed")) == 1
    store.publish(job, CheckpointId(0, 1), source, {})
    store.close()
    assert len(store.checkpoints(job)) == 1
