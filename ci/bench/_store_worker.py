"""The side of the store benchmark that runs Outlast itself, in a Python that has its dependencies.

Reads one JSON object a line:

    {"do": "connect"}
    {"do": "publish", "images": DIRECTORY, "sequence": N}
    {"do": "fetch", "sequence": N, "into": DIRECTORY}
    {"do": "changed", "old": DIRECTORY, "new": DIRECTORY}
    {"do": "close"}

and answers each by one: seconds; cpu, the seconds of this process and of the ssh that it started; bytes,
added to the store; anonymous, the most anonymous memory so far, in bytes. Until "close" the store stays open,
as the manager of a job has it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
import zstandard

from criu_backend._memory import take_pages
from outlast.config import StoreConfig
from outlast.model import CheckpointId, JobKey
from outlast.store import Store, open_store

_PAGE = 4096


class Worker:
    """One store, and one job in it."""

    def __init__(self, config: StoreConfig, job: JobKey) -> None:
        self._config = config
        self._job = job
        self._stack = contextlib.ExitStack()
        self._store: Store | None = None

    def connect(self) -> int:
        """Open the store and make one round trip of it."""
        if self._store is None:
            self._store = self._stack.enter_context(open_store(self._config))
        self._store.checkpoints(self._job)
        return 0

    def close(self) -> int:
        """End the connection; what is known of the store's content goes with it."""
        self._stack.close()
        self._store = None
        return 0

    def publish(self, images: Path, sequence: int) -> int:
        """Publish *images* as a plain dump is published; return the bytes that it added."""
        assert self._store is not None  # noqa: S101 - "connect" comes first
        work = images.with_name(f"{images.name}.work")
        shutil.copytree(images, work, copy_function=os.link)
        memories = take_pages(work, work.with_name(f"{work.name}.pages"))
        try:
            done = self._store.publish(self._job, CheckpointId(1, sequence), work, {}, memories)
        finally:
            for memory in memories:
                memory.close()
            shutil.rmtree(work.with_name(f"{work.name}.pages"))
            shutil.rmtree(work)
        return done.stored_bytes

    def fetch(self, sequence: int, into: Path) -> int:
        """Fetch a checkpoint; the caller compares it."""
        assert self._store is not None  # noqa: S101 - "connect" comes first
        self._store.fetch(self._job, CheckpointId(1, sequence), into)
        return 0

    def changed(self, old: Path, new: Path) -> int:
        """Return the bytes of the pages of *new* that *old* has not, in zstd frames of 256 KiB.

        Pages of zeros do not count; a page that *old* has elsewhere does not, nor the second of two alike.
        """
        seen = {*(hash_ for _, hash_ in _pages(old)), xxhash.xxh3_128_digest(bytes(_PAGE))}
        fresh = []
        for page, hash_ in _pages(new):
            if hash_ not in seen:
                seen.add(hash_)
                fresh.append(page)
        compressor = zstandard.ZstdCompressor(level=1)
        return sum(
            len(compressor.compress(b"".join(fresh[start : start + 64])))
            for start in range(0, len(fresh), 64)
        )

    def do(self, request: dict[str, Any]) -> int:
        """Do what *request* asks for."""
        if request["do"] == "publish":
            return self.publish(Path(request["images"]), request["sequence"])
        if request["do"] == "fetch":
            return self.fetch(request["sequence"], Path(request["into"]))
        if request["do"] == "changed":
            return self.changed(Path(request["old"]), Path(request["new"]))
        return self.connect() if request["do"] == "connect" else self.close()


def _pages(images: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield every page of the memory in *images*, and its hash."""
    for path in sorted(images.glob("pages-*.img")):
        with path.open("rb") as file:
            while page := file.read(_PAGE):
                yield page, xxhash.xxh3_128_digest(page)


def cpu_seconds() -> float:
    """The processor time of this process and its children, those that still run included."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    tick = os.sysconf("SC_CLK_TCK")
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for pid in (task / "children").read_text().split():
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / tick
    return total


class Peak:
    """Watches this process's anonymous memory."""

    def __init__(self) -> None:
        self.bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def look(self) -> None:
        """Look once."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                self.bytes = max(self.bytes, int(line.split()[1]) << 10)

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(0.05)


def main() -> int:
    """Answer requests until there are none."""
    parser = argparse.ArgumentParser()
    for name in ("--url", "--identity", "--known-hosts", "--key", "--transport", "--job"):
        parser.add_argument(name, required=True)
    given = parser.parse_args()
    config = StoreConfig(
        url=given.url,
        identity=Path(given.identity),
        known_hosts=Path(given.known_hosts),
        key=Path(given.key),
        transport=given.transport,
        timeout=60.0,
    )
    worker = Worker(config, JobKey("bench", given.job))
    peak = Peak()
    for line in sys.stdin:
        request = json.loads(line)
        gc.collect()
        cpu, begin = cpu_seconds(), time.monotonic()
        added = worker.do(request)
        seconds = time.monotonic() - begin
        peak.look()
        answer = {
            "seconds": seconds,
            "cpu": cpu_seconds() - cpu,
            "bytes": added,
            "anonymous": peak.bytes,
        }
        print(json.dumps(answer), flush=True)
    worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
