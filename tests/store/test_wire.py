"""The SFTP engine against OpenSSH's own sftp-server, over a link that the tests can disturb."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outlast.errors import StoreUnavailable
from outlast.model import CheckpointId, JobKey, Lease
from outlast.store import Store, _remote, _wire, _writer
from outlast.store._keys import Keyring
from outlast.store._remote import SftpBackend
from outlast.store._sftp import Server
from outlast.store._wire import Lost, Status, Wire

if TYPE_CHECKING:
    from tests.conftest import Need


class Pipe:
    """An sftp-server of one's own, at the end of two pipes."""

    def __init__(self, binary: str, *options: str) -> None:
        self._server = subprocess.Popen([binary, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.turns = 0  # how often it was waited for an answer after something was sent
        self._sent = False

    def send(self, data: bytes) -> None:
        assert self._server.stdin is not None
        self._sent = True
        try:
            self._server.stdin.write(data)
            self._server.stdin.flush()
        except OSError as error:
            raise Lost(str(error)) from error

    def receive(self) -> bytes:
        assert self._server.stdout is not None
        self.turns += self._sent
        self._sent = False
        if not select.select([self._server.stdout], [], [], 20)[0]:
            raise Lost("no answer")
        data = os.read(self._server.stdout.fileno(), 1 << 20)
        if not data:
            raise Lost("the end")
        return data

    def is_open(self) -> bool:
        return self._server.poll() is None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.communicate(timeout=20)


class Shuffling(Pipe):
    """Hands on the answers to requests in another order, and cut into pieces of any size."""

    def __init__(self, binary: str, *options: str) -> None:
        super().__init__(binary, *options)
        self._random = random.Random(4)  # noqa: S311 - a shuffle
        self._bytes = b""
        self._answers: list[bytes] = []
        self._out = b""

    def receive(self) -> bytes:
        while not self._out:
            self._bytes += super().receive()
            while len(self._bytes) >= 4:
                end = 4 + int(struct.unpack_from(">I", self._bytes)[0])
                if len(self._bytes) < end:
                    break
                self._answers.append(self._bytes[:end])
                self._bytes = self._bytes[end:]
            self._random.shuffle(self._answers)
            self._out = b"".join(self._answers)
            self._answers.clear()
        cut = self._random.choice([1, 3, 1000, 50_000])
        data, self._out = self._out[:cut], self._out[cut:]
        return data


class Breaking(Pipe):
    """Breaks for good once *n* requests are on their way: their answers no longer arrive."""

    def __init__(self, binary: str, n: int) -> None:
        super().__init__(binary)
        self._left = n

    def send(self, data: bytes) -> None:
        if not self._left:
            raise Lost("it broke")
        self._left -= 1
        super().send(data)

    def receive(self) -> bytes:
        if not self._left:
            raise Lost("it broke")
        return super().receive()

    def is_open(self) -> bool:
        return self._left > 0 and super().is_open()


@pytest.fixture
def binary(need: Need) -> str:
    found = shutil.which(
        "sftp-server", path="/usr/lib/openssh:/usr/libexec/openssh:/usr/libexec:/usr/lib/ssh"
    )
    need("sshd", None if found else "no sftp-server; install openssh-sftp-server")
    assert found is not None
    return found


@pytest.fixture
def start(binary: str) -> Iterator[Callable[[Callable[[], Pipe]], Pipe]]:
    with contextlib.ExitStack() as ending:

        def start(make: Callable[[], Pipe]) -> Pipe:
            pipe = make()
            ending.callback(pipe.close)
            return pipe

        yield start


Start = Callable[[Callable[[], Pipe]], Pipe]
NOWHERE = Server("nobody", "pipe", 22, Path("/none"), Path("/none"), 20.0)


def backend_over(link: Pipe, top: Path) -> SftpBackend:
    return SftpBackend(NOWHERE, str(top), lambda _: link)


def test_answers_may_come_in_any_order_and_in_pieces(start: Start, binary: str, tmp_path: Path) -> None:
    for options in ((), ("-P", "limits,fsync")):
        backend = backend_over(start(lambda options=options: Shuffling(binary, *options)), tmp_path)  # type: ignore[misc]
        data = os.urandom(3_000_000)
        name = f"file-{len(options)}"

        backend.create(name, [data[:100], data[100:]])
        assert (tmp_path / name).read_bytes() == data
        assert backend.read(name) == data
        ranges = [(offset, 10_000) for offset in range(0, 2_000_000, 7919)]
        assert list(backend.read_ranges(name, ranges)) == [
            data[start : start + size] for start, size in ranges
        ]


def test_every_failed_write_is_noticed(start: Start, binary: str) -> None:
    wire = Wire(start(lambda: Pipe(binary)))
    handle = wire.open("/dev/full", _wire.FOR_WRITING)

    with pytest.raises(Status):
        wire.write(handle, [b"x" * 1_000_000])
    assert wire.lstat("/dev").mode  # the session goes on
    assert not wire.lost


def test_packet_that_is_no_sftp_ends_the_session(start: Start, binary: str) -> None:
    class Chatty(Pipe):
        def receive(self) -> bytes:
            super().receive()
            return b"Welcome to this machine!\n"

    with pytest.raises(Lost, match="no SFTP"):
        Wire(start(lambda: Chatty(binary)))


def test_publish_over_a_link_that_breaks_anywhere_leaves_all_or_nothing(
    start: Start,
    binary: str,
    tmp_path: Path,
    job: JobKey,
    source: Path,
    keyring: Keyring,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A server that answers late is asked once more how far away it is. That must not depend on the machine's
    # load here: the n-th request is to be the same one each time.
    monkeypatch.setattr(_remote, "connections", lambda *_: 1)
    (source / "deep/hole").unlink()
    top = tmp_path / "store"
    top.mkdir()
    complete = 0
    for n in itertools.count(1):
        shutil.rmtree(top)
        top.mkdir()
        link = start(lambda n=n: Breaking(binary, n))  # type: ignore[misc]
        try:
            Store(backend_over(link, top), keyring).publish(job, CheckpointId(0, 1), source, {})
        except StoreUnavailable:
            pass
        else:
            break
        finally:
            link.close()  # the server ends its work first

        store = Store(backend_over(start(lambda: Pipe(binary)), top), keyring)
        seen = [checkpoint.id for checkpoint in store.checkpoints(job)]
        complete += bool(seen)
        for id in seen:
            store.fetch(job, id, tmp_path / f"fetched-{n}")
        if n % 5 == 0:
            store.publish(job, CheckpointId(0, 2), source, {})
            assert store.forget(job, 1) == len(seen)
            files = [path for path in (top / "jobs").rglob("*") if path.is_file()]
            assert sorted(path.suffix for path in files) == [".ck", ".pack"]
        store.close()

    assert n > 20
    assert complete == 1  # where only the answer to the last request got lost


@pytest.mark.parametrize("extensions", ["", "-P posix-rename,fsync,limits,statvfs"])
def test_steady_state_takes_one_round_trip(
    start: Start, binary: str, tmp_path: Path, job: JobKey, keyring: Keyring, extensions: str
) -> None:
    link = start(lambda: Pipe(binary, *extensions.split()))
    store = Store(backend_over(link, tmp_path), keyring)
    lease = Lease(job, 0, "n1", 2000)
    store.renew_lease(lease)
    store.put_record(job, "start", {})

    for call in (lambda: store.renew_lease(lease), lambda: store.take_requests(job)):
        before = link.turns
        call()
        assert link.turns == before + 1


def test_what_decides_on_a_restart_is_read_in_two_round_trips(
    start: Start, binary: str, tmp_path: Path, job: JobKey, keyring: Keyring
) -> None:
    image, top = tmp_path / "image", tmp_path / "store"
    image.mkdir()
    top.mkdir()
    (image / "pages").write_bytes(os.urandom(4096))
    link = start(lambda: Pipe(binary))
    store = Store(backend_over(link, top), keyring)
    store.put_record(job, "start", {})
    store.publish(job, CheckpointId(0, 1), image, {})
    known = store.checkpoints(job)
    before = link.turns
    with store.foreseeing(job, "start", "ended"):
        found = store.take_requests(job), store.get_record(job, "ended"), store.get_record(job, "start")
        again = store.checkpoints(job)

    assert (found, again) == (([], None, {}), known)
    assert link.turns == before + 2


def test_new_writer_asks_for_all_trailers_at_once(
    start: Start, binary: str, tmp_path: Path, job: JobKey, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_writer, "PACK_SIZE", 1 << 14)
    monkeypatch.setattr(_writer, "_AHEAD", 1)
    image, top = tmp_path / "image", tmp_path / "store"
    image.mkdir()
    top.mkdir()
    turns = []
    for seq, pages in enumerate((200, 20_00, 4000), 1):  # as many packs more
        (image / "pages").write_bytes(os.urandom(pages * 4096))
        Store(backend_over(start(lambda: Pipe(binary)), top), keyring).publish(
            job, CheckpointId(0, seq), image, {}
        )
        link = start(lambda: Pipe(binary))
        store = Store(backend_over(link, top), keyring)
        store.checkpoints(job)
        before = link.turns
        store.publish(job, CheckpointId(1, seq), image, {})
        turns.append(link.turns - before)
        shutil.rmtree(top / "jobs")

    assert turns[0] == turns[1] == turns[2]


def test_looking_at_many_leases_takes_as_long_as_at_one(
    start: Start, binary: str, tmp_path: Path, job: JobKey, keyring: Keyring
) -> None:
    link = start(lambda: Pipe(binary))
    store = Store(backend_over(link, tmp_path), keyring)
    turns = set()
    for count in range(1, 60):
        store.renew_lease(Lease(JobKey("testbed", str(count)), 0, "n1", 2000))
        store.leases("testbed")
        before = link.turns
        assert len(store.leases("testbed")) == count
        turns.add(link.turns - before)

    assert max(turns) <= 4 + 4  # the clock, and opening, reading and closing the directory
