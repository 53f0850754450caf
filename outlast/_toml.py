"""Dataclasses read from TOML files: each value knows the file and the line that it comes from."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from outlast.errors import ConfigError, OutlastError
from outlast.model import parse_interval

T = TypeVar("T")

_TABLE = re.compile(r"\s*\[\s*([\w.\"' -]+?)\s*\]")
_KEY = re.compile(r"\s*([\w.\"' -]+?)\s*=")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value stands: *line* counts from 1."""

    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


Origins = Mapping[tuple[str, ...], Origin]


def load(cls: type[T], paths: Sequence[Path]) -> tuple[T, Origins]:
    """Read *paths* in order into one *cls*, a dataclass whose fields are values, such dataclasses, or these by name.

    A key in a later file takes the place of the same key in an earlier one; tables are merged.

    Returns:
        What was read, and for each key that stands in a file (("store", "url")) where it stands.

    Raises:
        ConfigError: a file cannot be read or is no TOML, a key is unknown, or a value is of the wrong kind or
            out of range. The message names the file, the line, the table, the key and what is allowed.
    """
    values: dict[str, Any] = {}
    origins: dict[tuple[str, ...], Origin] = {}
    for path in paths:
        text = _text(path)
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(
                f"{path}: {error}", hint="the file is TOML: key = value, in tables such as [store]"
            ) from None
        lines = _lines(text)
        _merge(cls, table, values, origins, path, lines, ())
    return typing.cast(T, _build(cls, values, origins, paths[0], ())), origins


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        hint = "write one: docs/install.md shows the five lines"
        raise ConfigError(f"{path}: no such file", hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """Find the line of each key; tomllib tells of values only. A key within an inline table has that one's."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    inside = ""  # of a text that goes over several lines, its quotes
    for number, line in enumerate(text.splitlines(), 1):
        if not inside:
            if match := _TABLE.match(line):
                table = _words(match[1])
                found.setdefault(table, number)
            elif match := _KEY.match(line):
                found.setdefault((*table, *_words(match[1])), number)
        for quotes in re.findall(r'"""|\'\'\'', line):
            inside = "" if inside == quotes else inside or quotes
    return found


def _words(name: str) -> tuple[str, ...]:
    return tuple(word.strip().strip("\"'") for word in name.split("."))


def _merge(
    cls: type[Any],
    table: Mapping[str, Any],
    into: dict[str, Any],
    origins: dict[tuple[str, ...], Origin],
    path: Path,
    lines: Mapping[tuple[str, ...], int],
    where: tuple[str, ...],
) -> None:
    """Put what *table*, which stands in *path* under *where*, says into *into*, each value checked."""
    kinds = typing.get_type_hints(cls)
    for key, value in table.items():
        name = (*where, key)
        known = next((lines[name[:end]] for end in range(len(name), 0, -1) if name[:end] in lines), 1)
        origin = Origin(path, known)
        spot = f"{origin}: {_shown(name)}"
        if key not in kinds:
            raise ConfigError(f"{spot}: no such key", hint=f"the keys are {', '.join(sorted(kinds))}")
        kind = kinds[key]
        if inner := _inner(kind):
            if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
                raise ConfigError(
                    f"{spot}: must be tables", hint=f"write [{'.'.join(name)}.NAME] and its keys below it"
                )
            for word, one in value.items():
                below = into.setdefault(key, {}).setdefault(word, {})
                _merge(inner, one, below, origins, path, lines, (*name, word))
        elif dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{spot}: must be a table", hint=f"write [{key}] and its keys below it")
            below = into.setdefault(key, {})
            _merge(typing.cast(type[Any], kind), value, below, origins, path, lines, name)
        else:
            into[key] = _value(kind, value, spot)
            origins[name] = origin


def _inner(kind: object) -> type[Any] | None:
    """Return what a mapping from names to tables has for each name; None where *kind* is no such mapping."""
    arguments = typing.get_args(kind)
    is_mapping = typing.get_origin(kind) is Mapping and dataclasses.is_dataclass(arguments[1])
    return typing.cast(type[Any], arguments[1]) if is_mapping else None


def _shown(name: tuple[str, ...]) -> str:
    *tables, key = name
    return f"[{'.'.join(tables)}] {key}" if tables else key


def _build(
    cls: type[Any], values: Mapping[str, Any], origins: Origins, path: Path, where: tuple[str, ...]
) -> object:
    """Make a *cls*; what it says of a value that is out of range gets the place where that stands."""
    kinds = typing.get_type_hints(cls)
    made = {
        key: {word: _build(inner, one, origins, path, (*where, key, word)) for word, one in value.items()}
        if (inner := _inner(kinds[key]))
        else _build(typing.cast(type[Any], kinds[key]), value, origins, path, (*where, key))
        if dataclasses.is_dataclass(kinds[key])
        else value
        for key, value in values.items()
    }
    try:
        return cls(**made)
    except OutlastError:
        raise
    except ValueError as error:
        table = f"[{'.'.join(where)}] " if where else ""
        # Such a message begins with the key; it may be a default that another key does not go with.
        key = str(error).partition(" ")[0]
        near = [origin for name, origin in origins.items() if name[:-1] == where]
        spot = origins.get((*where, key)) or (near[0] if near else path)
        raise ConfigError(f"{spot}: {table}{error}") from None


def _value(kind: type | types.UnionType, value: object, where: str) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    if typing.get_origin(kind) is Mapping:
        if isinstance(value, dict):
            return value
        raise ConfigError(
            f"{where}: must be a table", hint="write a table of that name and its keys below it"
        )
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, str):
        try:
            return parse_interval(value)
        except OutlastError as error:
            raise ConfigError(f"{where}: {error}", hint=error.hint) from None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    raise ConfigError(f"{where} = {value!r}: must be {_WORDS.get(typing.cast(type, kind), str(kind))}")
