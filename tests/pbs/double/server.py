#!/usr/bin/python3
"""A double of pbs_server and its scheduler: jobs, nodes, one hook; what is lost with a node is queued again."""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import wire

CYCLE = 0.3
SLOTS = 2
FLAGS = {"c": "checkpoint", "N": "name", "r": "rerunable", "l": "resources", "v": "variables"}


class Refused(Exception):
    """What a command ends with: its text, and 1."""


class Server:
    """All that PBS knows; every method is called with the lock held."""

    def __init__(self, nodes: list[str]) -> None:
        self.lock = threading.RLock()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.nodes: dict[str, dict[str, Any]] = {
            name: {"down": 0.0, "offline": False, "comment": "", "changed": time.time()} for name in nodes
        }
        self.hook: dict[str, Any] = {}
        self.attributes = {"node_fail_requeue": "310"}

    # --- the commands, each with its arguments and who asks ---------------------------------------------

    def qsub(self, words: list[str], request: dict[str, Any]) -> str:
        """Queue a job. Its script is in the request."""
        options, held = self._options(words)
        number = len(self.jobs)
        job = {
            "id": "",
            "name": options.get("N", request["script_name"]),
            "user": request["user"],
            "state": "H" if held else "Q",
            "checkpoint": options.get("c", "u"),
            "rerunable": str(options.get("r", "y") == "y"),
            "variables": {"PBS_O_WORKDIR": request["cwd"], **_pairs(options.get("v", ""))},
            "resources": {"select": "1:ncpus=1", "place": "pack", **_pairs(options.get("l", ""))},
            "script": request["script"],
            "cwd": request["cwd"],
            "run_count": 0,
            "run_version": 0,
            "node": None,
            "status": None,
            "holds": "u" if held else "n",
            "spool": {},
            "flag": False,
        }
        self._consult("queuejob", job)
        job["id"] = f"{number}.ctl"
        self.jobs[job["id"]] = job
        return f"{job['id']}\n"

    def qstat(self, words: list[str], _request: dict[str, Any]) -> str:
        """Tell of jobs, as JSON; with -x of those, too, that have finished."""
        names = [word for word in words if re.match(r"[0-9]", word)]
        rows = {
            job["id"]: self._row(job)
            for job in self.jobs.values()
            if ("-x" in words or job["state"] != "F") and (not names or job["id"] in names)
        }
        return json.dumps({"pbs_version": "double", "Jobs": rows})

    def pbsnodes(self, words: list[str], _request: dict[str, Any]) -> str:
        """Tell of the nodes, take one out of service (-o) or put it back (-r)."""
        if words[0] in ("-o", "-r"):
            for name in words[1:]:
                if name in self.nodes:
                    comment = words[words.index("-C") + 1] if "-C" in words else ""
                    self.nodes[name].update(offline=words[0] == "-o", comment=comment, changed=time.time())
            return ""
        rows = {}
        for name, node in self.nodes.items():
            state = [word for word, so in (("down", node["down"]), ("offline", node["offline"])) if so] or [
                "free"
            ]
            rows[name] = {
                "Mom": name,
                "Port": wire.MOM_PORT,
                "state": ",".join(state),
                "comment": node["comment"],
            }
            rows[name]["last_state_change_time"] = int(node["changed"])
        return json.dumps({"nodes": rows})

    def qrerun(self, words: list[str], request: dict[str, Any]) -> str:
        """Kill a job, and queue it again; with force, even if its MoM does not answer."""
        job = self._job(words[-1])
        if request["user"] != "root":
            raise Refused(f"qrerun: Unauthorized Request  {job['id']}")
        if job["state"] != "R":
            raise Refused(f"qrerun: Request invalid for state of job {job['id']}")
        if "force" in words:
            # Where PBS knows MoM to be down, the job is stuck until that MoM is back: see PbsScheduler.mark_down.
            job["discarding"] = bool(self.nodes[job["node"]]["down"])
            self._requeue(job, -20)
        else:
            self._ask(job, {"op": "kill", "rerun": True})
        return ""

    def qhold(self, words: list[str], request: dict[str, Any]) -> str:
        """Hold a job; one that runs is checkpointed and ended by MoM, which is waited for."""
        job = self._mine(words[-1], request)
        job["holds"] = "u"
        if job["state"] == "Q":
            job["state"] = "H"
        elif job["state"] == "R" and job["checkpoint"] != "n":
            self.lock.release()  # MoM's script takes its time, and the obit comes before its end
            try:
                answer = self._ask(job, {"op": "hold"})
            finally:
                self.lock.acquire()
            if answer["code"]:
                raise Refused(f"qhold: MOM rejected hold request: 15061 {job['id']}")
            job["flag"] = True
        return ""

    def qrls(self, words: list[str], request: dict[str, Any]) -> str:
        """Release a held job."""
        job = self._mine(words[-1], request)
        job["holds"] = "n"
        if job["state"] == "H":
            job["state"] = "Q"
        return ""

    def qdel(self, words: list[str], request: dict[str, Any]) -> str:
        """Delete a job."""
        job = self._mine(words[-1], request)
        if job["state"] == "R":
            job["deleted"] = True
            self._ask(job, {"op": "kill"})
        else:
            job.update(state="F", status=None)
        return ""

    def qsig(self, words: list[str], request: dict[str, Any]) -> str:
        """Send a signal to all processes of a job."""
        job = self._mine(words[-1], request)
        self._ask(job, {"op": "signal", "number": int(words[1])})
        return ""

    def qmgr(self, words: list[str], _request: dict[str, Any]) -> str:
        """Know one hook and a few attributes of the server: what install-pbs asks for."""
        verb, kind, *rest = words[1].replace('"', "").replace(" = ", "=").replace("= ", "=").split()
        if kind == "server":
            return self._server_attribute(verb, rest)
        if verb == "create":
            self.hook = {
                "name": rest[0],
                "events": [],
                "code": "",
                "config": "{}",
                "alarm": "30",
                "enabled": "true",
            }
            return ""
        if not self.hook:
            raise Refused("qmgr: hook error returned from server: hook not found")
        if verb == "set":
            name, _, text = rest[1].partition("=")
            self.hook["events" if name == "event" else name] = text.split(",") if name == "event" else text
        elif verb in ("import", "export"):
            part = "code" if "python" in rest[1] else "config"
            if verb == "export":
                return str(self.hook[part])
            self.hook[part] = Path(rest[3]).read_text()
        elif verb == "delete":
            self.hook = {}
        elif verb == "list":
            facts = {
                "event": ",".join(self.hook["events"]),
                "alarm": self.hook["alarm"],
                "enabled": self.hook["enabled"],
            }
            return "Hook outlast\n" + "".join(
                f"    {name} = {text}\n" for name, text in facts.items() if name in rest
            )
        return ""

    # --- what happens by itself -------------------------------------------------------------------------

    def cycle(self) -> None:
        """Look at the nodes, then run what waits."""
        for name, node in self.nodes.items():
            jobs = [job for job in self.jobs.values() if job["node"] == name]
            try:
                known = wire.ask((name, wire.MOM_PORT), {"op": "have"}, timeout=2)["jobs"]
            except OSError:
                node["down"] = node["down"] or time.time()
            else:
                if node["down"]:
                    node.update(down=0.0, changed=time.time())
                self._compare(name, known, jobs)
            late = node["down"] and time.time() - node["down"] > float(self.attributes["node_fail_requeue"])
            for job in jobs if late else ():
                self._requeue(job, -20)
        for job in self.jobs.values():
            if job["state"] == "Q" and not job.get("discarding"):
                self._run(job)

    def obit(self, request: dict[str, Any]) -> None:
        """A run has ended on its node."""
        job = self.jobs[request["obit"]]
        if request["version"] != job["run_version"] or job["state"] != "R":
            return  # of a run that was given up
        job["spool"] = request["spool"]
        if request["status"] in (-3, -4, -11, -18):
            self._requeue(job, request["status"])
            return
        job.update(state="F", status=request["status"], node=None)
        for end, letter in (("OU", "o"), ("ER", "e")):
            path = Path(job["cwd"]) / f"{job['name']}.{letter}{job['id'].split('.')[0]}"
            path.write_text(job["spool"].get(end, ""))

    def _compare(self, name: str, known: dict[str, int], jobs: list[dict[str, Any]]) -> None:
        """MoM was started again and has lost its jobs, or still runs what was given up."""
        for job in jobs:
            if job["id"] not in known and job.get("seen"):
                self._requeue(job, -4)
            job["seen"] = job["id"] in known
        for job_id, version in known.items():
            job = self.jobs[job_id]
            if job["node"] != name or job["run_version"] != version:
                wire.ask((name, wire.MOM_PORT), {"op": "discard", "id": job_id})
                job["discarding"] = False

    def _run(self, job: dict[str, Any]) -> None:
        if job["flag"]:
            job["flag"] = False  # the first attempt after a hold is refused, and taken up in the next cycle
            return
        for name, node in self.nodes.items():
            here = sum(one["node"] == name for one in self.jobs.values())
            if not node["down"] and not node["offline"] and here < SLOTS:
                job.update(state="R", node=name, seen=False)
                job["run_count"] += 1
                job["run_version"] += 1
                try:
                    wire.ask((name, wire.MOM_PORT), {"op": "run", "job": job, "hook": self.hook})
                except OSError:
                    self._requeue(job, -3)
                return

    def _requeue(self, job: dict[str, Any], status: int) -> None:
        if job.get("deleted"):
            job.update(state="F", status=status, node=None)
            return
        # The spool is lost with its node.
        job.update(state="H" if job["holds"] == "u" else "Q", status=status, node=None)
        job["spool"] = {} if status in (-4, -20) else job["spool"]

    # --- small things -----------------------------------------------------------------------------------

    def _consult(self, event: str, job: dict[str, Any]) -> None:
        """Have the hook look at a job before it is queued. Raises Refused with the hook's words."""
        output = wire.run_hook(self.hook, event, wire.job_lines(job))
        if wire.value(output, "accept") != "True":
            raise Refused("qsub: " + str(wire.value(output, "reject_msg")))
        job["checkpoint"] = wire.value(output, "job.Checkpoint") or job["checkpoint"]
        if (listed := wire.value(output, "job.Variable_List")) is not None:
            job["variables"] = _pairs(listed)

    def _options(self, words: list[str]) -> tuple[dict[str, str], bool]:
        options = {}
        for flag, text in itertools.pairwise(words):
            if flag.startswith("-") and flag[1:] in FLAGS:
                options[flag[1:]] = text
        return options, "-h" in words

    def _server_attribute(self, verb: str, rest: list[str]) -> str:
        name, _, text = rest[0].partition("=")
        if verb == "set":
            self.attributes[name] = text
        return f"Server ctl\n    {name} = {self.attributes[name]}\n"

    def _job(self, name: str) -> dict[str, Any]:
        if name not in self.jobs:
            raise Refused(f"Unknown Job Id {name}")
        return self.jobs[name]

    def _mine(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        job = self._job(name)
        if request["user"] not in ("root", job["user"]):
            raise Refused(f"Unauthorized Request {name}")
        return job

    def _ask(self, job: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        try:
            return wire.ask((str(job["node"]), wire.MOM_PORT), {**request, "id": job["id"]}, timeout=600)
        except OSError:
            return {"code": 1}

    def _row(self, job: dict[str, Any]) -> dict[str, Any]:
        row = {
            "Job_Name": job["name"],
            "Job_Owner": f"{job['user']}@ctl",
            "euser": job["user"],
            "job_state": job["state"],
            "Checkpoint": job["checkpoint"],
            "Hold_Types": job["holds"],
            "Rerunable": job["rerunable"],
            "run_count": job["run_count"],
            "run_version": job["run_version"],
            "Variable_List": job["variables"],
        }
        row |= {"exec_host": f"{job['node']}/0"} if job["node"] else {}
        return row | ({"Exit_status": job["status"]} if job["status"] is not None else {})


def _pairs(text: str) -> dict[str, str]:
    return {name: rest for name, _, rest in (one.partition("=") for one in text.split(",") if one)}


def main(nodes: list[str]) -> None:
    """Serve; the first look at the nodes comes after the first answer could."""
    server = Server(nodes)

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        with server.lock:
            if "obit" in request:
                server.obit(request)
                return {}
            command: Callable[[list[str], dict[str, Any]], str] = getattr(server, request["command"])
            try:
                return {"code": 0, "out": command(request["words"], request), "err": ""}
            except Refused as error:
                return {"code": 1, "out": "", "err": f"{error}\n"}

    threading.Thread(target=wire.serve, args=(wire.SERVER[1], handle), daemon=True).start()
    while True:
        time.sleep(CYCLE)
        try:
            with server.lock:
                server.cycle()
        except Exception:  # noqa: BLE001
            traceback.print_exc()  # into the log of the tests; the next cycle may go well


if __name__ == "__main__":
    main(sys.argv[1:])
