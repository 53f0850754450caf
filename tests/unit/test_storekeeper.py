"""`outlast store`: what it prints, for people and for programs, and how it ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from outlast.cli import main
from outlast.config import read_config
from outlast.model import CheckpointId, JobKey
from outlast.store import open_store


class Site:
    """A configuration, a store in a directory, and the command line."""

    def __init__(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.here = here
        self.capsys = capsys
        (here / "store").mkdir()
        (here / "outlast.toml").write_text(
            f'cluster = "c"\n[store]\nurl = "file://{here}/store"\nkey = "{here}/data.key"\n'
        )

    def run(self, *words: str, code: int = 0) -> str:
        assert main(["--config", str(self.here / "outlast.toml"), "store", *words]) == code
        out, err = self.capsys.readouterr()
        return err if code else out

    def json(self, *words: str, code: int = 0) -> Any:  # noqa: ANN401
        assert main(["--config", str(self.here / "outlast.toml"), "store", *words, "--json"]) == code
        return json.loads(self.capsys.readouterr().out)

    def publish(self, count: int, job_id: str = "17") -> None:
        (self.here / "source").mkdir(exist_ok=True)
        with open_store(read_config(self.here / "outlast.toml").store) as store:
            for seq in range(1, count + 1):
                (self.here / "source/a").write_bytes(os.urandom(20000))
                store.publish(JobKey("c", job_id), CheckpointId(0, seq), self.here / "source", {})


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Site:
    return Site(tmp_path, capsys)


def test_init_makes_a_key_once_and_rotates_it_when_asked(site: Site) -> None:
    first = site.json("init")
    key = site.here / "data.key"

    assert first == {"key": key.read_text()[:8], "made": True, "file": str(key)}
    assert key.stat().st_mode & 0o777 == 0o600
    assert site.json("init") == {**first, "made": False}
    assert "copy the file to all nodes" in site.run("init", "--rotate")
    assert [line[:8] for line in key.read_text().splitlines()][1] == first["key"]


def test_nothing_is_read_without_a_key_and_the_message_says_how_to_make_one(site: Site) -> None:
    site.json("init")
    site.publish(1)
    (site.here / "data.key").rename(site.here / "away")

    assert "outlast store init" in site.run("check", code=os.EX_CONFIG)
    assert "outlast store init" in site.run("forget", "17", code=os.EX_CONFIG)


def test_check_finds_what_is_damaged_and_ends_with_74(site: Site) -> None:
    site.run("init")
    site.publish(3)
    assert site.json("check")["good"] == ["17@0.3", "17@0.2", "17@0.1"]
    assert site.json("check", "--read-data")["pages"] == 15
    (pack,) = (site.here / "store/jobs/c/17/packs").glob("0-2-*")
    garbled = bytearray(pack.read_bytes())
    garbled[500] ^= 1
    pack.write_bytes(garbled)

    assert site.json("check")["damaged"] == []
    found = site.json("check", "17", "--read-data", code=os.EX_IOERR)
    assert [one["checkpoint"] for one in found["damaged"]] == ["17@0.2"]
    assert found["good"] == ["17@0.3", "17@0.1"]
    assert "nothing of it is in the store" in site.run("check", "18", code=os.EX_USAGE)


def test_forget_keeps_what_is_asked_for_and_what_is_pinned(site: Site) -> None:
    site.run("init")
    site.publish(6)
    assert site.run("pin", "17@0.2") == "17@0.2: stays until it is unpinned\n"
    assert site.json("forget", "17", "--keep-last", "2") == {
        "forgotten": 3,
        "left": ["17@0.6", "17@0.5", "17@0.2"],
    }
    assert site.json("stats")["jobs"][0]["pinned"] == ["17@0.2"]
    site.run("unpin", "17@0.2")
    assert site.json("forget", "17", "--keep-hourly", "3")["left"] == ["17@0.6"]

    assert "is not pinned" in site.run("unpin", "17@0.2", code=os.EX_USAGE)
    assert "no such checkpoint" in site.run("pin", "17@0.2", code=os.EX_USAGE)
    assert "always kept" in site.run("forget", "17", "--keep-last", "0", code=os.EX_USAGE)
    assert "names look like" in site.run("pin", "17", code=os.EX_USAGE)


def test_stats_tell_what_each_job_has(site: Site) -> None:
    site.run("init")
    site.publish(2)
    site.publish(1, "18")
    (first, second) = site.json("stats")["jobs"]

    assert (first["job"], first["checkpoints"], first["image_bytes"]) == ("17", 2, 20000)
    assert 40000 < first["stored_bytes"] < 46000
    assert second["checkpoints"] == 1
    assert site.run("stats").splitlines()[-1].startswith("2 jobs, ")


def test_checkpoints_of_a_key_that_is_not_here_are_told(site: Site) -> None:
    site.run("init")
    site.publish(1)
    site.run("init", "--rotate")
    site.publish(1, "18")
    key = site.here / "data.key"
    key.write_text(key.read_text().splitlines(keepends=True)[0])

    (unreadable,) = site.json("check", code=os.EX_IOERR)["damaged"]
    assert unreadable["checkpoint"] == "17@0.1"
    assert "which this node does not have" in unreadable["why"]
    assert [row["checkpoints"] for row in site.json("stats")["jobs"]] == [0, 1]


def test_prune_puts_away_what_is_old_and_says_so(site: Site) -> None:
    site.run("init")
    site.publish(1)
    for path in (site.here / "store").rglob("*"):
        os.utime(path, (1, 1))

    assert site.run("prune", "--lost", "30d") == "to the trash: jobs/c/17\n"
    assert site.run("prune") == "nothing to do\n"
    assert site.json("stats")["jobs"] == []
