"""What the double's commands do: each method is one of PBS's commands, with its words and who asks."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import wire

FLAGS = {"c": "checkpoint", "N": "name", "r": "rerunable", "l": "resources", "v": "variables"}
FLAGS |= {"J": "array", "q": "queue", "k": "keep", "W": "more", "o": "output", "e": "errors", "j": "join"}
SLOTS = 2
# MoM tells of a job's session a moment after it has started it; before, a hold asks MoM for nothing.
SESSION_SECONDS = 1.0
STATE = wire.HOME / "server_priv" / "state.json"


class Refused(Exception):
    """What a command ends with: its text, and 1."""


class Desk:
    """All that PBS knows, and what people ask of it; every method is called with the lock held."""

    def __init__(self, nodes: list[str]) -> None:
        self.lock = threading.RLock()
        self.known: dict[str, Any] = {
            "jobs": {},
            "nodes": {
                name: {"down": 0.0, "offline": False, "comment": "", "changed": time.time()} for name in nodes
            },
            "hook": {},
            "number": 0,
            "server": {"node_fail_requeue": "310"},
            "sched": {},
            "queue": {"workq": {}},
        }
        if STATE.exists():  # the server was started again
            self.known = json.loads(STATE.read_text())
        self.ending = False
        # PBS looks at what waits when something has happened, and else once in scheduler_iteration.
        self.look, self.looked = True, 0.0

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        """Every job by its id."""
        return dict(self.known["jobs"])

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        """Every node by its name."""
        return dict(self.known["nodes"])

    def save(self) -> None:
        """Write down what is known."""
        STATE.parent.mkdir(parents=True, exist_ok=True)
        fresh = STATE.with_suffix(".new")
        fresh.write_text(json.dumps(self.known))
        fresh.replace(STATE)

    def qterm(self, words: list[str], request: dict[str, Any]) -> str:
        """End the server; with -t quick the jobs run on."""
        if words != ["-t", "quick"]:
            raise Refused(f"qterm: {' '.join(words)}: the double knows -t quick only")
        self._manager("qterm", request)
        self.ending = True
        return ""

    def qsub(self, words: list[str], request: dict[str, Any]) -> str:
        """Queue a job. Its script is in the request."""
        words = [*wire.directives(request["script"]), *words]
        options, held = self._options(words)
        job = {
            "id": "",
            "name": options.get("N", request["script_name"]),
            "user": request["user"],
            "state": "H" if held else "Q",
            "checkpoint": options.get("c", "u"),
            "interactive": "-I" in words,
            "queue": options.get("q", "workq"),
            "keep": options.get("k", "n"),
            "paths": {letter: options.get(letter, "") for letter in "oe"},
            "join": options.get("j", "n"),
            "submitted": time.time(),
            "sandbox": wire.pairs(options.get("W", "")).get("sandbox", "HOME"),
            "rerunable": str(options.get("r", "y") == "y"),
            "variables": {"PBS_O_WORKDIR": request["cwd"], **wire.pairs(options.get("v", ""))},
            "resources": {"select": "1:ncpus=1", "place": "pack", **wire.pairs(options.get("l", ""))},
            "script": request["script"],
            "cwd": request["cwd"],
            "run_count": 0,
            "run_version": 0,
            "began": 0.0,
            "used": {},
            "node": None,
            "status": None,
            "ended": 0.0,
            "holds": "u" if held else "",
            "spool": {},
            "flag": False,
        }
        self._consult("qsub", "queuejob", job, wire.job_lines(job))
        if job["interactive"]:
            raise Refused("qsub: the double runs no interactive jobs")
        minimum = self.known["queue"][job["queue"]].get("checkpoint_min")
        if minimum and job["checkpoint"] in ("c", "w"):
            job["checkpoint"] = f"{job['checkpoint']}={minimum}"
        self.look = True
        number = self.known["number"]
        self.known["number"] += 1
        if "J" not in options:
            job["id"] = f"{number}.ctl"
            self.known["jobs"][job["id"]] = job
            return f"{job['id']}\n"
        first, last = map(int, options["J"].split("-"))
        for task in range(first, last + 1):
            name = f"{number}[{task}].ctl"
            variables = {**job["variables"], "PBS_ARRAY_INDEX": str(task)}
            self.known["jobs"][name] = {**job, "id": name, "variables": variables, "spool": {}, "used": {}}
            self.known["jobs"][name]["resources"] = dict(job["resources"])
        return f"{number}[].ctl\n"

    def qalter(self, words: list[str], request: dict[str, Any]) -> str:
        """Change how often a job is checkpointed, or what a waiting one asks for."""
        job = self._mine(words[-1], request)
        options, _ = self._options(words)
        if "c" in options:
            new = {**job, "checkpoint": options["c"]}
            lines = [
                f"pbs.event().job.Checkpoint={options['c']}",
                f'pbs.event().job.Variable_List="""{wire.listed(job["variables"])}"""',
                *(line.replace("().job.", "().job_o.", 1) for line in wire.job_lines(job)),
            ]
            self._consult("qalter", "modifyjob", new, lines)
            job["checkpoint"] = new["checkpoint"]
            if job["state"] != "R":
                job["variables"] = new["variables"]
        if "l" in options:
            if job["state"] == "R":
                raise Refused(f"qalter: Cannot modify attribute while job running  Resource_List {job['id']}")
            job["resources"].update(wire.pairs(options["l"]))
        return ""

    def qstat(self, words: list[str], request: dict[str, Any]) -> str:
        """Tell of jobs, as JSON; with -x of those, too, that have finished, with -t of the tasks of arrays."""
        if "-Q" in words:
            return json.dumps({"Queue": {name: {"enabled": "True"} for name in self.known["queue"]}})
        if "-B" in words:
            return json.dumps({"Server": {"ctl": {"default_queue": "workq"}}})
        names = [word for word in words if re.match(r"[0-9]", word)]
        rows = {
            job["id"]: self._row(job, request)
            for job in self.jobs.values()
            if ("-x" in words or job["state"] != "F")
            and (job["id"] in names if names else "-t" in words or "[" not in job["id"])
        }
        return json.dumps({"pbs_version": "double", "Jobs": rows})

    def pbsnodes(self, words: list[str], _request: dict[str, Any]) -> str:
        """Tell of the nodes, take one out of service (-o) or put it back (-r)."""
        if words[0] in ("-o", "-r"):
            for name in words[1:]:
                if name in self.nodes:
                    comment = words[words.index("-C") + 1] if "-C" in words else ""
                    self.look = True
                    self.nodes[name].update(offline=words[0] == "-o", comment=comment, changed=time.time())
            return ""
        rows = {}
        for name, node in self.nodes.items():
            taken = sum(job["node"] == name for job in self.jobs.values())
            facts = (("down", node["down"]), ("offline", node["offline"]), ("job-busy", taken >= SLOTS))
            rows[name] = {
                "Mom": name,
                "Port": wire.MOM_PORT,
                "state": ",".join([word for word, so in facts if so] or ["free"]),
                "comment": node["comment"],
                "resources_available": {"ncpus": SLOTS},
                "resources_assigned": {"ncpus": taken},
                "last_state_change_time": int(node["changed"]),
            }
        return json.dumps({"nodes": rows})

    def qrerun(self, words: list[str], request: dict[str, Any]) -> str:
        """Kill a job, and queue it again; with force, even if its MoM does not answer."""
        job = self._job(words[-1])
        self._manager("qrerun", request)
        if job["state"] != "R":
            raise Refused(f"qrerun: Request invalid for state of job {job['id']}")
        if "force" in words:
            # Where PBS knows MoM to be down, the job is stuck until that MoM is back: see PbsScheduler.mark_down.
            job["discarding"] = bool(self.nodes[job["node"]]["down"])
            self.requeue(job, -20)
        else:
            self.ask(job, {"op": "kill", "rerun": True})
        return ""

    def qhold(self, words: list[str], request: dict[str, Any]) -> str:
        """Hold a job; one that runs is checkpointed and ended by MoM, which is waited for."""
        job = self._mine(words[-1], request)
        kind = words[1] if words[0] == "-h" else "u"
        if kind != "u":
            self._manager("qhold", request)
        self.hold(job, kind)
        return ""

    def hold(self, job: dict[str, Any], kind: str) -> None:
        """Set a hold. Raises Refused, and leaves it set, where MoM has not saved a job that runs."""
        if "[" in job["id"] and job["state"] == "R":
            raise Refused(f"qhold: Illegal attribute or resource value for job {job['id']}")
        job["holds"] = "".join(sorted({*job["holds"], kind}))
        if job["state"] == "Q":
            job["state"] = "H"
        elif job["state"] == "R" and job["checkpoint"] != "n" and substate(job) == 42:
            self.lock.release()  # MoM's script takes its time, and the obit comes before its end
            try:
                answer = self.ask(job, {"op": "hold"})
            finally:
                self.lock.acquire()
            if answer["code"]:
                raise Refused(f"qhold: MOM rejected hold request: 15061 {job['id']}")
            job["flag"] = True

    def qrls(self, words: list[str], request: dict[str, Any]) -> str:
        """Release a held job."""
        job = self._mine(words[-1], request)
        self.let_go(job, words[1] if words[0] == "-h" else "u")
        return ""

    def let_go(self, job: dict[str, Any], kind: str) -> None:
        """Take a hold away."""
        self.look = True
        job["holds"] = job["holds"].replace(kind, "")
        if job["state"] == "H" and not job["holds"]:
            job["state"] = "Q"

    def qdel(self, words: list[str], request: dict[str, Any]) -> str:
        """Delete a job."""
        job = self._mine(words[-1], request)
        if job["state"] == "R":
            job["deleted"] = True
            self.ask(job, {"op": "kill"})
        else:
            job.update(state="F", status=None)
        return ""

    def qsig(self, words: list[str], request: dict[str, Any]) -> str:
        """Send a signal to all processes of a job."""
        job = self._mine(words[-1], request)
        self.ask(job, {"op": "signal", "number": int(words[1])})
        return ""

    def qmgr(self, words: list[str], request: dict[str, Any]) -> str:
        """Know one hook, and any attribute of the server, the scheduler and the queues."""
        verb, kind, *rest = words[1].replace('"', "").replace(" = ", "=").replace("= ", "=").split()
        if kind != "hook":
            return self._attributes(verb, kind, rest, request)
        return self._hook(verb, rest)

    def _hook(self, verb: str, rest: list[str]) -> str:
        hook = self.known["hook"]
        if verb == "create":
            hook.update(name=rest[0], events=[], code="", config="{}", alarm="30", enabled="true")
        elif not hook:
            raise Refused("qmgr: hook error returned from server: hook not found")
        elif verb == "set":
            name, _, text = rest[1].partition("=")
            hook["events" if name == "event" else name] = text.split(",") if name == "event" else text
        elif verb in ("import", "export"):
            part = "code" if "python" in rest[1] else "config"
            if verb == "export":
                return str(hook[part])
            hook[part] = Path(rest[3]).read_text()
        elif verb == "delete":
            hook.clear()
        elif verb == "list":
            facts = {"event": ",".join(hook["events"]), "alarm": hook["alarm"], "enabled": hook["enabled"]}
            lines = [f"    {name} = {text}\n" for name, text in facts.items() if name in rest or not rest[1:]]
            return "Hook outlast\n" + "".join(lines)
        return ""

    def _attributes(self, verb: str, kind: str, rest: list[str], request: dict[str, Any]) -> str:
        if verb == "print":
            return "".join(f"create queue {name}\n" for name in self.known["queue"])
        if verb == "create":
            self.known["queue"][rest[0]] = dict(one.split("=") for one in rest[1].split(","))
            return ""
        table = self.known["queue"][rest.pop(0)] if kind == "queue" else self.known[kind]
        name, _, text = rest[0].partition("=")
        if verb in ("set", "unset"):
            self._manager("qmgr", request)
        self.look |= name == "scheduling"
        if verb == "set":
            table[name] = text
        elif verb == "unset":
            table.pop(name, None)
        if verb != "list":
            return ""
        return f"Server ctl\n    {name} = {table[name]}\n" if name in table else ""

    # --- small things -----------------------------------------------------------------------------------

    def requeue(self, job: dict[str, Any], status: int) -> None:
        """Have a job wait that has run."""
        self.look = True
        if job.get("deleted"):
            job.update(state="F", status=status, node=None)
            return
        # The spool is lost with its node.
        job.update(state="H" if job["holds"] else "Q", status=status, node=None)
        job["spool"] = {} if status in (-4, -20) else job["spool"]

    def ask(self, job: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        """Ask the MoM of a job that runs."""
        try:
            return wire.ask((str(job["node"]), wire.MOM_PORT), {**request, "id": job["id"]}, timeout=600)
        except OSError:
            return {"code": 1}

    def _consult(self, command: str, event: str, job: dict[str, Any], lines: list[str]) -> None:
        """Have the hook look at a job before it is queued or changed. Raises Refused with the hook's words."""
        output = wire.run_hook(self.known["hook"], event, lines)
        if wire.value(output, "accept") != "True":
            raise Refused(f"{command}: {wire.value(output, 'reject_msg')}")
        job["checkpoint"] = wire.value(output, "job.Checkpoint") or job["checkpoint"]
        if (listed := wire.value(output, "job.Variable_List")) is not None:
            job["variables"] = wire.pairs(listed)

    @staticmethod
    def _options(words: list[str]) -> tuple[dict[str, str], bool]:
        options: dict[str, str] = {}
        for flag, text in itertools.pairwise(words):
            if flag.startswith("-") and flag[1:] in FLAGS:
                several = flag in ("-l", "-v", "-W") and flag[1:] in options
                options[flag[1:]] = f"{options[flag[1:]]},{text}" if several else text
        return options, "-h" in words

    def _job(self, name: str) -> dict[str, Any]:
        if name not in self.jobs:
            raise Refused(f"Unknown Job Id {name}")
        return self.jobs[name]

    def _mine(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        job = self._job(name)
        if request["user"] not in ("root", job["user"]):
            raise Refused(f"Unauthorized Request {name}")
        return job

    @staticmethod
    def _manager(command: str, request: dict[str, Any]) -> None:
        if not is_manager(request):
            raise Refused(f"{command}: Unauthorized Request")

    @staticmethod
    def _row(job: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        row = {
            "Job_Name": job["name"],
            "Job_Owner": f"{job['user']}@ctl",
            "job_state": job["state"],
            "Checkpoint": job["checkpoint"],
            "Hold_Types": job["holds"] or "n",
            "Rerunable": job["rerunable"],
            "Resource_List": job["resources"],
            "resources_used": job["used"],
            "run_count": job["run_count"],
            "substate": substate(job),
            "Variable_List": job["variables"],
            "queue": job["queue"],
            "Join_Path": job["join"],
            "Output_Path": f"ctl:{wire.final_path(job, 'o')}",
            "Error_Path": f"ctl:{wire.final_path(job, 'e')}",
            "ctime": time.ctime(job["submitted"]),
            "mtime": time.ctime(job["ended"] or time.time()),
        }
        if is_manager(request):
            row |= {"euser": job["user"], "run_version": job["run_version"]}
        if job["node"]:
            row |= {"exec_host": f"{job['node']}/0", "stime": time.ctime(job["began"])}
        return row | ({"Exit_status": job["status"]} if job["status"] is not None else {})


def substate(job: dict[str, Any]) -> int:
    """PBS's number for where a job is, as far as anybody asks."""
    if job["state"] != "R":
        return {"Q": 10, "H": 20, "E": 63}.get(job["state"], 92)
    return 42 if time.time() - job["began"] > SESSION_SECONDS else 41


def is_manager(request: dict[str, Any]) -> bool:
    """PBS's managers are, unless set otherwise, root on the server's host alone."""
    return bool(request["user"] == "root" and request["host"] == "ctl")
