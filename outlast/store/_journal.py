"""What is told of jobs between those who keep them running: records; events, which stay; requests, which do not."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from outlast.errors import ConfigError, UsageError
from outlast.model import JobKey
from outlast.store import _records
from outlast.store._backend import Backend
from outlast.store._keys import Keyring

SMALL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


class Journal:
    """The records, events and requests of all jobs; a part of `Store`, whose errors it has."""

    def __init__(self, backend: Backend, keyring: Keyring | ConfigError) -> None:
        self._backend = backend
        self._keyring = keyring
        self._appending: set[str] = set()  # event streams whose last line is surely whole
        self._taken: dict[JobKey, list[Mapping[str, Any]]] = {}  # requests read, and not yet returned

    # --- records ----------------------------------------------------------------------------------

    def put_record(self, job: JobKey, name: str, value: Mapping[str, Any]) -> None:
        """Make *value* (JSON values) the record *name* of *job*; readers see the old or the new one.

        What is not in `_records.PUBLIC` is encrypted. Raises ConfigError where there is no key.
        """
        if not isinstance(self._keyring, Keyring):
            raise self._keyring
        self._backend.replace(_record_name(job, name), _records.encode(job, name, value, self._keyring))

    def get_record(self, job: JobKey, name: str) -> Mapping[str, Any] | None:
        """Return the record *name* of *job*, or None where there is none; without a key, its public part.

        Raises:
            CorruptCheckpoint: it is not what was stored there.
            KeyMissing: this node does not have the key that it is encrypted with.
        """
        try:
            data = self._backend.read(_record_name(job, name))
        except FileNotFoundError:
            return None
        return _records.decode(data, job, name, self._keyring)

    # --- events -----------------------------------------------------------------------------------

    def append_events(self, job: JobKey, stream: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Add *events* (JSON values, with a "time": seconds, Unix time) to the log of *job*.

        Each stream has one writer at a time. Repeat the call after StoreUnavailable: an event that is
        stored twice is read once.
        """
        if not events:
            return
        name = f"{_job(job)}/events/{small(stream)}.jsonl"
        # Somebody may have been cut off in the middle of a line; an empty line is nobody's event.
        start = b"" if name in self._appending else b"\n"
        self._appending.discard(name)
        self._backend.append(name, start + b"".join(map(_line, events)))
        self._appending.add(name)

    def events(self, job: JobKey) -> list[Mapping[str, Any]]:
        """Return the events of all streams of *job*, in the order of their "time", without torn lines."""
        found: list[Mapping[str, Any]] = []
        for entry in self._backend.list(f"{_job(job)}/events"):
            if not entry.name.endswith(".jsonl"):
                continue
            try:
                lines = self._backend.read(f"{_job(job)}/events/{entry.name}").split(b"\n")
            except FileNotFoundError:
                continue  # retired since the listing
            values = (_object(line) for line in dict.fromkeys(lines[:-1]))
            found += [value for value in values if value is not None]
        return sorted(found, key=_time)

    # --- requests ---------------------------------------------------------------------------------

    def post_request(self, job: JobKey, request: Mapping[str, Any]) -> str:
        """Leave *request* (JSON values) for the manager of *job*, and return the request's id."""
        id = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._backend.create(f"{_job(job)}/requests/{id}.json", [_line({**request, "id": id})])
        return id

    def take_requests(self, job: JobKey) -> list[Mapping[str, Any]]:
        """Remove the requests to *job* and return them, oldest first (by the clocks of those who posted).

        Each is returned once, to one taker, with its "id". One round trip when there is none: the
        directory exists only while there are requests.
        """
        taken = self._taken.setdefault(job, [])
        directory = f"{_job(job)}/requests"
        entries = self._backend.list(directory)
        for entry in entries:
            if entry.is_directory or not entry.name.endswith(".json"):
                continue
            try:
                value = _object(self._backend.read(f"{directory}/{entry.name}"))
            except FileNotFoundError:
                continue
            if self._backend.remove(f"{directory}/{entry.name}") and value is not None:
                taken.append(value)
        if entries:
            self._backend.remove_directory(directory)
        return self._taken.pop(job)


def _job(job: JobKey) -> str:
    return f"jobs/{job.cluster}/{job.job_id}"


def _record_name(job: JobKey, name: str) -> str:
    return f"{_job(job)}/records/{small(name)}.json"


def small(name: str) -> str:
    """Return *name*, which may be part of a path. Raises UsageError where it may not."""
    if not SMALL_NAME.fullmatch(name):
        raise UsageError(f"{name!r}: not a name of a cluster, a record or a stream")
    return name


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _object(data: bytes) -> Mapping[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _time(event: Mapping[str, Any]) -> float:
    time = event.get("time")
    return float(time) if isinstance(time, int | float) and math.isfinite(time) else 0.0
