"""When a job is run again: the site's rules, those of a partition, and what the job's owner chose for it."""

from __future__ import annotations

import dataclasses
import re
import signal
from collections.abc import Mapping

from outlast.errors import UsageError
from outlast.model import parse_interval

# Signals that end a process for what it did itself. SIGKILL comes from outside; the others are somebody's wish.
_CRASHES = frozenset(
    {
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSEGV,
        signal.SIGSYS,
        signal.SIGTRAP,
    }
)
# A shell whose command was ended by signal N ends with 128 + N. Source: POSIX.1-2024, 2.8.2 Exit Status.
_SHELL_SIGNAL = 128

_REPEATING = ("fail", "hold", "fresh")
_MOST_RESTARTS = 1000
_LONGEST_BACKOFF = 3600.0


@dataclasses.dataclass(frozen=True)
class RestartPolicy:
    """Of which ends a job is run again, how often and how soon."""

    on_node_failure: bool = True
    on_crash: str = "kill oom"  # of what crashes: "kill", "oom", "signal", exit codes such as 75; "" of none
    budget: int = 5  # restarts within 24 hours after crashes, and as many after lost nodes
    backoff: float = 30.0  # seconds that the second restart waits; each further one twice as long
    when_repeating: str = "fail"  # or "hold" or "fresh": a job that crashes at the same place again and again

    def __post_init__(self) -> None:
        for word in self.on_crash.split():
            if word not in ("kill", "oom", "signal") and not (word.isdecimal() and 1 <= int(word) <= 255):
                raise ValueError(
                    f'on_crash = "{self.on_crash}": must be of the words kill, oom, signal and exit codes, 1 to 255'
                )
        if not 0 <= self.budget <= _MOST_RESTARTS:
            raise ValueError(f"budget = {self.budget}: must be 0 to {_MOST_RESTARTS}")
        if not 0 <= self.backoff <= _LONGEST_BACKOFF:
            raise ValueError(f"backoff = {self.backoff:g}: must be 0 to {_LONGEST_BACKOFF:g} seconds")
        if self.when_repeating not in _REPEATING:
            raise ValueError(f'when_repeating = "{self.when_repeating}": must be "fail", "hold" or "fresh"')

    def covers(self, status: int | None, *, out_of_memory: bool) -> bool:
        """Whether a job that ended with *status* is to be run again.

        Args:
            status: an exit code, or less than 0 for a signal; None where the job was killed with its capsule.
            out_of_memory: the scheduler says that it was ended for want of memory.
        """
        words = self.on_crash.split()
        if out_of_memory and "oom" in words:
            return True
        if status is None:
            return False
        number = signal_of(status)
        if ("signal" in words and number in _CRASHES) or ("kill" in words and number == signal.SIGKILL):
            return True
        return str(status) in words

    def wait_before(self, restart: int) -> float:
        """Return for how many seconds the *restart*-th restart (from 1) is put off."""
        return 0.0 if restart < 2 else min(self.backoff * 2.0 ** min(restart - 2, 20), _LONGEST_BACKOFF)


def signal_of(status: int) -> int:
    """Return the signal that a status tells of, a shell's too, or 0."""
    if status < 0:
        return -status
    return status - _SHELL_SIGNAL if _SHELL_SIGNAL < status <= _SHELL_SIGNAL + signal.NSIG else 0


def how_ended(status: int | None) -> str:
    """Return *status* in words."""
    if status is None:
        return "killed"
    number = signal_of(status)
    by = f"by signal {number}"
    return by if status < 0 else f"with exit code {status}" + (f" ({by})" if number else "")


def changed(policy: RestartPolicy, values: Mapping[str, object]) -> RestartPolicy:
    """Return *policy* with *values* in the place of its own, as they stand in a configuration file.

    Raises:
        ValueError: a key or a value is not understood; the text says what is allowed.
    """
    kinds = {"on_node_failure": bool, "on_crash": str, "budget": int, "backoff": float, "when_repeating": str}
    found: dict[str, object] = {}
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(f"{key}: no such key; the keys are {', '.join(sorted(kinds))}")
        if key == "backoff" and isinstance(value, str):
            try:
                value = parse_interval(value)
            except UsageError as error:
                raise ValueError(f"{key}: {error}") from None
        wanted = (int, float) if key == "backoff" else kinds[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and kinds[key] is not bool):
            raise ValueError(f"{key} = {value!r}: must be {_WORDS[kinds[key]]}")
        found[key] = float(value) if key == "backoff" else value  # type: ignore[arg-type]
    return dataclasses.replace(policy, **found)  # type: ignore[arg-type]


_WORDS: Mapping[type, str] = {
    bool: "true or false",
    str: "a text",
    int: "a whole number",
    float: "seconds or a time such as 30s",
}


def parse_choice(text: str) -> dict[str, object]:
    """Read what a job's owner chose, as `on_crash=signal,75 budget=3 backoff=1m`.

    The keys are those of [restart]; commas stand for the spaces within a value, yes and no for true and false.

    Raises:
        UsageError: it is anything else, or a value is out of range.
    """
    values: dict[str, object] = {}
    for word in text.split():
        match = re.fullmatch(r"([a-z_]+)=([A-Za-z0-9,._-]*)", word)
        if match is None:
            raise UsageError(
                f"restart policy: {word!r}: not of the form key=value",
                hint="write budget=3 on_crash=signal,75",
            )
        key, value = match[1], match[2].replace(",", " ")
        if key == "on_node_failure" and value in ("yes", "no"):
            values[key] = value == "yes"
        elif value.isdecimal() and key in ("budget", "backoff"):
            values[key] = int(value)
        else:
            values[key] = value
    try:
        changed(RestartPolicy(), values)
    except ValueError as error:
        raise UsageError(f"restart policy: {error}", hint="docs/use.md has the keys") from None
    return values
