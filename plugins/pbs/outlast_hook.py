"""The PBS hook of Outlast: jobs that ask for checkpoints run in a capsule, under a manager of their own.

PBS imports this one file into its own Python, on the server (queuejob, modifyjob) and on the hosts
(execjob_launch, execjob_epilogue, execjob_end, exechost_startup), so it needs nothing but the standard
library; the work is done by the installed product, which it calls by absolute path. docs/install-pbs.md.

Nothing in here can end a job. A hook that raises, or runs into its alarm, in execjob_launch kills the job
for good: so every path is caught, and every wait together is shorter than the alarm (60 s).
"""

import json
import os
import pwd
import re
import subprocess

try:
    import pbs
except ImportError:  # under test; there is such a module in pbs_python only
    pbs = None

# What the configuration of the hook (qmgr: import hook outlast application/x-config) may set.
SETTINGS = {
    "outlast": "/usr/bin/outlast",
    "shim": "/usr/libexec/outlast/outlast-shim",
    "runtime": "/run/outlast/jobs",
    "interval": "10m",  # of "qsub -c c" and "qsub -c w", which name none
    "reruns": 16,  # runs after which a job that cannot be brought back ends; PBS itself holds it after 20
}

INTERVAL = "OUTLAST_INTERVAL"
_FORM = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST = 30 * 86400
_RUNNING = 4  # job_state R
_CALL_SECONDS = 10
# A job that was checkpointed by PBS itself and whose host went down and came back at once.
# Source: OpenPBS, src/include/job.h, JOB_EXEC_INITRST.
_INITRST = -5
# What a manager asks another run for, however often: it had the job end its run with a checkpoint.
_NO_FAULT = ("held", "left its host in good time")
# The shim's, where no manager answers and the job must not be begun from its start.
_TEMPORARY_FAILURE = 75
# Before every task, even where the shim itself has gone: a restarted job must not begin from its start.
_NO_SHIM = (
    'echo "outlast: $0: not there; the job was restarted, and is not begun from its start" >&2; exit 75'
)


class Refused(Exception):
    """The job cannot have what it asks for; the text tells its owner why."""


def interval_of(checkpoint, variables, settings):
    """Return the time between two checkpoints that a job asks for, such as "10m", or None for none.

    *checkpoint* is the job's Checkpoint attribute (qsub -c) as a text, *variables* its Variable_List.
    Raises Refused.
    """
    if checkpoint == "n":
        return None
    asked = variables.get(INTERVAL)
    match = re.fullmatch(r"[cw]=([0-9]+)", checkpoint)
    if match:
        asked = match[1] + "m"
    elif asked is None and checkpoint in ("c", "w"):
        asked = settings["interval"]
    if asked is None:
        return None
    form = _FORM.fullmatch(asked)
    if not form or not 1 <= int(form[1]) * _UNIT_SECONDS[form[2]] <= _LONGEST:
        raise Refused(
            "outlast: checkpoint interval %r: not a time between 1s and 30d; write a whole number and a unit, "
            "as in -v %s=30s, or minutes, as in -c w=10" % (asked, INTERVAL)
        )
    return asked


def directory_name(job_id):
    """Return what Outlast calls a job: `17.server`, and `17_3.server` for a task of an array."""
    return job_id.replace("[", "_").replace("]", "")


def queue(event, settings):
    """Look at what a new job asks for. Raises Refused."""
    job = event.job
    variables = job.Variable_List if job.Variable_List is not None else {}
    checkpoint = str(job.Checkpoint) if job.Checkpoint is not None else "u"
    interval = interval_of(checkpoint, variables, settings)
    if interval is None:
        return
    if getattr(job, "interactive", None):
        raise Refused("outlast: an interactive job cannot be checkpointed; leave out -c, or -I")
    if str(job.Rerunable) in ("False", "n", "0"):
        raise Refused("outlast: a job that may not be rerun cannot be restarted; leave out -r n, or -c")
    resources = job.Resource_List
    select, place = (
        str(resources[name] or "") if resources is not None else "" for name in ("select", "place")
    )
    chunks = sum(int(re.match(r"[0-9]*", chunk)[0] or 1) for chunk in select.split("+")) if select else 1
    if chunks > 1 and "pack" not in place.split(":"):
        raise Refused(
            "outlast: a job on several hosts cannot be checkpointed; ask for one chunk, or add -l place=pack"
        )
    variables[INTERVAL] = interval  # in place: the list as a whole cannot be set
    if "=" in checkpoint:
        # Outlast keeps the time: MoM's own timer is off by up to two minutes, and ties the job to its host.
        job.Checkpoint = pbs.checkpoint(checkpoint[0])


def modify(event, settings):
    """Look at what qalter -c asks for, and tell the manager of a running job. Raises Refused."""
    job, before = event.job, event.job_o
    if job.Checkpoint is None:
        return
    checkpoint = str(job.Checkpoint)
    had = before.Variable_List[INTERVAL] if _asked(before) else None
    interval = interval_of(checkpoint, {}, settings)
    if int(before.job_state) == _RUNNING:
        if had is None and interval is not None:
            raise Refused(
                "outlast: the job was started without checkpoints, and can have none before its next run"
            )
        if had is not None:
            command = [settings["outlast"], "hook", "pbs-interval"]
            _start(
                command, OUTLAST_JOB_ID=directory_name(str(before.id)), OUTLAST_INTERVAL=interval or "never"
            )
        # The variables of a running job are fixed; its next run finds what stands in Checkpoint.
    elif interval is not None:
        job.Variable_List[INTERVAL] = interval
        if "=" in checkpoint:
            job.Checkpoint = pbs.checkpoint(checkpoint[0])


def launch(event, settings):
    """Start the manager of a job that asks for checkpoints, and put the shim in the place of its shell."""
    job, environment = event.job, event.env
    if environment.get("PBS_TASKNUM") != "1":
        return  # pbsdsh, tm_spawn: not the job's own script
    try:
        interval = interval_of(str(job.Checkpoint), environment, settings)
    except Refused as error:
        _log(job, str(error))
        return
    if interval is None:
        return
    hosts = {part.split("/")[0] for part in str(job.exec_host2).split("+")}
    if len(hosts) > 1 or environment.get("PBS_ENVIRONMENT") == "PBS_INTERACTIVE":
        _log(job, "outlast: runs without checkpoints: it is interactive, or on several hosts")
        return
    name, version = directory_name(str(job.id)), int(job.run_version)
    arguments = list(event.argv)
    shell = [event.progname, "-l"] if not arguments else [event.progname, *arguments[1:]]
    if not os.access(settings["shim"], os.X_OK):
        if version > 1:
            event.progname = "/bin/sh"
            event.argv = ["sh", "-c", _NO_SHIM, settings["shim"]]
        _log(job, "outlast: %s: not there" % settings["shim"])
        return
    error = _call([settings["outlast"], "hook", "pbs-launch"], **_facts(job, environment, name, settings))
    if error:
        # The shim decides, and tells the job's owner: a first run goes on without checkpoints.
        _log(job, "outlast: no manager: " + error)
    environment["OUTLAST_JOB_ID"] = name
    environment["OUTLAST_EPOCH"] = str(version - 1)
    end = _end_of(job)
    if end:
        environment["OUTLAST_END_TIME"] = str(end)
    event.argv = [settings["shim"], "--interval", interval, "--", *shell]
    event.progname = settings["shim"]


def _end_of(job):
    """When MoM ends the run for its walltime, in Unix time; None where it has none."""
    limit = job.Resource_List["walltime"] if job.Resource_List is not None else None
    if limit is None or job.stime is None:
        return None
    # A run that follows a hold may begin with what the runs before it have used.
    used = job.resources_used["walltime"] if job.resources_used is not None else None
    return int(job.stime) + int(limit) - int(used or 0)


def _facts(job, environment, name, settings):
    """What the manager has to know of MoM's ways, as variables."""
    conf = pbs.pbs_conf
    kept = [environment[key] for key in ("TMPDIR", "PBS_JOBDIR") if key in environment]
    home = environment.get("HOME")
    return {
        "OUTLAST_JOB_ID": name,
        "OUTLAST_JOB_UID": str(pwd.getpwnam(str(job.euser)).pw_uid),
        "OUTLAST_PBS_ID": str(job.id),
        "OUTLAST_RUNS_AHEAD": str(int(job.run_version) - int(job.run_count)),
        "OUTLAST_SPOOL": os.path.join(conf.get("PBS_HOME", "/var/spool/pbs"), "spool"),
        "OUTLAST_KEEP": ":".join(path for path in kept if path != home),
        "OUTLAST_ATTACH": os.path.join(conf.get("PBS_EXEC", "/opt/pbs"), "bin", "pbs_attach"),
    }


def epilogue(event, settings):
    """Have a job run again that was held, or could not be brought back: in this event it is deterministic."""
    job = event.job
    name, status = directory_name(str(job.id)), int(job.Exit_status) if job.Exit_status is not None else 0
    path = os.path.join(settings["runtime"], name)
    marker, why = path + ".requeue", None
    if os.path.exists(marker):
        with open(marker) as file:
            why = file.read().strip()
        os.unlink(marker)
    elif _asked(job) and status == _INITRST:
        why = "its host went down, and came back"
    elif (
        _asked(job) and status == _TEMPORARY_FAILURE and int(job.run_version) > 1 and not os.path.exists(path)
    ):
        why = "there was no manager to bring it back"
    _tell_end(name, settings)
    if why is None:
        return
    if why not in _NO_FAULT and int(job.run_count) >= int(settings["reruns"]):
        _log(job, "outlast: not run again, after %s runs: %s" % (job.run_count, why))
        return
    _log(job, "outlast: runs again: " + why)
    job.rerun()


def end(event, settings):
    """Tell the manager of a job that PBS has discarded, which has no epilogue; nothing while a hold is under way.

    MoM runs this event beside a checkpoint_abort, too: were the job ended here, the server would wait for MoM
    for ever, the job in state E. The manager ends it when this event is over; see outlast/manager/_mom.py.
    Source: OpenPBS 23.06, src/resmom/requests.c, post_chkpt() and req_deletejob(): BG_CHECKPOINT_ABORT.
    """
    name = directory_name(str(event.job.id))
    if not os.path.exists(os.path.join(settings["runtime"], name + ".requeue")):
        _tell_end(name, settings)


def _tell_end(name, settings):
    if os.path.exists(os.path.join(settings["runtime"], name)):
        _call([settings["outlast"], "hook", "pbs-end"], OUTLAST_JOB_ID=name)


def _asked(job):
    return job.Variable_List is not None and INTERVAL in job.Variable_List


def startup(_event, settings):
    """Clear away what a host that went down left behind."""
    _call([settings["outlast"], "hook", "pbs-startup"])


def _call(command, **variables):
    """Run *command*, for a bounded time; return None, or what went wrong."""
    try:
        done = subprocess.run(
            command,
            env=_environment(variables),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_CALL_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.decode(errors="replace").strip() if done.returncode else None


def _start(command, **variables):
    """Run *command* without waiting for it: the server does nothing else meanwhile."""
    nowhere = subprocess.DEVNULL
    subprocess.Popen(
        command,
        env=_environment(variables),
        cwd="/",
        stdin=nowhere,
        stdout=nowhere,
        stderr=nowhere,
        start_new_session=True,
    )


def _environment(variables):
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **variables}


def _log(job, text):
    pbs.logjobmsg(str(job.id), text)


def _settings():
    name = pbs.hook_config_filename
    if not name:
        return SETTINGS
    with open(name) as file:
        return {**SETTINGS, **json.load(file)}


def main():
    """Do what the event is for, and accept it, whatever happened: a fault is logged, and the job goes on."""
    event = pbs.event()
    steps = {
        pbs.QUEUEJOB: queue,
        pbs.MODIFYJOB: modify,
        pbs.EXECJOB_LAUNCH: launch,
        pbs.EXECJOB_EPILOGUE: epilogue,
        pbs.EXECJOB_END: end,
        pbs.EXECHOST_STARTUP: startup,
    }
    refusal = None
    try:
        steps[event.type](event, _settings())
    except Refused as error:
        refusal = str(error)
    except BaseException as error:
        try:
            pbs.logmsg(pbs.LOG_ERROR, "outlast: internal fault, nothing was done: %r" % (error,))
        except BaseException:
            pass
    if refusal is not None:
        event.reject(refusal)
    event.accept()


if pbs is not None:
    main()
