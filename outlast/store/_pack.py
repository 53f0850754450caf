"""Packs: new pages in compressed, encrypted frames (docs/store-format.md, "Packs")."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from outlast.errors import CorruptCheckpoint
from outlast.store._codec import Chooser, packed, unpacked
from outlast.store._pages import Hashes, Numbers

MAGIC = b"outlast pack 1\n\0"
_FOOTER = struct.Struct("<QI4s")  # offset and length of the trailer, a mark
_MARK = b"OLp1"
FOOTER = _FOOTER.size
_TRAILER_HEAD = struct.Struct("<II")  # frames, pages
TRAILER_NUMBER = 0xFFFFFFFF  # in the place of a frame's number


@dataclass(frozen=True)
class Trailer:
    """What a pack says of itself: offset, stored length and pages of each frame, and the pages' hashes."""

    offsets: Numbers
    lengths: Numbers
    pages: Numbers
    hashes: Hashes


def seal(
    cipher: AESGCM,
    number: int,
    plain: bytes | memoryview,
    header: bytes | None = None,
    chooser: Chooser | None = None,
) -> bytes:
    """Return the stored form of frame *number*: as `packed` makes it, and encrypted.

    A number is used once under a key, so it is the nonce. *header* is bound to it, and not in it.
    """
    return cipher.encrypt(_nonce(number), packed(plain, chooser), header)


def unseal(
    cipher: AESGCM,
    number: int,
    stored: bytes | memoryview,
    *,
    largest: int,
    what: str,
    header: bytes | None = None,
) -> bytes:
    """Return what `seal` was given, at most *largest* bytes.

    Raises:
        CorruptCheckpoint: *stored* is not what was written as frame *number* of this pack.
    """
    try:
        body = cipher.decrypt(_nonce(number), bytes(stored), header)
    except (InvalidTag, ValueError):
        raise CorruptCheckpoint(
            f"{what}: not what was stored there: damaged, or put there by somebody else",
            hint="use an older checkpoint",
        ) from None
    return unpacked(body, largest=largest, what=what)


def encode_trailer(cipher: AESGCM, offset: int, trailer: Trailer) -> bytes:
    """Return what ends a pack: *trailer*, sealed, and where it stands, which is at *offset*."""
    plain = b"".join(
        (
            _TRAILER_HEAD.pack(len(trailer.offsets), len(trailer.hashes)),
            trailer.offsets.astype("<u8").tobytes(),
            trailer.lengths.astype("<u4").tobytes(),
            trailer.pages.astype("<u4").tobytes(),
            trailer.hashes.astype("<u8").tobytes(),
        )
    )
    stored = seal(cipher, TRAILER_NUMBER, plain)
    return stored + _FOOTER.pack(offset, len(stored), _MARK)


def trailer_range(footer: bytes, size: int, what: str) -> tuple[int, int]:
    """Return offset and length of the trailer of a pack of *size* bytes that ends with *footer*."""
    offset, length, mark = _FOOTER.unpack(footer)
    if mark != _MARK or offset + length + FOOTER != size:
        raise CorruptCheckpoint(f"{what}: torn: its end is not a pack's")
    return offset, length


def decode_trailer(cipher: AESGCM, stored: bytes, what: str) -> Trailer:
    """Return the trailer that `encode_trailer` was given. Raises CorruptCheckpoint."""
    plain = unseal(cipher, TRAILER_NUMBER, stored, largest=1 << 31, what=what)
    frames, pages = _TRAILER_HEAD.unpack_from(plain) if len(plain) >= _TRAILER_HEAD.size else (1, 0)
    if len(plain) != _TRAILER_HEAD.size + 16 * (frames + pages):
        raise CorruptCheckpoint(f"{what}: its trailer has not the length that it says")
    take = _taker(plain, _TRAILER_HEAD.size)
    return Trailer(
        take("<u8", frames),
        take("<u4", frames),
        take("<u4", frames),
        _hashes(plain[len(plain) - 16 * pages :]),
    )


def _taker(data: bytes, start: int) -> Callable[[str, int], Numbers]:
    position = start

    def take(kind: str, count: int) -> Numbers:
        nonlocal position
        values = np.frombuffer(data, kind, count, position)
        position += values.nbytes
        return values.astype(np.int64)

    return take


def _hashes(data: bytes) -> Hashes:
    return np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, 2)


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")
