"""The other ends of connections: of TCP from /proc, of UNIX sockets from the kernel's socket monitor."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

# Source: linux/inet_diag.h, linux/sock_diag.h, linux/unix_diag.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SHOW_NAME, _SHOW_PEER = 0x1, 0x4
_DIAG_NAME, _DIAG_PEER = 0, 2
_LISTEN, _CLOSE = "0A", "07"  # proc_pid_net(5), /proc/net/tcp; net/tcp_states.h


@dataclass(frozen=True)
class Endpoint:
    """One end of a TCP connection: addresses as "127.0.0.1:80"; two ends are each other's mirror images."""

    local: str
    remote: str
    connected: bool = field(default=True, compare=False)


class Connections:
    """What is connected with what in the network namespace of process *pid*."""

    def __init__(self, pid: int) -> None:
        self._tcp: dict[int, Endpoint] = {}
        self._waiting: set[Endpoint] = set()  # accepted by no process yet
        for name in ("tcp", "tcp6"):
            with contextlib.suppress(FileNotFoundError):
                for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                    fields = line.split()
                    end = Endpoint(
                        _address(fields[1]), _address(fields[2]), fields[3] not in (_LISTEN, _CLOSE)
                    )
                    if int(fields[9]):
                        self._tcp[int(fields[9])] = end
                    elif end.connected:
                        self._waiting.add(end)
        self._peers: dict[int, int] = {}
        self._names: dict[int, str] = {}
        # The monitor answers for the namespace that it is asked in.
        if os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):  # noqa: PTH115
            with contextlib.suppress(OSError):
                self._ask_monitor()

    def tcp(self, inode: int) -> Endpoint | None:
        """Return what the TCP socket of number *inode* is connected with; None if it is no TCP socket."""
        return self._tcp.get(inode)

    def waiting(self, end: Endpoint) -> bool:
        """Return whether *end* is in a listener's queue, or being closed: no process has it."""
        return end in self._waiting

    def unix_peer(self, inode: int) -> int:
        """Return the inode of a UNIX socket's other end; 0 where there is none."""
        return self._peers.get(inode, 0)

    def name(self, inode: int) -> str:
        """Return what the UNIX socket *inode* is bound to, "" if nothing."""
        return self._names.get(inode, "")

    def _ask_monitor(self) -> None:
        """Ask for all connected UNIX sockets but datagram ones, which CRIU opens again."""
        # family, protocol, states (all), inode, what to show, cookie
        request = struct.pack(
            "=BBHIII8s", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW_NAME | _SHOW_PEER, bytes(8)
        )
        header = struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0)
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
        ) as monitor:
            monitor.settimeout(1)
            monitor.send(header + request)
            while self._read(monitor.recv(1 << 18)):
                pass

    def _read(self, data: bytes) -> bool:
        """Take in one answer; return whether more follow."""
        at = 0
        while at + 16 <= len(data):
            length, kind = struct.unpack_from("=IH", data, at)
            if kind in (_NLMSG_ERROR, _NLMSG_DONE) or length < 16:
                return False
            _, kind_of_socket, _, _, inode = struct.unpack_from("=BBBBI", data, at + 16)
            attribute = at + 32
            while attribute + 4 <= at + length:
                size, what = struct.unpack_from("=HH", data, attribute)
                if size < 4:
                    break
                value = data[attribute + 4 : attribute + size]
                if what == _DIAG_PEER and kind_of_socket != socket.SOCK_DGRAM:
                    self._peers[inode] = int.from_bytes(value, "little")
                elif what == _DIAG_NAME:
                    self._names[inode] = value.rstrip(b"\0").replace(b"\0", b"@").decode(errors="replace")
                attribute += (size + 3) & ~3
            at += (length + 3) & ~3
        return True


def _address(text: str) -> str:
    """Return "0100007F:0050" as "127.0.0.1:80"; an IPv4 address in IPv6's clothes as the former."""
    raw, _, port = text.partition(":")
    data = b"".join(struct.pack("=I", int(word, 16)) for word in re.findall("." * 8, raw))
    if len(data) == 16 and data[:12] == bytes(10) + b"\xff\xff":
        data = data[12:]
    if len(data) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, data)}:{int(port, 16)}"
    return f"[{socket.inet_ntop(socket.AF_INET6, data)}]:{int(port, 16)}"
