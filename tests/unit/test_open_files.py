"""Which files of a process are noted while CRIU's code inside it opens and closes descriptors of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.config import CheckpointConfig
from outlast.manager import open_for_writing
from outlast.manager._saving import save

LOOKS = 300


@pytest.fixture
def coming_and_going(tmp_path: Path) -> Iterator[None]:
    """Open files beside the test, as low descriptors as there are, and close them at once."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            for fd in [os.open(tmp_path / "passing", os.O_WRONLY | os.O_CREAT) for _ in range(20)]:
                os.close(fd)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.usefixtures("coming_and_going")
def test_a_descriptor_that_goes_while_it_is_looked_at_is_none_of_the_jobs(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    kept = tmp_path / "kept"
    with kept.open("ab", buffering=0) as file:
        file.write(b"line\n")
        for _ in range(LOOKS):
            noted = [entry for entry in open_for_writing([os.getpid()]) if entry["path"] == os.fspath(kept)]
            saved = save(
                [os.getpid()], images, os.getuid(), CheckpointConfig(scratch="/dev/shm"), skip_passing
            )
            assert noted == [{"path": os.fspath(kept), "size": 5}]
            assert [entry["size"] for entry in saved if entry["path"] == os.fspath(kept)] == [5]


def skip_passing(path: str) -> bool:
    """Whether *path* is that of the file that comes and goes, which could not be read any more."""
    return path.endswith("/passing")
