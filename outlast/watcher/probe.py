"""Asks nodes whether their kernels live: the one question that a hung or killed daemon cannot spoil."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import time
from collections.abc import Iterable, Mapping

from outlast.model import SchedulerNode
from outlast.watcher.actions import Probe

ANSWER_SECONDS = 0.5

# So many at once: each takes a file descriptor, of which a process has 1024 unless told otherwise.
_AT_ONCE = 256

# A connection that is refused was refused by a living kernel. Source of all three: connect(2), ip(7).
_ANSWERS = frozenset({0, errno.ECONNREFUSED, errno.ECONNRESET})
# A connect that ends with one of these had no answer from the node: no SYN-ACK and no RST.
_SILENCE = frozenset({errno.EINPROGRESS, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN})
# With these the node was not even asked: this machine has no way to that address.
_NOT_ASKED = frozenset({errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


def ask(nodes: Iterable[SchedulerNode], timeout: float = ANSWER_SECONDS) -> dict[str, bool]:
    """Return for each node whether it answered a TCP connect within *timeout* seconds.

    All are asked at once (256 at a time). A node of which nothing certain can be said (its name does not
    resolve, this machine has no network) is not in the result: no news is neither good nor bad news.
    """
    answers = {}
    left = list(nodes)
    while left:
        codes = _connect(left[:_AT_ONCE], timeout)
        del left[:_AT_ONCE]
        for name, seen in codes.items():
            asked = seen - _NOT_ASKED
            if asked & _ANSWERS:
                answers[name] = True
            elif asked and asked <= _SILENCE:
                answers[name] = False
    return answers


def _connect(nodes: Iterable[SchedulerNode], timeout: float) -> dict[str, set[int]]:
    """Return for each node the errors, or 0, that connects to its addresses ended with."""
    codes: dict[str, set[int]] = {}
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for node in nodes:
            for family, address in _addresses(node):
                connection = stack.enter_context(
                    socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                )
                code = connection.connect_ex(address)
                if code == errno.EINPROGRESS:
                    selector.register(connection, selectors.EVENT_WRITE, (node.name, connection))
                else:
                    codes.setdefault(node.name, set()).add(code)
        deadline = time.monotonic() + timeout
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                name, connection = key.data
                selector.unregister(connection)
                codes.setdefault(name, set()).add(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        for key in selector.get_map().values():
            codes.setdefault(key.data[0], set()).add(errno.EINPROGRESS)
    return codes


class Prober:
    """Remembers for how many cycles in a row each node answered, or did not."""

    def __init__(self, cycle: float, timeout: float = ANSWER_SECONDS) -> None:
        """*cycle* is the least time in seconds between two questions that count as two."""
        self._cycle = cycle
        self._timeout = timeout
        self._known: dict[str, tuple[Probe, float]] = {}

    def ask(self, nodes: Iterable[SchedulerNode]) -> Mapping[str, Probe]:
        """Ask *nodes*, and forget all others: what is not asked in each cycle does not count as in a row."""
        began = time.monotonic()
        answers = ask(nodes, self._timeout)
        known = {}
        for name, answered in answers.items():
            probe, since = self._known.get(name, (None, began))
            if probe is None or probe.answered is not answered:
                known[name] = (Probe(answered, 1), began)
            elif began - since < self._cycle:
                known[name] = (probe, since)
            else:
                known[name] = (Probe(answered, probe.times + 1), began)
        self._known = known
        return {name: probe for name, (probe, _) in known.items()}

    def forget(self) -> None:
        """Begin anew: there was a cycle in which nobody was asked."""
        self._known = {}


def _addresses(node: SchedulerNode) -> list[tuple[socket.AddressFamily, tuple[str | int | bytes, ...]]]:
    try:
        # ADDRCONFIG: no address of a family that this machine has no network for.
        found = socket.getaddrinfo(
            node.address, node.port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
    except OSError:
        return []
    return [(family, address) for family, _, _, _, address in found]
