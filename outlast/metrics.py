"""What Outlast does on this node, in figures: asked of the managers of the jobs that run here."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import outlast
from outlast import control
from outlast.config import Config
from outlast.errors import OutlastError
from outlast.exposition import Family

_MANAGER_SECONDS = 2.0


def node_metrics(config: Config, runtime: Path) -> list[Family]:
    """Return the figures of this node, of the managers whose sockets are below *runtime*."""
    reports: dict[str, Mapping[str, Any] | None] = {}
    for path in sorted(runtime.glob("*/manager.sock")):
        job = path.parent.name
        if "." in job and path.parent.with_name(job.partition(".")[0]).exists():
            continue  # of an earlier run, which the name without an ending does not lead to any more
        try:
            reports[job] = control.call(path, {"op": "status"}, timeout=_MANAGER_SECONDS)
        except OutlastError:
            reports[job] = None
    return _families(config, reports)


def _families(config: Config, reports: Mapping[str, Mapping[str, Any] | None]) -> list[Family]:
    heard = {job: report for job, report in reports.items() if report is not None}
    tallies = {job: report.get("tally", {}) for job, report in heard.items()}
    spool = next(
        path for path in (config.checkpoint.spool, *config.checkpoint.spool.parents) if path.exists()
    )

    def each(key: str) -> list[tuple[dict[str, str], float]]:
        return [({"job": job}, float(tally[key])) for job, tally in tallies.items() if key in tally]

    return [
        Family("outlast_build_info", "gauge", "Always 1.", [({"version": outlast.__version__}, 1)]),
        Family(
            "outlast_manager_up",
            "gauge",
            "Whether the job's manager on this node answers.",
            [({"job": job}, int(report is not None)) for job, report in reports.items()],
        ),
        Family(
            "outlast_job_running",
            "gauge",
            "Whether the job computes on this node.",
            [({"job": job}, int(bool(report["running"]))) for job, report in heard.items()],
        ),
        Family(
            "outlast_job_epoch",
            "gauge",
            "How often the job was started again before this run.",
            [({"job": job}, report["epoch"]) for job, report in heard.items() if report["epoch"] is not None],
        ),
        Family(
            "outlast_events_total",
            "counter",
            "Entries of the job's event log made by its manager here, by their word.",
            [
                ({"job": job, "event": event}, count)
                for job, tally in tallies.items()
                for event, count in sorted(tally.get("events", {}).items())
            ],
        ),
        Family(
            "outlast_checkpoint_last_timestamp_seconds",
            "gauge",
            "When this run's newest checkpoint was complete in the store, in Unix time.",
            each("newest"),
        ),
        Family(
            "outlast_checkpoint_pause_seconds_total",
            "counter",
            "How long the job stood still for its checkpoints.",
            [(labels, value / 1000) for labels, value in each("pause_ms")],
        ),
        Family(
            "outlast_checkpoint_image_bytes_total",
            "counter",
            "Size of the checkpoints made.",
            each("image_bytes"),
        ),
        Family(
            "outlast_checkpoint_stored_bytes_total",
            "counter",
            "What was shipped to the store for them.",
            each("stored_bytes"),
        ),
        Family(
            "outlast_checkpoint_ship_seconds_total",
            "counter",
            "How long their shipping took.",
            each("ship_s"),
        ),
        Family(
            "outlast_spool_free_bytes",
            "gauge",
            "Room where images wait until they are shipped.",
            [({}, shutil.disk_usage(spool).free)],
        ),
    ]


def write_textfile(text: str, path: Path) -> None:
    """Have *path*, which the node exporter reads at any time, hold *text*: the old one or the new, never a part.

    Raises:
        OutlastError: the directory is not there, or cannot be written.
    """
    try:
        # The exporter reads what ends in .prom only.
        handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        hint = "the node exporter says where it reads: --collector.textfile.directory"
        raise OutlastError(f"{path}: {error.strerror}", hint=hint) from None
