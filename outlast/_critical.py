"""Critical data for programs in Python: liboutlast's outlast_protect(), outlast_save() and outlast_load().

Source: lib/man/outlast_save.3. The files are the same as in C: one language may load what the other has saved.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

from outlast._ckpt import CheckpointFailed

LIBRARY = "liboutlast.so.0"

# By id: what keeps the memory alive and where it is, and what to call after a load.
_kept: dict[int, tuple[object, Callable[[], object] | None]] = {}


def protect(id_: int, memory: Any, restored: Callable[[], object] | None = None) -> None:  # noqa: ANN401
    """Have save() write what is in *memory*, a writable buffer such as a bytearray or an array of NumPy's.

    Args:
        id_: a number of the program's own; the same number again replaces it.
        restored: called by load() when all is read back, by growing id.
    """
    view = memoryview(memory).cast("B")
    held = (ctypes.c_char * view.nbytes).from_buffer(view)
    _call("outlast_protect", id_, ctypes.byref(held), ctypes.c_size_t(view.nbytes), None, None)
    _kept[id_] = (held, restored)


def protect_file(
    id_: int, path: str | os.PathLike[str], restored: Callable[[], object] | None = None
) -> None:
    """Have save() write what is in the file *path* then, and load() put it back; else as protect()."""
    _call("outlast_protect_file", id_, os.fsencode(path), None, None)
    _kept[id_] = (None, restored)


def unprotect(id_: int) -> None:
    """Undo protect() or protect_file()."""
    _call("outlast_unprotect", id_)
    del _kept[id_]


def save(path: str | os.PathLike[str]) -> None:
    """Write all that is protected to *path*, and wait for it to be on the disk: whole, or what was there stays."""
    _call("outlast_save", os.fsencode(path))


def load(path: str | os.PathLike[str]) -> None:
    """Read back what save() wrote to where the same ids are protected now, then call each *restored*.

    Raises:
        CheckpointFailed: the file is not there, is damaged, or holds something else; all memory is as it was.
    """
    _call("outlast_load", os.fsencode(path))
    for id_ in sorted(_kept):
        restored = _kept[id_][1]
        if restored is not None:
            restored()


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise CheckpointFailed(f"{LIBRARY}: {error}; it comes with Outlast") from None
    library.outlast_error.restype = ctypes.c_char_p
    return library


def _call(name: str, *arguments: object) -> None:
    library = _library()
    if library[name](*arguments) < 0:
        raise CheckpointFailed(library.outlast_error().decode(errors="replace"))
