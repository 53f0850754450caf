"""The watcher against a real store in a directory, and a Slurm that replays what a real one printed.

tests/unit/data is described in test_slurm_adapter.py. The two programs of data/bin print the files of one
directory and write down what they are told to do; only the addresses of the nodes are the test's own.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from outlast import control
from outlast.config import Config, read_config
from outlast.errors import LeaseLost, StoreRefused
from outlast.model import CheckpointId, JobKey, Lease
from outlast.scheduler import SchedulerUnavailable
from outlast.scheduler.slurm import SlurmScheduler
from outlast.store import Store, add_key, open_store
from outlast.watcher.actions import DropLease, Exclude, Leave, MarkDown, Readmit, Requeue
from outlast.watcher.loop import Loop

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[2]
ALICE, BOB, SLURM = 2000, 2001, 64030
DAEMON = (
    "import logging, pathlib, sys; from outlast.config import read_config; from outlast.watcher import run; "
    "logging.basicConfig(level=logging.INFO); run(read_config(pathlib.Path(sys.argv[1])))"
)


class Site:
    """A cluster as one directory: its store, its Slurm, its configuration."""

    def __init__(self, here: Path, **watcher: float) -> None:
        self.here = here
        (here / "store").mkdir()
        shutil.copytree(DATA / "bin", here / "bin")
        keys = {"cycle": 0.1, "exclude": 60, "silent": 0.4, "takeover": 1, **watcher}
        lines = [f"{key} = {value}" for key, value in keys.items()]
        (here / "outlast.toml").write_text(
            f'cluster = "c"\n[store]\nurl = "file://{here}/store"\nkey = "{here}/no.key"\n'
            "[lease]\nrenew = 0.1\nttl = 1.0\n"
            f'[watcher]\nsocket = "{here}/run/watcher.sock"\n' + "\n".join(lines) + "\n"
        )
        self.config: Config = read_config(here / "outlast.toml")
        # The store as a node opens it; the watcher has no key.
        add_key(here / "data.key")
        self.store: Store = open_store(dataclasses.replace(self.config.store, key=here / "data.key"))

    def show(self, now: str, *, port: int, jobs: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Have Slurm print the capture *now*, and "lost" once it was told that a node is down.

        Every node's slurmd is at *port*; *jobs* changes fields of some jobs.
        """
        for capture in ("running", "lost"):
            (self.here / capture).mkdir()
            for kind in ("jobs", "nodes"):
                output = json.loads((DATA / f"{capture}.{kind}.json").read_text())
                for row in output[kind]:
                    at = {"address": "127.0.0.1", "port": port}
                    row |= at if kind == "nodes" else (jobs or {}).get(str(row["job_id"]), {})
                (self.here / capture / f"{kind}.json").write_text(json.dumps(output))
        self.switch_to(now)

    def switch_to(self, capture: str) -> None:
        (self.here / "next").symlink_to(capture)
        (self.here / "next").rename(self.here / "now")

    def change_job(self, job_id: int, **fields: object) -> None:
        jobs = self.here / "now" / "jobs.json"
        output = json.loads(jobs.read_text())
        (row,) = (row for row in output["jobs"] if row["job_id"] == job_id)
        row |= fields
        jobs.with_suffix(".new").write_text(json.dumps(output))
        jobs.with_suffix(".new").rename(jobs)

    def lease(self, job_id: str, *, age: float = 0.0, epoch: int = 0) -> Lease:
        """A lease of a run on n1, last renewed *age* seconds ago."""
        lease = Lease(JobKey("c", job_id), epoch, "n1", ALICE)
        self.store.renew_lease(lease)
        (file,) = (self.here / "store").glob(f"leases/c/{job_id}@{epoch}@*")
        os.utime(file, (time.time() - age,) * 2)
        return lease

    def told(self) -> list[str]:
        """What scontrol was told to do, its reasons cut off."""
        path = self.here / "told"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split(" Reason=")[0] for line in lines]

    def events(self, job_id: str) -> list[str]:
        return [event["event"] for event in self.store.events(JobKey("c", job_id))]

    def loop(self) -> Loop:
        return Loop(self.config, SlurmScheduler(), open_store(self.config.store))

    @contextlib.contextmanager
    def daemon(self) -> Iterator["subprocess.Popen[bytes]"]:
        """The watcher as a process of its own; it must end by SIGTERM with 0."""
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        argv = [sys.executable, "-c", DAEMON, str(self.here / "outlast.toml")]
        with (self.here / "log").open("wb") as log:
            process = subprocess.Popen(argv, stderr=log, env=environment, cwd=ROOT)
        try:
            wait_for(lambda: "watching cluster" in self.log() or process.poll() is not None)
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=15) == 0, self.log()
        finally:
            process.kill()
            process.wait()

    def log(self) -> str:
        return (self.here / "log").read_text()

    def ask(self, uid: int, **request: object) -> Mapping[str, Any]:
        """Ask the daemon as the user *uid*, whom the kernel vouches for."""
        os.seteuid(uid)
        try:
            return control.call(self.config.watcher.socket, request)
        finally:
            os.seteuid(0)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # pytest's own directories are closed to other users.
    place = Path(tempfile.mkdtemp(prefix="watcher-"))
    place.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}/bin:{os.environ['PATH']}")
    yield place
    shutil.rmtree(place)


@pytest.fixture
def site(here: Path) -> Site:
    return Site(here)


@pytest.fixture
def silent() -> Iterator[int]:
    """A port whose kernel answers a SYN with nothing at all, since the queue of its listener is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, socket.socket() as first:
        first.connect(server.getsockname())
        yield server.getsockname()[1]


@pytest.fixture
def refusing() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
FREE: dict[str, Mapping[str, Any]] = {"4": {"required_nodes": ""}}


def kinds(decisions: tuple[object, ...]) -> list[type]:
    return [type(one) for one in decisions]


def listen(loop: Loop) -> None:
    """Have *loop* hear a lease, and then nothing of it for long enough to wonder."""
    loop.cycle(look=True)
    time.sleep(0.25)


def test_a_dead_node_is_marked_down_and_its_job_sent_elsewhere_at_once(site: Site, silent: int) -> None:
    site.show("running", port=silent, jobs=FREE)
    site.lease("4")
    loop = site.loop()
    listen(loop)

    seen = [kinds(loop.cycle()) for _ in range(3)]

    assert seen == [[Leave], [MarkDown, Exclude], [Leave]]
    assert site.told() == ["update NodeName=n1 State=DOWN", "update JobId=4 ExcNodeList=n1 StartTime=now"]
    assert site.events("4") == ["node-marked-down", "node-excluded"]


def test_the_next_run_of_a_lost_job_is_fenced_off_for_as_long_as_the_lost_one_may_go_on(
    site: Site, silent: int
) -> None:
    site.show("running", port=silent, jobs=FREE)
    lease = site.lease("4")
    loop = site.loop()
    listen(loop)
    while not site.told():
        loop.cycle()
    up = time.monotonic()

    assert [view.lease for view in site.store.leases("c")] == [lease.fence()]
    with pytest.raises(LeaseLost):
        site.store.renew_lease(lease)
    while not site.store.leases("c")[0].lease.is_lifted:
        loop.cycle()
    assert site.config.lease.ttl - 0.1 < time.monotonic() - up < site.config.lease.ttl + 10


def test_a_job_that_the_scheduler_still_has_run_gets_no_fence(site: Site, silent: int) -> None:
    site.show("running", port=silent, jobs=FREE)
    lease = site.lease("4")
    shutil.rmtree(site.here / "lost")
    shutil.copytree(site.here / "running", site.here / "lost")
    loop = site.loop()
    listen(loop)
    while not site.told():
        loop.cycle()

    assert [view.lease for view in site.store.leases("c")] == [lease]


def test_a_watcher_that_has_just_begun_takes_nobody_for_dead(site: Site, silent: int) -> None:
    site.show("running", port=silent)
    site.lease("4", age=60.0)

    assert kinds(site.loop().cycle(look=True)) == [Leave]
    assert site.told() == []


def test_a_lease_that_is_renewed_while_its_node_is_asked_counts(site: Site, silent: int) -> None:
    site.show("running", port=silent)
    lease = site.lease("4")
    loop = site.loop()
    listen(loop)
    loop.cycle()
    late = threading.Timer(0.3, open_store(site.config.store).renew_lease, [lease])
    late.start()

    assert kinds(loop.cycle()) == [Leave]
    late.join()
    assert site.told() == []


def test_a_node_whose_kernel_refuses_is_left_alone_and_its_owner_told_once(site: Site, refusing: int) -> None:
    site.show("running", port=refusing)
    site.lease("4")
    loop = site.loop()
    for _ in range(14):
        loop.cycle()
        time.sleep(0.1)

    assert site.told() == []
    assert site.events("4") == ["manager-silent"]


def test_a_job_whose_lease_is_renewed_costs_the_scheduler_no_query(site: Site, silent: int) -> None:
    site.show("running", port=silent)
    site.lease("4")
    loop = site.loop()
    loop.cycle()
    (site.here / "away").touch()
    site.lease("4")

    assert loop.cycle() == ()
    time.sleep(0.25)
    with pytest.raises(SchedulerUnavailable):
        loop.cycle()


@pytest.mark.parametrize("refused", [False, True])
def test_a_lost_job_is_requeued_once_even_if_slurm_refuses(site: Site, silent: int, refused: bool) -> None:
    site.show("lost", port=silent, jobs={"5": {"requeue": True}})
    site.lease("5", age=2.0)
    if refused:
        (site.here / "no").touch()
    loop = site.loop()

    assert [kinds(loop.cycle(look=True)) for _ in range(3)] == [[Requeue], [Leave], [Leave]]
    assert site.told() == ["requeue 5"]
    (event,) = site.store.events(JobKey("c", "5"))
    assert (event["event"], "presently disabled" in event["text"]) == ("requeued", refused)


def test_leases_of_ended_jobs_are_taken_away(site: Site, silent: int) -> None:
    site.show("running", port=silent)
    for job_id, age in (("1", 70.0), ("2", 30.0), ("999", 70.0)):
        site.lease(job_id, age=age)
    loop = site.loop()

    assert kinds(loop.cycle()) == [DropLease, Leave, DropLease]
    assert [view.lease.job.job_id for view in site.store.leases("c")] == ["2"]


@pytest.mark.parametrize("missing", ["slurmctld", "store"])
def test_nothing_is_decided_while_one_does_not_answer(site: Site, silent: int, missing: str) -> None:
    site.show("running", port=silent)
    site.lease("4")
    store, elsewhere, away = (site.here / name for name in ("store", "elsewhere", "away"))
    loop = site.loop()
    listen(loop)
    loop.cycle()
    store.rename(elsewhere) if missing == "store" else away.touch()
    with pytest.raises((SchedulerUnavailable, StoreRefused)):
        loop.cycle()
    elsewhere.rename(store) if missing == "store" else away.unlink()

    # What was seen before the gap is old news: the node has to be silent for as long again.
    assert [kinds(loop.cycle(look=True)) for _ in range(2)] == [[Leave], [Leave]]
    assert site.told() == []


def test_a_new_watcher_knows_what_the_last_one_did(here: Path, silent: int) -> None:
    site = Site(here, exclude=3)
    site.show("lost", port=silent, jobs=FREE)
    site.lease("4", age=1.5)
    assert kinds(site.loop().cycle()) == [Exclude]
    site.change_job(4, excluded_nodes="n1")

    second = site.loop()

    assert kinds(second.cycle()) == [Leave]
    wait_for(lambda: kinds(second.cycle(look=True)) == [Readmit], seconds=10)
    site.change_job(4, excluded_nodes="")
    assert kinds(site.loop().cycle()) == [Leave]
    assert site.told() == ["update JobId=4 ExcNodeList=n1 StartTime=now", "update JobId=4 ExcNodeList="]


def test_nodes_that_a_person_excluded_stay_so(site: Site, silent: int) -> None:
    site.show("lost", port=silent, jobs={"4": {"required_nodes": "", "excluded_nodes": "n[2-3]"}})
    site.lease("4", age=2.0)
    site.loop().cycle()

    assert site.told() == ["update JobId=4 ExcNodeList=n1,n2,n3 StartTime=now"]


def test_the_daemon_acts_and_survives_an_absent_slurmctld_and_ends_by_sigterm(
    site: Site, silent: int
) -> None:
    site.show("running", port=silent, jobs=FREE)
    (site.here / "away").touch()
    site.lease("4", age=2.0)
    with site.daemon():
        wait_for(lambda: "nothing can be decided" in site.log())
        time.sleep(0.5)
        (site.here / "away").unlink()
        wait_for(lambda: len(site.told()) == 2)

    assert site.told() == ["update NodeName=n1 State=DOWN", "update JobId=4 ExcNodeList=n1 StartTime=now"]
    assert site.log().count("nothing can be decided") == 1
    assert "answer again" in site.log()
    assert "Traceback" not in site.log()
    assert not site.config.watcher.socket.exists()


def test_a_daemon_that_was_killed_can_be_started_again(site: Site, refusing: int) -> None:
    site.show("running", port=refusing)
    with contextlib.suppress(AssertionError), site.daemon() as process:
        process.kill()
        process.wait()
    assert site.config.watcher.socket.exists()

    with site.daemon():
        assert control.call(site.config.watcher.socket, {"op": "status"}) == {"jobs": []}


@root_only
def test_owners_see_their_jobs_and_nobody_elses(site: Site, refusing: int) -> None:
    site.show("running", port=refusing)
    for job_id in ("4", "8"):
        site.store.put_record(JobKey("c", job_id), "start", {"uid": ALICE})
    site.change_job(8, user_id=BOB)
    site.store.put_record(JobKey("c", "8"), "start", {"uid": BOB})
    (site.here / "image").mkdir()
    (site.here / "image" / "pages").write_bytes(bytes(5000))
    meta = {"node": "n1", "epoch": 0, "seq": 3, "pause_ms": 12.5}
    chosen = {"interval": 600, "auto": True}
    stored = site.store.publish(JobKey("c", "4"), CheckpointId(0, 3), site.here / "image", {**meta, **chosen})
    site.store.append_events(JobKey("c", "4"), "manager", [{"time": 1.0, "node": "n1", "event": "started"}])
    site.lease("4")
    sizes = {"image_bytes": 5000, "stored_bytes": stored.stored_bytes}
    place = {"where": ["store"], "durable": True}
    row = {"name": "4@0.3", "created": stored.created, **meta, **sizes, **place}
    job = {"job_id": "4", "name": "runner", "state": "RUNNING", "nodes": ["n1"], "epoch": 0, "uid": ALICE}
    with site.daemon():
        wait_for(lambda: site.ask(0, op="status")["jobs"][0]["lease_age"] is not None)
        (status,) = site.ask(ALICE, op="status")["jobs"]

        assert status.pop("lease_age") >= 0
        assert status == {**job, **chosen, "checkpoints": 1, "newest": row}
        assert [job["job_id"] for job in site.ask(BOB, op="status")["jobs"]] == ["8"]
        assert [job["job_id"] for job in site.ask(0, op="status")["jobs"]] == ["4", "8"]
        assert site.ask(ALICE, op="list", job="4") == {"checkpoints": [row]}
        assert [event["event"] for event in site.ask(ALICE, op="events", job="4")["events"]] == ["started"]
        posted = site.ask(ALICE, op="checkpoint", job="4")["request"]
        assert site.store.take_requests(JobKey("c", "4")) == [
            {"op": "checkpoint", "uid": ALICE, "id": posted}
        ]
        for op in ("list", "events", "checkpoint"):
            for job_id in ("4", "77"):
                with pytest.raises(control.RemoteError, match=f"^job {job_id}: no such job of yours$"):
                    site.ask(BOB, op=op, job=job_id)
        with pytest.raises(control.RemoteError, match="not a name for a job"):
            site.ask(ALICE, op="list", job="../4")
        with pytest.raises(control.RemoteError, match="names no job"):
            site.ask(ALICE, op="list")
        with pytest.raises(control.RemoteError, match="no such request"):
            site.ask(ALICE, op="requeue", job="4")
    assert site.store.take_requests(JobKey("c", "4")) == []


def test_only_a_running_job_can_be_asked_for_a_checkpoint(site: Site, refusing: int) -> None:
    site.show("running", port=refusing)
    for job_id in ("1", "4242"):
        site.store.put_record(JobKey("c", job_id), "start", {"uid": os.geteuid()})
    with site.daemon():
        for job_id, state in (("1", "COMPLETED"), ("4242", "gone")):
            with pytest.raises(control.RemoteError, match=f"job {job_id}: is {state}; only a running job"):
                control.call(site.config.watcher.socket, {"op": "checkpoint", "job": job_id})


@root_only
def test_the_schedulers_word_that_a_job_ended_is_acted_on_at_once(here: Path, silent: int) -> None:
    site = Site(here, cycle=30)
    site.show("running", port=silent, jobs=FREE)
    site.lease("4")
    with site.daemon():
        wait_for(lambda: site.ask(0, op="status")["jobs"] == [])
        site.switch_to("lost")
        with pytest.raises(control.RemoteError, match="only the scheduler"):
            site.ask(ALICE, op="ended", job="4")
        assert site.told() == []
        began = time.monotonic()

        assert site.ask(SLURM, op="ended", job="4") == {}

        wait_for(lambda: site.told() == ["update JobId=4 ExcNodeList=n1 StartTime=now"])
        assert time.monotonic() - began < 5
