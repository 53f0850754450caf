"""Checkpoints that could not be restored: kept, whatever their age, until a restore shows that the cause is over."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from outlast.errors import OutlastError
from outlast.model import CheckpointId, JobKey
from outlast.store import Store

log = logging.getLogger(__name__)

# The record that tells which pins are of this module's, and not of a person's.
RECORD = "unrestored"


def keep(store: Store, job: JobKey, id: CheckpointId) -> None:
    """Pin checkpoint *id*, which could not be restored; one that somebody has pinned stays his."""
    with contextlib.suppress(OutlastError):
        if id not in store.pins(job):
            _write(store, job, [*_read(store, job), id])
            store.pin(job, id)


def release(store: Store, job: JobKey, restored: CheckpointId) -> None:
    """Checkpoint *restored* was: unpin it, and those before it, that were pinned by `keep`.

    It may not have failed for a fault of its own, but of a node, which is over; and those before it nobody needs
    any more. What is newer, which the job could not go on from, stays.
    """
    try:
        kept = _read(store, job)
        over = [id for id in kept if id <= restored]
        for id in over:
            store.unpin(job, id)
        if over:
            _write(store, job, [id for id in kept if id > restored])
    except OutlastError as error:
        log.warning("checkpoints that could not be restored stay pinned: %s", error)


def _read(store: Store, job: JobKey) -> list[CheckpointId]:
    found = (store.get_record(job, RECORD) or {}).get("checkpoints", ())
    return [CheckpointId(int(epoch), int(seq)) for epoch, seq in found]


def _write(store: Store, job: JobKey, ids: Sequence[CheckpointId]) -> None:
    store.put_record(job, RECORD, {"checkpoints": [[id.epoch, id.seq] for id in ids]})
