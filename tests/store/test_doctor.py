"""What `outlast doctor` says of stores, their keys, and a node's own directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outlast import doctor_store
from outlast.config import Config, OtherStore, StoreConfig
from outlast.doctor import Finding
from outlast.store import add_key

if TYPE_CHECKING:
    from tests.conftest import SshServer

MOUNTED = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
31 22 0:27 / /home rw,relatime shared:9 - nfs4 10.0.2.2:/ rw,vers=4.2,rsize=1048576,hard,proto=tcp,sec=sys
45 22 259:1 / /nvme rw,noatime - xfs /dev/nvme0n1 rw
46 45 0:31 / /nvme/my\040own rw - tmpfs tmpfs rw
47 22 0:52 / /ckpt rw - fuse.sshfs outlast@store:/ckpt rw
48 22 0:53 / /scratch rw - lustre 10.0.0.1@o2ib:/scratch rw
"""


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    found = {finding.what: finding for finding in findings}
    assert all(finding.remedy for finding in found.values() if finding.verdict != "ok")
    return found


def site(config: StoreConfig, **changes: object) -> Config:
    return Config(cluster="testbed", store=dataclasses.replace(config, **changes))  # type: ignore[arg-type]


def other(config: StoreConfig, **changes: object) -> Config:
    """A site whose further store "fast" is as *config* has it, with *changes*."""
    fast = OtherStore(
        url=config.url,
        partitions="gpu*",
        identity=str(config.identity),
        known_hosts=str(config.known_hosts),
        key=str(config.key),
    )
    fast = dataclasses.replace(fast, **changes)  # type: ignore[arg-type]
    return Config(cluster="testbed", store=StoreConfig(url="file:///nowhere", other={"fast": fast}))


def test_each_store_is_looked_at_by_its_name_and_how_much_is_free_is_said(
    config: StoreConfig, top: Path
) -> None:
    found = by_name(doctor_store.stores(other(config)))

    assert (found["store"].verdict, found["store fast"].verdict) == ("FAIL", "ok")
    assert "file:///nowhere" in found["store"].fact
    assert "answers and can be written" in found["store fast"].fact
    assert "MiB free" in found["store fast room"].fact
    assert (top / "format").exists()


def test_store_of_another_format_is_said(config: StoreConfig, top: Path) -> None:
    (top / "format").write_text('{"outlast":"store","version":9}\n')
    finding = by_name(doctor_store.stores(other(config)))["store fast"]

    assert finding.verdict == "FAIL"
    assert "has format version 9" in finding.fact


def test_store_that_is_nearly_full_is_said(config: StoreConfig, small_disk: Path) -> None:
    found = by_name(doctor_store.stores(other(config)))

    assert found["store fast"].verdict == "ok"
    assert found["store fast room"].verdict == "warn"
    assert "5 MiB free" in found["store fast room"].fact


def test_identity_that_others_can_read_or_that_is_missing_is_said(
    own_server: SshServer, tmp_path: Path
) -> None:
    config = own_server.config(own_server.served)
    copy = tmp_path / "identity"
    copy.write_bytes(config.identity.read_bytes())
    copy.chmod(0o644)
    found = by_name(doctor_store.stores(other(config, identity=str(copy))))
    assert found["store fast key"].remedy == f"chmod 600 {copy}"

    copy.unlink()
    finding = by_name(doctor_store.stores(other(config, identity=str(copy))))["store fast"]
    assert finding.verdict == "FAIL"
    assert str(copy) in finding.fact


def test_each_key_file_is_looked_at_once(tmp_path: Path, nvme: Path) -> None:
    mine, theirs = tmp_path / "data.key", tmp_path / "fast.key"
    add_key(mine)
    fast = OtherStore(url="file:///fast", partitions="gpu*", key=str(theirs))
    big = OtherStore(url="file:///big", partitions="cpu*")
    config = site(StoreConfig(url="file:///main", key=mine), other={"fast": fast, "big": big})
    found = by_name(doctor_store.keys(config))

    assert {what: finding.verdict for what, finding in found.items()} == {
        "data key": "ok",
        "data key fast": "FAIL",
    }
    assert "outlast store init --of fast" in found["data key fast"].remedy
    add_key(theirs)
    assert by_name(doctor_store.keys(config))["data key fast"].verdict == "ok"


def test_own_directory_is_looked_at_where_there_is_to_be_one(nvme: Path, tmp_path: Path) -> None:
    store = StoreConfig(url="file:///main")
    assert by_name(doctor_store.own_directory(site(store))) == {}

    found = by_name(doctor_store.own_directory(site(store, local=str(nvme))))
    assert set(found) == {"local", "local room"}
    missing = by_name(doctor_store.own_directory(site(store, local=str(tmp_path / "none"))))["local"]
    assert (missing.verdict, missing.remedy[:19]) == ("warn", "install -d -m 700 /")
    nvme.chmod(0o750)
    assert (
        by_name(doctor_store.own_directory(site(store, local=str(nvme))))["local"].remedy
        == f"chmod 700 {nvme}"
    )
    nvme.chmod(0o777)
    assert by_name(doctor_store.own_directory(site(store, local=str(nvme))))["local"].verdict == "FAIL"
    (tmp_path / "file").touch()
    wrong = by_name(doctor_store.own_directory(site(store, local=str(tmp_path / "file"))))["local"]
    assert (wrong.verdict, wrong.fact) == ("FAIL", f"{tmp_path}/file: no directory")


def test_own_directory_without_room_or_in_memory_is_said(
    nvme: Path, mounted: Callable[[Path, str], None]
) -> None:
    mounted(nvme, "2m")
    found = by_name(doctor_store.own_directory(site(StoreConfig(url="file:///main"), local=str(nvme))))

    assert (found["local"].verdict, found["local room"].verdict) == ("warn", "warn")
    assert "on tmpfs" in found["local"].fact
    assert found["local room"].fact.startswith("2 MiB free")


def test_own_directory_that_other_machines_have_is_refused(
    nvme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(doctor_store, "_MOUNTED", mounts)
    for kind, verdict in (("nfs4", "FAIL"), ("lustre", "FAIL"), ("fuse.sshfs", "FAIL"), ("xfs", "ok")):
        mounts.write_text(f"22 1 254:0 / / rw - ext4 /dev/vda1 rw\n31 22 0:27 / {nvme} rw - {kind} x rw\n")
        found = by_name(doctor_store.own_directory(site(StoreConfig(url="file:///main"), local=str(nvme))))
        assert (found["local"].verdict, f"on {kind}" in found["local"].fact) == (verdict, True)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/nvme", "ext4"),
        ("/home/outlast", "nfs4"),
        ("/nvme/outlast", "xfs"),
        ("/nvmes", "ext4"),
        ("/nvme/my own/x", "tmpfs"),
        ("/ckpt", "fuse.sshfs"),
        ("/scratch/a/b", "lustre"),
    ],
)
def test_file_system_of_a_path_is_that_of_the_deepest_mount_above_it(path: str, kind: str) -> None:
    assert doctor_store.kind_of(Path(path), MOUNTED) == kind
