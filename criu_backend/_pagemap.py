"""CRIU's page maps: which pages of an address space are in the image, in the order of its pages file.

pycriu reads them too, but a scattered address space has a million entries, and pycriu makes dictionaries of
them. Source: criu 4.2, images/pagemap.proto, criu/protobuf.c, criu/include/magic.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from criu_backend._images import ImageError

PAGE = 4096  # bytes; CRIU's images count in pages of the machine, and only x86-64's are read here

PARENT, LAZY, PRESENT = 1, 2, 4  # criu/include/pagemap.h, PE_*

_MAGIC_LENGTH = 8  # two words: an image, and of which kind
_LENGTH_LENGTH = 4


@dataclass(frozen=True)
class Entry:
    """A run of *pages* pages from *vaddr* on. With PRESENT among *flags* the pages file holds them."""

    vaddr: int
    pages: int
    flags: int


@dataclass(frozen=True)
class PageMap:
    """One page map. *pages_id* is the number in the name of its pages file.

    *head* is what comes before the entries, byte for byte; *old_count* tells that the number of pages is
    where CRIU before 4.2 has it.
    """

    pages_id: int
    entries: tuple[Entry, ...]
    head: bytes
    old_count: bool


def read_pagemap(image: Path) -> PageMap:
    """Read the page map *image*. Raises ImageError where it is none."""
    data = image.read_bytes()
    try:
        end = _MAGIC_LENGTH + _LENGTH_LENGTH + int.from_bytes(data[8:12], "little")
        head = data[:end]
        pages_id = dict(_fields(data, 12, end))[1]
        entries = []
        old_count = True
        at = end
        while at < len(data):
            end = at + _LENGTH_LENGTH + int.from_bytes(data[at : at + _LENGTH_LENGTH], "little")
            values = dict(_fields(data, at + _LENGTH_LENGTH, end))
            flags = values.get(4, PARENT if values.get(3) else PRESENT)
            old_count = old_count and 5 not in values
            entries.append(Entry(values[1], values.get(5) or values[2], flags))
            at = end
    except (IndexError, KeyError) as error:
        raise ImageError(f"{image.name}: not a page map of CRIU") from error
    return PageMap(pages_id, tuple(entries), head, old_count)


def write_pagemap(image: Path, old: PageMap, entries: Iterable[Entry]) -> None:
    """Write *entries* as the page map *image*, in the form of *old*."""
    parts = [old.head]
    for entry in entries:
        if old.old_count:
            body = (
                b"\x08"
                + _varint(entry.vaddr)
                + b"\x10"
                + _varint(entry.pages)
                + b"\x20"
                + _varint(entry.flags)
            )
        else:
            body = b"\x08" + _varint(entry.vaddr) + b"\x10\x00\x20" + _varint(entry.flags)
            body += b"\x28" + _varint(entry.pages)
        parts += [len(body).to_bytes(_LENGTH_LENGTH, "little"), body]
    image.write_bytes(b"".join(parts))


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield number and value of the fields of one message, all of which are varints."""
    if end > len(data):
        raise IndexError
    while at < end:
        tag, at = _read_varint(data, at)
        if tag & 7:
            raise KeyError
        value, at = _read_varint(data, at)
        yield tag >> 3, value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
