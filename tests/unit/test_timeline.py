"""A job's history as it is read from its event log; one log is a real job's that lost its node."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from outlast.errors import OutlastError, UsageError
from outlast.plot import plot, svg
from outlast.timeline import History, read_history

DATA = Path(__file__).parent / "data"


def event(at: float, node: str, word: str, text: str = "", **more: object) -> dict[str, object]:
    return {"time": at, "node": node, "epoch": 0, "event": word, "text": text, **more}


START = event(100, "n1", "started")
DUMP = event(110, "n1", "dump", "checkpoint 0.1 begins")
DONE = event(112, "n1", "checkpoint", checkpoint="7@0.1", pause_ms=500, ship_s=1, stored_bytes=10)
LATER = event(120, "n1", "dump", "checkpoint 0.2 begins")
DOWN = event(130, "ctl", "node-marked-down", "n1")
BACK = event(140, "n2", "restored", checkpoint="7@0.1", fetch_s=0.5, restore_s=0.25)
BACK_2 = {**BACK, "checkpoint": "7@0.2"}


@pytest.fixture(scope="module")
def killed() -> History:
    """The history of a job whose node lost its power."""
    events = json.loads((DATA / "killed.events.json").read_text())["events"]
    stored = json.loads((DATA / "killed.checkpoints.json").read_text())["checkpoints"]
    return read_history("1", events, stored)


@pytest.mark.parametrize(
    ("events", "runs"),
    [
        ([START], [("n1", 100, 200, "running", None)]),
        ([START, event(150, "n1", "ended")], [("n1", 100, 150, "ended", None)]),
        ([START, DUMP, DONE, DOWN, BACK], [("n1", 100, 130, "lost", 110), ("n2", 140, 200, "running", None)]),
        # The node died before it could tell that its checkpoint was complete.
        (
            [START, DUMP, DONE, LATER, DOWN, BACK_2],
            [("n1", 100, 130, "lost", 120), ("n2", 140, 200, "running", None)],
        ),
        # There was no checkpoint: everything is computed again.
        (
            [START, DOWN, event(140, "n2", "started"), event(140, "n2", "begun-again")],
            [("n1", 100, 130, "lost", 100), ("n2", 140, 200, "running", None)],
        ),
        # The scheduler itself found the node dead, and the watcher has nothing to tell.
        ([START, DUMP, DONE, BACK], [("n1", 100, 112, "lost", 110), ("n2", 140, 200, "running", None)]),
        # The watcher's clock may be behind: a run has no end before its beginning.
        ([START, event(90, "ctl", "requeued")], [("n1", 100, 100, "lost", None)]),
    ],
)
def test_runs_and_what_is_computed_again_are_read_from_the_events(
    events: list[dict[str, Any]], runs: list[tuple[object, ...]]
) -> None:
    history = read_history("7", events, running_at=200)

    assert [(run.node, run.start, run.end, run.how, run.again) for run in history.runs] == runs


def test_a_dead_nodes_last_checkpoint_is_known_from_the_store() -> None:
    stored = [{"name": "7@0.2", "node": "n1", "created": 121.0}]
    history = read_history("7", [START, DUMP, DONE, DOWN, BACK_2], stored, running_at=200)

    assert history.runs[0].again == 121


def test_a_dead_nodes_last_checkpoint_is_known_from_the_restore() -> None:
    back = {**BACK_2, "made": 122.0, "made_on": "n1"}
    history = read_history("7", [START, DUMP, DONE, DOWN, back], running_at=200)

    assert history.runs[0].again == 122
    assert history.cost.saved_s == 22


def test_what_was_saved_is_what_had_been_computed_before_the_checkpoint() -> None:
    second = [
        event(150, "n2", "dump", "checkpoint 1.1 begins"),
        event(151, "n2", "checkpoint", checkpoint="7@1.1", pause_ms=100, ship_s=0.5, stored_bytes=5),
        event(160, "ctl", "requeued"),
        event(170, "n3", "restored", checkpoint="7@1.1", fetch_s=0.5, restore_s=0.25),
        event(180, "n3", "ended"),
    ]
    cost = read_history("7", [START, DUMP, DONE, DOWN, BACK, *second]).cost

    assert cost.saved_s == 10 + (10 + 10), "10 s at the first restart, all 20 s at the second"
    assert cost.again_s == (130 - 110) + (160 - 150)
    assert (cost.elapsed_s, cost.run_s, cost.down_s) == (80, 60, 20)
    assert (cost.restarts, cost.restore_s) == (2, 1.5)
    assert (cost.checkpoints, cost.pause_s, cost.upload_s, cost.shipped_bytes) == (2, 0.6, 1.5, 15)


def test_a_real_jobs_log_is_two_runs_and_a_node_that_died(killed: History) -> None:
    assert [(run.node, run.how, run.origin) for run in killed.runs] == [
        ("n1", "lost", None),
        ("n2", "ended", "1@0.2"),
    ]
    assert [one.event for one in killed.failures] == ["node-marked-down"]
    assert [one.name for one in killed.checkpoints[:3]] == ["1@0.1", "1@0.2", "1@1.1"]
    assert 7.5 < killed.cost.saved_s < 8.5
    assert 4 < killed.cost.again_s < 5


def test_the_drawing_has_a_mark_for_each_thing_that_happened(killed: History) -> None:
    root = ElementTree.fromstring(svg(killed))  # noqa: S314 - made here
    space = "{http://www.w3.org/2000/svg}"
    titles = [str(one.text) for one in root.iter(f"{space}title")]

    assert sum("stood still for" in title for title in titles) == len(killed.checkpoints)
    assert sum("shipped in" in title for title in titles) == len(killed.checkpoints)
    assert sum("until it ran again on n2" in title for title in titles) == 1
    assert sum("computed again" in title for title in titles) == 1
    assert sum("node-marked-down" in title for title in titles) == 1
    assert {"n1", "n2"} <= {str(one.text) for one in root.iter(f"{space}text")}
    width = float(root.attrib["width"])
    for shape in root.iter(f"{space}rect"):
        assert 0 <= float(shape.attrib.get("x", 0)) <= width


def test_a_name_that_is_markup_is_drawn_as_text() -> None:
    history = read_history("7", [{**START, "node": "<script>&"}], running_at=200)

    assert "<script>" not in svg(history)
    ElementTree.fromstring(svg(history))  # noqa: S314 - made here


def test_pages_hold_the_picture_and_the_figures_as_a_table(killed: History, tmp_path: Path) -> None:
    plot(killed, tmp_path / "job.html")
    page = (tmp_path / "job.html").read_text()

    assert page.count("<tr><td>1@") == len(killed.checkpoints)
    assert "<svg" in page


def test_png_is_drawn_by_matplotlib_or_refused_with_what_to_install(
    killed: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutlastError) as caught:
        plot(killed, tmp_path / "job.png")

    assert "matplotlib" in str(caught.value)
    assert "python3-matplotlib" in str(caught.value.hint)
    assert not (tmp_path / "job.png").exists()


def test_a_picture_of_another_kind_and_one_of_nothing_are_refused(killed: History, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a kind of picture"):
        plot(killed, tmp_path / "job.gif")
    with pytest.raises(UsageError, match="has not run yet"):
        plot(read_history("7", []), tmp_path / "job.svg")
    with pytest.raises(OutlastError, match="No such file or directory"):
        plot(killed, tmp_path / "missing" / "job.svg")
