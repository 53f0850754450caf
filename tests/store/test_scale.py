"""A thousand managers at one store: none waits for another, and each pays as if it were alone."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from outlast.model import CheckpointId, JobKey, Lease
from outlast.store import Store
from outlast.store._backend import Backend
from outlast.store._keys import Keyring
from outlast.store._local import LocalBackend

MANAGERS = 1000
CHECKPOINTS = 3


class Counting:
    """Counts the calls of a backend; each costs a manager some round trips."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.mtime_step = backend.mtime_step
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._backend, name)

        def counted(*args: Any, **options: Any) -> object:  # noqa: ANN401
            self.calls[name] += 1
            return method(*args, **options)

        return counted


@pytest.fixture
def here() -> Iterator[Path]:
    """A directory in memory, where there is one: what is measured is not the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        (Path(name) / "store").mkdir()
        (Path(name) / "small").mkdir()
        (Path(name) / "small/a").write_bytes(b"a page of its own")
        yield Path(name)


@pytest.mark.timeout(300)
def test_thousand_managers_do_not_cost_each_other_anything(here: Path, keyring: Keyring) -> None:
    def manage(number: int) -> Counter[str]:
        backend = Counting(LocalBackend(here / "store"))
        store = Store(cast(Backend, backend), keyring)
        job = JobKey("c", str(number))
        store.put_record(job, "start", {"uid": 2000})
        lease = Lease(job, 0, "n1", 2000)
        store.renew_lease(lease)
        backend.calls.clear()
        for seq in range(1, CHECKPOINTS + 1):
            store.renew_lease(lease)
            store.take_requests(job)
            store.publish(job, CheckpointId(0, seq), here / "small", {"node": "n1"})
            store.append_events(job, "0-n1", [{"time": seq}])
            store.forget(job, 2)
        return backend.calls

    alone = manage(0)
    with ThreadPoolExecutor(16) as pool:
        everybody = list(pool.map(manage, range(1, MANAGERS)))

    assert all(calls == alone for calls in everybody)
    # For each checkpoint: heartbeat, requests, is the name free, manifest, event, and forget's looks.
    assert sum(alone.values()) <= 20 * CHECKPOINTS
    watcher = Counting(LocalBackend(here / "store"))
    store = Store(cast(Backend, watcher), keyring)
    assert len(store.leases("c")) == MANAGERS
    assert watcher.calls == {"read": 1, "clock": 1, "list": 1}
    sizes = {path: len(list(path.iterdir())) for path in (here / "store").rglob("*") if path.is_dir()}
    assert {str(path.relative_to(here / "store")) for path, size in sizes.items() if size > 10} == {
        "jobs/c",
        "leases/c",
    }
    assert max(sizes.values()) == MANAGERS
