"""What /proc tells of the processes of a job."""

from __future__ import annotations

import re
import time
from pathlib import Path

from criu_backend import Capsule
from tests.criu.waiting import eventually


def status_of(pid: int | str) -> dict[str, str]:
    """The fields of /proc/PID/status, or with "PID/task/TID" of a thread."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def inner(pid: int, name: str = "NSpid") -> int:
    """What *pid* is called inside its capsule; with *name* "NSsid" or "NSpgid" its session or group."""
    return int(status_of(pid)[name].split()[-1])


def tasks_of(capsule: Capsule) -> dict[int, int]:
    """The processes of the job: PID inside the capsule, and PID as the test sees it."""
    return {inner(pid): pid for pid in capsule.tasks()}


def visible_state(capsule: Capsule) -> dict[tuple[int, str], object]:
    """What the tasks of a job can tell of themselves from outside, by their PIDs in the capsule and a word.

    Must be the same before a dump and after a restore. The numbers of pipes and sockets are the kernel's own
    and differ; so they are replaced by the order in which they are met.
    """
    numbers: dict[str, int] = {}

    def anonymous(text: str) -> str:
        # "socket:[12]", "pipe:[34]", and a deleted file's name that CRIU has given to it anew
        text = re.sub(r"CRIU\.\w+ \(deleted\)|\.fake\.\w+", "(deleted)", text)
        return re.sub(
            r"^(\w+):\[(\d+)\]$", lambda m: f"{m[1]} {numbers.setdefault(m[0], len(numbers))}", text
        )

    found: dict[tuple[int, str], object] = {}
    known = {pid: number for number, pid in tasks_of(capsule).items()}
    for number, pid in sorted(tasks_of(capsule).items()):
        proc = Path(f"/proc/{pid}")
        status = status_of(pid)
        names: tuple[str, ...] = (
            "Name",
            "Umask",
            "Uid",
            "Gid",
            "Groups",
            "SigPnd",
            "ShdPnd",
            "SigIgn",
            "SigCgt",
            "SigBlk",
        )
        names += ("NoNewPrivs", "Seccomp", "CapInh", "CapPrm", "CapEff", "CapBnd", "Threads")
        seen: dict[str, object] = {
            **{name: status[name] for name in names},
            "numbers": [inner(pid, name) for name in ("NSpid", "NStgid", "NSpgid", "NSsid")],
            "parent": known.get(int(status["PPid"])),
            "command": (proc / "cmdline").read_bytes(),
            "cwd": str((proc / "cwd").readlink()),
            "program": str((proc / "exe").readlink()),
            "limits": (proc / "limits").read_text(),
            "files": {
                int(fd.name): (anonymous(str(fd.readlink())), _offset_and_flags(proc / "fdinfo" / fd.name))
                for fd in sorted((proc / "fd").iterdir(), key=lambda fd: int(fd.name))
            },
            "threads": {
                inner_thread(pid, int(task.name)): (
                    (task / "comm").read_text(),
                    status_of(f"{pid}/task/{task.name}")["SigBlk"],
                )
                for task in (proc / "task").iterdir()
            },
            "memory": _memory(proc / "maps"),
        }
        found |= {(number, word): value for word, value in seen.items()}
    return found


def inner_thread(pid: int, thread: int) -> int:
    """What a thread is called inside its capsule."""
    return int(status_of(f"{pid}/task/{thread}")["NSpid"].split()[-1])


def _memory(maps: Path) -> list[tuple[int, int, str, str]]:
    """Begin, end, rights and file of each mapping; neighbors that the kernel may join or not are joined."""
    found: list[tuple[int, int, str, str]] = []
    for line in maps.read_text().splitlines():
        addresses, rights, _, _, _, *rest = line.split(maxsplit=5)
        name = rest[0] if rest else ""
        if re.match(r"\[(vvar|vdso|vsyscall)", name):
            continue
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if found and found[-1][1:] == (begin, rights, name):
            begin = found.pop()[0]
        found.append((begin, end, rights, name))
    return found


def _offset_and_flags(fdinfo: Path) -> list[str]:
    # O_LARGEFILE (0o100000) is the kernel's own: what CRIU opens has it, whatever the program said.
    fields = dict(line.split(":\t", 1) for line in fdinfo.read_text().splitlines() if ":\t" in line)
    return [fields["pos"], oct(int(fields["flags"], 8) & ~0o100000)]


def run_states(capsule: Capsule) -> set[str]:
    """The letters of proc_pid_stat(5) that say what the job's threads do."""
    return {
        (task / "stat").read_text().rpartition(")")[2].split()[0]
        for pid in capsule.tasks()
        for task in Path(f"/proc/{pid}/task").iterdir()
    }


def quiet(capsule: Capsule) -> None:
    """Wait until all threads of the job stand still: then /proc shows the same for as long as they do."""

    def same() -> bool:
        try:
            before = visible_state(capsule)
            time.sleep(0.05)
            return before == visible_state(capsule)
        except (FileNotFoundError, ProcessLookupError):
            return False  # something was closed, or ended, while it was looked at

    eventually(same, "the job stands still")
