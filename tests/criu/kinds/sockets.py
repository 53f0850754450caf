"""Kinds of sockets that a job holds."""

# System calls are what it is about.

from __future__ import annotations

import os
import socket
import struct
import threading
import time

from .holding import Check, asks, child, echo, kind


@kind
def unix_pair() -> Check:
    mine, theirs = socket.socketpair()
    child(lambda: echo(theirs))
    return asks(mine)


def unix_listener(address: str) -> Check:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(4)

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=echo, args=[connection], daemon=True).start()

    child(serve)
    kept = socket.socket(socket.AF_UNIX)
    kept.connect(address)

    def check() -> object:
        with socket.socket(socket.AF_UNIX) as new:
            new.connect(address)
            return asks(kept)(), asks(new)()

    return check


@kind
def unix_named() -> Check:
    return unix_listener("listener")


@kind
def unix_abstract() -> Check:
    return unix_listener(f"\0holds-{os.getuid()}-{time.time_ns()}")


@kind
def unix_datagram() -> Check:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def check() -> object:
        mine.send(b"q")
        return theirs.recv(9)

    return check


@kind
def tcp_listener() -> Check:
    listener = socket.create_server(("127.0.0.1", 0))

    def check() -> object:
        with socket.create_connection(listener.getsockname()) as mine, listener.accept()[0] as theirs:
            mine.send(b"q")
            # So that no address is left in use behind it.
            mine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return theirs.recv(1)

    return check


@kind
def tcp_listener_idle() -> Check:
    listener = socket.create_server(("127.0.0.1", 0))
    return listener.getsockname


@kind
def tcp_inside() -> Check:
    listener = socket.create_server(("127.0.0.1", 0))
    child(lambda: echo(listener.accept()[0]))
    return asks(socket.create_connection(listener.getsockname()))


@kind
def udp() -> Check:
    theirs = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    theirs.bind(("127.0.0.1", 0))
    mine = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    mine.connect(theirs.getsockname())

    def check() -> object:
        mine.send(b"q")
        return theirs.recv(5)

    return check


@kind
def netlink() -> Check:
    connection = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    connection.bind((0, 0))
    return lambda: connection.getsockname()[0] > 0


@kind
def raw_socket() -> Check:
    connection = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
    return connection.fileno


@kind
def packet_socket() -> Check:
    connection = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)
    return connection.fileno
