"""Where checkpoints are: in the store that a site has, or in a further one; maybe on this node first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

from outlast.errors import ConfigError
from outlast.model import JobKey
from outlast.store._backend import Backend
from outlast.store._checkpoints import Checkpoints
from outlast.store._foresight import Foresight
from outlast.store._format import Marked
from outlast.store._front import TieredBackend
from outlast.store._keys import Keyring
from outlast.store._quota import Quota
from outlast.store._tier import Tier
from outlast.store._upkeep import Upkeep


@dataclasses.dataclass(frozen=True)
class Home:
    """Where the checkpoints of some jobs are: a store, called *behind*; they go and are read by *checkpoints*."""

    name: str
    backend: Backend
    checkpoints: Checkpoints
    behind: Checkpoints
    upkeep: Upkeep
    foresight: Foresight
    front: TieredBackend | None = None  # through which *checkpoints* goes, where this node has a tier


class Homes:
    """All homes of one configuration; each connects when it is first used."""

    def __init__(
        self,
        backend: Backend,
        keyring: Keyring | ConfigError,
        quota: Quota,
        others: Mapping[str, tuple[Backend, Keyring | ConfigError, Quota]],
        tier: Tier | None,
    ) -> None:
        """See `Store`."""
        self._tier = tier
        self.main = self._at("store", backend, keyring, quota)
        self.others = {name: self._at(name, *one) for name, one in others.items()}

    def called(self, name: str, job: JobKey) -> Home:
        """Return the home *name*, "" for the main one, which is that of *job*. Raises ConfigError."""
        if not name:
            return self.main
        try:
            return self.others[name]
        except KeyError:
            raise ConfigError(
                f"job {job.job_id}: its checkpoints are in the store {name!r}, which is not in the configuration",
                hint=f"add the table [store.other.{name}] again, as it is on the node that ran the job",
            ) from None

    def close(self) -> None:
        """End all connections."""
        for home in (self.main, *self.others.values()):
            home.backend.close()

    def _at(self, name: str, backend: Backend, keyring: Keyring | ConfigError, quota: Quota) -> Home:
        foresight = Foresight(backend)
        marked = cast(Backend, Marked(cast(Backend, foresight)))
        behind = here = Checkpoints(marked, keyring, quota)
        front = None
        if self._tier is not None:
            front = TieredBackend(self._tier.local, marked)
            here = Checkpoints(cast(Backend, front), keyring, quota)
        return Home(name, marked, here, behind, Upkeep(marked), foresight, front)
