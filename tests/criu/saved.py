"""A checkpoint with all that the manager has a restore set back, without a manager."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from criu_backend import DumpResult, put_back
from outlast.config import CheckpointConfig
from outlast.manager._run import Run
from outlast.manager._saving import declared, save, sources
from tests.criu.capsules import Job, Place

SET_BACK = "/usr/libexec/outlast/outlast-set-back"
# What the tests use is below /tmp, which counts as any directory here, unless a test says otherwise.
SHARED = CheckpointConfig(scratch="/dev/shm")


class Saved:
    """A job that was dumped and lost, and what a restore has to set back."""

    def __init__(
        self,
        place: Place,
        job: Job,
        config: CheckpointConfig = SHARED,
        patterns: tuple[str, ...] = (),
        *,
        mode: str | None = None,
        lose: bool = True,
    ) -> None:
        """Dump *job*, and lose it unless that is to be done later."""
        self.place = place
        self.images = place.images()
        self.files: list[dict[str, Any]] = []

        def look() -> None:
            self.files = save(job.capsule.tasks(), self.images, place.uid, config)
            self.files += declared(os.fspath(place.path), patterns, place.uid)

        with place.criu.dump(job.capsule, self.images, look, mode=mode or place.mode) as result:
            put_back(result.memories, self.images)
        self.result: DumpResult = result
        if lose:
            place.lose(job)

    def set_back(self) -> str:
        """Have all set back; return why not, or nothing."""
        run = cast(Run, SimpleNamespace(directory=self.place.path / "manager", uid=self.place.uid))
        run.directory.mkdir(mode=0o755, exist_ok=True)
        with sources(self.files, self.images, run) as files:
            done = subprocess.run(
                [sys.executable, "-IS", SET_BACK],
                input=json.dumps({"files": files, "epoch": 3}),
                capture_output=True,
                text=True,
                user=self.place.uid,
                group=self.place.uid,
                extra_groups=[],
            )
        assert done.stderr == ""
        return done.stdout.strip()

    def restore(self) -> Job:
        """Set all back and restore the job."""
        why_not = self.set_back()
        assert not why_not, why_not
        return self.place.restore(self.images)

    def entry(self, path: Path) -> dict[str, Any]:
        """What was noted of *path*."""
        return next(one for one in self.files if one.get("path") == os.fspath(path))
