"""Errors, told apart by who can put them right.

Each class has its own exit code, so that a hook or a site's script can act on it without reading text.
"""

from __future__ import annotations

import os


class OutlastError(Exception):
    """Something went wrong that a person can understand; *hint* is the next thing to try."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(OutlastError):
    """The caller must change the command: a bad interval, an unknown job, somebody else's job."""

    exit_code = os.EX_USAGE


class ConfigError(OutlastError):
    """The administrator must change a file."""

    exit_code = os.EX_CONFIG


class StoreUnavailable(OutlastError):
    """Nobody must do anything: the store did not answer, and the next try may succeed."""

    exit_code = os.EX_TEMPFAIL


class StoreRefused(OutlastError):
    """The store answered no, and would again: its administrator must look at space and permissions."""

    exit_code = os.EX_CANTCREAT


class LeaseLost(StoreRefused):
    """A later run of the same job holds its lease: this one is a copy, and must not go on."""


class CheckpointRefused(OutlastError):
    """The job holds something that CRIU cannot dump; its author must change the job."""

    exit_code = os.EX_DATAERR


class CorruptCheckpoint(OutlastError):
    """Stored bytes are not what the manifest says; never restored, never ignored."""

    exit_code = os.EX_IOERR


class RestoreFailed(OutlastError):
    """CRIU could not bring a checkpoint back to life on this node."""

    exit_code = os.EX_SOFTWARE
