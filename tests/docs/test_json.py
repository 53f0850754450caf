"""docs/json.md says what every verb's JSON holds: neither more nor less."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import Cluster, Job
from tests.docs.conftest import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.timeout(240)]

TEXT = (ROOT / "docs/json.md").read_text()


def documented(section: str) -> dict[str, bool]:
    """Return the keys of one section's table, and of each whether it must be there."""
    (body,) = re.findall(rf"^## [^\n]*\b{section}\b[^\n]*\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    rows = re.findall(r"^\| `([\w.\[\]{}]+)` \| ?(.*?) ?\|$", body, re.M)
    return {key: not text.startswith("if ") for key, text in rows}


def paths(value: Any, where: str = "") -> Iterator[str]:  # noqa: ANN401 - any JSON value
    """Yield the path of every leaf of *value*; of one that is null its own."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from paths(inner, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for inner in value:
            yield from paths(inner, f"{where}[]")
    else:
        yield where


def agree(section: str, value: Any, *, also: dict[str, bool] | None = None, open_: str = "") -> None:  # noqa: ANN401
    """Assert that *value* holds the keys of *section*, and *also*; any others only where *open_* begins them."""
    known = documented(section) | (also or {})
    assert known, section
    found = set(paths(value))
    # An object that the document does not open is one key.
    folded = {next((key for key in known if one == key or one.startswith(f"{key}.")), one) for one in found}
    # A list that is null has no elements either.
    folded -= {one for one in folded if f"{one}[]" in known}
    extra = {one for one in folded - set(known) if not (open_ and one.startswith(open_))}
    assert extra == set()
    # Of a list that is empty no element's keys can be seen.
    seen = {
        key
        for key in known
        if "[]" not in key or any(one.startswith(key.rpartition("[]")[0] + "[]") for one in found)
    }
    assert {key for key, must in known.items() if must and key in seen} - folded == set()


@pytest.fixture(scope="module")
def job(module_cluster: Cluster) -> Job:
    """A job that was restarted once, and has checkpoints."""
    job = module_cluster.submit("sleep 600", checkpoint="1h")
    job.wait_for("started")
    ask(job, "checkpoint", job.id)
    job.requeue()
    job.wait_for("restored", within=60)
    ask(job, "checkpoint", job.id)
    return job


def ask(job: Job, *words: str, host: str = "ctl") -> Any:  # noqa: ANN401 - any JSON value
    return json.loads(job.cluster.on(host, "outlast", *words, "--json", user=host == "ctl"))


@pytest.mark.parametrize("verb", ["status", "top"])
def test_status(job: Job, verb: str) -> None:
    agree("status", ask(job, verb))


def test_list_and_show(job: Job) -> None:
    listed = ask(job, "list", job.id)
    agree("list", listed)
    one = {key.removeprefix("checkpoints[]."): must for key, must in documented("list").items()}
    agree("show", ask(job, "show", listed["checkpoints"][0]["name"]), also=one)


def test_events(job: Job) -> None:
    # Some events have more: docs/operate.md says which.
    agree("events", ask(job, "events", job.id), open_="events[].")


def test_report(job: Job) -> None:
    agree(
        "report",
        ask(job, "report", job.id),
        also={key: False for key in documented("report") if "fail" in key},
    )


def test_checkpoint_restart_migrate_and_drain(cluster: Cluster) -> None:
    job = cluster.submit("sleep 600", checkpoint="1h")
    job.wait_for("started")
    one = {key.removeprefix("checkpoints[]."): False for key in documented("list")}
    agree("checkpoint", ask(job, "checkpoint", job.id), also=one)
    agree("migrate", ask(job, "migrate", job.id))
    job.wait_for("restored", within=60)
    agree("hold", ask(job, "hold", job.id))
    job.wait_for_state("PENDING")
    newest = ask(job, "list", job.id)["checkpoints"][0]["name"]
    agree("restart", ask(job, "restart", newest))
    agree("release", ask(job, "release", job.id))
    job.wait_for("restored", count=2, within=60)
    node = job.node
    try:
        drained = json.loads(cluster.on("ctl", "outlast", "drain", "--wait", "--json", node, within=120))
        agree("drain", drained)
        assert drained["left"] == [job.id]
    finally:
        cluster.on("ctl", "scontrol", "update", f"NodeName={node}", "State=RESUME")
        job.cancel()


def test_verify_explain_doctor_and_store(job: Job) -> None:
    name = ask(job, "list", job.id)["checkpoints"][0]["name"]
    agree("verify", ask(job, "verify", name, host=job.node))
    agree("explain", ask(job, "explain", job.id, host=job.node))
    agree("doctor", ask(job, "doctor", host=job.node))
    stored = ask(job, "store", "stats", host=job.node)
    assert set(paths(stored)) - {"jobs[].pinned[]", "jobs[].pinned"} == {
        *(f"jobs[].{key}" for key in ("job", "checkpoints", "image_bytes", "stored_bytes", "idle_s")),
        "stored_bytes",
    }


def test_an_error(job: Job) -> None:
    done = job.cluster.try_on("ctl", "outlast", "list", "999999", "--json", user=True)
    keys = re.findall(r"^\| `(\w+)`", TEXT.partition("## ")[0], re.M)
    assert set(json.loads(done.stderr)) == set(keys)
    assert json.loads(done.stderr)["exit_code"] == done.returncode
