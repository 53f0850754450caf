"""Sparing a process the faults that a twin leaves behind.

fork() makes every page read-only, and the first write to each is a fault from then on, even when the twin has ended
and there is nothing to copy: 1.3 µs each, all of which the job waits for. The kernel carries such faults out from
another processor, too, and in bulk, when somebody is about to write to another process's memory. So it is asked to
write from an address where nothing is: it makes the pages writable, and then has nothing to write. What is in
them stays as it is, whatever the process does meanwhile.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from criu_backend._pagemap import PAGE

# The kernel makes up to 1024 pages ready at a time, mm/process_vm_access.c, and the process can map none meanwhile.
_AT_A_TIME = 256
# Source: Documentation/admin-guide/mm/pagemap.rst.
_PRESENT, _OF_A_FILE, _MAPPED_ONCE = 1 << 63, 1 << 61, 1 << 56
_BYTES = 8

_libc = ctypes.CDLL(None)


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def regain(pid: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Make the pages of process *pid* in *ranges* writable again that are its own, as its first writes would.

    Pages that another process has as well stay shared. Does what it can: where the process has ended, or has
    other memory by now, nothing comes of it.
    """
    try:
        with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
            for start, end in ranges:
                for at, length in _own(pagemap.fileno(), start, end):
                    _fault(pid, at, length)
    except OSError:
        return


def _own(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of the runs of pages that no other process has, of an open *pagemap*."""
    entries = array("Q", os.pread(pagemap, (end - start) // PAGE * _BYTES, start // PAGE * _BYTES))
    wanted = _PRESENT | _MAPPED_ONCE
    for own, run in itertools.groupby(entries, lambda entry: entry & (wanted | _OF_A_FILE) == wanted):
        length = sum(1 for _ in run) * PAGE
        if own:
            yield start, length
        start += length


def _fault(pid: int, start: int, length: int) -> None:
    """Have the kernel make *length* bytes at *start* ready to be written."""
    for at in range(start, start + length, _AT_A_TIME * PAGE):
        part = min(_AT_A_TIME * PAGE, start + length - at)
        # There is nothing at address 0, mmap(2): so the call fails, after it has made the pages ready.
        source, target = _Span(None, part), _Span(at, part)
        _libc.process_vm_writev(pid, ctypes.byref(source), 1, ctypes.byref(target), 1, 0)
