"""steps.py COUNT [include]: the example steps.c in Python: does COUNT steps, with a checkpoint after each."""

import mmap
import random
import sys
import time

import outlast

SCRATCH = 64 << 20


def main(count: int, *, include: bool) -> None:
    """Do *count* steps; say "step N", and "restored in step N" where it was."""
    outlast.on_ckpt(after=lambda restored: restored and print("connection: opened again", flush=True))
    scratch = mmap.mmap(-1, SCRATCH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # What is in it is of no use after a step: it need not be in any checkpoint.
    outlast.exclude(scratch)
    if include:
        outlast.include(scratch)
    for step in range(1, count + 1):
        scratch[:] = random.Random(step).randbytes(SCRATCH)  # noqa: S311
        time.sleep(0.2)
        print("step", step, flush=True)
        if outlast.ckpt():
            print("restored in step", step, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), include=sys.argv[2:] == ["include"])
