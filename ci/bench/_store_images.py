"""The images of the store benchmark: real programs, dumped by CRIU several times as they run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ci.bench import Bed

_HERE = Path(__file__).parent / "programs"
DUMPS = 3
_GAP_SECONDS = 4.0  # between two dumps

# How each is started in the directory of the programs, and for how many seconds it runs before the first
# dump: it has made its data then.
PROGRAMS = {
    "lu": ("./lu 4096 1", 8),
    "sgd": ("./sgd", 4),
    "heat": ("./heat", 4),
    "table": ("python3 table.py", 9),
}


def dump(bed: Bed, into: Path, say: Callable[[str], None]) -> None:
    """Run each of PROGRAMS on a node and leave its DUMPS images in *into*/NAME/1, 2, ..."""
    home = bed.give(_HERE, "bench")
    bed.give(_HERE.parents[2] / "tests/programs", "programs")
    bed.output("ctl", ["make", "--silent", "-C", "programs", "O=/shared/alice/bench", "lu"], within=120)
    for name in ("sgd", "heat"):
        bed.output("ctl", ["gcc", "-O2", "-std=gnu11", "-o", f"bench/{name}", f"bench/{name}.c"])
    for name, (command, warm) in PROGRAMS.items():
        say(f"dumping {name}")
        words = ["sh", "/shared/alice/bench/dump.sh", name, command, str(warm), str(DUMPS)]
        bed.output("n1", [*words, str(_GAP_SECONDS)], root=True, within=180)
    shutil.copytree(home / "images", into)


def noise(directory: Path, size: int) -> None:
    """Make the image *directory* of one file of *size* bytes that no compression makes smaller."""
    directory.mkdir(parents=True)
    with (directory / "noise").open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))


def size_of(directory: Path) -> int:
    """Return the bytes of all files below *directory*."""
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())
