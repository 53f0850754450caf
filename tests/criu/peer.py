#!/usr/bin/python3 -IS
"""Stands where the job should run, as the shim does: holds the capsule's connection and nothing else.

Its one argument is the descriptor of that connection. What its standard input brings, a line with a signal's
number, goes to the capsule; what comes from there is written as a line with the wait status; "gone" is the
last one.
"""

import os
import select
import socket
import struct
import sys

capsule = socket.socket(fileno=int(sys.argv[1]))
poll = select.poll()
poll.register(0, select.POLLIN)
poll.register(capsule, select.POLLIN)
print("here", flush=True)
waiting = b""
while True:
    for fd, _ in poll.poll():
        if fd == 0:
            data = os.read(0, 4096)
            if not data:
                poll.unregister(0)
            *numbers, waiting = (waiting + data).split(b"\n")
            for number in numbers:
                capsule.send(struct.pack("=i", int(number)))
        else:
            message = capsule.recv(4)
            print(struct.unpack("=i", message)[0] if message else "gone", flush=True)
            if not message:
                poll.unregister(capsule)
