"""What is done to bytes before they are encrypted: compression, after a filter where that helps."""

from __future__ import annotations

import threading

import numpy as np
import zstandard

from outlast.errors import CorruptCheckpoint
from outlast.store._pages import PAGE

# The first byte of what `packed` returns; docs/store-format.md, "Keys".
_RAW, _ZSTD, _PLANES, _STEPS, _RECORDS, _CURVES = (bytes([form]) for form in range(6))
_FILTERS = (_PLANES, _STEPS, _RECORDS, _CURVES)
_RECORD = 32  # bytes: two of the allocation units of a 64-bit C library or of Python
_ORDER = 6  # of the differences that stand for a curve
_WORTH = 0.97  # of its size: what compression must bring a text to
_LEVEL = 1
_SAMPLE = 4 * PAGE  # bytes of a large frame that are compressed in each way, to choose one; of others all are
_LARGE = 16 * PAGE
# What a filter may be worse by, in a sample: the kinds of bytes that it sorts have too few of each there to be packed
# as well as in all of a frame.
_TOLERANCE = 0.025
_TRUSTED = 3  # frames after one that was compressed in each way, of which only its best and none are compared

_local = threading.local()


class Chooser:
    """Says how the frames of a pack are filtered, one after the other: what suited one suits its neighbors.

    Threads may share it: what they do to each other is to look once too often, or not often enough.
    """

    def __init__(self) -> None:
        self._best = _ZSTD
        self._trusted = 0

    def form(self, plain: bytes | memoryview) -> bytes:
        """Choose, by some pages in the middle, what makes them smallest. They are neighbors: filters live on that."""
        is_large = len(plain) > _LARGE
        start = len(plain) // 2 // PAGE * PAGE
        sample = plain[start : start + _SAMPLE] if is_large else plain
        self._trusted -= 1
        is_trusted = self._trusted >= 0 and is_large
        tried = [_ZSTD, self._best] if is_trusted and self._best != _ZSTD else [_ZSTD, _PLANES]
        size = {form: len(_compressed(_filtered(form, sample))) for form in tried}
        if min(size.values()) > _WORTH * len(sample):
            return _ZSTD  # noise, of which no filter makes anything else
        worth = size[_ZSTD] + _TOLERANCE * is_large * len(sample)
        if is_trusted and size[tried[1]] < worth:
            return tried[1]
        size |= {form: len(_compressed(_filtered(form, sample))) for form in _FILTERS if form not in size}
        best = min(_FILTERS, key=size.__getitem__)
        self._best = best if size[best] < worth else _ZSTD
        self._trusted = _TRUSTED if self._best != _ZSTD else 0
        return self._best


def packed(plain: bytes | memoryview, chooser: Chooser | None = None) -> bytes:
    """Return *plain* as small as is worth the time, and how to undo that.

    *chooser*: that of frames, which are whole pages and may consist of numbers, such as a grid of floating-point
    values, whose high bytes are alike where their low ones are noise.
    """
    form = chooser.form(plain) if chooser is not None else _ZSTD
    smaller = _compressed(_filtered(form, plain))
    return form + smaller if len(smaller) < _WORTH * len(plain) else b"".join((_RAW, plain))


def unpacked(body: bytes, *, largest: int, what: str) -> bytes:
    """Return what `packed` was given, at most *largest* bytes. Raises CorruptCheckpoint."""
    form = body[:1]
    if form == _RAW:
        return body[1:]
    if form != _ZSTD and form not in _FILTERS:
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
    width = _RECORD if form == _RECORDS else 8
    if len(plain) % width:
        raise CorruptCheckpoint(f"{what}: no whole numbers of {width} bytes")
    sorted_back = np.empty((len(plain) // width, width), np.uint8)
    for place, kind in enumerate(np.frombuffer(plain, np.uint8).reshape(width, -1)):
        sorted_back[:, place] = kind  # a transposed copy takes four times as long: it reads against the cache
    if form in (_PLANES, _RECORDS):
        return sorted_back.tobytes()
    words = sorted_back.view("<u8").reshape(-1)
    if form == _STEPS:
        return np.cumsum(words, out=words).tobytes()
    words = (words >> np.uint64(1)) ^ -(words & np.uint64(1))
    for _ in range(_ORDER):
        np.cumsum(words, out=words)
    return words.tobytes()


def _filtered(form: bytes, plain: bytes | memoryview) -> bytes | memoryview:
    """Return *plain* as it is compressed in *form*; `unpacked` undoes it. docs/store-format.md, "Keys"."""
    if form == _ZSTD:
        return plain
    if form == _RECORDS:
        return np.frombuffer(plain, np.uint8).reshape(-1, _RECORD).T.tobytes()
    words = np.frombuffer(plain, "<u8")
    for _ in range({_STEPS: 1, _CURVES: _ORDER}.get(form, 0)):
        words = np.diff(words, prepend=words.dtype.type(0))
    if form == _CURVES:
        # They come with either sign: with that in the lowest bit, small ones have high bytes of zeros.
        words = (words << np.uint64(1)) ^ -(words >> np.uint64(63))
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
