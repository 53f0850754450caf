"""What a job goes on from: what its manager fetched before only if nothing newer came; what failed before is kept."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from criu_backend import Capsule, Criu, CriuError, Looked
from outlast.config import Config, RestartConfig, StoreConfig
from outlast.manager._events import EventLog
from outlast.manager._launch import Launcher, remember_choice
from outlast.manager._pager import Pager
from outlast.manager._run import Run
from outlast.manager._shim import Shim
from outlast.model import CheckpointId, JobKey
from outlast.store import add_key, open_store

JOB = JobKey("c", "17")


class Images(Criu):
    """Restores nothing; remembers the images that it was to restore, and refuses some by the checkpoint's number."""

    refused = "none"

    def version(self) -> str:
        return "4.2.1"

    def warm_up(self) -> None: ...

    def look_over(self, images: Path, uid: int) -> Looked:
        return Looked(uid, len(list(images.iterdir())), 1)

    def restore(self, context: object, images: Path, *_: object, **__: object) -> Capsule:
        if images.name.removeprefix("restore-").startswith(self.refused):
            raise CriuError("restore: the helper is missing", log=Path("/dev/null"))
        self.seen = {path.name: path.read_bytes() for path in images.iterdir()}
        return Capsule(1, 0, 1)


class Site:
    """A node with a store in a directory, and a job of which that has checkpoints."""

    def __init__(self, here: Path) -> None:
        for name in ("store", "run/spool"):
            (here / name).mkdir(parents=True)
        add_key(here / "data.key")
        store = StoreConfig(f"file://{here}/store", key=here / "data.key")
        self.here, self.config = here, Config("c", store=store, restart=RestartConfig(post_copy="on"))
        self.criu, self.prepared, self.opened = Images(), [], []  # type: ignore[var-annotated]
        pager = SimpleNamespace(
            pid=1,
            connect=lambda job: None,
            prepare=lambda job, id: self.prepared.append(id),
            open=self._open,
        )
        self.launcher = Launcher(self.config, self.criu, EventLog(JOB, "n2"), cast(Pager, pager))
        with open_store(store) as opened:
            opened.put_record(JOB, "start", {"uid": 2000, "epoch": 0, "files": []})

    def _open(self, job: JobKey, id: CheckpointId, *_: object) -> socket.socket:
        self.opened.append(id)
        return socket.socketpair()[0]

    def publish(self, seq: int) -> None:
        source = self.here / f"images{seq}"
        source.mkdir()
        (source / "core-1.img").write_bytes(b"image %d" % seq)
        meta: dict[str, Any] = {"node": "n1", "criu": "4.2.1", "files": [], "passed": [], "uid": 2000}
        with open_store(self.config.store) as store:
            store.publish(JOB, CheckpointId(0, seq), source, meta)

    def connect(self) -> None:
        self.launcher.connect(JOB, self.here / "run/spool")
        self.launcher.store()

    def launch(self) -> None:
        shim = SimpleNamespace(context=None, stdio=(), gone=False, set_back=lambda files, epoch: None)
        self.launcher.launch(Run(JOB, 1, 2000, "n2", 60, [], self.here / "run"), cast(Shim, shim))

    def pins(self) -> set[int]:
        with open_store(self.config.store) as store:
            return {id.seq for id in store.pins(JOB)}

    def spool(self) -> list[str]:
        return sorted(path.name for path in (self.here / "run/spool").iterdir())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_job_goes_on_from_what_was_fetched_before_it_might(site: Site) -> None:
    site.publish(1)
    site.connect()
    fetched = site.spool()
    (site.here / "run/spool/restore-0.1-following/core-1.img").write_bytes(b"as fetched")
    site.launch()

    assert fetched == ["restore-0.1-following"]
    assert site.criu.seen == {"core-1.img": b"as fetched"}
    assert site.prepared == site.opened == [CheckpointId(0, 1)]


def test_checkpoint_that_came_meanwhile_is_the_one_that_the_job_goes_on_from(site: Site) -> None:
    site.publish(1)
    site.connect()
    site.publish(2)
    site.launch()

    assert site.criu.seen == {"core-1.img": b"image 2"}
    assert (site.prepared, site.opened) == ([CheckpointId(0, 1)], [CheckpointId(0, 2)])
    assert site.spool() == ["restore-0.2-following"]


def test_checkpoint_that_was_chosen_meanwhile_is_the_one_that_the_job_goes_on_from(site: Site) -> None:
    site.publish(1)
    site.publish(2)
    site.connect()
    with open_store(site.config.store) as store:
        remember_choice(store, JOB, {"checkpoint": [0, 1]}, 1)
    site.launch()

    assert site.prepared == [CheckpointId(0, 2)]
    assert site.criu.seen == {"core-1.img": b"image 1"}
    assert site.spool() == ["restore-0.1-following"]


def test_checkpoint_that_is_gone_meanwhile_is_not_gone_on_from(site: Site) -> None:
    site.publish(1)
    site.publish(2)
    site.connect()
    (site.here / "store/jobs/c/17/ckpt/0-2.ck").unlink()
    site.launch()

    assert site.criu.seen == {"core-1.img": b"image 1"}


def test_job_whose_store_fails_meanwhile_goes_on_when_it_is_back(site: Site) -> None:
    site.publish(1)
    shutil.move(site.here / "store/jobs/c/17/packs", site.here / "packs")
    site.connect()
    shutil.move(site.here / "packs", site.here / "store/jobs/c/17/packs")
    site.launch()

    assert site.criu.seen == {"core-1.img": b"image 1"}


def test_checkpoint_that_could_not_be_restored_is_kept_until_it_could(site: Site) -> None:
    site.publish(1)
    site.publish(2)
    site.criu.refused = "0.2"
    site.launch()
    pinned = site.pins()
    site.criu.refused = "none"
    site.launch()

    assert pinned == {2}
    assert site.criu.seen == {"core-1.img": b"image 2"}
    assert site.pins() == set()


def test_checkpoint_that_could_not_be_restored_is_kept_until_a_later_one_could(site: Site) -> None:
    for seq in (1, 2):
        site.publish(seq)
    site.criu.refused = "0.2"
    site.launch()
    site.publish(3)
    site.launch()

    assert site.criu.seen == {"core-1.img": b"image 3"}
    assert site.pins() == set()


def test_pins_of_people_stay_whatever_is_restored(site: Site) -> None:
    for seq in (1, 2):
        site.publish(seq)
    with open_store(site.config.store) as store:
        store.pin(JOB, CheckpointId(0, 2))
        store.pin(JOB, CheckpointId(0, 1))
    site.criu.refused = "0.2"
    site.launch()
    site.criu.refused = "none"
    site.launch()

    assert site.criu.seen == {"core-1.img": b"image 2"}
    assert site.pins() == {1, 2}
