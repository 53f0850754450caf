"""How CRIU is called for a forked dump: with the plugin of native/twin."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from criu_backend._capsule import Capsule
from criu_backend._twins import end_twins

# Nothing else is in its directory: CRIU loads all of it.
TWIN_LIBRARY = Path("/usr/libexec/outlast/twin/outlast-twin.so")

# Beside the images while a forked dump is made. A CRIU that is killed in the middle of it may leave the job's
# root without its orphans; who finds the mark has that mended.
_MARK = ".forked"

_NEWBORN_SECONDS = 0.3


@dataclass
class Call:
    """What a mode adds to a call of CRIU: arguments, environment, descriptors to pass on."""

    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    fds: list[int] = field(default_factory=list)


class TwinPlugin:
    """The plugin that is installed as *library*."""

    def __init__(self, library: Path) -> None:
        self.library = library

    def why_not(self) -> str | None:
        """Return why it cannot be used, None where it can."""
        return None if self.library.exists() else f"{self.library} is not installed"

    @contextlib.contextmanager
    def call(self, mode: str, capsule: Capsule, images: Path, *, predict: bool) -> Iterator[Call]:
        """Give what to add for a dump in *mode* of the tree in *capsule*; an exception means that it failed.

        With *predict* CRIU may be told things that must be verified in the twins afterwards.
        """
        mark = images.parent / _MARK
        call = Call()
        with contextlib.ExitStack() as closing:
            if mode != "plain" or (mark.exists() and self.library.exists()):
                call.arguments += ["--libdir", os.fspath(self.library.parent)]
            if mode == "plain":
                call.environment["OUTLAST_TWIN_MEND"] = "1"
            else:
                mark.touch(mode=0o600)
            if mode == "forked":
                call.environment["LD_PRELOAD"] = os.fspath(self.library)
                if predict:
                    call.environment["OUTLAST_TWIN_ROOT"] = str(capsule.job_pid)
            if mode == "lazy":
                # CRIU serves lazy pages until its peer hangs up, which this one has done already.
                mine, theirs = map(closing.enter_context, socket.socketpair())
                mine.close()
                call.arguments += ["--lazy-pages", "--ps-socket", str(theirs.fileno())]
                call.fds.append(theirs.fileno())
            try:
                yield call
            except BaseException:
                if mode != "plain":
                    # A twin that was being made when CRIU ended has not got its name yet.
                    until = time.monotonic() + _NEWBORN_SECONDS
                    while time.monotonic() < until:
                        end_twins(capsule)
                        time.sleep(_NEWBORN_SECONDS / 10)
                raise
        mark.unlink(missing_ok=True)
