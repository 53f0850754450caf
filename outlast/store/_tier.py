"""A node's own directory in front of a store: checkpoints are whole there first, and are shipped from there.

Files of a checkpoint are the same in both places, name for name and byte for byte, and become visible in the
same order; so the store behind is a whole one at every moment, which any node can go on from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.errors import CorruptCheckpoint, OutlastError, StoreRefused, StoreUnavailable, UsageError
from outlast.model import Checkpoint, CheckpointId, JobKey
from outlast.store._local import LocalBackend
from outlast.store._manifest import decode_header
from outlast.store._reader import pack_path

if TYPE_CHECKING:
    from outlast.store._homes import Home
    from outlast.store._source import Memory
    from outlast.store._store import Store

_log = logging.getLogger(__name__)

_PIECE = 1 << 20  # bytes
_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 1.0, 30.0
_LEFT_BEHIND_SECONDS = (
    2 * 86400.0
)  # a job of which nothing changed here for so long went on elsewhere, or ended
RECORD = "local"  # the record in which the node tells of what it has


@dataclasses.dataclass(frozen=True)
class Shipped:
    """What came of shipping a checkpoint: *error* is why it is not in the store, if it is not."""

    job: JobKey
    id: CheckpointId
    seconds: float
    error: OutlastError | None = None


class Shipper:
    """Brings the newest checkpoint of a job from this node's directory to the store, in a thread of its own.

    One that is overtaken before its turn is left out; the packs that it shares with the next go with that.
    """

    def __init__(
        self,
        directory: Path,
        node: str,
        connect: Callable[[], Store],
        told: Callable[[Shipped], None],
        turn: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        """*connect* opens the store behind, for this thread; *told* hears, in it, what came of each one.

        *turn* is held while one is shipped.
        """
        self._local = LocalBackend(directory)
        self._node = node
        self._connect = connect
        self._told = told
        self._turn = turn
        self._change = threading.Condition()
        self._wanted: tuple[JobKey, Checkpoint] | None = None
        self._done: tuple[JobKey, CheckpointId] | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self.shipping: CheckpointId | None = None  # which must stay here meanwhile
        self.seconds = 0.0  # that the last one took
        self.unanswered = False  # whether the store did not answer when it was last asked
        self.keep = 0  # how many checkpoints of the job are to be left in the store; 0: it is not known yet

    def ship(self, job: JobKey, checkpoint: Checkpoint) -> None:
        """Have *checkpoint*, which is here, shipped; the one that waited until now is left out."""
        with self._change:
            self._wanted = (job, checkpoint)
            if self._thread is None:
                self._closed = False
                self._thread = threading.Thread(target=self._run, name="ship", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def is_there(self, job: JobKey, id: CheckpointId) -> None:
        """Checkpoint *id* of *job* has come to the store by another way; what waits, and is older, is left out."""
        with self._change:
            self._done = (job, id)
            self._wanted = None
            self.unanswered = False
            self._change.notify_all()

    def wait(self, job: JobKey, id: CheckpointId, seconds: float) -> bool:
        """Wait at most *seconds* until checkpoint *id* of *job*, or a later one, is in the store; tell if it is."""
        with self._change:
            return self._change.wait_for(lambda: self._done is not None and self._done >= (job, id), seconds)

    def close(self) -> None:
        """Stop; what is under way is broken off, and goes on with the next run on this node, or not at all."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            self._thread = None

    def _run(self) -> None:
        wait = _FIRST_RETRY_SECONDS
        with self._connect() as store:
            while (turn := self._next()) is not None:
                job, checkpoint = turn
                begin = time.monotonic()
                try:
                    with self._turn():
                        self._ship(store, job, checkpoint)
                except FileNotFoundError:
                    self._drop(turn)  # overtaken, and forgotten here
                    continue
                except OutlastError as error:
                    self.unanswered = isinstance(error, StoreUnavailable)
                    self._told(Shipped(job, checkpoint.id, time.monotonic() - begin, error))
                    with self._change:
                        self._change.wait_for(lambda: self._closed, wait)
                    wait = min(2 * wait, _LONGEST_RETRY_SECONDS)
                    continue
                finally:
                    self.shipping = None
                wait = _FIRST_RETRY_SECONDS
                self.unanswered = False
                self.seconds = time.monotonic() - begin
                with self._change:
                    self._done = (job, checkpoint.id)
                    self._change.notify_all()
                self._told(Shipped(job, checkpoint.id, self.seconds))
                self._forget(store, job)

    def _next(self) -> tuple[JobKey, Checkpoint] | None:
        with self._change:
            self._change.wait_for(lambda: self._closed or self._is_due())
            if self._closed or self._wanted is None:
                return None
            self.shipping = self._wanted[1].id
            return self._wanted

    def _is_due(self) -> bool:
        return self._wanted is not None and (
            self._done is None or self._done != (self._wanted[0], self._wanted[1].id)
        )

    def _drop(self, turn: tuple[JobKey, Checkpoint]) -> None:
        """Have *turn*, which is not here anymore, not tried again."""
        with self._change:
            if self._wanted is turn:
                self._wanted = None

    def _ship(self, store: Store, job: JobKey, checkpoint: Checkpoint) -> None:
        id = checkpoint.id
        backend = store.home(job).backend
        directory = f"jobs/{job.cluster}/{job.job_id}"
        manifest = f"{directory}/ckpt/{id.epoch}-{id.seq}.ck"
        store.put_record(job, RECORD, self._announced(checkpoint))
        data = self._local.read(manifest)
        header = decode_header(data, job, id)
        there = {entry.name: entry.size for entry in backend.list(f"{directory}/packs")}
        for name, size in header.packs.items():
            if there.get(f"{name}.pack") != size and self._local.entry(pack_path(job, name)) is not None:
                with contextlib.suppress(FileExistsError):
                    backend.create(pack_path(job, name), self._pieces(pack_path(job, name), size))
        there = {entry.name: entry.size for entry in backend.list(f"{directory}/packs")}
        if gone := [name for name, size in header.packs.items() if there.get(f"{name}.pack") != size]:
            self._local.read(manifest)  # where it is gone, too, the checkpoint was overtaken
            raise StoreRefused(
                f"{job}: pack {gone[0]} was removed meanwhile by another run",
                hint="the next checkpoint brings what is missing; if this run is the older one, it is stopped soon",
            )
        try:
            backend.create(manifest, [data])
        except FileExistsError:
            if backend.read(manifest) != data:
                raise StoreRefused(
                    f"{job}: another checkpoint {id.name(job.job_id)} is in the store",
                    hint="two runs of the job use the same epoch; look at its events",
                ) from None

    def _forget(self, store: Store, job: JobKey) -> None:
        """Have the store keep as many checkpoints as before this one came."""
        try:
            if self.keep:
                store.forget(job, self.keep)
        except OutlastError as error:
            _log.warning("old checkpoints stay for now: %s", error)

    def _announced(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "node": self._node,
            "epoch": checkpoint.id.epoch,
            "time": time.time(),
            "local": {
                "seq": checkpoint.id.seq,
                "created": checkpoint.created,
                "stored_bytes": checkpoint.stored_bytes,
                "image_bytes": checkpoint.image_bytes,
                "pause_ms": checkpoint.meta.get("pause_ms"),
            },
        }

    def _pieces(self, name: str, size: int) -> Iterator[bytes]:
        ranges = [(start, min(_PIECE, size - start)) for start in range(0, size, _PIECE)]
        try:
            yield from self._local.read_ranges(name, ranges)
        except EOFError as error:
            raise CorruptCheckpoint(f"{name}: torn in this node's directory: {error}") from error


def told_of(record: Mapping[str, Any] | None) -> Checkpoint | None:
    """Return the checkpoint that a node tells of by its RECORD, which is unproven where there is no key."""
    if record is None:
        return None
    try:
        local, node = record["local"], str(record["node"])
        id = CheckpointId(int(record["epoch"]), int(local["seq"]))
        meta = {"node": node, "pause_ms": local.get("pause_ms")}
        sizes = int(local["stored_bytes"]), int(local["image_bytes"])
        return Checkpoint(id, float(local["created"]), *sizes, meta, durable=False, where=(node,))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


class Tier:
    """What `Store` does otherwise where this node has a directory of its own for checkpoints."""

    def __init__(
        self,
        directory: Path,
        node: str,
        connect: Callable[[], Store],
        told: Callable[[Shipped], None],
        turn: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """See `Shipper`."""
        self.node = node
        self.local = LocalBackend(directory)
        self.shipper = Shipper(directory, node, connect, told, turn)
        self._directory = directory
        self._tidied = False
        self._unanswered = False

    def publish(
        self,
        home: Home,
        job: JobKey,
        id: CheckpointId,
        source: Path,
        meta: Mapping[str, Any],
        memories: Sequence[Memory],
    ) -> Checkpoint:
        """Have the checkpoint on this node, to be shipped; or in the store at once where there is no room here.

        The store is asked for what this node does not know, such as the packs that the first checkpoint of a run
        can refer to. Where it does not answer, that is StoreUnavailable once, and the next try does without.
        """
        if not self._tidied:
            self._tidied = True
            self._clear(job)
        try:
            with self._alone(home):
                done = home.checkpoints.publish(job, id, source, meta, memories)
        except StoreUnavailable:
            self._unanswered = True
            raise
        except StoreRefused as error:
            _log.warning("not kept on this node: %s", error)
            home.behind.forget_writer(job)
            home.checkpoints.forget_writer(job)
            done = dataclasses.replace(
                home.behind.publish(job, id, source, meta, memories), where=(home.name,)
            )
            self.shipper.is_there(job, id)
            return done
        self._unanswered = False
        self.shipper.ship(job, done)
        return dataclasses.replace(done, durable=False, where=(self.node,))

    def forget(
        self,
        home: Home,
        job: JobKey,
        keep: int,
        chosen: Callable[[Sequence[Checkpoint]], Iterable[CheckpointId]],
        pinned: Callable[[], Iterable[CheckpointId]],
    ) -> int:
        """See `Store.forget`: in both places, and in the store once more when what is under way has come there.

        Where the store does not answer, here alone; pinned checkpoints are in the store.
        """
        self.shipper.keep = keep
        gone, missed, pins = 0, None, frozenset[CheckpointId]()
        if not self.shipper.unanswered:
            try:
                pins = frozenset(pinned())
                gone = home.behind.forget(job, lambda found: {*chosen(found), *pins})
            except StoreUnavailable as error:
                missed = error
        alone = missed is not None or self.shipper.unanswered
        shipping = self.shipper.shipping
        with self._alone(home, alone):
            gone += home.checkpoints.forget(
                job, lambda found: {*chosen(found), *pins, *filter(None, [shipping])}
            )
        if missed is not None:
            raise missed
        return gone

    @contextlib.contextmanager
    def _alone(self, home: Home, alone: bool | None = None) -> Iterator[None]:
        if alone is None:
            alone = self._unanswered or self.shipper.unanswered
        with home.front.alone() if alone and home.front is not None else contextlib.nullcontext():
            yield

    def found(self, home: Home, job: JobKey) -> list[Checkpoint]:
        """Return the complete checkpoints of *job*, of this node and of the store, newest first."""
        found = home.checkpoints.complete(job)
        durable = set(home.behind.published(job))
        here = {entry.name for entry in self.local.list(f"jobs/{job.cluster}/{job.job_id}/ckpt")}
        return [
            dataclasses.replace(
                one,
                durable=one.id in durable,
                where=(home.name,) * (one.id in durable)
                + (self.node,) * (f"{one.id.epoch}-{one.id.seq}.ck" in here),
            )
            for one in found
        ]

    def remove(self, job: JobKey) -> None:
        """Remove what this node has of *job*."""
        shutil.rmtree(self._directory / "jobs" / job.cluster / job.job_id, ignore_errors=True)

    def close(self) -> None:
        """Stop shipping."""
        self.shipper.close()
        self.local.close()

    def _clear(self, keep: JobKey) -> None:
        """Remove what jobs other than *keep* left on this node days ago."""
        now = time.time()
        for cluster in _directories(self._directory / "jobs"):
            for job in _directories(cluster):
                files = [path for path in job.rglob("*") if path.is_file()]
                with contextlib.suppress(FileNotFoundError, UsageError):
                    newest = max((path.stat().st_mtime for path in files), default=0.0)
                    key = JobKey(cluster.name, job.name)
                    if key != keep and now - newest > _LEFT_BEHIND_SECONDS:
                        self.remove(key)


def _directories(path: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [one for one in path.iterdir() if one.is_dir()]
    return []
