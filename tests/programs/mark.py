"""mark.py [PID]: the example mark.c in Python: has a job checkpointed without it noticing."""

import sys

import outlast

if __name__ == "__main__":
    try:
        outlast.tckpt(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    except outlast.CheckpointFailed as error:
        sys.exit(f"mark: {error}")
