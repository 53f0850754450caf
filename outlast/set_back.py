#!/usr/bin/python3 -IS
"""Sets a job's files back to what they were at a checkpoint. Run by the job's shim, as the job's owner.

    outlast-set-back

Reads from standard input an object of JSON: "files", as `outlast.manager._saving` describes them (with
"source", the path of a copy, in place of "saved"), and "epoch", which names what is kept of that which is
lost. As the user, nothing can be reached that the user could not. Ends with 0, or else with 1 and, on standard
output, the name of the file that cannot be set back, and why; then nothing may be restored.

It imports nothing but the standard library's built-in parts, since a restored job waits for it.
"""

import fnmatch
import json
import os
import stat
import sys
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    import typing

# As many bytes of a file's head and tail are in its checksum.
_ENDS = 4096


def set_back(files: "list[dict[str, object]]", epoch: int) -> None:
    """Make every file what it was; what is cut off or replaced is kept in a file beside it.

    All are looked at before any is touched. Raises OSError, with the file's name, where one cannot be set
    back: then nothing may be restored.
    """
    for entry in files:
        if "walk" not in entry:
            check(entry)
    for entry in files:
        if "walk" in entry:
            put_aside_newer(entry, epoch)
        elif "source" in entry:
            put_back(entry, epoch)
        else:
            cut(entry, epoch)


def check(entry: "dict[str, object]") -> None:
    """Raise OSError if the file of *entry* cannot be set back, with its name and why."""
    path, size = str(entry["path"]), int(entry["size"])  # type: ignore[call-overload]
    try:
        info = os.stat(path, follow_symlinks="source" not in entry)
    except FileNotFoundError:
        if "source" in entry or (size == 0 and entry.get("optional")):
            return
        raise
    if "source" in entry:
        # In a directory that all may write to, somebody else may have put something in the file's place.
        if not stat.S_ISREG(info.st_mode):
            raise OSError(0, "something else has taken the place of this file", path)
        return
    if info.st_size < size:
        raise OSError(0, f"it has {info.st_size} bytes, and had {size} at the checkpoint", path)
    if "mtime_ns" in entry and (info.st_size, info.st_mtime_ns) != (size, entry["mtime_ns"]):
        raise OSError(0, "it is written in place and has changed since, and was too large to be saved", path)
    if entry.get("ends") is not None and checksum(path, size) != entry["ends"]:
        raise OSError(0, "what it held at the checkpoint has been overwritten since", path)


def checksum(path: str, size: int) -> int:
    """Return a checksum of the first and the last bytes of the first *size* bytes of *path*."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(min(size, _ENDS))
        file.seek(size - min(size, _ENDS))
        return zlib.crc32(file.read(min(size, _ENDS)), zlib.crc32(head))


def cut(entry: "dict[str, object]", epoch: int) -> None:
    """Cut a file back to the size that it had."""
    path, size = str(entry["path"]), int(entry["size"])  # type: ignore[call-overload]
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return
    if info.st_size > size:
        keep_aside(path, size, epoch)
        os.truncate(path, size)
    restore_mode(path, entry)


def put_back(entry: "dict[str, object]", epoch: int) -> None:
    """Give a file the contents that were saved, unless it has them; what it has else is kept aside."""
    path, size = str(entry["path"]), int(entry["size"])  # type: ignore[call-overload]
    for directory, mode in entry.get("parents", ()):  # type: ignore[attr-defined]
        if not os.path.isdir(directory):
            os.mkdir(directory)
            os.chmod(directory, mode)
    with open(str(entry["source"]), "rb") as source:
        if os.path.lexists(path):
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as now:
                same = first_difference(source, now)
                length = os.fstat(now.fileno()).st_size
            # What was shared memory has gone with the processes whose memory it was.
            if length > same and not entry.get("memory"):
                keep_aside(path, same if same == size else 0, epoch)
        else:
            same, length = 0, -1
        if (same, length) != (size, size):
            # In place: the job's standard descriptors may be open already, and hard links stay links.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            with open(os.open(path, flags, 0o600), "wb") as target:
                target.truncate(same)
                target.truncate(size)
                at = same
                while at < size:
                    try:
                        at = os.lseek(source.fileno(), at, os.SEEK_DATA)
                    except OSError:
                        break  # only a hole is left
                    block = os.pread(source.fileno(), 1 << 20, at)
                    at += os.pwrite(target.fileno(), block, at)
    restore_mode(path, entry)


def first_difference(one: "typing.BinaryIO", other: "typing.BinaryIO") -> int:
    """Return for how many bytes two files are the same."""
    at = 0
    while True:
        mine, theirs = one.read(1 << 20), other.read(1 << 20)
        if mine != theirs or not mine:
            return at + next(
                (i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs))
            )
        at += len(mine)


def restore_mode(path: str, entry: "dict[str, object]") -> None:
    """Give the file the permissions that it had: CRIU opens no file with others."""
    mode = entry.get("mode")
    if mode is not None and stat.S_IMODE(os.stat(path).st_mode) != mode:
        os.chmod(path, mode)  # type: ignore[arg-type]


def put_aside_newer(entry: "dict[str, object]", epoch: int) -> None:
    """Rename every declared file that there was not yet."""
    top, known = str(entry["walk"]), set(entry["known"])  # type: ignore[call-overload]
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            inner = os.path.relpath(path, top)
            patterns = entry["patterns"]
            if path in known or os.path.islink(path):
                continue
            if any(fnmatch.fnmatch(inner if "/" in one else name, one) for one in patterns):  # type: ignore[attr-defined]
                os.rename(path, lost_name(path, epoch))


def keep_aside(path: str, size: int, epoch: int) -> None:
    """Copy what *path* holds beyond *size* bytes to `PATH.outlast-lost.EPOCH`."""
    part = f"{path}.outlast-lost.{epoch}.part"
    with open(path, "rb") as source, open(part, "wb") as target:
        source.seek(size)
        while block := source.read(1 << 20):
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    os.rename(part, lost_name(path, epoch))


def lost_name(path: str, epoch: int) -> str:
    """Return the name under which what is lost of *path* is kept, which nothing has yet."""
    kept = f"{path}.outlast-lost.{epoch}"
    number = 1
    while os.path.lexists(kept):
        number += 1
        kept = f"{path}.outlast-lost.{epoch}.{number}"
    return kept


def main() -> int:
    """Entry point."""
    request = json.load(sys.stdin)
    try:
        set_back(request["files"], request["epoch"])
    except OSError as error:
        sys.stdout.write(f"{error.filename}: {error.strerror}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
