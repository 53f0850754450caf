"""A job's output file as it grows, is set back at a restore, and grows again."""

from __future__ import annotations

import os
import re
import stat
from typing import Any

# Bytes of a file's end that are shown at first; more is behind "Download".
FIRST = 256 << 10
# Bytes that are remembered, to find how far a file has been set back.
WINDOW = 4 << 20
# Bytes that may have come since the last look; what is beyond is skipped, and said to be.
BACKLOG = 4 << 20
# Characters of one line that are shown.
LINE = 4096
_TAIL = 4096
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")
# Control characters become their pictures; those that turn the writing's direction round become visible too.
_PICTURES = {code: 0x2400 + code for code in range(32) if code != 9} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)

Message = dict[str, Any]


class Follower:
    """Tells what happens to one file, as messages that a page can show.

    After each `poll`, who has followed all messages shows exactly what the file holds, from where the first
    message began: no line is missing, and none is there twice.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._position = 0  # bytes of the file that have been told
        self._window = bytearray()  # the last of them
        self._seen: tuple[int, int, int, int] | None = None  # device, inode, size, mtime
        self._suspicious = False
        self._problem: str | None = None
        self._begin_line(0)

    def recheck(self) -> None:
        """Compare all that is remembered at the next poll: the job has been restarted."""
        self._suspicious = True

    def poll(self) -> list[Message]:
        """Look once, which takes no longer than reading a few MiB, and return what has happened.

        The messages, by `op`:

        - `begin`: the file is there; *skipped* bytes at its start are not told.
        - `lines`: *lines* of [offset of the first byte, text, whether it is complete, characters left out];
          a line that is not complete is told again, whole, under the same offset.
        - `cut`: the file now ends at *at*; lines from offset *start* on are no more.
        - `reset`: nothing that was told holds any longer; a `begin` follows.
        - `skip`: *bytes* came too fast to be told.
        - `problem`: *text*, or None when it is over.
        """
        try:
            fd = os.open(self.path, _OPEN)
        except FileNotFoundError:
            return self._vanished()
        except OSError as error:
            return self._complain(f"{self.path}: {error.strerror}")
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                return self._complain(f"{self.path}: not a regular file, so it is not shown")
            return self._complain(None) + self._follow(fd, info)
        except OSError as error:
            return self._complain(f"{self.path}: {error.strerror}")
        finally:
            os.close(fd)

    def _follow(self, fd: int, info: os.stat_result) -> list[Message]:
        now = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)
        if now == self._seen and not self._suspicious and info.st_size == self._position:
            return []
        messages: list[Message] = []
        if self._seen is None:
            messages += self._begin(fd, info.st_size)
        elif now != self._seen or self._suspicious:
            thorough = self._suspicious or now[:2] != self._seen[:2]
            messages += self._set_back(fd, info.st_size, thorough=thorough)
        self._suspicious = False
        self._seen = now
        if info.st_size - self._position > BACKLOG:
            messages += self._skip(fd, info.st_size)
        lines: list[list[Any]] = []
        if data := _read(fd, self._position, max(0, info.st_size - self._position)):
            lines = self._feed(data)
        elif any(message["op"] == "cut" for message in messages):
            lines = self._unfinished()
        return [*messages, {"op": "lines", "lines": lines}] if lines else messages

    def _begin(self, fd: int, size: int) -> list[Message]:
        start = max(0, size - FIRST)
        if start:
            # From a line's start, where there is one near.
            start += _read(fd, start, 64 << 10).find(b"\n") + 1
        self._position = start
        self._window.clear()
        self._begin_line(start)
        return [{"op": "begin", "skipped": start}]

    def _set_back(self, fd: int, size: int, *, thorough: bool) -> list[Message]:
        """Find out whether what has been told still stands in the file; if not, from where on it does not."""
        start = self._position - len(self._window)
        tail = len(self._window) if thorough else min(_TAIL, len(self._window))
        if (
            size >= self._position
            and _read(fd, self._position - tail, tail) == self._window[-tail or WINDOW :]
        ):
            return []
        agreed = _common(self._window, _read(fd, start, max(0, min(len(self._window), size - start))))
        at = start + agreed
        line = start + self._window.rfind(b"\n", 0, agreed) + 1
        if start > 0 and line == start:
            # The line that it was set back into began before what is remembered.
            self._seen = None
            return [{"op": "reset"}, *self._begin(fd, size)]
        rest = bytes(self._window[line - start : agreed])
        del self._window[line - start :]
        self._position = line
        self._begin_line(line)
        self._feed(rest)
        return [{"op": "cut", "at": at, "start": line}]

    def _skip(self, fd: int, size: int) -> list[Message]:
        before = self._position
        self._begin(fd, size)
        return [{"op": "skip", "bytes": self._position - before, "at": self._position}]

    def _vanished(self) -> list[Message]:
        if self._seen is None:
            return self._complain(None)
        self._seen = None
        self._position = 0
        self._window.clear()
        self._begin_line(0)
        return [{"op": "reset"}]

    def _complain(self, text: str | None) -> list[Message]:
        if text == self._problem:
            return []
        self._problem = text
        return [{"op": "problem", "text": text}]

    # --- lines -------------------------------------------------------------------------------------------

    def _begin_line(self, at: int) -> None:
        self._line_at = at
        self._line_length = 0  # bytes so far
        self._head = bytearray()  # the first of them that are shown
        self._left_out = 0  # those of them that would be shown, were it not so long
        self._returned = False  # the last byte was a carriage return

    def _feed(self, data: bytes) -> list[list[Any]]:
        """Take in the file's next bytes; return the lines that they complete, and the one that is begun."""
        self._position += len(data)
        self._window += data
        del self._window[: max(0, len(self._window) - WINDOW)]
        found = []
        *whole, rest = data.split(b"\n")
        for piece in whole:
            self._extend(piece)
            found.append(self._told(complete=True))
            self._begin_line(self._line_at + self._line_length + 1)
        self._extend(rest)
        return found + self._unfinished()

    def _unfinished(self) -> list[list[Any]]:
        return [self._told(complete=False)] if self._line_length else []

    def _extend(self, piece: bytes) -> None:
        if not piece:
            return
        self._line_length += len(piece)
        # As a terminal does: what follows a carriage return stands in place of what was before it.
        _, turned, last = piece.rstrip(b"\r").rpartition(b"\r")
        if turned or self._returned:
            self._head.clear()
            self._left_out = 0
        self._returned = piece.endswith(b"\r")
        room = 4 * LINE - len(self._head)
        self._head += last[:room]
        self._left_out += max(0, len(last) - room)

    def _told(self, *, complete: bool) -> list[Any]:
        text = _ESCAPES.sub("", self._head.decode("utf-8", "replace")).translate(_PICTURES)
        return [self._line_at, text[:LINE], complete, self._left_out + max(0, len(text) - LINE)]


def _common(one: bytes | bytearray, other: bytes) -> int:
    """Return how many bytes at the start are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _read(fd: int, start: int, count: int) -> bytes:
    found = bytearray()
    while len(found) < count and (block := os.pread(fd, count - len(found), start + len(found))):
        found += block
    return bytes(found)
