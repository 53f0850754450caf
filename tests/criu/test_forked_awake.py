"""While a tree stands still for a forked dump no processor goes idle so deeply that it takes long to wake."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criu_backend import CriuError
from tests.criu.capsules import Place
from tests.criu.waiting import eventually

pytestmark = pytest.mark.criu

_DEVICE = Path("/dev/cpu_dma_latency")
_PROGRAM = """
    say("ready")
    wait("stop")
"""


@pytest.fixture
def device(need: Callable[[str, str | None], None]) -> None:
    need("cpu_dma_latency", None if _DEVICE.exists() else f"this kernel has no {_DEVICE}")


@pytest.fixture
def no_device() -> Iterator[None]:
    kept = _DEVICE.with_name("kept")
    if _DEVICE.exists():
        _DEVICE.rename(kept)
    yield
    if kept.exists():
        kept.rename(_DEVICE)


def latency_usecs() -> int:
    """What all who have a wish agree on. Source: Documentation/power/pm_qos_interface.rst."""
    with _DEVICE.open("rb", buffering=0) as device:
        return int(struct.unpack("i", device.read(4))[0])


def test_processors_are_kept_awake_while_the_job_stands_still_and_no_longer(
    user_place: Place, device: None
) -> None:
    job = user_place.python(_PROGRAM)
    job.says("ready")
    found = []

    _, result = user_place.dump(job, lambda: found.append(latency_usecs()), mode="forked")

    assert (result.mode, found) == ("forked", [0])
    eventually(lambda: latency_usecs() > 0, "nobody wants processors to be awake")


def test_dump_that_fails_leaves_no_processor_awake(user_place: Place, device: None) -> None:
    job = user_place.python(_PROGRAM)
    job.says("ready")

    def refuse() -> None:
        raise CriuError("no", log=Path("/dev/null"))

    with pytest.raises(CriuError, match="no"):
        user_place.dump(job, refuse, mode="forked")

    eventually(lambda: latency_usecs() > 0, "nobody wants processors to be awake")


def test_forked_dump_does_without(user_place: Place, no_device: None) -> None:
    job = user_place.python(_PROGRAM)
    job.says("ready")

    _, result = user_place.dump(job, mode="forked")

    assert (result.mode, result.reason) == ("forked", None)
