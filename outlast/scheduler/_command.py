"""Asking a scheduler by its own commands: one answer, or an error that tells no answer from a no."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence

from outlast.scheduler import SchedulerRefused, SchedulerUnavailable


def ask(
    command: Sequence[str],
    argv: Sequence[str],
    environment: Mapping[str, str],
    timeout: float,
    no_answer: re.Pattern[str],
) -> str:
    """Run *argv*, which errors call *command*, and return what it prints.

    Args:
        timeout: seconds for which it is waited for.
        no_answer: what the command says when its server cannot be reached.

    Raises:
        SchedulerUnavailable: there was no answer.
        SchedulerRefused: the answer was no, in the command's own words.
    """
    try:
        done = subprocess.run(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SchedulerUnavailable(f"{command[0]}: no answer within {timeout:g} s") from None
    except OSError as error:
        raise SchedulerUnavailable(f"{argv[0]}: {error.strerror}") from None
    if done.returncode == 0:
        return done.stdout
    lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode} and no word"]
    words = "; ".join(lines)
    if no_answer.search(words):
        raise SchedulerUnavailable(f"{command[0]}: {words}")
    raise SchedulerRefused(f"{' '.join(command)}: {words}")
