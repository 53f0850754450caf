"""A job that holds one kind of thing and says again and again whether it still has it: python3 -m kinds.holds KIND.

It says "ready", and then "tick N ok" for as long as check() returns what it returned at first. It ends with 3 when
there is a file `stop`.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from . import files, processes, refused, sockets
from .holding import HOLDS, say

__all__ = ["files", "processes", "refused", "sockets"]


def main(name: str) -> Any:  # noqa: ANN401
    """Hold *name*, and tell of it until asked to stop."""
    check = HOLDS[name]()
    first = check()
    say("ready", first)
    number = 0
    while not os.path.exists("stop"):  # noqa: PTH110
        now = check()
        say("tick", number, "ok" if now == first else f"is {now!r} and was {first!r}")
        number += 1
        time.sleep(0.01)
    os._exit(3)


if __name__ == "__main__":
    main(sys.argv[1])
