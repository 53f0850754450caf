"""What a checkpoint takes of the node's memory does not depend on its size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outlast.config import StoreConfig

# MiB; $OUTLAST_TEST_IMAGE_MIB makes it what a large job has.
SIZE = int(os.environ.get("OUTLAST_TEST_IMAGE_MIB", "256"))
BOUND = (128 << 20) + 24 * SIZE * 256

PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from outlast.config import StoreConfig
from outlast.model import CheckpointId, JobKey
from outlast.store import open_store

url, key, identity, known_hosts, here, size, compressible, do = sys.argv[1:]
config = StoreConfig(url, Path(identity), Path(known_hosts), key=Path(key), timeout=60)
pages = int(size) * 256

class Memory:
    name = "pages-1.img"
    runs = [(1, 0x1000, pages)]
    round = 0
    def readinto(self, space, vaddr, buffer):
        values = np.random.default_rng([vaddr, self.round]).integers(0, 1 << 63, len(buffer) // 8)
        if compressible == "1":
            values >>= 60
        np.frombuffer(buffer, np.int64)[:] = values

job, id = JobKey("c", "1"), CheckpointId(0, 1)
(Path(here) / "small").mkdir(exist_ok=True)
with open_store(config) as store:
    if do == "publish":
        memory = Memory()
        store.publish(job, id, Path(here, "small"), {}, [memory])
        memory.round = 1
        store.publish(job, CheckpointId(0, 2), Path(here, "small"), {}, [memory])
        store.forget(job, 1)
    else:
        store.fetch(job, CheckpointId(0, 2), Path(here, "fetched"))
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("compressible", ["0", "1"])
def test_publish_and_fetch_stay_within_the_bound(
    config: StoreConfig, tmp_path: Path, compressible: str
) -> None:
    peaks = {}
    for do in ("publish", "fetch"):
        places = (config.url, config.key, config.identity, config.known_hosts, tmp_path)
        command = [sys.executable, "-c", PROGRAM, *map(str, places), str(SIZE), compressible, do]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks[do] = int(done.stdout) << 10
    print(json.dumps(peaks))

    assert (tmp_path / "fetched/pages-1.img").stat().st_size == SIZE << 20
    assert max(peaks.values()) < BOUND, peaks
    # Two rounds of a job whose pages all change are in the store at the same time.
    (tmp_path / "fetched/pages-1.img").unlink()
