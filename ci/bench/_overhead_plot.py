"""A picture of what checkpoints cost beside what the papers measured; needs matplotlib."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

# Runtime with checkpoints over runtime without. LU: the process launcher's paper, its means of five runs (35.49 s
# without, 35.77 s with 3 and 36.06 s with 6). The others: the kernel's paper, forked checkpoints, 10 a run; where
# the times of its table do not add up, by the overhead that it gives.
_PAPERS = {
    "lu": {"3": 1.0079, "6": 1.0161},
    "matmul": {"500": 1.018, "615": 1.009, "1020": 1.002, "1500": 1.001},
    "cellular": {"1024": 1.077, "2048": 1.036},
}
_TITLES = {
    "lu": "LU, by checkpoints",
    "matmul": "matrix multiplication, by order",
    "cellular": "automaton, by size",
}


def require() -> None:
    """Refuse before anything is measured that could not be drawn.

    Raises:
        SystemExit: there is no matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit(
            f"bench: --plot needs matplotlib in {sys.prefix}: {sys.executable} -m pip install matplotlib"
        )


def draw(path: Path, ratios: Mapping[str, Mapping[str, float]], noise: Mapping[str, float]) -> None:
    """Draw *ratios* (program, then checkpoints or size) into *path*, with the *noise* of each case as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(ratios), 4), layout="constrained")
    for place, (program, found) in enumerate(ratios.items()):
        axes = figure.add_subplot(1, len(ratios), place + 1)
        middle = range(len(found))
        papers = [100 * (_PAPERS[program][key] - 1) for key in found]
        ours = [100 * (value - 1) for value in found.values()]
        axes.bar([x - 0.2 for x in middle], papers, 0.4, label="the paper", color="#b0b8c4")
        axes.bar([x + 0.2 for x in middle], ours, 0.4, label="Outlast, forked", color="#1f6fb2")
        around = max((abs(value - 1) for case, value in noise.items() if case.startswith(program)), default=0)
        axes.axhspan(-100 * around, 100 * around, color="#d9822b", alpha=0.2, label="noise")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(list(middle), list(found))
        axes.set_title(_TITLES[program])
        axes.set_ylabel("longer than without, %")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
