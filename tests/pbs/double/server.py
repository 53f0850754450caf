#!/usr/bin/python3
"""A double of pbs_server and its scheduler: jobs, nodes, one hook; what is lost with a node is queued again."""

from __future__ import annotations

import os
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
from desk import SLOTS, Desk, Refused, substate

CYCLE = 0.3


class Server(Desk):
    """PBS as it goes on by itself."""

    def cycle(self) -> None:
        """Look at the nodes, then run what waits."""
        for name, node in self.nodes.items():
            jobs = [job for job in self.jobs.values() if job["node"] == name]
            try:
                answer = wire.ask((name, wire.MOM_PORT), {"op": "have"}, timeout=2)
            except OSError:
                node["down"] = node["down"] or time.time()
            else:
                if node["down"]:
                    node.update(down=0.0, changed=time.time())
                    self.look = True
                self._compare(name, answer["jobs"], jobs)
                for job in jobs:
                    job["used"] = answer["used"].get(job["id"], job["used"])
            late = node["down"] and time.time() - node["down"] > float(
                self.known["server"]["node_fail_requeue"]
            )
            for job in jobs if late else ():
                self.requeue(job, -20)
        self._look_at_what_waits()
        self.save()

    def _look_at_what_waits(self) -> None:
        iteration = float(self.known["server"].get("scheduler_iteration", "600"))
        if not self.look and time.monotonic() - self.looked < iteration:
            return
        self.look, self.looked = False, time.monotonic()
        for job in self.jobs.values():
            if job["state"] == "Q" and not job.get("discarding") and not self._run(job):
                self._preempt(job)

    def obit(self, request: dict[str, Any]) -> None:
        """A run has ended on its node."""
        job = self.jobs[request["obit"]]
        if request["version"] != job["run_version"] or job["state"] != "R":
            return  # of a run that was given up
        if request["stuck"]:
            job["state"] = "E"  # MoM answers no request about this job any more
            return
        job.update(spool=request["spool"], used=request["used"])
        self.look = True
        if request["status"] in (-3, -4, -11, -18):
            self.requeue(job, request["status"])
            return
        job.update(state="F", status=request["status"], node=None, ended=time.time())
        for end, letter in (("OU", "o"), ("ER", "e")):
            joined = job["join"] == "oe" and letter == "e"
            if not joined and (letter not in job["keep"] or "d" not in job["keep"]):
                wire.final_path(job, letter).write_text(job["spool"].get(end, ""))

    def _compare(self, name: str, known: dict[str, int], jobs: list[dict[str, Any]]) -> None:
        """MoM was started again and has lost its jobs, or still runs what was given up."""
        for job in jobs:
            if job["id"] not in known and job.get("seen"):
                self.requeue(job, -4)
            job["seen"] = job["id"] in known
        for job_id, version in known.items():
            job = self.jobs[job_id]
            if job["node"] != name or job["run_version"] != version:
                wire.ask((name, wire.MOM_PORT), {"op": "discard", "id": job_id})
                job["discarding"] = False
                self.look = True

    def _run(self, job: dict[str, Any]) -> bool:
        """Run a job if there is place for it."""
        if job["flag"]:
            job["flag"] = False  # the first attempt after a hold is refused, and taken up in the next cycle
            return True
        asked = re.findall(r":host=([^:+]+)", job["resources"]["select"])
        for name, node in self.nodes.items():
            here = sum(one["node"] == name for one in self.jobs.values())
            if node["down"] or node["offline"] or here >= SLOTS or (asked and name not in asked):
                continue
            job.update(state="R", node=name, seen=False, began=time.time(), used={})
            job["run_count"] += 1
            job["run_version"] += 1
            try:
                wire.ask((name, wire.MOM_PORT), {"op": "run", "job": job, "hook": self.known["hook"]})
            except OSError:
                self.requeue(job, -3)
            return True
        return False

    def _preempt(self, job: dict[str, Any]) -> None:
        """Make place for a job of an urgent queue: preempt_order C is a hold that is taken away again."""
        if "C" not in self.known["sched"].get("preempt_order", "") or job.get("preempting"):
            return
        if int(self.known["queue"][job["queue"]].get("priority", "0")) < 150:
            return
        for victim in self.jobs.values():
            usable = victim["node"] and not self.nodes[victim["node"]]["offline"]
            fit = victim["checkpoint"] != "n" and "[" not in victim["id"] and victim["queue"] == "workq"
            if victim["state"] == "R" and usable and fit and substate(victim) == 42:
                job["preempting"] = True
                threading.Thread(target=self._hold_for_a_moment, args=(victim, job), daemon=True).start()
                return

    def _hold_for_a_moment(self, victim: dict[str, Any], job: dict[str, Any]) -> None:
        with self.lock:
            try:
                self.hold(victim, "s")
            except Refused:
                traceback.print_exc()
        deadline = time.monotonic() + 60
        while victim["state"] == "R" and time.monotonic() < deadline:
            time.sleep(0.1)
        with self.lock:
            self._run(job)
            self.let_go(victim, "s")
            job["preempting"] = False


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
                if server.ending:
                    os._exit(0)
        except Exception:  # noqa: BLE001
            traceback.print_exc()  # into the log of the tests; the next cycle may go well


if __name__ == "__main__":
    main(sys.argv[1:])
