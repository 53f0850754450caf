"""Frames are made smaller in the way that suits what is in them, and come back as they were."""

from __future__ import annotations

import os

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.errors import CorruptCheckpoint
from outlast.store._codec import Chooser, packed, unpacked
from outlast.store._pages import FRAME_PAGES, PAGE

FRAME = FRAME_PAGES * PAGE


def grid() -> bytes:
    """A smooth field of floating-point numbers, as a solver has them: noise in the low bytes only."""
    x = np.linspace(0, 3, FRAME // 8)
    return bytes((np.sin(x) * np.exp(-x) + np.random.default_rng(1).random(FRAME // 8) * 1e-7).tobytes())


def counters() -> bytes:
    """Numbers of 8 bytes that have high bytes in common, and nothing else."""
    return np.random.default_rng(2).integers(1 << 20, 1 << 40, FRAME // 8).astype("<u8").tobytes()


def smooth() -> bytes:
    """A field as it is after many steps of a solver, to a few of its last bits."""
    x = np.linspace(0, 3, FRAME // 8)
    return bytes((np.sin(x) * np.exp(-x)).tobytes())


def objects() -> bytes:
    """A heap of small objects: a count, a pointer to their kind, a value, and what the allocator rounds up to."""
    random = np.random.default_rng(3)
    heap = np.zeros((FRAME // 32, 4), "<u8")
    heap[:, 0] = random.integers(1, 4, len(heap))
    heap[:, 1] = 0x7F31_0040_2A60 + 0x1A0 * random.integers(0, 3, len(heap))
    heap[:, 2] = random.integers(0, 1 << 30, len(heap))
    return heap.tobytes()


def text() -> bytes:
    """Lines of words, of different lengths."""
    random = np.random.default_rng(4)
    words = b"one of a few words that come again and again in some order\n".split(b" ")
    return b" ".join(words[n] for n in random.integers(0, len(words), FRAME))[:FRAME]


@pytest.mark.parametrize(
    ("plain", "form"),
    [
        (os.urandom(FRAME), 0),
        (text(), 1),
        (counters(), 2),
        (grid(), 3),
        (objects(), 4),
        (smooth(), 5),
    ],
)
def test_each_kind_of_content_has_its_form_and_comes_back(plain: bytes, form: int) -> None:
    stored = packed(plain, Chooser())

    assert stored[0] == form
    assert len(stored) <= len(packed(plain)) <= len(plain) + 1
    assert unpacked(stored, largest=FRAME, what="x") == plain


def test_grid_of_numbers_takes_a_third_less_than_by_compression_alone() -> None:
    assert len(packed(grid(), Chooser())) < 0.67 * len(packed(grid()))


def test_what_suited_a_frame_is_not_kept_for_others_that_it_does_not_suit() -> None:
    chooser = Chooser()
    kinds = {0: os.urandom(FRAME), 1: text(), 2: counters(), 3: grid(), 4: objects(), 5: smooth()}
    for form, plain in kinds.items():
        stored = [packed(plain, chooser) for _ in range(9)]

        # A filter goes on for some frames where it does nearly as well as the best.
        assert {one[0] for one in stored[4:]} == {form}
        assert all(unpacked(one, largest=FRAME, what="x") == plain for one in stored)


def test_filters_are_those_of_the_format() -> None:
    """Decoded here as docs/store-format.md says it, number by number."""
    stored = packed(objects(), Chooser())
    text = zstandard.ZstdDecompressor().decompress(stored[1:])
    count = len(text) // 32
    assert (
        bytes(text[at * count + record] for record in range(40) for at in range(32)) == objects()[: 40 * 32]
    )

    stored = packed(smooth(), Chooser())
    text = zstandard.ZstdDecompressor().decompress(stored[1:])
    count = len(text) // 8
    numbers = [0] * 6
    for n in range(40):
        code = int.from_bytes(bytes(text[at * count + n] for at in range(8)), "little")
        step = code // 2 if code % 2 == 0 else -(code + 1) // 2
        weights = (6, -15, 20, -15, 6, -1)
        foretold = sum(weight * before for weight, before in zip(weights, numbers[::-1], strict=False))
        numbers.append((foretold + step) % (1 << 64))
    assert b"".join(number.to_bytes(8, "little") for number in numbers[6:]) == smooth()[:320]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("zrwgt"), st.integers(0, 255)), min_size=1, max_size=FRAME_PAGES),
)
def test_any_pages_come_back(kinds: list[tuple[str, int]]) -> None:
    page = {
        "z": lambda n: bytes(PAGE),
        "r": lambda n: os.urandom(PAGE),
        "w": lambda n: np.arange(n << 56, (n << 56) + PAGE // 8, dtype=np.uint64).tobytes(),
        "g": lambda n: np.linspace(-n, n, PAGE // 8).tobytes(),
        "t": lambda n: bytes([n]) * PAGE,
    }
    plain = b"".join(page[kind](number) for kind, number in kinds)

    assert unpacked(packed(plain, Chooser()), largest=FRAME, what="x") == plain


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\0", b"\1", b"\2", b"\3", b"\4", b"\5", b"\6", b"\xff"])
)
def test_bytes_that_are_no_packed_ones_are_refused_and_nothing_else(rest: bytes, form: bytes) -> None:
    try:
        assert len(unpacked(form + rest, largest=4096, what="x")) <= 4096
    except CorruptCheckpoint as error:
        assert "x: " in str(error)


def test_form_of_a_later_version_is_named() -> None:
    with pytest.raises(CorruptCheckpoint, match="packed in the way 07, which this Outlast does not know"):
        unpacked(b"\7abc", largest=4096, what="x")


@pytest.mark.parametrize("form", [b"\1", b"\2", b"\3", b"\4", b"\5"])
def test_nothing_unpacks_to_more_than_it_may(form: bytes) -> None:
    packed_zeros = packed(bytes(FRAME))

    with pytest.raises(CorruptCheckpoint, match="more than"):
        unpacked(form + packed_zeros[1:], largest=FRAME - 1, what="x")
