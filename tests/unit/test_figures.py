"""Figures for Prometheus, read by its own parser."""

from __future__ import annotations

import re
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from outlast import control
from outlast.config import Config
from outlast.errors import OutlastError
from outlast.exposition import CONTENT_TYPE, Family, render, serve
from outlast.manager._events import EventLog
from outlast.metrics import node_metrics, write_textfile
from outlast.model import JobKey

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_parser_of_prometheus_reads_what_is_written() -> None:
    odd = 'a "quoted" \\ line\nand another'
    found = read(render([Family("x_total", "counter", "Odd.", [({"a": odd}, 1.5), ({}, 2)])]))

    assert found == {("x_total", (("a", odd),)): 1.5, ("x_total", ()): 2.0}


def test_node_tells_of_each_manager(tmp_path: Path) -> None:
    events = EventLog(JobKey("c", "17"), "n1")
    events.add("started", "it began")
    for _ in range(2):
        events.add("checkpoint", "", pause_ms=250.0, image_bytes=1000, stored_bytes=10, ship_s=0.5)
    status = {"running": True, "epoch": 1, "tally": events.tally()}
    (tmp_path / "17").mkdir()
    listener = control.listen(tmp_path / "17" / "manager.sock")
    threading.Thread(
        target=control.serve, args=(listener, lambda _peer, _request: status), daemon=True
    ).start()
    (tmp_path / "18").mkdir()
    (tmp_path / "18" / "manager.sock").touch()  # of a manager that is dead
    found = read(render(node_metrics(Config(), tmp_path)))
    listener.close()

    job = (("job", "17"),)
    assert found["outlast_manager_up", job] == 1
    assert found["outlast_manager_up", (("job", "18"),)] == 0
    assert found["outlast_job_running", job] == 1
    assert found["outlast_job_epoch", job] == 1
    assert found["outlast_events_total", (("event", "checkpoint"), ("job", "17"))] == 2
    assert found["outlast_checkpoint_pause_seconds_total", job] == 0.5
    assert found["outlast_checkpoint_image_bytes_total", job] == 2000
    assert found["outlast_checkpoint_stored_bytes_total", job] == 20
    assert found["outlast_checkpoint_last_timestamp_seconds", job] > 1e9
    assert found["outlast_spool_free_bytes", ()] > 0


def test_node_without_jobs_has_figures_too(tmp_path: Path) -> None:
    assert ("outlast_spool_free_bytes", ()) in read(render(node_metrics(Config(), tmp_path / "none")))


def test_every_figure_is_documented() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "operate.md").read_text()
    sources = [Path(__file__).parents[2] / "outlast" / name for name in ("metrics.py", "watcher/figures.py")]
    names = {name for source in sources for name in re.findall(r'"(outlast_\w+)"', source.read_text())}

    assert len(names) > 12
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_text_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "outlast.prom"
    write_textfile("x 1\n", path)
    write_textfile("x 2\n", path)

    assert path.read_text() == "x 2\n"
    assert [one.name for one in tmp_path.iterdir()] == ["outlast.prom"]
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(OutlastError, match=r"none/outlast.prom: No such file"):
        write_textfile("", tmp_path / "none" / "outlast.prom")


def test_figures_are_served_over_http() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    end = serve(f"127.0.0.1:{port}", lambda: "x 1\n")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            kind, text = answer.headers["Content-Type"], answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/other", timeout=10)
    finally:
        end()

    assert (kind, text) == (CONTENT_TYPE, "x 1\n")
