// Brings the panels together: what the server tells goes to them, what a person does goes to it.

import { News, get, post, setToken, takeTokenFromAddress } from "./api.js";
import { Form } from "./form.js";
import { JobList, stateWord } from "./jobs.js";
import { Messages } from "./messages.js";
import { OutputPanel } from "./output.js";
import { Timeline } from "./timeline.js";
import { $, ago, element, milliseconds, setText, size, time } from "./words.js";

let chosen = null;
let facts = { partitions: [], home: "" };

const messages = new Messages();
const timeline = new Timeline();
const output = new OutputPanel(say);
const form = new Form((job) => {
  say(`Submitted as job ${job}.`);
  choose(job);
}, say);
const jobs = new JobList((id) => choose(id));
const news = new News(take, connection);

function say(text, wrong = false) {
  const said = $("said");
  said.classList.toggle("bad", wrong);
  setText(said, text);
}

function connection(state) {
  const words = { live: "live", broken: "no connection; trying again", locked: "locked" };
  $("link").dataset.state = state;
  setText($("link-text"), words[state]);
  if (state === "locked") login("The token is not this launcher's: it may have been started again.");
}

function take(event, message) {
  if (event === "begin") {
    messages.begin(message.job);
    output.begin(message.job);
    timeline.show([], null);
  } else if (event === "jobs") {
    jobs.take(message);
    problems(message.problems);
    showJob();
  } else if (message.job !== chosen) {
    return;
  } else if (event === "events") {
    messages.take(message.events);
    timeline.show(messages.events, jobs.rows.get(chosen));
  } else if (event === "checkpoints") {
    showCheckpoints(message.checkpoints);
    timeline.know(message.checkpoints);
  } else if (event === "files") {
    output.files(message);
  } else if (event === "output") {
    output.take(message);
  } else if (event === "trouble") {
    setText($("control-subject"), message.text || "");
  }
}

function problems(found) {
  const banner = $("banner");
  const text = Object.entries(found).map(([who, why]) => `The ${who} does not answer: ${why}.`).join(" ");
  banner.hidden = !text;
  setText(banner, text ? `${text} What is shown may be old.` : "");
}

function choose(id) {
  if (id === chosen) {
    if (id !== null) scrollToWork();
    return;
  }
  const fresh = id !== null;
  chosen = id;
  history.replaceState(null, "", fresh ? `#job=${id}` : location.pathname + location.search);
  jobs.choose(id);
  $("form").hidden = fresh;
  $("job").hidden = !fresh;
  $("new-job").setAttribute("aria-pressed", String(!fresh));
  setText($("control-subject"), "");
  showCheckpoints([]);
  news.follow(id);
  showJob();
  if (fresh) scrollToWork();
}

// On a narrow page the panels are below the list.
function scrollToWork() {
  if (matchMedia("(max-width: 899px)").matches) $("commands").scrollIntoView({ block: "start" });
}

function showJob() {
  const row = jobs.rows.get(chosen);
  document.title = row ? `${stateWord(row)}: ${row.name} – Outlast` : "Outlast launcher";
  setText($("commands-subject"), chosen === null ? "a new job" : row ? `job ${row.id}: ${row.name}` : `job ${chosen}`);
  if (chosen === null) return;
  timeline.show(messages.events, row);
  const list = [];
  if (row) {
    const reason = row.reason && row.kind !== "running" ? ` (${row.reason})` : "";
    list.push(["State", stateWord(row) + reason]);
    if (row.nodes) list.push(["Node", row.nodes]);
    list.push(["Partition", row.partition], ["Restarts", String(row.restarts)]);
    list.push(["Checkpoints", row.watched ? (row.newest ? `newest ${ago(row.newest.created)}` : "none yet") : "not with --checkpoint, or not started yet"]);
    if (row.submitted) list.push([row.restarts ? "Requeued" : "Submitted", time(row.submitted)]);
    if (row.ended) list.push(["Ended", time(row.ended) + (row.exit !== "" ? `, exit ${row.exit}` : "")]);
    list.push(["Directory", row.directory]);
  }
  const place = $("facts");
  const text = list.flat().join("\n");
  if (place.dataset.text !== text) {
    place.dataset.text = text;
    place.replaceChildren(...list.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }
  const may = {
    checkpoint: row?.kind === "running" && row.watched,
    hold: (row?.kind === "running" && row.watched) || row?.kind === "pending",
    release: row?.kind === "held",
    cancel: ["pending", "held", "running", "lost"].includes(row?.kind),
  };
  for (const button of $("actions").querySelectorAll("button")) {
    const name = button.dataset.action;
    // Not "disabled": a button must not lose the keyboard's focus when its job's state changes.
    button.setAttribute("aria-disabled", String(!may[name]));
  }
}

function showCheckpoints(found) {
  const table = $("checkpoints");
  table.hidden = found.length === 0;
  table.tBodies[0].replaceChildren(
    ...found.map((one) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, one.name),
        element("td", {}, time(one.created)),
        element("td", {}, one.node || "–"),
        element("td", { class: "num" }, size(one.image_bytes)),
        element("td", { class: "num" }, size(one.stored_bytes)),
        element("td", { class: "num" }, milliseconds(one.pause_ms)),
      ),
    ),
  );
}

async function act(name) {
  const job = chosen;
  if (name === "cancel" && !(await sure(job))) return;
  say("…");
  try {
    const answer = await post(`api/jobs/${job}/${name}`, {});
    say(`Job ${job}: ${answer.said}.`);
  } catch (error) {
    say([error.message, error.hint].filter(Boolean).join(" – "), true);
  }
}

function sure(job) {
  const row = jobs.rows.get(job);
  setText($("ask-title"), `Cancel job ${job}?`);
  setText($("ask-text"), `${row?.name || "It"} is ended for good, and is not restarted from its checkpoints. “Hold” gives its node back and lets it go on later.`);
  const dialog = $("ask");
  dialog.showModal();
  return new Promise((done) => {
    dialog.onclose = () => done(dialog.returnValue === "yes");
    $("ask-no").onclick = () => dialog.close("no");
    $("ask-yes").onclick = () => dialog.close("yes");
    dialog.oncancel = () => (dialog.returnValue = "no");
  });
}

function login(why = "") {
  setText($("login-wrong"), why);
  if (!$("login").open) $("login").showModal();
}

async function open() {
  try {
    facts = await get("api/facts");
  } catch (error) {
    if (error.status === 401) return login(sessionStorage.getItem("outlast-token") ? "That is not this launcher's token." : "");
    connection("broken");
    setTimeout(open, 2000);
    return;
  }
  if ($("login").open) $("login").close();
  setText($("who"), `${facts.user} on ${facts.cluster}`);
  form.begin(facts);
  const asked = new URLSearchParams(location.hash.slice(1)).get("job");
  if (asked && /^[0-9]+$/.test(asked)) choose(asked);
  else news.follow(null);
}

$("login-go").addEventListener("click", () => {
  setToken($("token").value);
  $("token").value = "";
  open();
});
$("token").addEventListener("keydown", (event) => {
  if (event.key === "Enter") $("login-go").click();
});
$("login").addEventListener("cancel", (event) => event.preventDefault());
$("new-job").addEventListener("click", () => {
  say("");
  choose(null);
  $("f-text").focus();
});
$("actions").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.getAttribute("aria-disabled") === "true") say(`Job ${chosen}: not while it is ${stateWord(jobs.rows.get(chosen) || { kind: "", state: "unknown" })}.`, true);
  else act(button.dataset.action);
});

takeTokenFromAddress();
open();
