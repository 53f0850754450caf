"""critical.py FILE STEPS: the example critical.c in Python, with a smaller table. It may go on from what C saved."""

import array
import sys
import time
from pathlib import Path

import outlast

CELLS = 8 << 20  # of the table in C, of which this computes only the cells that it needs
MASK = (1 << 64) - 1

state = array.array("Q", [1, 0])  # the seed and the step, as in C


def cell(number: int) -> int:
    """Return cell *number* of the table that C fills from the seed: a linear congruential sequence, by leaps."""
    factor, addend, result = 6364136223846793005, 1442695040888963407, state[0]
    count = number + 1
    while count:
        if count & 1:
            result = (factor * result + addend) & MASK
        factor, addend = factor * factor & MASK, (factor + 1) * addend & MASK
        count >>= 1
    return result


def main(path: str, steps: int) -> None:
    """Do *steps* steps in all, saving to *path* after each."""
    log = Path("critical.log")
    log.touch()
    outlast.protect(1, state, restored=lambda: print("goes on after step", state[1], flush=True))
    outlast.protect_file(2, log)
    if Path(path).exists():
        outlast.load(path)
    while state[1] < steps:
        state[0] = (cell(state[0] % CELLS) + state[1]) & MASK
        state[1] += 1
        with log.open("a") as file:
            file.write(f"{state[1]} {state[0]:016x}\n")
        outlast.save(path)
        print("step", state[1], flush=True)
        time.sleep(0.05)
    print(f"result {state[0]:016x}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
