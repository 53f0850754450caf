"""A terminal with a program in it, for tests of what people are shown."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


class Terminal:
    """A pseudo-terminal of 80 by 24 with a program in it."""

    def __init__(self, *command: str, **variables: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.pop("NO_COLOR", None)
            env = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT)} | variables
            os.execvpe(command[0], command, env)  # noqa: S606
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.seen = ""

    def until(self, text: str, within: float = 15) -> None:
        """Read until *text* was shown."""
        deadline = time.monotonic() + within
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            self._read()

    def _read(self) -> bool:
        if select.select([self.fd], [], [], 0.2)[0]:
            try:
                self.seen += os.read(self.fd, 65536).decode()
            except OSError:
                return False
        return True

    def type_(self, keys: str) -> None:
        """Press *keys*."""
        os.write(self.fd, keys.encode())

    def end(self, within: float = 15) -> int:
        """Wait for the program's end; return its exit code."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            alive = self._read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            if not alive:
                time.sleep(0.05)
        pytest.fail(self.seen)
