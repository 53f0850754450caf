"""SFTP version 3 over any channel: many requests under way at once, and every answer looked at.

Source: draft-ietf-secsh-filexfer-02, and OpenSSH's PROTOCOL file for the extensions. A client that lets
answers to writes go unread (as paramiko's pipelined files do) takes a full disk for success and leaves
holes of zeros behind; so here no answer is dropped without a look at its status.
"""

from __future__ import annotations

import contextlib
import struct
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias

from outlast.store._bytes import PERMISSIONS, attributes_at, pieces, string_at
from outlast.store._bytes import Attributes as Attributes
from outlast.store._bytes import block as block
from outlast.store._bytes import text as text

OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT = 3, 4, 5, 6, 7, 8
OPENDIR, READDIR, REMOVE, MKDIR, RMDIR, RENAME, EXTENDED = 11, 12, 13, 14, 15, 18, 200
_INIT, _VERSION, _STATUS, _HANDLE, _DATA, _NAME, _ATTRS, _EXTENDED_REPLY = 1, 2, 101, 102, 103, 104, 105, 201

# Flags of OPEN.
FOR_READING, FOR_WRITING, APPENDING, CREATING, EXCLUSIVE = 0x01, 0x02, 0x04, 0x08, 0x20

# Codes of STATUS.
_OK, END, NO_SUCH_FILE, PERMISSION_DENIED, FAILURE, _BAD_MESSAGE, _NO_CONNECTION, CONNECTION_LOST = range(8)

_SMALL_REQUEST = 32 << 10  # bytes of data that every server takes in one request
_LARGE_REQUEST = 255 << 10  # what OpenSSH takes at most
_IN_FLIGHT = 64  # requests
_IN_FLIGHT_BYTES = 8 << 20  # fills 400 MB/s at a round trip of 20 ms
_FSYNC_EVERY = 32 << 20  # bytes: one fsync of all at the end could take longer than any timeout
_LARGEST_PACKET = 1 << 20  # of an answer; beyond it the stream is out of step

Request = tuple[int, bytes]  # a kind and its payload without the id
Reply = tuple[int, memoryview]  # a kind and its payload without the id


# Bytes moved so far: sessions to share the work with, each with its handle of the file.
More: TypeAlias = "Callable[[int], Sequence[tuple[Wire, bytes]]]"


class Link(Protocol):
    """A byte stream to an SFTP server."""

    def send(self, data: bytes) -> None:
        """Send all of *data*. Raises Lost."""

    def receive(self) -> bytes:
        """Return the next bytes, at least one. Raises Lost: none came in time, or none will come."""

    def is_open(self) -> bool:
        """Whether the stream still stands, as far as this side knows."""

    def close(self) -> None:
        """End the stream; a wait in another thread ends with it."""


class Lost(Exception):
    """The server does not answer, or no longer makes sense: the session is over."""


class Status(Exception):
    """The server answered a request with other than OK; *code* is one of SFTP's, the text its own."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text or f"status {code}")
        self.code = code


def _alone(_: int) -> Sequence[tuple[Wire, bytes]]:
    return ()


class Wire:
    """One SFTP session. After Lost it is of no more use; after Status it goes on."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._buffer = memoryview(b"")
        self._id = 0
        self._arrived: dict[int, Reply] = {}  # answers to requests that are not asked for yet
        self.lost = False
        self.extensions = self._handshake()
        self._request_size = self._limit()
        # How many requests may be under way.
        self.depth = max(1, min(_IN_FLIGHT, _IN_FLIGHT_BYTES // self._request_size))

    # --- operations -------------------------------------------------------------------------------

    def open(self, path: str, flags: int) -> bytes:
        """Open *path* and return the handle; a file that this creates is its owner's alone."""
        return handle_of(*self.call(OPEN, text(path) + struct.pack(">III", flags, PERMISSIONS, 0o600)))

    def close(self, handle: bytes) -> None:
        """Give up *handle*."""
        check(*self.call(CLOSE, block(handle)))

    def lstat(self, path: str) -> Attributes:
        """Return the attributes of *path*, not following a symbolic link."""
        return attributes(*self.call(LSTAT, text(path)))

    def write(self, handle: bytes, chunks: Iterable[bytes], more: More = _alone) -> int:
        """Write *chunks* from the file's start on and make them durable; return the bytes written.

        All answers are in when this returns, so the bytes are on the server's disk. *more* is called with the
        bytes sent so far, and gives sessions to share the work with, which have the same file open.
        """
        size = 0
        helped = False

        def requests() -> Iterator[tuple[Wire, Request]]:
            nonlocal size, helped
            synced = 0
            for turn, piece in enumerate(pieces(chunks, self._request_size)):
                lanes = [(self, handle), *more(size)]
                helped = helped or len(lanes) > 1
                wire, its_handle = lanes[turn % len(lanes)]
                yield wire, (WRITE, block(its_handle) + struct.pack(">QI", size, len(piece)) + piece)
                size += len(piece)
                if size - synced >= _FSYNC_EVERY:
                    synced = size
                    yield from ((self, request) for request in self.fsync_requests(handle))
            if not helped:
                yield from ((self, request) for request in self.fsync_requests(handle))

        with contextlib.closing(pipeline(requests())) as replies:
            for kind, payload in replies:
                check(kind, payload)
        if helped:  # what others have sent is surely written only now that they have been answered
            for request in self.fsync_requests(handle):
                check(*self.call(*request))
        return size

    def fsync_requests(self, handle: bytes) -> list[Request]:
        """The request that makes *handle*'s bytes durable, where the server offers it."""
        if b"fsync@openssh.com" not in self.extensions:
            return []
        return [(EXTENDED, text("fsync@openssh.com") + block(handle))]

    def read(self, handle: bytes, ranges: Iterable[tuple[int, int]], more: More = _alone) -> Iterator[bytes]:
        """Yield the bytes of each (offset, length); *more* is as for `write`.

        Raises EOFError where the file ends too early.
        """
        return self._read(((handle, offset, length) for offset, length in ranges), more)

    def read_each(self, wanted: Iterable[tuple[str, int, int]]) -> Generator[bytes, None, None]:
        """Yield the bytes of each (path, offset, length); three round trips for all of them together.

        Raises Status where a file cannot be opened, EOFError where one ends too early.
        """
        wanted = list(wanted)
        opening = [(OPEN, text(path) + struct.pack(">II", FOR_READING, 0)) for path, _, _ in wanted]
        handles: list[bytes] = []
        failed: Status | None = None
        try:
            with contextlib.closing(self.pipeline(opening)) as replies:
                for reply in replies:
                    try:
                        handles.append(handle_of(*reply))
                    except Status as status:
                        failed = failed or status
            if failed is not None:
                raise failed
            pairs = zip(handles, wanted, strict=True)
            yield from self._read((handle, offset, length) for handle, (_, offset, length) in pairs)
        finally:
            if not self.lost:
                with contextlib.closing(self.pipeline((CLOSE, block(one)) for one in handles)) as replies:
                    for reply in replies:
                        check(*reply)

    def _read(self, ranges: Iterable[tuple[bytes, int, int]], more: More = _alone) -> Iterator[bytes]:
        # handle, offset, length, is the last one of its range
        asked: deque[tuple[bytes, int, int, bool]] = deque()

        def requests() -> Iterator[tuple[Wire, Request]]:
            total = turn = 0
            for handle, offset, length in ranges:
                end = offset + length
                for start in range(offset, end, self._request_size):
                    size = min(self._request_size, end - start)
                    asked.append((handle, start, size, start + size == end))
                    lanes = [(self, handle), *more(total)]
                    wire, its_handle = lanes[turn % len(lanes)]
                    turn += 1
                    yield wire, (READ, block(its_handle) + struct.pack(">QI", start, size))
                    total += size

        got: list[bytes | memoryview] = []
        with contextlib.closing(pipeline(requests())) as replies:
            for kind, payload in replies:
                handle, offset, length, last = asked.popleft()
                data: bytes | memoryview = data_of(kind, payload)
                while len(data) < length:  # a server may send less than was asked for
                    position = struct.pack(">QI", offset + len(data), length - len(data))
                    rest = data_of(*self.call(READ, block(handle) + position))
                    if not rest:
                        raise EOFError(f"ends before byte {offset + length}")
                    data = bytes(data) + bytes(rest)
                got.append(data)
                if last:
                    yield b"".join(got)
                    got.clear()

    def list(self, path: str) -> list[tuple[str, Attributes]]:
        """Return the names in the directory *path* and their attributes, without "." and ".."."""
        handle = handle_of(*self.call(OPENDIR, text(path)))
        entries: list[tuple[str, Attributes]] = []
        try:
            ended = False
            while not ended:
                # OpenSSH sends 100 names at a time; those asked for in vain cost next to nothing.
                with contextlib.closing(self.pipeline([(READDIR, block(handle))] * 8)) as replies:
                    for reply in replies:
                        some = names_of(*reply)
                        ended = ended or some is None
                        entries += some or ()
        finally:
            if not self.lost:
                self.close(handle)
        return entries

    def extended(self, name: str, *arguments: str) -> memoryview:
        """Make the request of the extension *name* and return the payload of its answer."""
        kind, payload = self.call(EXTENDED, text(name) + b"".join(map(text, arguments)))
        if kind != _EXTENDED_REPLY:
            check(kind, payload)
        return payload

    # --- requests and replies ---------------------------------------------------------------------

    def call(self, kind: int, payload: bytes) -> Reply:
        """Send one request and return its answer: one round trip."""
        return self._reply(self._send(kind, payload))

    def pipeline(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """As the function `pipeline`, all in this session."""
        return pipeline((self, request) for request in requests)

    def _send(self, kind: int, payload: bytes) -> int:
        self._id = (self._id + 1) & 0xFFFFFFFF
        packet = struct.pack(">IBI", len(payload) + 5, kind, self._id) + payload
        with self._losing():
            self._link.send(packet)
        return self._id

    def _reply(self, request: int) -> Reply:
        """Return the answer to *request*. OpenSSH answers in order; version 3 allows any order."""
        while request not in self._arrived:
            packet = self._packet()
            (number,) = struct.unpack_from(">I", packet, 1)
            self._arrived[number] = (packet[0], packet[5:])
        return self._arrived.pop(request)

    def _packet(self) -> memoryview:
        """Return the next packet: its kind (one byte), then what follows."""
        with self._losing():
            (length,) = struct.unpack(">I", self._take(4))
            if not 5 <= length <= _LARGEST_PACKET:
                raise Lost(f"sends no SFTP, but a packet of {length} bytes")
            return self._take(length)

    def _take(self, count: int) -> memoryview:
        if count <= len(self._buffer):
            taken, self._buffer = self._buffer[:count], self._buffer[count:]
            return taken
        gathered = bytearray(self._buffer)
        self._buffer = memoryview(b"")
        while len(gathered) < count:
            received = memoryview(self._link.receive())
            missing = count - len(gathered)
            gathered += received[:missing]
            self._buffer = received[missing:]
        return memoryview(gathered)

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Also after an interrupt: half a packet may be gone, and the next answer would be misread.
            self.lost = True
            raise

    def _handshake(self) -> dict[bytes, bytes]:
        with self._losing():
            self._link.send(struct.pack(">IBI", 5, _INIT, 3))
        try:
            packet = self._packet()
        except Lost as error:
            raise Lost(f"no SFTP session: {error}") from error
        if packet[0] != _VERSION:
            raise Lost("sends no SFTP")
        extensions = {}
        offset = 5
        while offset < len(packet):
            name, offset = string_at(packet, offset)
            extensions[name], offset = string_at(packet, offset)
        return extensions

    def _limit(self) -> int:
        """Return how many bytes of data the server takes and gives in one request."""
        if b"limits@openssh.com" not in self.extensions:
            return _SMALL_REQUEST
        _, reading, writing, _ = struct.unpack_from(">QQQQ", self.extended("limits@openssh.com"))
        return min(reading or _LARGE_REQUEST, writing or _LARGE_REQUEST, _LARGE_REQUEST)


def pipeline(requests: Iterable[tuple[Wire, Request]]) -> Generator[Reply, None, None]:
    """Send *requests*, each in its session, and yield their answers in the same order; many at once.

    Close it (contextlib.closing) when leaving early: then it takes in the answers still to come, so that
    the sessions can go on.
    """
    under_way: deque[tuple[Wire, int]] = deque()
    depths: Counter[Wire] = Counter()

    def answer() -> Reply:
        wire, number = under_way.popleft()
        depths[wire] -= 1
        return wire._reply(number)

    try:
        for wire, (kind, payload) in requests:
            while depths[wire] >= wire.depth:
                yield answer()
            under_way.append((wire, wire._send(kind, payload)))
            depths[wire] += 1
        while under_way:
            yield answer()
    except Lost:
        under_way.clear()  # with one session the others are given up, too: there is no wait for each of them
        raise
    finally:
        while under_way:
            answer()


# --- the bytes of requests and replies ----------------------------------------------------------------


def check(kind: int, payload: memoryview) -> None:
    """Raise Status unless the answer is STATUS with code OK."""
    if _status(kind, payload) != _OK:
        raise _error(kind, payload)


def attributes(kind: int, payload: memoryview) -> Attributes:
    """Return what an ATTRS answer says. Raises Status where it is another."""
    if kind != _ATTRS:
        raise _error(kind, payload)
    return attributes_at(payload, 0)[0]


def _status(kind: int, payload: memoryview) -> int:
    return int(struct.unpack_from(">I", payload)[0]) if kind == _STATUS else -1


def _error(kind: int, payload: memoryview) -> Exception:
    if kind != _STATUS:
        return Lost(f"answers with {kind} where SFTP has another")
    message = bytes(string_at(payload, 4)[0]).decode(errors="replace") if len(payload) > 8 else ""
    return Status(_status(kind, payload), message)


def handle_of(kind: int, payload: memoryview) -> bytes:
    """Return the handle in a HANDLE answer. Raises Status where it is another."""
    if kind != _HANDLE:
        raise _error(kind, payload)
    return string_at(payload, 0)[0]


def data_of(kind: int, payload: memoryview) -> memoryview:
    """Return the bytes of a DATA answer; none at the file's end."""
    if kind == _DATA:
        return payload[4 : 4 + int(struct.unpack_from(">I", payload)[0])]
    if _status(kind, payload) == END:
        return payload[:0]
    raise _error(kind, payload)


def names_of(kind: int, payload: memoryview) -> list[tuple[str, Attributes]] | None:
    """Return what a NAME answer tells, without "." and ".."; None at the end of the directory."""
    if _status(kind, payload) == END:
        return None
    if kind != _NAME:
        raise _error(kind, payload)
    found = []
    (count,) = struct.unpack_from(">I", payload)
    offset = 4
    for _ in range(count):
        name, offset = string_at(payload, offset)
        _, offset = string_at(payload, offset)  # the line that "ls -l" would show
        described, offset = attributes_at(payload, offset)
        if name not in (b".", b".."):
            found.append((name.decode(errors="surrogateescape"), described))
    return found
