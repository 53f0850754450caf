"""The bytes of SFTP's version 3: the parts that its packets are made of."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SIZE, IDS, PERMISSIONS, TIMES = 0x1, 0x2, 0x4, 0x8  # flags of ATTRS


@dataclass(frozen=True)
class Attributes:
    """What version 3 tells of a file: bytes, the st_mode bits, and whole seconds."""

    size: int
    mode: int
    mtime: int


def pieces(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the same bytes in pieces of *size*, but for the last."""
    parts: list[memoryview] = []
    missing = size
    for chunk in chunks:
        rest = memoryview(chunk)
        while len(rest) >= missing:
            yield b"".join((*parts, rest[:missing]))
            rest, missing = rest[missing:], size
            parts.clear()
        if rest:
            parts.append(rest)
            missing -= len(rest)
    if parts:
        yield b"".join(parts)


def block(data: bytes) -> bytes:
    """Return *data* as SFTP's string: its length, then itself."""
    return struct.pack(">I", len(data)) + data


def text(value: str) -> bytes:
    """Return *value* as SFTP's string, in UTF-8."""
    return block(value.encode())


def string_at(data: memoryview, offset: int) -> tuple[bytes, int]:
    """Return the string at *offset*, and where it ends."""
    (length,) = struct.unpack_from(">I", data, offset)
    return bytes(data[offset + 4 : offset + 4 + length]), offset + 4 + length


def attributes_at(data: memoryview, offset: int) -> tuple[Attributes, int]:
    """Return the attributes at *offset*, and where they end."""
    (flags,) = struct.unpack_from(">I", data, offset)
    offset += 4
    size = mode = mtime = 0
    if flags & SIZE:
        (size,) = struct.unpack_from(">Q", data, offset)
        offset += 8
    if flags & IDS:
        offset += 8
    if flags & PERMISSIONS:
        (mode,) = struct.unpack_from(">I", data, offset)
        offset += 4
    if flags & TIMES:
        _, mtime = struct.unpack_from(">II", data, offset)
        offset += 8
    if flags & 0x80000000:
        (count,) = struct.unpack_from(">I", data, offset)
        offset += 4
        for _ in range(2 * count):
            _, offset = string_at(data, offset)
    return Attributes(size, mode, mtime), offset
