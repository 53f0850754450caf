"""What the tests here share: a cluster that is up, jobs' history beside failures, the kills' figures."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tests.cluster import cluster, cluster_to_break, module_cluster, pytest_runtest_makereport, shared_cluster

__all__ = ["cluster", "cluster_to_break", "module_cluster", "pytest_runtest_makereport", "shared_cluster"]


@dataclass
class Kills:
    """The kills at random moments: where in the checkpoint cycle they fell, and what they cost."""

    seed: int
    moments: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # from the kill until the job runs again


KILLS_DONE = pytest.StashKey[dict[str, Kills]]()  # by what they are called in the summary


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the figures, and how to have the same moments again."""
    for name, kills in config.stash.get(KILLS_DONE, {}).items():
        terminalreporter.section(name)
        terminalreporter.line(f"OUTLAST_E2E_SEED={kills.seed}")
        for moment, count in Counter(kills.moments).most_common():
            terminalreporter.line(f"{count:3d}  {moment}")
        if kills.seconds:
            terminalreporter.line(
                f"seconds from the kill to running again: median {statistics.median(kills.seconds):.1f}, "
                f"least {min(kills.seconds):.1f}, most {max(kills.seconds):.1f}"
            )
