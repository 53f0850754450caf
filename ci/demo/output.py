"""The job's output file: when it grows again after the kill, and whether it is right at the end."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

_RESULT = "result "


class OutputFile:
    """A file that one process at a time appends to, and that is set back once, between two of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = b""  # by the first writer
        self._smallest: int | None = None

    def expect_rollback(self) -> None:
        """From now on nobody writes until the file is set back: its writer is dead."""
        self._written = self._path.read_bytes() if self._path.exists() else b""
        self._smallest = len(self._written)

    def has_grown_again(self) -> bool:
        """Whether it has grown since the end of its first writer, the cut at the rollback left aside."""
        if self._smallest is None:
            return False
        size = self._size()
        self._smallest = min(size, self._smallest)
        return size > self._smallest

    def lines_set_back(self) -> int:
        """How many whole lines of the first writer were cut off so far."""
        return self._written[self._smallest :].count(b"\n")

    def last_line(self) -> str:
        """The file's last line that is whole; empty if there is none."""
        whole = self._path.read_text(errors="replace").rpartition("\n")[0] if self._path.exists() else ""
        return whole.rpartition("\n")[2]

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An output against that of an uninterrupted run of the same program."""

    lines: int  # progress lines that have to be there
    lost: int
    doubled: int  # surplus copies
    strange: tuple[str, ...]  # lines that the uninterrupted run does not have
    in_order: bool
    result: str
    result_matches: bool

    def problems(self) -> list[str]:
        """What is wrong with the output, as sentences."""
        found = []
        if not self.result_matches:
            found.append(f"the result is not that of an uninterrupted run: {self.result or 'there is none'}")
        if self.lost:
            found.append(f"lines of output are lost: {self.lost} of {self.lines}")
        if self.doubled:
            found.append(f"lines of output are doubled: {self.doubled} too many")
        if self.strange:
            found.append(f"lines in the output are not the program's, such as {self.strange[0]!r}")
        if not (self.in_order or self.lost or self.doubled or self.strange):
            found.append("the lines of output are not in order")
        return found


def compare(lines: Sequence[str], expected: Sequence[str]) -> Comparison:
    """Compare an output's lines with those of an uninterrupted run, of which the last is its result."""
    seen = [line for line in lines if not line.startswith(_RESULT)]
    progress = Counter(seen)
    wanted = Counter(expected[:-1])
    results = [line for line in lines if line.startswith(_RESULT)]
    at_end = lines[-1:] == expected[-1:]
    return Comparison(
        lines=wanted.total(),
        lost=(wanted - progress).total(),
        doubled=sum(count - wanted[line] for line, count in progress.items() if count > wanted[line] > 0),
        strange=tuple(line for line in progress if line not in wanted),
        in_order=seen == list(expected[:-1]),
        result=" / ".join(results),
        result_matches=results == [expected[-1]] and at_end,
    )
