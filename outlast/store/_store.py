"""What the manager, the watcher and the command line see of a store."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from outlast.errors import ConfigError, OutlastError, UsageError
from outlast.model import SITE, Checkpoint, CheckpointId, JobKey, Lease, LeaseView
from outlast.store._backend import Backend
from outlast.store._homes import Home, Homes
from outlast.store._journal import SMALL_NAME, Journal, small
from outlast.store._keys import Keyring
from outlast.store._leases import Leases
from outlast.store._quota import Quota
from outlast.store._reader import Stored
from outlast.store._source import Memory
from outlast.store._tier import RECORD, Tier, told_of
from outlast.store._upkeep import Progress, Pruned, Usage

_log = logging.getLogger(__name__)


class Store(Journal):
    """The checkpoints, records, events, requests and leases of jobs, kept as docs/store-format.md says.

    Not shared between threads: each opens its own. Every method may raise StoreUnavailable (no answer;
    the next call connects anew) and StoreRefused (the store said no, and would again). After a
    StoreUnavailable it is unknown whether the call took effect.
    """

    def __init__(
        self,
        backend: Backend,
        keyring: Keyring | ConfigError,
        quota: Quota | None = None,
        *,
        others: Mapping[str, tuple[Backend, Keyring | ConfigError, Quota]] | None = None,
        tier: Tier | None = None,
    ) -> None:
        """*keyring*: the data keys, or why there are none here: checkpoints can then only be listed.

        Args:
            quota: what a job, and all jobs of a user, may have here.
            others: further stores, by name, and how to reach them. A job whose start record has a member
                "store" has its checkpoints and pins there; all else of it is here.
            tier: this node's own directory, through which checkpoints go.
        """
        self._tier = tier
        self._homes = Homes(backend, keyring, quota or Quota(), others or {}, tier)
        self._home_of: dict[JobKey, str] = {}
        backend = self._backend = self._homes.main.backend
        super().__init__(backend, keyring)
        self._upkeep = self._homes.main.upkeep
        self._leases = Leases(backend)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, if there is one."""
        if self._tier is not None:
            self._tier.close()
        self._homes.close()

    def home(self, job: JobKey) -> Home:
        """Return where the checkpoints of *job* are.

        Raises:
            ConfigError: in a store that the configuration of this machine does not have.
        """
        name = self._home_of.get(job)
        if name is None:
            start = self.get_record(job, "start") if self._homes.others else {}
            name = str((start or {}).get("store", ""))
            if start:
                self._home_of[job] = name
        return self._homes.called(name, job)

    def require_home(self, job: JobKey) -> None:
        """Raise ConfigError where the checkpoints of *job* are in a store that is not in the configuration.

        To be called before a job is taken for one without checkpoints; it reads the start record once more
        than `checkpoints` does where there is but one store.
        """
        self._homes.called(str((self.get_record(job, "start") or {}).get("store", "")), job)

    def foreseeing(self, job: JobKey, *records: str) -> AbstractContextManager[None]:
        """Within this, what decides on how *job* goes on is read as it stands now, in two round trips in all.

        That is its requests, the list of its checkpoints, and the records called *records*. Each is read once so.
        """
        directories = [f"{_job(job)}/{kind}" for kind in ("requests", "ckpt", "packs")]
        files = [f"{_job(job)}/records/{small(name)}.json" for name in records]
        return self._homes.main.foresight.foreseeing(directories, files)

    def require_key(self) -> None:
        """Raise ConfigError where there is no data key: checkpoints can then only be listed."""
        if not isinstance(self._keyring, Keyring):
            raise self._keyring

    # --- checkpoints ------------------------------------------------------------------------------

    def publish(
        self,
        job: JobKey,
        id: CheckpointId,
        source: Path,
        meta: Mapping[str, Any],
        memories: Sequence[Memory] = (),
    ) -> Checkpoint:
        """Store every regular file below the directory *source*, and *memories*, as checkpoint *id* of *job*.

        Pages that the job's earlier checkpoints have are not stored again, and zero pages never are. The
        manifest goes last: afterwards the checkpoint is there and complete, or not there at all; it is on the
        server's disk, or on this node's where it has a tier: `await_durable`. Memory stays below some 80 MiB, plus
        24 bytes for each page of the job.

        Args:
            meta: JSON values, given back by `checkpoints`. What says nothing of the job's work (see
                `_manifest.PUBLIC`) can be read without the key.
            memories: files that need not exist; none of them is below *source*.

        Raises:
            StoreRefused: there is such a checkpoint, or the store has no room.
            StoreUnavailable: calling it again goes on where it broke off: finished packs are used.
            OutlastError: *source* or a memory cannot be read.
        """
        home = self.home(job)
        if self._tier is not None:
            return self._tier.publish(home, job, id, source, meta, memories)
        done = home.checkpoints.publish(job, id, source, meta, memories)
        return dataclasses.replace(done, where=(home.name,))

    def checkpoints(self, job: JobKey) -> list[Checkpoint]:
        """Return the complete checkpoints of *job*, newest first.

        Complete: the manifest is what was published, as far as the key is here to tell, and its packs are
        there and as long as they should be. Others are left out, and logged. Pages are verified by `fetch`.
        """
        home = self.home(job)
        if self._tier is not None:
            return self._tier.found(home, job)
        return [dataclasses.replace(one, where=(home.name,)) for one in home.checkpoints.complete(job)]

    def whereabouts(self, job: JobKey) -> list[Checkpoint]:
        """Return what `checkpoints` does, and the one that so far only the job's node has, as that tells."""
        found = self.checkpoints(job)
        told = told_of(self.get_record(job, RECORD))
        for number, one in enumerate(found):
            if told is not None and one.id == told.id:
                found[number] = dataclasses.replace(one, where=(*dict.fromkeys((*one.where, *told.where)),))
        if told is not None and (not found or told.id > found[0].id):
            found.insert(0, told)
        return found

    def await_durable(self, job: JobKey, id: CheckpointId, seconds: float) -> bool:
        """Wait at most *seconds* until checkpoint *id*, or a later one, does not depend on this node; tell if so."""
        return self._tier is None or self._tier.shipper.wait(job, id, seconds)

    def resume(self, job: JobKey, epoch: int) -> None:
        """Have the newest checkpoint shipped from this node's tier, if run *epoch* goes on from it and it is not."""
        if self._tier is not None:
            for one in self.checkpoints(job)[:1]:
                if not one.durable and one.id.epoch >= epoch - 1:
                    self._tier.shipper.ship(job, one)

    @property
    def ships_later(self) -> bool:
        """Whether a checkpoint is on this node when `publish` returns, and is shipped after that."""
        return self._tier is not None

    @property
    def shipping_seconds(self) -> float:
        """How long the last checkpoint took from this node's tier to the store; 0 where there is no tier."""
        return 0.0 if self._tier is None else self._tier.shipper.seconds

    def fetch(self, job: JobKey, id: CheckpointId, into: Path) -> None:
        """Make the directory *into*, mode 0700, with all files of the checkpoint *id*, every byte verified.

        *into* appears at once and complete, by a rename within its parent directory, which must exist.

        Raises:
            UsageError: there is no such checkpoint, or *into* exists.
            CorruptCheckpoint: stored bytes are not what was published; go on with an older checkpoint.
            OutlastError: *into* cannot be written.
        """
        self.home(job).checkpoints.fetch(job, id, into)

    def open(self, job: JobKey, id: CheckpointId) -> Stored:
        """Return checkpoint *id* for the reading of single pages. Raises UsageError, CorruptCheckpoint.

        While it is read, this store serves nothing else.
        """
        return self.home(job).checkpoints.open(job, id)

    def published(self, job: JobKey) -> list[CheckpointId]:
        """Return the ids of all checkpoints of *job* that have a manifest, good or not, newest first."""
        return self.home(job).checkpoints.published(job)

    def verify(
        self,
        job: JobKey,
        id: CheckpointId,
        *,
        read_data: bool = True,
        progress: Progress = lambda *_: None,
    ) -> int:
        """Verify checkpoint *id*: with *read_data* every stored page, else its manifest and its packs' sizes.

        *progress* hears of frames read, of how many. Returns how many pages were read. Raises
        CorruptCheckpoint, or UsageError where there is none.
        """
        return self.home(job).checkpoints.verify(job, id, read_data=read_data, progress=progress)

    def forget(
        self,
        job: JobKey,
        keep: int,
        also: Callable[[Sequence[Checkpoint]], Iterable[CheckpointId]] = lambda _: (),
    ) -> int:
        """Remove all but the newest *keep* (at least 1) complete checkpoints and those that are pinned.

        A checkpoint goes manifest first, so that none is ever seen without its pages. Leftovers of writing
        that broke off go too, unless they are newer than the newest complete checkpoint: those may be
        under way. Returns how many checkpoints went.

        Args:
            also: chooses further checkpoints to keep, out of those that there are, newest first.

        Raises:
            ConfigError: a key is missing, without which nobody can tell which checkpoints are good.
        """
        if keep < 1:
            raise UsageError(f"keep = {keep}: the newest checkpoint is always kept")

        def chosen(found: Sequence[Checkpoint]) -> Iterator[CheckpointId]:
            yield from (checkpoint.id for checkpoint in found[:keep])
            yield from also(found)

        home = self.home(job)
        if self._tier is not None:
            return self._tier.forget(home, job, keep, chosen, lambda: self.pins(job))
        return home.checkpoints.forget(job, lambda found: {*chosen(found), *self.pins(job)})

    def leave_node(self, job: JobKey) -> None:
        """Remove what this node's tier has of *job*, whose work is done."""
        if self._tier is not None:
            self._tier.remove(job)

    # --- upkeep -----------------------------------------------------------------------------------

    def pins(self, job: JobKey) -> frozenset[CheckpointId]:
        """Return which checkpoints of *job* are pinned: `forget` and `prune` leave them."""
        return self.home(job).upkeep.pins(job)

    def pin(self, job: JobKey, id: CheckpointId) -> None:
        """Keep checkpoint *id* until it is unpinned. Raises UsageError where there is no such checkpoint."""
        if id not in [checkpoint.id for checkpoint in self.checkpoints(job)]:
            raise UsageError(f"{id.name(job.job_id)}: no such checkpoint")
        self.home(job).upkeep.pin(job, id)

    def unpin(self, job: JobKey, id: CheckpointId) -> bool:
        """Take the pin off checkpoint *id*; True if there was one."""
        return self.home(job).upkeep.unpin(job, id)

    def usage(self, job: JobKey) -> Usage:
        """Return what all files of *job* take on the server, and since when none of them changed."""
        mine, home = self._upkeep.usage(_job(job)), self.home(job)
        if home is self._homes.main:
            return mine
        there = home.upkeep.usage(_job(job))
        return Usage(mine.stored_bytes + there.stored_bytes, min(mine.idle, there.idle))

    def free(self) -> int | None:
        """Return how many bytes the main store has room for, or None where its server cannot say."""
        return self._backend.free()

    def prune(
        self,
        cluster: str,
        *,
        ended: float,
        lost: float,
        grace: float,
        progress: Progress = lambda *_: None,
    ) -> Pruned:
        """Put the jobs of *cluster* that are over into the trash, and remove what has been there for long.

        Over: without a lease, without a pin, and nothing of it changed for *ended* seconds, or for *lost*
        seconds where the store does not know that it ended. What was retired goes after *ended* seconds.
        From the trash, which is not looked into by anybody else, things go for good after *grace* seconds;
        until then a rename brings them back. Nobody is kept waiting, and nothing locked. *progress* hears of
        jobs looked at, of how many.
        """

        def held() -> list[JobKey]:
            return [view.lease.job for view in self.leases(cluster)]

        def pinned(job: JobKey) -> bool:
            try:
                return bool(self.pins(job))
            except OutlastError as error:
                _log.warning("left as it is: %s", error)
                return True

        done = self._upkeep.prune(
            cluster, held, pinned, ended=ended, lost=lost, grace=grace, progress=progress
        )
        # Elsewhere goes what is no longer here: what a job is, this store knows.
        here = set(self.jobs(cluster))
        for home in self._homes.others.values():
            more = home.upkeep.prune(cluster, held, here.__contains__, ended=ended, lost=ended, grace=grace)
            trashed, removed = (
                [f"{home.name}: {one}" for one in some] for some in (more.trashed, more.removed)
            )
            done = Pruned((*done.trashed, *trashed), (*done.removed, *removed))
        for home in (self._homes.main, *self._homes.others.values()):
            home.behind.room.tidy(cluster)
        return done

    # --- jobs -------------------------------------------------------------------------------------

    def retire(self, job: JobKey) -> bool:
        """Put what is stored under *job*'s name out of the way, and drop its leases; True if there was any.

        For a scheduler that uses a job's id again. All is kept, as retired/<cluster>/<id>.<random>.
        """
        self._leases.drop_all(job)
        homes = [self._homes.main]
        with contextlib.suppress(ConfigError):  # what is there stays until its store is pruned
            if (home := self.home(job)) not in homes:
                homes.append(home)
        self._home_of.pop(job, None)
        if self._tier is not None:
            self._tier.remove(job)
        self._appending.clear()
        to = f"retired/{job.cluster}/{job.job_id}.{uuid.uuid4().hex[:12]}"
        found = False
        for home in reversed(homes):
            home.checkpoints.forget_writer(job)
            home.behind.forget_writer(job)
            found = home.backend.rename(_job(job), to) or found
        return found

    def jobs(self, cluster: str) -> list[JobKey]:
        """Return every job of *cluster* of which anything is stored, sorted."""
        found = []
        for entry in self._backend.list(f"jobs/{small(cluster)}"):
            if entry.is_directory and SMALL_NAME.fullmatch(entry.name) and entry.name != SITE:
                found.append(JobKey(cluster, entry.name))
        return sorted(found)

    # --- leases -----------------------------------------------------------------------------------

    def renew_lease(self, lease: Lease) -> None:
        """Tell everybody that *lease* is held; creates it the first time. One round trip from then on.

        What is guaranteed: once the run of a higher epoch has renewed its lease, the next renewal of a lower
        one is refused, and so is every later one. Of two runs of the same epoch on different nodes (which
        no scheduler should start) the later takes the lease from the earlier.

        What is not: between the two renewals both runs believe that they hold the lease. So a run that
        cannot renew must stop by its own clock before the lease's time is over, counted from the start of
        its last successful renewal; and a new run starts only after that time. Nothing on the server
        stops a run that goes on regardless from storing checkpoints; those of a lower epoch are never
        newer than those of a higher one, so they are not restored.

        Raises:
            StoreRefused: the lease is lost to another run, for good; or the store refuses to write.
        """
        self._leases.renew(lease)

    def leases(self, cluster: str) -> list[LeaseView]:
        """Return for every job of *cluster* that has one the lease of the highest epoch.

        *age*, in seconds, is never more than the time since the lease was last renewed, and less than
        it by 2 s at most (SFTP; 0.02 s in a directory) and the round trip. It is told by the clock of
        the store's machine alone. Two listings and a write, however many leases there are.
        """
        return self._leases.views(small(cluster))

    def drop_lease(self, lease: Lease) -> None:
        """Give up *lease*, if it is still there; those of other runs of the job stay."""
        self._leases.drop(lease)


def _job(job: JobKey) -> str:
    return f"jobs/{job.cluster}/{job.job_id}"
