"""steps.py COUNT: the example steps.c in Python: does COUNT steps, with a checkpoint after each."""

import sys
import time

import outlast


def main(count: int) -> None:
    """Do *count* steps; say "step N", and "restored in step N" where it was."""
    outlast.on_ckpt(after=lambda restored: restored and print("connection: opened again", flush=True))
    for step in range(1, count + 1):
        time.sleep(0.2)
        print("step", step, flush=True)
        if outlast.ckpt():
            print("restored in step", step, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
