"""What a benchmark is given: rounds, a place for its values, a cluster; and what is made of the values."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import platform
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ci.bench._bed import Bed, testbed


@dataclasses.dataclass(frozen=True)
class Row:
    """All values of one quantity of one variant."""

    variant: str
    quantity: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The values' median."""
        return statistics.median(self.values)

    def as_json(self) -> dict[str, object]:
        """The row as one of "results"."""
        return {
            "variant": self.variant,
            "quantity": self.quantity,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "n": len(self.values),
            "values": list(self.values),
        }


class Bench:
    """One run of one benchmark."""

    def __init__(self, name: str, rounds: int, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.notes: dict[str, object] = {}
        self.problems: list[str] = []
        self.machine = machine_facts()
        self._rounds = rounds
        self._values: dict[tuple[str, str, str], list[float]] = {}

    @property
    def round_count(self) -> int:
        """How often each variant is measured."""
        return self._rounds

    @contextmanager
    def testbed(self) -> Iterator[Bed]:
        """Bring up a cluster of the benchmark's own, as `ci.bench.testbed` does."""
        with testbed("bench") as bed:
            self.machine |= bed.versions()
            yield bed

    def rounds(self, *variants: str) -> Iterator[str]:
        """Give each variant once a round; every second round goes backwards."""
        for number in range(self._rounds):
            for variant in variants if number % 2 == 0 else reversed(variants):
                self.say(f"round {number + 1} of {self._rounds}: {variant}")
                yield variant

    def add(self, variant: str, quantity: str, value: float, unit: str) -> None:
        """Keep one measured value.

        Raises:
            ValueError: it is not a number, which would spoil the medians.
        """
        if not math.isfinite(value):
            raise ValueError(f"{variant}: {quantity}: {value}: not a number")
        self._values.setdefault((variant, quantity, unit), []).append(value)

    def note(self, name: str, fact: object) -> None:
        """Keep a fact, any JSON value, that belongs to the figures."""
        self.notes[name] = fact

    def problem(self, text: str) -> None:
        """Something that must hold did not."""
        self.say(text)
        self.problems.append(text)

    def say(self, text: str) -> None:
        """Tell the person at the terminal what is being done."""
        print(f"bench: {text}", file=sys.stderr, flush=True)

    def rows(self) -> list[Row]:
        """What was measured so far, in the order of the first values."""
        return [Row(*key, tuple(values)) for key, values in self._values.items()]

    def as_json(self) -> dict[str, object]:
        """The object that --json prints."""
        options = {
            name: str(one) if isinstance(one, Path) else one for name, one in vars(self.options).items()
        }
        return {
            "bench": self.name,
            "ok": not self.problems,
            "rounds": self._rounds,
            "options": options,
            "machine": self.machine,
            "results": [row.as_json() for row in self.rows()],
            "notes": self.notes,
            "problems": self.problems,
        }


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of text, quantity by quantity; with ratios where a quantity has several variants."""
    quantities = dict.fromkeys(row.quantity for row in rows)
    ordered = [row for quantity in quantities for row in rows if row.quantity == quantity]
    first = {row.quantity: row for row in reversed(ordered)}
    has_ratio = len(ordered) > len(first)
    head = ["QUANTITY", "VARIANT", "MEDIAN", "MIN", "MAX", "UNIT", "N", *(["RATIO"] if has_ratio else [])]
    texts = [head]
    for row in ordered:
        numbers = [
            f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}" for value in _middle_and_ends(row)
        ]
        texts.append([row.quantity, row.variant, *numbers, row.unit, str(len(row.values))])
        if has_ratio:
            base = first[row.quantity].median
            texts[-1].append("" if row is first[row.quantity] or not base else f"{row.median / base:.3f}")
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        "  ".join(
            _padded(text, width, i) for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in texts
    ]


def _middle_and_ends(row: Row) -> tuple[float, float, float]:
    return row.median, min(row.values), max(row.values)


def _padded(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column in (0, 1, 5) else text.rjust(width)


def machine_facts() -> dict[str, object]:
    """What of this machine the figures depend on."""
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": names[0] if names else platform.machine(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
    }
