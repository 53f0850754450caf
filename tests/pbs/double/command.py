#!/usr/bin/python3
"""A double of PBS's commands, by the name that it is called by: qsub, qstat, pbsnodes, pbs_attach and others."""

from __future__ import annotations

import os
import pwd
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import wire


def attach(words: list[str]) -> int:
    """pbs_attach -j JOB -p PID: asks this host's MoM."""
    with socket.socket(socket.AF_UNIX) as mom:
        mom.connect(str(wire.HOME / "attach.sock"))
        mom.sendall(f"{words[1]} {words[3]}".encode())
        answer = mom.recv(4096).decode()
    if answer == "ok":
        return 0
    print(f"pbs_attach: tm_attach: {answer}", file=sys.stderr)
    return 1


def main(program: str, words: list[str]) -> int:
    """Ask the server, and say what it says."""
    name = Path(program).name
    if name == "pbs_attach":
        return attach(words)
    request: dict[str, object] = {
        "command": name,
        "words": words,
        "host": socket.gethostname(),
        "user": pwd.getpwuid(os.geteuid()).pw_name,
        "cwd": str(Path.cwd()),
    }
    if name == "qsub":
        script = Path(words[-1] if words else "-")
        if script.is_file():
            request |= {"script": script.read_text(), "script_name": script.name}
        else:
            request |= {"script": "" if "-I" in words else sys.stdin.read(), "script_name": "STDIN"}
    try:
        answer = wire.ask(wire.SERVER, request, timeout=600)
    except OSError:
        print(f"{name}: cannot connect to server ctl (errno=15010)", file=sys.stderr)
        return 2
    sys.stdout.write(answer["out"])
    sys.stderr.write(answer["err"])
    return int(answer["code"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[0], sys.argv[1:]))
