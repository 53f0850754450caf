"""Verifying in a twin what CRIU was told of its process without looking: see native/twin/predict.c."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from criu_backend._images import ImageError
from criu_backend._twins import Twin

# The flags of a mapping that CRIU reads. Locking is left out: a twin does not inherit it, and it is verified
# while the process stands still. Source: criu 4.2, criu/proc_parse.c, __parse_vmflags().
_READ = frozenset(("gd", "nr", "ht", "dp", "sr", "rr", "dd", "mg", "hg", "nh", "wf", "io", "pf", "ss"))
_NOT_COPIED = "dc"

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")


class Mispredicted(ImageError):
    """A process changed its mappings' flags just before it was frozen; the images are wrong."""


def verify(images: Path, twin: Twin) -> None:
    """See that what CRIU was told of the process of *twin* was so, and remove what it was told by.

    Raises:
        Mispredicted: it was not.
        OSError: the twin has ended.
    """
    file = images / f"predicted-{twin.pid}"
    if not file.exists():
        return
    true = dict(_mappings(twin.smaps()))
    for addresses, flags in _mappings(file.read_text()):
        found = true.get(addresses)
        copied = _NOT_COPIED not in flags
        if (found is not None) != copied or (found is not None and found & _READ != flags & _READ):
            raise Mispredicted(
                f"process {twin.pid}: mapping {addresses[0]:#x}: its flags were not {' '.join(sorted(flags))}"
            )
    if twin.has_guards():
        raise Mispredicted(f"process {twin.pid}: has guard regions")
    file.unlink()


def _mappings(smaps: str) -> Iterator[tuple[tuple[int, int], frozenset[str]]]:
    """Yield addresses and flags of each mapping. Source: proc_pid_smaps(5)."""
    addresses = (0, 0)
    for line in smaps.splitlines():
        if line.startswith("VmFlags:"):
            yield addresses, frozenset(line.split()[1:])
        elif match := _MAPPING.match(line):
            addresses = (int(match[1], 16), int(match[2], 16))
