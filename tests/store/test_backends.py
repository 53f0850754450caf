"""The contract of `Backend`, run against every backend there is."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outlast.errors import StoreRefused
from outlast.store._backend import Backend
from outlast.store._foresight import Foresight
from outlast.store._local import LocalBackend
from outlast.store._remote import SftpBackend

if TYPE_CHECKING:
    from tests.conftest import SshServer, StartSshd


@pytest.fixture(scope="module")
def bare_sshd(start_sshd: StartSshd) -> SshServer:
    """A server that speaks SFTP version 3 and nothing beyond it."""
    return start_sshd(sftp="internal-sftp -P posix-rename,fsync,limits,statvfs")


@pytest.fixture(params=["local", "paramiko", "openssh", "bare-paramiko"])
def server(request: pytest.FixtureRequest) -> SshServer | None:
    """The server of the store, spoken to by either transport, or None for a store in a directory."""
    if request.param == "local":
        return None
    sshd: SshServer = request.getfixturevalue("bare_sshd" if "bare" in request.param else "sshd")
    sshd.transport = request.param.removeprefix("bare-")
    return sshd


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def test_new_file_comes_back_whole(backend: Backend, top: Path) -> None:
    chunks = [b"", b"a" * 700_001, b"b", os.urandom(3 << 20)]

    assert backend.create("some/where/file", iter(chunks)) == sum(map(len, chunks))
    assert backend.read("some/where/file") == b"".join(chunks)
    assert (top / "some/where/file").read_bytes() == b"".join(chunks)
    assert names(top) == {"some/where/file"}


def test_files_and_directories_are_their_owners_alone(backend: Backend, top: Path) -> None:
    backend.create("some/file", [b"memory of a job"])
    backend.replace("some/record", b"{}")

    assert (top / "some").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (top / "some").iterdir()} == {0o600}


def test_free_room_is_the_disks_where_the_server_can_tell(
    backend: Backend, small_disk: Path, request: pytest.FixtureRequest
) -> None:
    backend.create("some/file", [bytes(1 << 20)])
    tells = "bare" not in request.node.callspec.params["server"]

    assert backend.free() == (shutil.disk_usage(small_disk).free if tells else None)


def test_name_that_is_taken_is_refused_and_its_file_untouched(backend: Backend, top: Path) -> None:
    backend.create("file", [b"first"])

    with pytest.raises(FileExistsError):
        backend.create("file", [b"second"])
    assert backend.read("file") == b"first"
    assert names(top) == {"file"}


def test_of_two_that_create_a_name_at_once_one_wins(
    backend: Backend, server: SshServer | None, top: Path
) -> None:
    barrier = threading.Barrier(2, timeout=20)
    won: list[bytes] = []

    def create(mine: Backend, content: bytes) -> None:
        def chunks() -> Iterator[bytes]:
            yield content
            barrier.wait()

        try:
            mine.create("file", chunks())
            won.append(content)
        except FileExistsError:
            pass

    backends = [LocalBackend(top) if server is None else remote_backend(backend) for _ in range(2)]
    for _ in range(5):
        threads = [
            threading.Thread(target=create, args=each) for each in zip(backends, (b"1", b"2"), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

        assert len(won) == 1
        assert backend.read("file") == won.pop()
        assert names(top) == {"file"}
        backend.remove("file")
    for each in backends:
        each.close()


def remote_backend(backend: Backend) -> Backend:
    assert isinstance(backend, SftpBackend)
    return SftpBackend(backend.server, backend.root)


def test_what_the_chunks_raise_goes_through_and_nothing_is_kept(backend: Backend, top: Path) -> None:
    class Interrupted(Exception):
        pass

    def chunks() -> Iterator[bytes]:
        yield b"x" * (2 << 20)
        raise Interrupted

    with pytest.raises(Interrupted):
        backend.create("directory/file", chunks())
    assert names(top) == set()
    assert backend.create("directory/file", [b"again"]) == 5


def test_replacing_makes_and_replaces(backend: Backend, top: Path) -> None:
    backend.replace("directory/file", b"first and longer")
    backend.replace("directory/file", b"second")

    assert backend.read("directory/file") == b"second"
    assert names(top) == {"directory/file"}


def test_appending_makes_and_adds(backend: Backend) -> None:
    backend.append("directory/file", b"one")
    backend.append("directory/file", b"two" * 100_000)

    assert backend.read("directory/file") == b"one" + b"two" * 100_000


def test_ranges_come_in_the_order_asked_for(backend: Backend) -> None:
    data = os.urandom(3 << 20)
    backend.create("file", [data])
    ranges = [(5, 10), (1 << 20, 1 << 20), (0, 1), (len(data) - 700_000, 700_000), (2 << 20, 300_000)]

    assert list(backend.read_ranges("file", ranges)) == [data[start : start + size] for start, size in ranges]


def test_range_beyond_the_end_is_an_error(backend: Backend) -> None:
    backend.create("file", [b"12345"])

    with pytest.raises(EOFError):
        list(backend.read_ranges("file", [(0, 5), (3, 3)]))
    assert backend.read("file") == b"12345"


def test_parts_of_many_files_come_in_the_order_asked_for(backend: Backend) -> None:
    data = {f"packs/{number}": os.urandom(400_000 + number) for number in range(230)}
    for name, content in data.items():
        backend.create(name, [content])
    wanted = [(name, len(data[name]) - 300_016, 300_016) for name in sorted(data)]

    assert list(backend.read_each(wanted)) == [data[name][-300_016:] for name in sorted(data)]
    assert list(backend.read_each([])) == []
    with pytest.raises(FileNotFoundError):
        list(backend.read_each([wanted[0], ("packs/absent", 0, 1), wanted[1]]))
    with pytest.raises(EOFError):
        list(backend.read_each([(*wanted[0][:2], 300_017)]))
    assert next(backend.read_each(wanted[:1])) == data[wanted[0][0]][-300_016:]


def test_reading_may_end_early_and_other_calls_come_between(backend: Backend) -> None:
    data = os.urandom(8 << 20)
    backend.create("file", [data])

    ranges = backend.read_ranges("file", [(start, 1 << 20) for start in range(0, len(data), 1 << 20)])
    assert next(ranges) == data[: 1 << 20]
    assert backend.entry("file") is not None
    assert next(ranges) == data[1 << 20 : 2 << 20]
    del ranges
    assert backend.read("file") == data


def test_what_is_not_there_is_told(backend: Backend) -> None:
    with pytest.raises(FileNotFoundError):
        backend.read("no/file")
    with pytest.raises(FileNotFoundError):
        list(backend.read_ranges("no/file", [(0, 1)]))
    assert backend.entry("no/file") is None
    assert backend.list("no/directory") == []
    assert not backend.remove("no/file")
    assert not backend.remove_directory("no/directory")
    assert not backend.rename("no/directory", "other/place")
    assert not backend.touch("no/file", create=False)


def test_listing_tells_names_sizes_kinds_and_times(backend: Backend) -> None:
    backend.create("directory/b", [b"12345"])
    backend.create("directory/a/below", [b""])
    before = backend.clock()
    backend.create("directory/c", [b"1"])

    a, b, c = backend.list("directory")
    assert [(each.name, each.is_directory) for each in (a, b, c)] == [("a", True), ("b", False), ("c", False)]
    assert (b.size, c.size) == (5, 1)
    assert b.mtime <= before <= c.mtime
    assert backend.entry("directory/b") == b


def test_long_listing_is_whole(backend: Backend, top: Path) -> None:
    (top / "directory").mkdir()
    for number in range(1500):
        (top / "directory" / f"{number:04}").touch()

    assert [entry.name for entry in backend.list("directory")] == [f"{number:04}" for number in range(1500)]


def test_what_is_looked_at_together_is_what_there_is(backend: Backend) -> None:
    for name in ("records/b", "records/a", "records/deep/c", "empty", "large"):
        backend.create(name, [name.encode() * (name != "empty") * (20_000 if name == "large" else 1)])

    listed, read = backend.look(["records", "nowhere"], ["records/a", "empty", "records/none", "large"])
    assert listed == {"records": backend.list("records"), "nowhere": []}
    read.pop("large", None)  # may be more than what is had in one go
    assert read == {"records/a": b"records/a", "empty": b"", "records/none": None}


def test_what_was_foreseen_is_read_once_and_not_after_a_change(backend: Backend, top: Path) -> None:
    mine = Foresight(backend)
    mine.create("records/a", [b"old"])
    with mine.foreseeing(["records"], ["records/a", "records/b"]):
        (top / "records/a").write_bytes(b"by another")
        (top / "records/c").write_bytes(b"by another")
        assert [entry.name for entry in mine.list("records")] == ["a"]
        assert [entry.name for entry in mine.list("records")] == ["a", "c"]
        assert (mine.read("records/a"), mine.read("records/a")) == (b"old", b"by another")
    with mine.foreseeing(["records"], ["records/a", "records/b"]):
        mine.replace("records/b", b"mine")
        assert mine.read("records/b") == b"mine"
        assert [entry.name for entry in mine.list("records")] == ["a", "b", "c"]
    with mine.foreseeing([], ["records/a"]):
        pass
    (top / "records/a").write_bytes(b"and again")
    assert mine.read("records/a") == b"and again"


def test_removing_tells_who_did_it(backend: Backend) -> None:
    backend.create("file", [b""])

    assert backend.remove("file")
    assert not backend.remove("file")


def test_only_an_empty_directory_is_removed(backend: Backend) -> None:
    backend.create("directory/file", [b""])

    assert not backend.remove_directory("directory")
    backend.remove("directory/file")
    assert backend.remove_directory("directory")
    assert backend.list("") == []


def test_directory_is_renamed_with_all_in_it(backend: Backend) -> None:
    backend.create("from/here/file", [b"content"])

    assert backend.rename("from/here", "to/there")
    assert backend.read("to/there/file") == b"content"
    assert backend.list("from") == []


def test_touching_stamps_a_file_by_the_stores_clock(backend: Backend, top: Path) -> None:
    assert backend.touch("directory/file", create=True)
    for _ in range(2):
        os.utime(top / "directory/file", (1000, 1000))
        before = backend.clock()

        assert backend.touch("directory/file", create=False)
        entry = backend.entry("directory/file")
        assert entry is not None
        assert before <= entry.mtime <= backend.clock()


def test_touching_tells_when_the_file_is_gone_and_makes_it_again(backend: Backend, top: Path) -> None:
    backend.touch("file", create=True)
    backend.touch("file", create=False)
    (top / "file").unlink()

    assert not backend.touch("file", create=False)
    assert not (top / "file").exists()
    assert backend.touch("file", create=True)
    (top / "file").unlink()
    assert backend.touch("file", create=True)
    assert (top / "file").exists()


def test_clock_goes_on_and_leaves_nothing_behind(backend: Backend, top: Path) -> None:
    first = backend.clock()
    time.sleep(1.1)

    assert 1.0 <= backend.clock() - first <= 10
    assert abs(first - time.time()) < 10
    assert names(top) == set()


def test_missing_top_directory_is_an_error_and_not_an_empty_store(backend: Backend, top: Path) -> None:
    top.rmdir()

    with pytest.raises(StoreRefused, match="no such directory"):
        backend.list("jobs")
    with pytest.raises(StoreRefused, match="no such directory"):
        backend.create("jobs/file", [b""])
    assert not top.exists()


def test_full_disk_is_refused_and_nothing_half_done_stays(backend: Backend, small_disk: Path) -> None:
    with pytest.raises(StoreRefused, match=r"(?i)no space|'Failure'"):
        backend.create("file", [os.urandom(1 << 20)] * 10)

    assert names(small_disk) == set()
    assert backend.create("file", [b"x" * (1 << 20)]) == 1 << 20
