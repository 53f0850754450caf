"""The page as a person uses it: in a real browser, against a real cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.cluster import Cluster, Job, eventually
from tests.launcher.conftest import Launcher

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(240)]

COUNT = 60
COMMAND = f"for i in $(seq {COUNT}); do echo line $i; echo note $i >&2; sleep 0.5; done"


def one(page: Chrome, css: str) -> WebElement:
    return page.find_element("css selector", css)


def every(page: Chrome, css: str) -> list[WebElement]:
    return page.find_elements("css selector", css)


def texts(page: Chrome, css: str) -> list[str]:
    """The texts of all elements that *css* chooses, whether they can be seen or not."""
    script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
    return [str(text) for text in page.execute_script(script, css)]


def soon(true: Callable[[], object], what: str, within: float = 45) -> None:
    eventually(true, within=within, what=what)


def opened(page: Chrome, launcher: Launcher) -> None:
    page.get(launcher.address)
    soon(lambda: "live" in texts(page, "#link-text"), "a live page")


def choose(page: Chrome, job_id: str) -> None:
    soon(lambda: every(page, f'[data-job="{job_id}"]'), f"job {job_id} in the list")
    one(page, f'[data-job="{job_id}"]').click()
    soon(lambda: f"job {job_id}" in one(page, "#commands-subject").text, f"job {job_id} chosen")


def fill(page: Chrome, **fields: str) -> None:
    for name, value in fields.items():
        field = one(page, f'#form [name="{name}"]')
        field.clear()
        field.send_keys(value)


def submitted(page: Chrome, cluster: Cluster, **fields: str) -> Job:
    """Submit the form; return the job that the page has chosen then."""
    fill(page, **fields)
    one(page, "#submit").click()
    soon(lambda: "Submitted as job" in one(page, "#said").text, "the job submitted")
    job_id = one(page, "#said").text.split()[-1].rstrip(".")
    return Job(cluster, job_id, fields["directory"])


def press(page: Chrome, action: str) -> None:
    button = one(page, f'[data-action="{action}"]')
    soon(lambda: button.get_attribute("aria-disabled") == "false", f"{action} possible")
    button.click()


def events(page: Chrome, kind: str) -> list[str]:
    return texts(page, f'#messages li[data-event="{kind}"]')


def state(page: Chrome, job_id: str) -> str:
    return "".join(texts(page, f'[data-job="{job_id}"] .badge'))


def has_more_to_lose(browser: Chrome) -> bool:
    """Whether the page shows a line more after a while in which it shows no new checkpoint."""
    before = len(events(browser, "checkpoint")), len(texts(browser, '[data-stream="out"] .line'))
    time.sleep(1)
    now = len(events(browser, "checkpoint")), len(texts(browser, '[data-stream="out"] .line'))
    return now[0] == before[0] and now[1] > before[1]


def test_a_job_is_submitted_watched_loses_its_node_and_goes_on_with_every_line_once(
    browser: Chrome, launcher: Launcher, cluster_to_break: Cluster
) -> None:
    cluster = cluster_to_break
    opened(browser, launcher)
    assert "token" not in browser.current_url
    directory = cluster.new_directory()
    one(browser, "#more summary").click()
    fill(browser, name="count", text=COMMAND, interval="3s", directory=directory, output="out", errors="err")
    wanted = ["#!/bin/sh", "#SBATCH --job-name=count", f"#SBATCH --chdir={directory}", "#SBATCH --output=out"]
    wanted += ["#SBATCH --error=err", "#SBATCH --checkpoint=3s", COMMAND]
    soon(lambda: one(browser, "#script").text.splitlines() == wanted, "the script as it is submitted")
    job = submitted(browser, cluster, directory=directory)
    soon(lambda: state(browser, job.id) == "running", "the job running", within=30)
    soon(
        lambda: len(events(browser, "checkpoint")) >= 2, "two checkpoints in the control messages", within=40
    )
    soon(lambda: len(every(browser, "#checkpoints tbody tr")) == 2, "two checkpoints in the table")
    assert len(texts(browser, ".timeline svg .pause")) >= 2
    shown = texts(browser, '[data-stream="out"] .line')
    assert shown == [f"line {number}" for number in range(1, len(shown) + 1)]
    assert len(shown) > 5

    first = job.node
    soon(lambda: has_more_to_lose(browser), "lines after the newest checkpoint", within=20)
    cluster.cut_power(first)
    soon(lambda: events(browser, "restored"), "the job's return in the control messages", within=90)
    soon(lambda: len(texts(browser, ".timeline svg .run")) == 2, "two runs in the timeline")
    assert texts(browser, ".timeline svg .lane") == [first, job.node]
    assert texts(browser, ".timeline svg .failure")
    assert texts(browser, ".timeline svg .restart")
    assert job.node != first
    soon(lambda: texts(browser, '[data-stream="out"] .mark.cut'), "a mark where the output was set back")

    soon(lambda: state(browser, job.id) == "done", "the job's end", within=90)
    for name, word in (("out", "line"), ("err", "note")):
        wanted = [f"{word} {number}" for number in range(1, COUNT + 1)]
        soon(lambda n=name, w=wanted: texts(browser, f'[data-stream="{n}"] .line') == w, f"every {word} once")  # type: ignore[misc]
        assert job.lines(name) == wanted
    assert "Ended" in one(browser, "#facts").text


def test_a_held_job_gives_its_node_back_after_a_checkpoint_and_goes_on_when_released(
    browser: Chrome, launcher: Launcher, cluster: Cluster
) -> None:
    opened(browser, launcher)
    job = submitted(browser, cluster, text=COMMAND, interval="1h", directory=cluster.new_directory())
    soon(lambda: any("line 3" in line for line in texts(browser, ".line")), "output", within=30)
    press(browser, "hold")
    soon(lambda: state(browser, job.id) == "held", "the job held", within=40)
    soon(lambda: events(browser, "on-hold"), "word that it is held")
    # One that was asked for; the product may take another when the job leaves its node.
    soon(lambda: events(browser, "checkpoint"), "word of the checkpoint")
    held_with = len(events(browser, "checkpoint"))
    soon(lambda: cluster.idle() == {"n1", "n2", "n3"}, "its node idle")
    press(browser, "release")
    soon(lambda: events(browser, "restored"), "the job restored", within=40)
    soon(lambda: state(browser, job.id) == "running", "the job running")
    press(browser, "checkpoint")
    soon(lambda: len(events(browser, "checkpoint")) > held_with, "a checkpoint at once", within=30)
    press(browser, "cancel")
    one(browser, "#ask-no").click()
    time.sleep(1)
    assert job.state == "RUNNING"
    press(browser, "cancel")
    one(browser, "#ask-yes").click()
    soon(lambda: state(browser, job.id) == "canceled", "the job canceled", within=30)


def test_a_job_goes_on_from_the_checkpoint_that_was_chosen_and_moves_to_the_node_that_was_named(
    browser: Chrome, launcher: Launcher, cluster: Cluster
) -> None:
    opened(browser, launcher)
    one(browser, "#more summary").click()
    directory = cluster.new_directory()
    job = submitted(browser, cluster, text=COMMAND, interval="1h", output="out", directory=directory)
    for count in (1, 2):
        soon(lambda n=count: len(texts(browser, ".line")) > 3 * n, "some output", within=30)  # type: ignore[misc]
        press(browser, "checkpoint")
        soon(lambda n=count: len(every(browser, "#checkpoints tbody tr")) == n, "it in the table", within=30)  # type: ignore[misc]
    older = f"{job.id}@0.1"
    button = one(browser, f'[aria-label="Restart from {older}"]')
    button.click()
    assert older in one(browser, "#ask-text").text
    one(browser, "#ask-no").click()
    assert not events(browser, "restarted")
    # Everything by keyboard: the button, and the answer.
    button.send_keys(Keys.ENTER)
    one(browser, "#ask-yes").send_keys(Keys.ENTER)
    soon(lambda: any(older in text for text in events(browser, "restored")), "the job back", within=60)
    soon(lambda: state(browser, job.id) == "running", "the job running")
    soon(lambda: len(texts(browser, ".timeline svg .run")) == 2, "two runs in the timeline")

    target = next(node for node in ("n1", "n2", "n3") if node != job.node)
    press(browser, "migrate")
    one(browser, "#move-no").click()
    press(browser, "migrate")
    one(browser, "#move-to").send_keys("no-such-node", Keys.ENTER)
    soon(lambda: "knows no such node" in one(browser, "#said").text, "the refusal")
    browser.get_log("browser")  # type: ignore[no-untyped-call]  # which the browser tells of, too
    press(browser, "migrate")
    one(browser, "#move-to").send_keys(target, Keys.ENTER)
    soon(lambda: len(events(browser, "restored")) == 2, "the job on another node", within=60)
    soon(lambda: job.node == target, "the node that was named")
    soon(lambda: job.lines()[-1:] == [f"note {COUNT}"], "its last line", within=90)
    assert job.lines() == [
        text for number in range(1, COUNT + 1) for text in (f"line {number}", f"note {number}")
    ]


def test_what_a_job_is_called_and_prints_is_never_taken_for_markup(
    browser: Chrome, launcher: Launcher, cluster: Cluster
) -> None:
    opened(browser, launcher)
    payloads = [
        "<script>window.broken=1</script>",
        "<img src=x onerror=window.broken=1>",
        "</div><svg onload=window.broken=1>",
        "javascript:window.broken=1",
        "{{constructor.constructor('window.broken=1')()}}",
    ]
    name = "".join(payloads)[:180]
    script = "#!/bin/sh\ncat <<'END'\n" + "\n".join(payloads) + "\nEND\nsleep 4\n"
    one(browser, '[name=kind][value="script"]').click()
    directory = cluster.new_directory()
    job = submitted(browser, cluster, text=script, interval="2s", name=name, directory=directory)
    soon(lambda: texts(browser, ".line") == payloads, "the output to the letter", within=30)
    soon(lambda: events(browser, "checkpoint"), "a checkpoint", within=30)
    assert texts(browser, f'[data-job="{job.id}"] .job-name') == [name]
    assert name in browser.title
    assert every(browser, "main script, main img, main svg[onload]") == []
    assert browser.execute_script("return window.broken") is None


def test_without_the_token_the_page_asks_for_it_and_takes_the_address(
    browser: Chrome, launcher: Launcher
) -> None:
    browser.get(launcher.address.replace(launcher.token, "wrong"))
    soon(lambda: one(browser, "#login").is_displayed(), "the question who it is")
    assert texts(browser, "[role=option]") == []
    one(browser, "#token").send_keys(launcher.address, Keys.ENTER)
    soon(lambda: "live" in texts(browser, "#link-text"), "a live page")
    assert launcher.token not in browser.page_source
    browser.get_log("browser")  # type: ignore[no-untyped-call]  # the refusal was wanted


def test_everything_can_be_done_with_the_keyboard(
    browser: Chrome, launcher: Launcher, cluster: Cluster
) -> None:
    jobs = [cluster.submit("true", "--hold", "-J", f"key-{number}") for number in range(3)]
    opened(browser, launcher)
    soon(lambda: every(browser, f'[data-job="{jobs[2].id}"]'), "the jobs in the list")

    def type_(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    def focused() -> str:
        script = (
            "const a = document.activeElement; return a.id || a.dataset.job || a.dataset.action || a.tagName"
        )
        return str(browser.execute_script(script))

    order = []
    for _ in range(5):
        type_(Keys.TAB)
        order.append(focused())
    assert order[1:] == ["new-job", "find", "which", jobs[2].id]
    type_(Keys.ARROW_DOWN)
    assert focused() == jobs[1].id
    type_(Keys.ENTER)
    soon(lambda: jobs[1].id in one(browser, "#commands-subject").text, "the job chosen")
    type_(Keys.END)
    type_(Keys.TAB)
    assert focused() == "checkpoint"
    type_(Keys.TAB, Keys.TAB, Keys.TAB)
    assert focused() == "release"
    type_(Keys.ENTER)
    soon(lambda: state(browser, jobs[1].id) == "done", "the job released and done", within=30)


def test_a_screen_reader_is_given_a_name_for_everything(
    browser: Chrome, launcher: Launcher, cluster: Cluster
) -> None:
    opened(browser, launcher)
    job = submitted(browser, cluster, text=COMMAND, interval="2s", directory=cluster.new_directory())
    soon(lambda: events(browser, "checkpoint") and texts(browser, ".line"), "messages and output", within=30)
    browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes: list[dict[str, Any]] = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in (
        "button",
        "textbox",
        "searchbox",
        "combobox",
        "checkbox",
        "option",
        "listbox",
        "log",
        "img",
        "table",
    ):
        assert "" not in roles.get(role, []), role
    assert {"Commands", "Control messages", "Output"} <= set(roles["region"])
    assert {"Control messages", "Output and errors"} == set(roles["log"])
    assert any(
        name.startswith(f"Timeline: 1 run on {job.node}") for name in roles["image"] + roles.get("img", [])
    )
    assert one(browser, "#messages").get_attribute("aria-live") == "polite"
    assert one(browser, ".lines").get_attribute("aria-live") == "off"


def event(at: float, node: str, word: str, text: str = "", **more: object) -> dict[str, object]:
    return {"time": at, "node": node, "epoch": 0, "event": word, "text": text, **more}


START = event(100, "n1", "started")
DUMP = event(110, "n1", "dump", "checkpoint 0.1 begins")
DONE = event(112, "n1", "checkpoint", checkpoint="7@0.1", pause_ms=500, ship_s=1, stored_bytes=1)
LATER = event(120, "n1", "dump", "checkpoint 0.2 begins")
DOWN = event(130, "ctl", "node-marked-down", "n1")
BACK = event(140, "n2", "restored", checkpoint="7@0.1")


@pytest.mark.parametrize(
    ("events_", "runs"),
    [
        ([START], [["n1", 100, 200, "running", None]]),
        ([START, event(150, "n1", "ended")], [["n1", 100, 150, "ended", None]]),
        ([START, DUMP, DONE, DOWN, BACK], [["n1", 100, 130, "lost", 110], ["n2", 140, 200, "running", None]]),
        # The node died before it could tell that its checkpoint was complete.
        (
            [START, DUMP, DONE, LATER, DOWN, BACK | {"checkpoint": "7@0.2"}],
            [["n1", 100, 130, "lost", 120], ["n2", 140, 200, "running", None]],
        ),
        # It could not even tell that it had begun: the node that restored it says when it was made.
        (
            [START, DUMP, DONE, DOWN, BACK | {"checkpoint": "7@0.2", "made": 121, "made_on": "n1"}],
            [["n1", 100, 130, "lost", 121], ["n2", 140, 200, "running", None]],
        ),
        # There was no checkpoint: everything is computed again.
        (
            [START, DOWN, event(140, "n2", "started"), event(140, "n2", "begun-again")],
            [["n1", 100, 130, "lost", 100], ["n2", 140, 200, "running", None]],
        ),
        # The scheduler itself found the node dead, and the watcher has nothing to tell.
        ([START, DUMP, DONE, BACK], [["n1", 100, 112, "lost", 110], ["n2", 140, 200, "running", None]]),
        # The watcher's clock may be behind: a run has no end before its beginning.
        ([START, event(90, "ctl", "requeued")], [["n1", 100, 100, "lost", None]]),
    ],
)
def test_the_timeline_tells_runs_and_what_is_computed_again(
    browser: Chrome, launcher: Launcher, events_: list[dict[str, object]], runs: list[list[object]]
) -> None:
    opened(browser, launcher)
    script = """const [events, done] = arguments;
        import("/static/timeline.js").then(({ read }) => done(read(events, { kind: "running" }, 200).runs.map(
            (run) => [run.node, run.start, run.end, run.how, run.again ?? null])))"""
    assert browser.execute_async_script(script, events_) == runs


@pytest.fixture
def thousand(module_cluster: Cluster) -> Iterator[None]:
    """A thousand held jobs of alice's."""
    submit = (
        "printf '#!/bin/sh\\ntrue\\n' | sbatch --hold --checkpoint=10m -J many-$i -o /dev/null >/dev/null"
    )
    script = f"i=0; while [ $i -lt 1000 ]; do {submit} || exit; i=$((i+1)); done"
    module_cluster.on("ctl", "sh", "-c", script, user=True, within=120)
    yield
    module_cluster.on("ctl", "scancel", "--user=alice", within=60)


def test_of_a_thousand_jobs_only_the_one_that_changes_is_drawn_again(
    browser: Chrome, launcher: Launcher, cluster: Cluster, thousand: None
) -> None:
    opened(browser, launcher)
    soon(lambda: len(every(browser, "[role=option]")) >= 1000, "all jobs in the list", within=60)
    browser.execute_script(
        """window.touched = [];
        new MutationObserver((all) => all.forEach(({ target, type, attributeName }) => {
            const node = target.closest ? target : target.parentElement;
            const job = node.closest("[data-job]")?.dataset.job ?? "list";
            window.touched.push([job, type, attributeName, node.className, node.textContent]);
        })).observe(document.getElementById("job-list"),
            {subtree: true, childList: true, characterData: true, attributes: true})"""
    )
    job_id = cluster.on("ctl", "squeue", "--noheader", "--name=many-500", "--format=%i").strip()
    cluster.on("ctl", "scontrol", "update", f"JobId={job_id}", "Name=changed", user=True)
    soon(lambda: texts(browser, f'[data-job="{job_id}"] .job-name') == ["changed"], "the new name", within=30)
    many = set(cluster.on("ctl", "squeue", "--noheader", "--states=PD", "--format=%i").split())
    seen = browser.execute_script("return window.touched")
    touched = [one for one in seen if one[0] in {*many, "list"} and one[3] != "job-newest"]
    assert touched == [[job_id, "childList", None, "job-name", "changed"]]
    one(browser, "#find").send_keys("many-77")
    shown = "[role=option]:not([hidden]) .job-name"
    wanted = [*(f"many-{number}" for number in range(779, 769, -1)), "many-77"]
    soon(lambda: texts(browser, shown) == wanted, "only those that are looked for")


@pytest.mark.parametrize("width", [400, 900, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_window_so_wide_by_day_and_night(
    start_browser: Callable[..., Chrome], launcher: Launcher, cluster: Cluster, width: int, dark: bool
) -> None:
    name = "a-name-without-any-space-that-is-much-longer-than-it-should-be-" * 2
    job = cluster.submit(f"echo {name * 5}", "--hold", "-J", name)
    page = start_browser(width=width, dark=dark)
    try:
        opened(page, launcher)
        for step in ("form", "job"):
            if step == "job":
                choose(page, job.id)
            wide = page.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width
        color = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, color[4:-1].split(","))) < 200) is dark
    finally:
        page.quit()
