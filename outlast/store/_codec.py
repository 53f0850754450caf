"""What is done to bytes before they are encrypted: compression, after a filter where that helps."""

from __future__ import annotations

import threading

import numpy as np
import zstandard

from outlast.errors import CorruptCheckpoint
from outlast.store._pages import PAGE

# The first byte of what `packed` returns; docs/store-format.md, "Keys".
_RAW, _ZSTD, _PLANES, _STEPS = b"\0", b"\1", b"\2", b"\3"
_WORTH = 0.97  # of its size: what compression must bring a text to
_CLEARLY = 0.95  # of the size without it: what a filter must bring a sample to, as it costs time to undo
_LEVEL = 1
_SAMPLE = 4  # pages that are compressed in each way, to choose one

_local = threading.local()


def packed(plain: bytes | memoryview, *, words: bool = False) -> bytes:
    """Return *plain* as small as is worth the time, and how to undo that.

    *words*: it may consist of numbers of 8 bytes, such as a grid of floating-point values, whose high bytes
    are alike where their low ones are noise; it is then whole pages.
    """
    form = _form(plain) if words else _ZSTD
    smaller = _compressed(_filtered(form, plain))
    return form + smaller if len(smaller) < _WORTH * len(plain) else b"".join((_RAW, plain))


def unpacked(body: bytes, *, largest: int, what: str) -> bytes:
    """Return what `packed` was given, at most *largest* bytes. Raises CorruptCheckpoint."""
    form = body[:1]
    if form == _RAW:
        return body[1:]
    if form not in (_ZSTD, _PLANES, _STEPS):
        raise CorruptCheckpoint(
            f"{what}: packed in the way {form.hex() or 'of nothing'}, which this Outlast does not know",
            hint="a newer one wrote it: install that on this node",
        )
    try:
        if zstandard.frame_content_size(body[1:]) > largest:
            raise CorruptCheckpoint(f"{what}: unpacks to more than {largest} bytes")
        plain: bytes = _decompressor().decompress(memoryview(body)[1:], max_output_size=largest)
    except zstandard.ZstdError as error:
        raise CorruptCheckpoint(f"{what}: {error}") from error
    if form == _ZSTD:
        return plain
    if len(plain) % 8:
        raise CorruptCheckpoint(f"{what}: no whole numbers of 8 bytes")
    words = np.frombuffer(plain, np.uint8).reshape(8, -1).T.copy()
    if form == _STEPS:
        return np.cumsum(words.view("<u8").reshape(-1), dtype="<u8").tobytes()
    return words.tobytes()


def _form(plain: bytes | memoryview) -> bytes:
    """Choose, by a few of the pages, what makes them smallest."""
    step = max(PAGE, len(plain) // PAGE // _SAMPLE * PAGE)
    sample = b"".join(plain[start : start + PAGE] for start in range(0, len(plain), step))
    size = {form: len(_compressed(_filtered(form, sample))) for form in (_ZSTD, _PLANES, _STEPS)}
    best = min(_PLANES, _STEPS, key=size.__getitem__)
    return best if size[best] < _CLEARLY * size[_ZSTD] else _ZSTD


def _filtered(form: bytes, plain: bytes | memoryview) -> bytes | memoryview:
    """Return the numbers of *plain*, or the steps from one to the next, with all first bytes before all second."""
    if form == _ZSTD:
        return plain
    words = np.frombuffer(plain, "<u8")
    if form == _STEPS:
        words = np.diff(words, prepend=words.dtype.type(0))
    return words.view(np.uint8).reshape(-1, 8).T.tobytes()


def _compressed(data: bytes | memoryview) -> bytes:
    compressor = getattr(_local, "compressor", None)
    if compressor is None:
        compressor = _local.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
    smaller: bytes = compressor.compress(data)
    return smaller


def _decompressor() -> zstandard.ZstdDecompressor:
    decompressor = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    return decompressor
