"""Images that must not be restored are refused, in words, and nothing of them runs."""

from __future__ import annotations

import pytest

from criu_backend import CriuError
from tests.criu.capsules import Peer, Place

pytestmark = pytest.mark.criu


def processes_of(peer: Peer) -> int:
    """How many capsules were left for *peer*, as far as its connection tells: 0 when it is closed."""
    return 0 if peer.hears_no_more() else 1


def test_image_of_another_user_is_refused(user_place: Place) -> None:
    job = user_place.start(["sleep", "60"])
    images, _ = user_place.dump(job)
    peer = user_place.peer()

    with pytest.raises(CriuError, match="a task of user 2000 in a checkpoint of user 2001"):
        user_place.restore(images, peer, uid=2001)
    peer.hand_over()
    assert processes_of(peer) == 0


def test_image_of_root_is_refused_to_a_user(place: Place) -> None:
    job = place.start(["sleep", "60"])
    images, _ = place.dump(job)

    if place.uid == 0:
        with pytest.raises(
            CriuError, match="a task of user 0 with capabilities in a checkpoint of user 2000"
        ):
            place.restore(images, uid=2000)
    else:
        place.lose(job)
        assert place.restore(images).capsule.alive


def test_images_of_a_later_criu_are_refused(place: Place) -> None:
    job = place.start(["sleep", "60"])
    images, _ = place.dump(job)
    peer = place.peer()

    with pytest.raises(CriuError, match=r"written by criu 99\.1, this node has") as caught:
        place.criu.restore(peer.context, images, place.path, uid=place.uid, dumped_by="99.1")
    assert caught.value.hint == "install criu 99.1 or later on this node"


def test_missing_file_fails_the_restore_with_a_hint_and_leaves_nothing(place: Place) -> None:
    job = place.python("file = open('data', 'w'); say('ready'); time.sleep(60)")
    job.says("ready")
    images, _ = place.dump(job)
    place.lose(job)
    (place.path / "data").unlink()
    peer = place.peer()

    with pytest.raises(CriuError, match=r"^restore: .*data .*: No such file") as caught:
        place.restore(images, peer)
    assert caught.value.hint == "a file that the job had open is not on this node"
    peer.hand_over()
    assert processes_of(peer) == 0


@pytest.mark.parametrize("name", ["pstree.img", "core-{root}.img"])
def test_damaged_image_is_refused(user_place: Place, name: str) -> None:
    job = user_place.start(["sleep", "60"])
    images, _ = user_place.dump(job)
    name = name.format(root=job.capsule.job_pid)
    user_place.lose(job)
    assert (images / name).exists()
    (images / name).write_bytes(b"nothing that CRIU wrote")

    with pytest.raises(CriuError, match=rf"{name}: not a CRIU image"):
        user_place.restore(images)
