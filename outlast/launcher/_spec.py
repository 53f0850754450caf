"""What a person wants run, checked field by field, and the scheduler script that says the same."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from outlast.errors import UsageError
from outlast.model import parse_pace

_LONGEST_SCRIPT = 1 << 20  # characters
_LONGEST_WORD = 255

# Source of the forms: sbatch(1), --time, --mem, --partition.
_TIME = re.compile(r"[0-9]+|[0-9]+:[0-9]{1,2}(:[0-9]{1,2})?|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}")
_MEMORY = re.compile(r"[1-9][0-9]{0,11}[KMGT]?")
_PARTITION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A value of these characters needs no quotes in a "#SBATCH" line.
_PLAIN = re.compile(r"[A-Za-z0-9_./,:@%+=-]+")


class SpecError(UsageError):
    """Some fields cannot be used as they are; *fields* says for each of them why."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {why}" for name, why in fields.items()))
        self.fields = dict(fields)


@dataclass(frozen=True)
class Spec:
    """One job to be. A field that is empty is left to the scheduler.

    *kind* is "command" (*text* is what /bin/sh is to run) or "script" (*text* begins with "#!").
    """

    kind: str
    text: str
    name: str = ""
    partition: str = ""
    time: str = ""
    cpus: str = ""
    memory: str = ""
    directory: str = ""
    output: str = ""
    errors: str = ""
    interval: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def script(self) -> str:
        """Return the script that sbatch(1) is given."""
        options = [
            ("job-name", self.name),
            ("partition", self.partition),
            ("time", self.time),
            ("cpus-per-task", self.cpus),
            ("mem", self.memory),
            ("chdir", self.directory),
            ("output", self.output),
            ("error", self.errors),
            ("checkpoint", self.interval),
        ]
        lines = [f"#SBATCH --{option}={_quoted(value)}" for option, value in options if value]
        first, rest = "#!/bin/sh", self.text
        if self.kind == "script":
            first, _, rest = self.text.partition("\n")
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if exports and self.kind == "script":
            # sbatch reads no option below the first command, so the script's own must come first.
            head, rest = _split_head(rest)
            lines += head
        return "\n".join([first, *lines, *exports, rest.rstrip("\n")]) + "\n"


def parse_spec(form: Mapping[str, object]) -> Spec:
    """Return what the fields of *form*, all of them texts, describe.

    Raises:
        SpecError: naming every field that cannot be used, and why.
    """
    wrong: dict[str, str] = {}

    def take(name: str, check: Callable[[str], str | None], *, strip: bool = True) -> str:
        value = form.get(name, "")
        if not isinstance(value, str):
            wrong[name] = "must be a text"
            return ""
        value = value.strip() if strip else value.replace("\r\n", "\n")
        if value and (why := check(value)):
            wrong[name] = why
        return value

    kind = take("kind", lambda value: None if value in ("command", "script") else "command or script")
    text = take("text", lambda value: _bad_text(value, kind), strip=False)
    if not text.strip():
        wrong["text"] = "say what is to be run"
    spec = Spec(
        kind=kind or "command",
        text=text,
        name=take("name", _bad_word),
        partition=take("partition", _matches(_PARTITION, "a partition's name, such as main")),
        time=take("time", _matches(_TIME, "minutes, or such as 4:00:00 or 2-12")),
        cpus=take("cpus", _bad_cpus),
        memory=take("memory", _matches(_MEMORY, "a number and K, M, G or T, such as 4G")),
        directory=_expanded(take("directory", _bad_directory)),
        output=take("output", _bad_path),
        errors=take("errors", _bad_path),
        interval=take("interval", _bad_interval),
        environment=_environment(form.get("environment", ""), wrong),
    )
    if wrong:
        raise SpecError(wrong)
    return spec


def _environment(text: object, wrong: dict[str, str]) -> dict[str, str]:
    if not isinstance(text, str):
        wrong["environment"] = "must be a text"
        return {}
    found: dict[str, str] = {}
    for line in filter(str.strip, text.splitlines()):
        name, equals, value = line.partition("=")
        name = name.strip()
        if not equals or not _VARIABLE.fullmatch(name):
            wrong["environment"] = f"{line.strip()[:40]!r}: write one NAME=value a line"
        elif _control(value):
            wrong["environment"] = f"{name}: its value has a control character"
        found[name] = value
    return found


def _split_head(text: str) -> tuple[list[str], str]:
    """Split a script, its first line taken off, where its comments and empty lines end."""
    lines = text.split("\n")
    count = 0
    while count < len(lines) and (not lines[count].strip() or lines[count].startswith("#")):
        count += 1
    return lines[:count], "\n".join(lines[count:])


def _quoted(value: str) -> str:
    """Write *value* as sbatch reads it: quotes hold spaces and '#', a backslash the next character."""
    if _PLAIN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _control(value: str) -> bool:
    return any(ord(character) < 32 or 127 <= ord(character) < 160 for character in value)


def _matches(pattern: re.Pattern[str], what: str) -> Callable[[str], str | None]:
    return lambda value: None if pattern.fullmatch(value) and len(value) <= _LONGEST_WORD else what


def _bad_text(value: str, kind: str) -> str | None:
    if "\0" in value:
        return "has a null character"
    if len(value) > _LONGEST_SCRIPT:
        return "is longer than a mebibyte; put it into a file, and run that"
    if kind == "script" and not value.startswith("#!"):
        return "a script begins with #! and its interpreter, such as #!/bin/sh"
    return None


def _bad_word(value: str) -> str | None:
    if _control(value) or "\u2028" in value or "\u2029" in value:
        return "must be one line without control characters"
    return f"at most {_LONGEST_WORD} characters" if len(value) > _LONGEST_WORD else None


def _bad_cpus(value: str) -> str | None:
    right = value.isascii() and value.isdigit() and 1 <= int(value[:9]) <= 65535
    return None if right else "a whole number from 1 on"


def _bad_interval(value: str) -> str | None:
    try:
        parse_pace(value)
    except UsageError as error:
        return error.hint
    return None


def _expanded(value: str) -> str:
    return str(Path(value).expanduser()) if value == "~" or value.startswith("~/") else value


def _bad_path(value: str) -> str | None:
    # Source: sbatch(1), "filename pattern": a backslash is taken out, and turns the rest's meaning off.
    return "Slurm cannot have a backslash in it" if "\\" in value else _bad_word(value)


def _bad_directory(value: str) -> str | None:
    if bad := _bad_path(value):
        return bad
    path = Path(_expanded(value))
    if not path.is_absolute():
        return "a whole path, from / or ~/"
    try:
        return None if path.is_dir() else "no such directory here"
    except OSError as error:
        return str(error.strerror)
