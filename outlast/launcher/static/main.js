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
    migrate: row?.kind === "running" && row.watched,
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
  const body = table.tBodies[0];
  table.hidden = found.length === 0;
  const names = new Set(found.map((one) => one.name));
  for (const row of [...body.rows]) if (!names.has(row.dataset.checkpoint)) row.remove();
  // Rows that are there stay: the keyboard may be on one of their buttons.
  for (const [at, one] of found.entries()) {
    if (body.rows[at]?.dataset.checkpoint !== one.name) body.insertBefore(checkpointRow(one), body.rows[at] ?? null);
  }
}

function checkpointRow(one) {
  return element(
    "tr",
    { "data-checkpoint": one.name },
    element("th", { scope: "row" }, one.name),
    element("td", {}, time(one.created)),
    element("td", {}, one.node || "–"),
    element("td", { class: "num" }, size(one.image_bytes)),
    element("td", { class: "num" }, size(one.stored_bytes)),
    element("td", { class: "num" }, milliseconds(one.pause_ms)),
    element("td", {}, element("button", { type: "button", class: "button small", "aria-label": `Restart from ${one.name}` }, "Restart")),
  );
}

async function act(name, form = {}) {
  const job = chosen;
  say("…");
  try {
    const answer = await post(`api/jobs/${job}/${name}`, form);
    say(`Job ${job}: ${answer.said}.`);
  } catch (error) {
    say([error.message, error.hint].filter(Boolean).join(" – "), true);
  }
}

async function decide(name) {
  const job = chosen;
  const row = jobs.rows.get(job);
  if (name === "cancel") {
    const what = `${row?.name || "It"} is ended for good, and is not restarted from its checkpoints. “Hold” gives its node back and lets it go on later.`;
    if (!(await sure(`Cancel job ${job}?`, what, "Cancel job", "Keep it"))) return;
  }
  if (name !== "migrate") return act(name);
  const to = await where(job);
  if (to !== null) act(name, { to });
}

async function restart(checkpoint) {
  const row = jobs.rows.get(chosen);
  const now = row?.kind === "running" ? "What it has computed since then is computed again. " : "";
  const what = `${row?.name || "The job"} goes on from ${checkpoint}. ${now}Newer checkpoints of older runs are not used any more.`;
  if (await sure(`Restart job ${chosen}?`, what, "Restart", "Leave it")) act("restart", { checkpoint });
}

function sure(title, text, yes, no) {
  setText($("ask-title"), title);
  setText($("ask-text"), text);
  setText($("ask-yes"), yes);
  setText($("ask-no"), no);
  const dialog = $("ask");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((done) => {
    dialog.onclose = () => done(dialog.returnValue === "yes");
    $("ask-no").onclick = () => dialog.close("no");
    $("ask-yes").onclick = () => dialog.close("yes");
    dialog.oncancel = () => (dialog.returnValue = "no");
  });
}

// Asks for the node that a job is to go to: its name, "" for any, null for none at all.
function where(job) {
  setText($("move-title"), `Migrate job ${job}?`);
  $("move-to").value = "";
  const dialog = $("move");
  dialog.returnValue = "no";
  dialog.showModal();
  $("move-to").focus();
  return new Promise((done) => {
    dialog.onclose = () => done(dialog.returnValue === "yes" ? $("move-to").value.trim() : null);
    $("move-no").onclick = () => dialog.close("no");
    $("move-form").onsubmit = (event) => {
      event.preventDefault();
      dialog.close("yes");
    };
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
  if (asked && /^[0-9]+(_[0-9]+)?(\.[A-Za-z0-9.-]+)?$/.test(asked)) choose(asked);
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
  else decide(button.dataset.action);
});

$("checkpoints").addEventListener("click", (event) => {
  const name = event.target.closest("button") && event.target.closest("tr")?.dataset.checkpoint;
  if (name) restart(name);
});

takeTokenFromAddress();
open();
