"""CRIU reaches a job's files as the job's owner, whom a file server and the file system know, and not as root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from criu_backend import CriuError
from tests.criu.capsules import Place
from tests.criu.waiting import exit_code

pytestmark = pytest.mark.criu

READER = """
    file = open("data", "rb", buffering=0)
    say(file.read(1).decode())
    wait("go")
    say(file.read(1).decode())
"""


def secret(place: Place) -> Path:
    """A file that only root may read, as long as the job's own and of the same mode."""
    path = place.path.with_name(place.path.name + "-secret")
    path.write_bytes(b"XY")
    path.chmod(0o644)
    directory = path.with_name(path.name + ".d")
    directory.mkdir(mode=0o700)
    return path.rename(directory / "secret")


def test_a_file_that_only_the_owner_may_reach_is_open_after_a_restore(user_place: Place) -> None:
    place = user_place
    place.path.chmod(0o700)
    data = place.path / "data"
    data.write_bytes(b"ab")
    data.chmod(0o600)
    os.chown(data, place.uid, place.uid)
    job = place.python(READER)
    job.says("a")

    after = place.again(job)
    place.touch("go")
    after.says("b")
    assert after.ended() == exit_code(0)


def test_a_path_that_now_leads_to_a_file_of_roots_is_not_opened_for_the_job(user_place: Place) -> None:
    place = user_place
    data = place.path / "data"
    data.write_bytes(b"ab")
    data.chmod(0o644)
    job = place.python(READER)
    job.says("a")
    images, _ = place.dump(job)
    place.lose(job)
    hidden = secret(place)
    try:
        data.unlink()
        data.symlink_to(hidden)

        with pytest.raises(CriuError, match="Permission denied"):
            place.restore(images)
    finally:
        hidden.unlink()
        hidden.parent.rmdir()
    assert place.output.read_text().split() == ["a"]


def test_a_program_that_its_user_may_run_and_not_read_is_restored(user_place: Place) -> None:
    place = user_place
    program = place.path / "sleeper"
    program.write_bytes(Path("/usr/bin/sleep").read_bytes())
    program.chmod(0o711)
    job = place.start([str(program), "1000"])

    after = place.again(job)

    assert after.capsule.alive
    assert {Path(f"/proc/{pid}/comm").read_text().strip() for pid in after.capsule.tasks()} == {"sleeper"}
