"""Saving, while a job stands still, what a restore must put back and CRIU's images do not hold.

CRIU's images tell of a file its name, its size and where each reader stands; its contents are not in them.
So these files go with the checkpoint: those that are mapped for writing, those on this node's own scratch
directories, and those that are written in place. Of all others a restore needs to know how long they were.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from outlast.config import CheckpointConfig
from outlast.errors import CheckpointRefused, OutlastError
from outlast.manager._files import DELETED, NamedFile, named_file, open_files
from outlast.manager._run import Run

_FICLONE = 0x40049409  # linux/fs.h
# Of the first and the last bytes of a file there is a checksum: who writes a file's head anew is noticed.
ENDS = 4096
# A walk for declared files goes no further, as the job stands still.
_MOST_ENTRIES = 50_000
_WALK_SECONDS = 1.0

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class _File:
    """A file that the tree has open or mapped."""

    link: str  # in /proc: leads to the very file, whatever its name leads to meanwhile
    path: str
    info: os.stat_result
    writes: bool = False
    appends: bool = True  # all that write it do so at its end
    mapped: bool = False  # shared and for writing


def save(
    pids: Iterable[int],
    images: Path,
    uid: int,
    config: CheckpointConfig,
    kept_elsewhere: Callable[[str], bool] = lambda _: False,
) -> list[dict[str, Any]]:
    """Return what a restore has to set back of the files of *pids*, which stand still; copy some to *images*.

    Returns:
        For each file `path`, `size` (bytes) and `mode`; and, where that applies, `saved`, the copy's name in
        *images*; `ends`, the checksum of `outlast.set_back.checksum`; `mtime_ns`, of a file that may not have
        changed at all when the job is restored; `parents`, directories to make and their modes; `memory`,
        whether it is shared memory, of which nothing is to be kept aside.

    Raises:
        CheckpointRefused: more is mapped for writing than may be saved.
        OutlastError: a mapped file cannot be read or there is no room for its copy.
    """
    scratch = [Path(one) for one in config.scratch.split(":") if one]
    budget = {"save_files": config.save_files_bytes, "save_mapped": config.save_mapped_bytes}
    found: list[dict[str, Any]] = []
    # Small ones first, so that one large file does not keep all others from being saved.
    for file in sorted(_files(pids, scratch), key=lambda one: (one.info.st_size, one.path)):
        here = any(Path(file.path).is_relative_to(one) for one in scratch)
        # CRIU's code inside the tasks has its log open, and may still.
        if Path(file.path).is_relative_to(images) or kept_elsewhere(file.path):
            continue
        if not (file.writes or file.mapped or here):
            continue
        entry: dict[str, Any] = {
            "path": file.path,
            "size": file.info.st_size,
            "mode": stat.S_IMODE(file.info.st_mode),
        }
        found.append(entry)
        if here:
            entry["parents"] = _parents(Path(file.path), uid)
            entry["memory"] = Path(file.path).is_relative_to("/dev/shm")  # noqa: S108 - looked at, not used
        if not (file.mapped or here or not file.appends):
            entry["ends"] = _checksum(file.link, file.info.st_size, uid)
            continue
        key = "save_mapped" if file.mapped else "save_files"
        room = file.info.st_blocks * 512 <= budget[key]
        if file.mapped and not room:
            raise CheckpointRefused(
                f"{file.path}: mapped for writing, and more than {getattr(config, key)} in all may be saved",
                hint=f"raise [checkpoint] {key} on the nodes",
            )
        name = f"saved-{len(found)}"
        if room:
            try:
                _copy(file.link, images / name, uid)
            except OSError as error:
                if file.mapped:
                    raise OutlastError(f"{file.path}: cannot be saved: {error.strerror}") from None
                with contextlib.suppress(FileNotFoundError):
                    (images / name).unlink()
                room = False
        if room:
            budget[key] -= file.info.st_blocks * 512
            entry["saved"] = name
        elif file.writes and not file.appends:
            entry["mtime_ns"] = file.info.st_mtime_ns
        else:
            entry["ends"] = _checksum(file.link, file.info.st_size, uid)
    return found


@contextlib.contextmanager
def sources(
    files: Sequence[Mapping[str, Any]], images: Path | None, run: Run
) -> Iterator[list[dict[str, Any]]]:
    """Give `outlast.set_back` what `save` saved: its entries, with copies that the job's owner can read.

    *images*: where the copies are; not needed where there are none.
    """
    # Above the copies all is root's, so that their names lead to them and nowhere else.
    directory = run.directory / "put-back"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o755)
    try:
        found = []
        for entry in files:
            if "name" in entry:
                continue
            found.append(dict(entry))
            if "saved" in entry and images is not None:
                copy = directory / Path(entry["saved"]).name
                (images / copy.name).rename(copy)
                os.chown(copy, run.uid, -1)
                found[-1]["source"] = os.fspath(copy)
        yield found
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def make_durable(files: Iterable[Mapping[str, Any]], uid: int) -> None:
    """Have *files*, as `save` and `declared` found them, lie on their server or disk and not in this node's memory.

    A restore elsewhere finds of an NFS file what has been written to its server. Takes as long as that takes, so
    the job should run meanwhile.

    Raises:
        OutlastError: a file could not be written, such as for want of room; the checkpoint is worth nothing.
    """
    for entry in files:
        if "path" not in entry or "saved" in entry:
            continue
        try:
            with _as_user(uid):
                file = os.open(entry["path"], os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone or closed to its owner by now; a restore would say so
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what has nothing to write
                raise OutlastError(f"{entry['path']}: cannot be written out: {error.strerror}") from None
        finally:
            os.close(file)


def declared(directory: str, patterns: Sequence[str], uid: int) -> list[dict[str, Any]]:
    """Return what a restore has to set back of the files that are appended to and closed again.

    Args:
        directory: where the job works; it is walked as user *uid*, who may see what root may not.
        patterns: as the shell's; those without a slash match a file's name in any directory below.

    Returns:
        One entry for the walk, so that a restore finds those that came later, then one for each file.

    Raises:
        CheckpointRefused: there are too many files, or the file system is too slow, for a walk.
    """
    if not patterns:
        return []
    with _as_user(uid):
        files = [
            {"path": path, "size": info.st_size, "mode": stat.S_IMODE(info.st_mode)}
            for path, info in _walk(directory, patterns)
        ]
    return [{"walk": directory, "patterns": list(patterns), "known": [one["path"] for one in files]}, *files]


def _walk(top: str, patterns: Sequence[str]) -> Iterator[tuple[str, os.stat_result]]:
    entries, deadline, pending = 0, time.monotonic() + _WALK_SECONDS, [top]
    while pending:
        directory = pending.pop()
        try:
            listing = list(os.scandir(directory))
        except OSError:
            continue  # what its owner may not read is not of the job's making
        for entry in listing:
            entries += 1
            if entries > _MOST_ENTRIES or time.monotonic() > deadline:
                raise CheckpointRefused(
                    f"{top}: more than {_MOST_ENTRIES} files, or more than {_WALK_SECONDS:g} s, to look for "
                    f"{' '.join(patterns)}",
                    hint="have the job work in a directory of its own, or take OUTLAST_APPEND away",
                )
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif entry.is_file(follow_symlinks=False) and matches(entry.path, top, patterns):
                yield entry.path, entry.stat(follow_symlinks=False)


def matches(path: str, top: str, patterns: Iterable[str]) -> bool:
    """Whether one of *patterns* is meant for the file *path* below *top*."""
    inner = os.path.relpath(path, top)
    return any(fnmatch(inner if "/" in one else os.path.basename(inner), one) for one in patterns)  # noqa: PTH119


@contextlib.contextmanager
def _as_user(uid: int) -> Iterator[None]:
    """Have this thread, and no other, reach files as user *uid* would."""
    # os.seteuid() would change all threads of this process.
    _libc.setfsuid(uid)
    try:
        yield
    finally:
        _libc.setfsuid(0)


def _files(pids: Iterable[int], scratch: Sequence[Path]) -> list[_File]:
    found: dict[tuple[int, int], _File] = {}
    for pid in pids:
        for opened in open_files(pid):
            file = _noted(opened, found)
            if opened.writes:
                file.writes = True
                file.appends &= bool(opened.flags & os.O_APPEND) or opened.position == file.info.st_size
        for area, shared in _mappings(pid, scratch):
            if (mapped := named_file(f"/proc/{pid}/map_files/{area}")) is not None:
                _noted(mapped, found).mapped |= shared
    return list(found.values())


def _noted(file: NamedFile, found: dict[tuple[int, int], _File]) -> _File:
    return found.setdefault((file.info.st_dev, file.info.st_ino), _File(file.link, file.path, file.info))


def _mappings(pid: int, scratch: Sequence[Path]) -> Iterator[tuple[str, bool]]:
    """Yield the name in map_files, and whether it is shared for writing, of each mapping that matters."""
    seen = set()
    for line in Path(f"/proc/{pid}/maps").read_bytes().decode(errors="surrogateescape").splitlines():
        area, permissions, _, device, inode, *rest = line.split(None, 5)
        path = rest[0] if rest else ""
        shared = permissions[3] == "s" and permissions[1] == "w"
        if inode == "0" or path.endswith(DELETED) or (device, inode, shared) in seen:
            continue
        if shared or any(path.startswith(f"{one}/") for one in scratch):
            seen.add((device, inode, shared))
            # In map_files there are no leading zeros; in maps there may be.
            yield "-".join(f"{int(part, 16):x}" for part in area.split("-")), shared


def _parents(path: Path, uid: int) -> list[tuple[str, int]]:
    """Return the directories above *path* that are user *uid*'s, outermost first, and their modes."""
    found = []
    for parent in path.parents:
        try:
            info = parent.lstat()
        except OSError:
            break
        if info.st_uid != uid or info.st_mode & stat.S_ISVTX:
            break
        found.append((os.fspath(parent), stat.S_IMODE(info.st_mode)))
    return found[::-1]


def _open(link: str, uid: int) -> int:
    """Open the file behind *link* to read: as its owner, whom NFS lets, else as root, from whom little is hidden."""
    try:
        with _as_user(uid):
            return os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return os.open(link, os.O_RDONLY | os.O_CLOEXEC)


def _checksum(link: str, size: int, uid: int) -> int | None:
    """Return what `outlast.set_back.checksum` does of the first *size* bytes; None where they are unreadable."""
    try:
        file = _open(link, uid)
    except OSError:
        return None
    try:
        head = os.pread(file, min(size, ENDS), 0)
        return zlib.crc32(os.pread(file, min(size, ENDS), size - min(size, ENDS)), zlib.crc32(head))
    except OSError:
        return None
    finally:
        os.close(file)


def _copy(link: str, target: Path, uid: int) -> None:
    """Copy the file behind *link*, holes as holes."""
    source = _open(link, uid)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(target, flags, 0o600), "wb") as copy:
            with contextlib.suppress(OSError):
                fcntl.ioctl(copy, _FICLONE, source)
                return
            size, at = os.fstat(source).st_size, 0
            copy.truncate(size)
            while at < size:
                try:
                    at = os.lseek(source, at, os.SEEK_DATA)
                except OSError:
                    break  # only a hole is left
                end = os.lseek(source, at, os.SEEK_HOLE)
                os.lseek(copy.fileno(), at, os.SEEK_SET)
                while at < end and (count := os.sendfile(copy.fileno(), source, at, end - at)):
                    at += count
    finally:
        os.close(source)
