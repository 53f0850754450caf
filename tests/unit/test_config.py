"""What a site writes into its files, and what it is told when that cannot be right."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from outlast.config import Config, explain_config, read_config
from outlast.errors import ConfigError

GOOD = 'cluster = "c"\n\n[store]\nurl = "sftp://me:word@host/ckpt"\n\n[checkpoint]\nkeep = 3\n'


@pytest.fixture
def main(tmp_path: Path) -> Path:
    path = tmp_path / "outlast.toml"
    path.write_text(GOOD)
    (tmp_path / "conf.d").mkdir()
    return path


def add(main: Path, name: str, text: str) -> Path:
    path = main.parent / "conf.d" / name
    path.write_text(text)
    return path


def run(main: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "outlast.cli", "--config", str(main), *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_later_files_win_key_by_key(main: Path) -> None:
    add(main, "20-site.toml", "[checkpoint]\nkeep = 5\n")
    add(main, "10-site.toml", '[checkpoint]\nkeep = 4\nmode = "plain"\n[lease]\nttl = 8\n')
    add(main, "30-not-read", "this is no TOML")

    config = read_config(main)

    assert (config.cluster, config.checkpoint.keep, config.checkpoint.mode) == ("c", 5, "plain")
    assert (config.lease.ttl, config.lease.renew) == (8.0, Config().lease.renew)


def test_each_value_says_where_it_comes_from(main: Path) -> None:
    late = add(main, "10-site.toml", "# of the site\n[checkpoint]\nkeep = 4\n")

    found = explain_config(main)

    assert found["checkpoint.keep"] == (4, f"{late}:3")
    assert found["store.url"] == ("sftp://me:***@host/ckpt", f"{main}:4")
    assert found["lease.guard"] == (True, "default")


def test_further_stores_come_by_name_from_all_files_in_their_order(main: Path) -> None:
    main.write_text(GOOD + '[store.other.fast]\nurl = "file:///fast"\npartitions = "gpu*"\n')
    late = add(
        main,
        "10.toml",
        '[store.other.big]\nurl = "file:///big"\nusers = "al"\n[store.other.fast]\nquota = "5G"\n',
    )

    store = read_config(main).store

    assert list(store.other) == ["fast", "big"]
    assert (store.other["fast"].url, store.other["fast"].quota) == ("file:///fast", "5G")
    found = explain_config(main)
    assert found["store.other.fast.partitions"] == ("gpu*", f"{main}:10")
    assert found["store.other.fast.quota"] == ("5G", f"{late}:5")
    assert found["store.other.big.quota"] == ("", "default")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[store.other]\nfast = "file:///x"\n', ["[store] other: must be tables", "[store.other.NAME]"]),
        ('[store.other.fast]\npartition = "x"\n', [":2: [store.other.fast] partition: no such key"]),
        ('[store.other.fast]\npartitions = "x"\n', ["[store.other.fast] url", "must be set"]),
        ('[store.other.fast]\nurl = "file:///x"\n', ["one of partitions, users and jobs"]),
        (
            '[store.other.fast]\nurl = "file:///x"\njobs = 3\n',
            [":3: [store.other.fast] jobs = 3: must be a text"],
        ),
        (
            '[store.other.fast]\nurl = "file:///x"\njobs = "a"\nquota = "x"\n',
            [':4: [store.other.fast] quota = "x"'],
        ),
        ('[store.other."a b"]\nurl = "file:///x"\njobs = "a"\n', ['other = "a b": must be a name']),
        ("[store]\ntimeout = 0.0\n", [":2: [store] timeout = 0: must be 0.1 to 3600 seconds"]),
        (
            '[store.other.fast]\nurl = "file:///x"\njobs = "a"\ntimeout = 9999.0\n',
            [":4: [store.other.fast] timeout = 9999: must be 0.1 to 3600 seconds"],
        ),
        ('[store]\nlocal = "nvme"\n', [':2: [store] local = "nvme": must be a path from the root']),
        ('[store]\nuser_quota = "many"\n', [':2: [store] user_quota = "many"']),
    ],
)
def test_store_that_cannot_be_is_refused_with_file_line_and_key(
    main: Path, text: str, says: list[str]
) -> None:
    add(main, "10.toml", text)

    with pytest.raises(ConfigError) as caught:
        read_config(main)
    for part in says:
        assert part in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[checkpoint]\nkeeep = 1\n", ":2: [checkpoint] keeep: no such key"),
        ("[checkpoint]\n\nkeep = 0\n", ":3: [checkpoint] keep = 0: must be 1 to 1000"),
        ('[checkpoint]\nkeep = "x"\n', ":2: [checkpoint] keep: "),
        ("[checkpoint]\nmode = 3\n", ":2: [checkpoint] mode = 3: must be a text"),
        ("checkpoint.keep = 0\n", ":1: [checkpoint] keep = 0: must be"),
        ("checkpoint = { keep = 0 }\n", ":1: [checkpoint] keep = 0: must be"),
        ("checkpoint = 3\n", ":1: checkpoint: must be a table"),
        ('x = """\nkeep = 3\n"""\n', ":1: x: no such key"),
        ("[checkpoint\n", "(at line 1, column 12)"),
        ('scheduler = "lsf"\n', ':1: scheduler = "lsf": must be "slurm" or "pbs"'),
        # The default of another key is what it does not go with.
        ("[lease]\nttl = 0.9\n", ":2: [lease] renew = 0.5: must be 0.1 or more, and at most half of ttl"),
    ],
)
def test_errors_name_file_line_and_key(main: Path, text: str, says: str) -> None:
    late = add(main, "10-site.toml", text)

    with pytest.raises(ConfigError) as caught:
        read_config(main)

    assert str(caught.value).startswith(str(late))
    assert says in str(caught.value)


def test_what_an_earlier_file_has_wrong_is_mended_by_a_later_one(main: Path) -> None:
    main.write_text(GOOD.replace("keep = 3", "keep = 0"))
    add(main, "10-site.toml", "[checkpoint]\nkeep = 1\n")

    assert read_config(main).checkpoint.keep == 1


def test_check_ends_with_the_code_of_a_wrong_configuration(main: Path) -> None:
    good = run(main, "config", "check")
    late = add(main, "10-site.toml", "[checkpoint]\nkeeep = 1\n")
    bad = run(main, "config", "check")

    assert (good.returncode, good.stdout) == (0, f"{main}: in order\n")
    assert bad.returncode == 78
    assert bad.stderr.startswith(
        f"outlast: {late}:2: [checkpoint] keeep: no such key\noutlast: the keys are "
    )


def test_what_is_shown_can_be_read_again(main: Path, tmp_path: Path) -> None:
    main.write_text(GOOD.replace("me:word@", "me@"))
    shown = run(main, "config", "show")
    again = tmp_path / "again" / "outlast.toml"
    again.parent.mkdir()
    again.write_text(shown.stdout)

    assert shown.returncode == 0, shown.stderr
    assert tomllib.loads(shown.stdout)["checkpoint"]["keep"] == 3
    assert read_config(again) == read_config(main)


def test_json_shows_the_same(main: Path) -> None:
    found = json.loads(run(main, "config", "show", "--json").stdout)

    assert found["checkpoint.keep"] == {"value": 3, "from": f"{main}:7"}
    assert set(found) == set(explain_config(main))
