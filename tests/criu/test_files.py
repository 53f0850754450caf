"""After a restore every file is as it was at the checkpoint, or the restore is refused with the file's name.

Each test dumps a job, loses it, changes its files as the lost run or somebody else would have, has them set
back by the program that the job's shim runs, as the job's owner, and restores the job.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from criu_backend import CriuError
from outlast.config import CheckpointConfig
from outlast.errors import CheckpointRefused
from outlast.manager._saving import declared, save
from tests.criu.capsules import Job, Place
from tests.criu.saved import Saved
from tests.criu.waiting import exit_code

pytestmark = pytest.mark.criu

# What the tests use is below /tmp, which counts as any directory here, unless a test says otherwise.
LOCAL = CheckpointConfig(scratch="/tmp:/dev/shm")


def begin(place: Place, opening: str, going_on: str) -> Job:
    """Start a job that does *opening*, and after the restore, when it finds the file "go", *going_on*."""
    path = place.path / "data"
    job = place.python(
        f"PATH = {os.fspath(path)!r}\nimport mmap\n" + opening + '\nsay("ready")\nwait("go")\n' + going_on
    )
    job.says("ready")
    return job


def goes_on(job: Job, place: Place, said: str = "done") -> None:
    """Let the restored job do the rest, which it ends by saying *said*."""
    place.touch("go")
    job.says(said)
    assert job.ended() == exit_code(0)


WRITER = 'file = open(PATH, "wb", 0)\nfile.write(b"one\\n")'
APPENDER = 'file = open(PATH, "ab", 0)\nfile.write(b"one\\n")'
WRITES_ON = 'file.write(b"two\\n")\nsay("done")'


def lost(place: Place) -> bytes:
    """What was kept of what "data" lost."""
    return (place.path / "data.outlast-lost.3").read_bytes()


@pytest.mark.parametrize("how", [WRITER, APPENDER], ids=["written", "appended"])
def test_file_that_did_not_change_is_written_on(place: Place, how: str) -> None:
    saved = Saved(place, begin(place, how, WRITES_ON))
    goes_on(saved.restore(), place)

    assert (place.path / "data").read_bytes() == b"one\ntwo\n"
    assert not list(place.path.glob("*.outlast-lost*"))


@pytest.mark.parametrize("how", [WRITER, APPENDER], ids=["written", "appended"])
def test_file_that_grew_is_cut_and_what_is_cut_is_kept(place: Place, how: str) -> None:
    saved = Saved(place, begin(place, how, WRITES_ON))
    with (place.path / "data").open("ab") as file:
        file.write(b"from the lost run\n")
    goes_on(saved.restore(), place)

    assert (place.path / "data").read_bytes() == b"one\ntwo\n"
    assert lost(place) == b"from the lost run\n"


def _shrink(path: Path) -> None:
    os.truncate(path, 1)


def _overwrite_head(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"ONE\n and more")


@pytest.mark.parametrize("how", [WRITER, APPENDER], ids=["written", "appended"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_shrink, "it has 1 bytes, and had 4 at the checkpoint"),
        (Path.unlink, "No such file or directory"),
        (lambda path: path.rename(path.with_name("moved")), "No such file or directory"),
        (_overwrite_head, "what it held at the checkpoint has been overwritten since"),
    ],
    ids=["shrunk", "deleted", "renamed", "overwritten"],
)
def test_file_that_cannot_be_set_back_is_refused_by_name_and_none_is_touched(
    user_place: Place, how: str, change: Callable[[Path], object], why: str
) -> None:
    place = user_place
    saved = Saved(place, begin(place, how + '\nother = open(PATH + "2", "ab", 0)', WRITES_ON))
    (place.path / "data2").write_bytes(b"grew")
    change(place.path / "data")

    assert saved.set_back() == f"{place.path / 'data'}: {why}"
    assert (place.path / "data2").read_bytes() == b"grew"


def test_permissions_are_set_back(place: Place) -> None:
    saved = Saved(place, begin(place, WRITER, WRITES_ON))
    (place.path / "data").chmod(0o600)
    goes_on(saved.restore(), place)

    assert (place.path / "data").stat().st_mode & 0o777 == 0o644


IN_PLACE = 'file = open(PATH, "w+b", 0)\nfile.write(b"a" * 9000)\nfile.seek(100)'
READS_ON = 'file.seek(0)\nsay("done" if file.read() == b"a" * 9000 else "DIFFERENT")'


def _change_middle(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"from the lost run")


@pytest.mark.parametrize(
    "change", [_change_middle, _shrink, Path.unlink], ids=["changed", "shrunk", "deleted"]
)
def test_file_that_is_written_in_place_has_its_contents_again(
    place: Place, change: Callable[[Path], object]
) -> None:
    saved = Saved(place, begin(place, IN_PLACE, READS_ON), LOCAL)
    change(place.path / "data")
    goes_on(saved.restore(), place)

    if change is _change_middle:
        assert b"from the lost run" in lost(place)


def test_large_file_that_is_written_in_place_is_refused_when_it_changed(user_place: Place) -> None:
    place = user_place
    config = CheckpointConfig(scratch="/dev/shm", save_files="4K")
    saved = Saved(place, begin(place, IN_PLACE, READS_ON), config)
    assert "saved" not in saved.entry(place.path / "data")
    _change_middle(place.path / "data")

    assert "written in place and has changed since" in saved.set_back()


def test_large_file_that_is_written_in_place_is_used_as_it_is_where_it_did_not_change(place: Place) -> None:
    config = CheckpointConfig(scratch="/dev/shm", save_files="4K")
    saved = Saved(place, begin(place, IN_PLACE, READS_ON), config)

    goes_on(saved.restore(), place)


MAPPER = """
file = open(PATH, "w+b", 0)
file.truncate(3 << 20)
memory = mmap.mmap(file.fileno(), 3 << 20)
file.close()
memory[5:8] = b"yes"
memory[2 << 20:(2 << 20) + 3] = b"end"
"""
MAP_READS = 'say("done" if (memory[5:8], memory[2 << 20:(2 << 20) + 3]) == (b"yes", b"end") else "DIFFERENT")'


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\0" * 8192)


@pytest.mark.parametrize("change", [_overwrite, _shrink, Path.unlink], ids=["changed", "shrunk", "deleted"])
def test_mapped_file_has_its_contents_again(place: Place, change: Callable[[Path], object]) -> None:
    saved = Saved(place, begin(place, MAPPER, MAP_READS))
    blocks = (saved.images / saved.entry(place.path / "data")["saved"]).stat().st_blocks
    change(place.path / "data")
    goes_on(saved.restore(), place)

    assert blocks * 512 < 1 << 20  # holes stay holes
    assert (place.path / "data").read_bytes()[5:8] == b"yes"


@pytest.mark.parametrize("change", [_overwrite, Path.unlink], ids=["changed", "gone"])
def test_shared_memory_has_its_contents_again(place: Place, change: Callable[[Path], object]) -> None:
    segment = Path(f"/dev/shm/outlast-test-{place.path.name}")
    try:
        opening = MAPPER.replace("PATH", repr(os.fspath(segment)))
        saved = Saved(place, begin(place, opening, MAP_READS))
        change(segment)
        goes_on(saved.restore(), place)

        assert not list(segment.parent.glob(f"{segment.name}.outlast-lost*"))
    finally:
        segment.unlink(missing_ok=True)


def test_too_much_mapped_memory_refuses_the_checkpoint_and_the_job_runs_on(user_place: Place) -> None:
    place = user_place
    job = begin(place, MAPPER, MAP_READS)
    config = CheckpointConfig(save_mapped="4K")

    with pytest.raises(CheckpointRefused, match="data: mapped for writing, and more than 4K"):
        place.criu.dump(
            job.capsule,
            images := place.images(),
            lambda: print(save(job.capsule.tasks(), images, place.uid, config)),
        )
    goes_on(job, place)


def test_files_on_the_nodes_own_disk_are_made_again_on_another_node(place: Place) -> None:
    opening = """
os.makedirs(PATH + ".d/deep", mode=0o750)
file = open(PATH + ".d/deep/written", "wb", 0)
file.write(b"one\\n")
with open(PATH + ".d/deep/read", "wb", 0) as other:
    other.write(b"input")
other = open(PATH + ".d/deep/read", "rb", 0)
"""
    going_on = 'file.write(b"two\\n")\nsay("done" if other.read() == b"input" else "DIFFERENT")'
    saved = Saved(place, begin(place, opening, going_on), LOCAL)
    shutil.rmtree(place.path / "data.d")
    goes_on(saved.restore(), place)

    made = place.path / "data.d/deep"
    assert (made / "written").read_bytes() == b"one\ntwo\n"
    assert (made.stat().st_mode & 0o777, made.stat().st_uid) == (0o750, place.uid)


def test_something_else_in_the_place_of_a_saved_file_is_never_followed(user_place: Place) -> None:
    place = user_place
    saved = Saved(place, begin(place, MAPPER, MAP_READS))
    (place.path / "data").unlink()
    (place.path / "data").symlink_to("/etc/passwd")

    assert saved.set_back() == f"{place.path / 'data'}: something else has taken the place of this file"


@pytest.mark.parametrize("size", [100_000, 5 << 20])
def test_deleted_file_that_is_open_goes_with_the_checkpoint(user_place: Place, size: int) -> None:
    place = user_place
    opening = f'file = open(PATH, "w+b", 0)\nfile.write(b"x" * {size})\nos.unlink(PATH)'
    rest = f'file.seek(0)\nsay("done" if file.read() == b"x" * {size} else "DIFFERENT")'

    goes_on(Saved(place, begin(place, opening, rest)).restore(), place)


def test_deleted_file_with_another_name_is_refused_and_the_job_runs_on(user_place: Place) -> None:
    place = user_place
    opening = WRITER + '\nos.link(PATH, PATH + ".link")\nos.unlink(PATH)'
    job = begin(place, opening, WRITES_ON)

    with pytest.raises(CriuError, match="link") as refused:
        place.criu.dump(job.capsule, place.images(), lambda: None)
    assert refused.value.hint is not None
    goes_on(job, place)


def test_deleted_working_directory_is_no_hindrance(user_place: Place) -> None:
    place = user_place
    opening = WRITER + '\nos.mkdir(PATH + ".d")\nos.chdir(PATH + ".d")\nos.rmdir(PATH + ".d")'
    job = place.python(
        f"PATH = {os.fspath(place.path / 'data')!r}\n{opening}\nsay('ready')\n"
        f"wait({os.fspath(place.path / 'go')!r})\n{WRITES_ON}"
    )
    job.says("ready")

    goes_on(Saved(place, job).restore(), place)


def test_declared_files_are_cut_and_those_that_came_later_are_put_aside(place: Place) -> None:
    opening = """
os.mkdir("logs")
for name in ("a.log", "logs/b.log", "c.txt"):
    with open(name, "a") as file:
        file.write("one\\n")
"""
    saved = Saved(place, begin(place, opening, 'say("done")'), patterns=("*.log",))
    for name in ("a.log", "logs/b.log", "c.txt", "logs/later.log"):
        with (place.path / name).open("a") as file:
            file.write("from the lost run\n")
    goes_on(saved.restore(), place)

    names = ("a.log", "logs/b.log", "c.txt")
    assert [(place.path / name).read_text() for name in names] == [
        "one\n",
        "one\n",
        "one\nfrom the lost run\n",
    ]
    for name in ("a.log", "logs/b.log", "logs/later.log"):
        assert (place.path / f"{name}.outlast-lost.3").read_text() == "from the lost run\n"


def test_declared_files_are_looked_for_with_no_more_rights_than_the_user_has(user_place: Place) -> None:
    hidden = user_place.path / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "a.log").touch()
    (user_place.path / "b.log").touch()

    found = declared(os.fspath(user_place.path), ["*.log"], user_place.uid)
    assert [one["path"] for one in found[1:]] == [os.fspath(user_place.path / "b.log")]
    assert len(list(hidden.iterdir())) == 1  # this thread is root again
