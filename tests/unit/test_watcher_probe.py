import socket
import time
from collections.abc import Iterator

import pytest

from outlast.model import SchedulerNode
from outlast.watcher.actions import Probe
from outlast.watcher.probe import Prober, ask


def node(name: str, port: int, address: str = "127.0.0.1") -> SchedulerNode:
    return SchedulerNode(name, up=True, responding=True, address=address, port=port)


@pytest.fixture
def alive() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def refusing() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def silent() -> Iterator[int]:
    """A port whose kernel answers a SYN with nothing at all, since the queue of its listener is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, socket.socket() as first:
        first.connect(server.getsockname())
        yield server.getsockname()[1]


def test_a_node_that_accepts_or_refuses_lives_and_a_silent_one_does_not(
    alive: int, refusing: int, silent: int
) -> None:
    nodes = [node("accepts", alive), node("refuses", refusing), node("silent", silent)]

    assert ask(nodes, timeout=0.3) == {"accepts": True, "refuses": True, "silent": False}


def test_many_silent_nodes_take_no_longer_than_one(silent: int) -> None:
    began = time.monotonic()
    answers = ask([node(f"n{i}", silent) for i in range(100)], timeout=0.3)

    assert len(answers) == 100
    assert not any(answers.values())
    assert 0.3 <= time.monotonic() - began < 15, "one after another they would take 30 s"


def test_nothing_is_said_of_a_node_that_could_not_be_asked(alive: int) -> None:
    assert ask([node("n1", alive, address="no-such-host.invalid")]) == {}


def test_answers_are_counted_as_long_as_they_stay_the_same(alive: int, silent: int) -> None:
    prober = Prober(cycle=0.0, timeout=0.2)

    assert [prober.ask([node("n1", alive)])["n1"] for _ in range(3)] == [
        Probe(True, 1),
        Probe(True, 2),
        Probe(True, 3),
    ]
    assert prober.ask([node("n1", silent)]) == {"n1": Probe(False, 1)}
    assert prober.ask([node("n1", silent)]) == {"n1": Probe(False, 2)}
    assert prober.ask([node("n1", alive)]) == {"n1": Probe(True, 1)}


def test_a_cycle_in_which_a_node_was_not_asked_begins_the_count_anew(silent: int) -> None:
    prober = Prober(cycle=0.0, timeout=0.2)
    prober.ask([node("n1", silent)])
    prober.ask([])

    assert prober.ask([node("n1", silent)]) == {"n1": Probe(False, 1)}

    prober.forget()

    assert prober.ask([node("n1", silent)]) == {"n1": Probe(False, 1)}


def test_two_questions_at_once_count_as_one(alive: int) -> None:
    prober = Prober(cycle=60.0)

    assert prober.ask([node("n1", alive)]) == {"n1": Probe(True, 1)}
    assert prober.ask([node("n1", alive)]) == {"n1": Probe(True, 1)}
