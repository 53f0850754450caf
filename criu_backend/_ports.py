"""Ports that a lost run of a tree still holds on this node, and that the restored one needs."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from criu_backend._images import entries

# Source: linux/inet_diag.h (struct inet_diag_req_v2), linux/sock_diag.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DESTROY = 21
_REQUEST_ACKNOWLEDGED = 0x5
_NO_COOKIE = b"\xff" * 8
# Both ends are closed, and the kernel remembers it for a minute. Source: net/tcp_states.h.
_FIN_WAIT_1, _FIN_WAIT_2, _TIME_WAIT = "04", "05", "06"


def free_ports(images: Path) -> None:
    """Have the kernel forget closed connections of this node with itself at the ports of the tree in *images*.

    A run that was killed leaves them behind for a minute, in which nobody can listen at their ports, and a restore on
    the node that it ran on would fail. A connection that a process has open is never touched. Where the kernel cannot
    do it (it wants CONFIG_INET_DIAG_DESTROY) nothing happens, and the restore says what it lacks.
    """
    ports = {
        int(entry["isk"]["src_port"])
        for entry in entries(images / "files.img")
        if entry.get("isk", {}).get("type") in (socket.SOCK_STREAM, "STREAM")
    }
    closed = [end for end in _closed() if end[1] in ports] if ports else []
    if not closed:
        return
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
    ) as monitor:
        monitor.settimeout(1)
        for family, port, address, remote_port, remote in closed:
            # family, protocol, extensions, padding, states; ports, addresses, interface, cookie
            request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF)
            request += struct.pack("!HH16s16s", port, remote_port, address, remote) + bytes(4) + _NO_COOKIE
            header = struct.pack("=IHHII", 16 + len(request), _SOCK_DESTROY, _REQUEST_ACKNOWLEDGED, 1, 0)
            with contextlib.suppress(OSError):
                monitor.send(header + request)
                monitor.recv(1 << 16)


def _closed() -> Iterator[tuple[int, int, bytes, int, bytes]]:
    """Yield family, port, address, the other end's port and address of each that is closed, both ends here."""
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        with contextlib.suppress(FileNotFoundError):
            for line in Path("/proc/self/net", name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] not in (_FIN_WAIT_1, _FIN_WAIT_2, _TIME_WAIT) or int(fields[9]):
                    continue
                (address, port), (remote, remote_port) = _end(fields[1]), _end(fields[2])
                if _is_here(family, address) and _is_here(family, remote):
                    yield int(family), port, address, remote_port, remote


def _end(text: str) -> tuple[bytes, int]:
    """Return address and port of "0100007F:0050", as proc_pid_net(5) writes them."""
    raw, _, port = text.partition(":")
    return b"".join(struct.pack("=I", int(word, 16)) for word in re.findall("." * 8, raw)), int(port, 16)


def _is_here(family: socket.AddressFamily, address: bytes) -> bool:
    """Whether *address* is one of this node's: nobody else could bind to it."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((socket.inet_ntop(family, address), 0))
        except OSError:
            return False
    return True
