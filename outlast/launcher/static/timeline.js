// Draws what a job has been through: a lane per node, and on it runs, pauses, uploads, failures and restarts.

import { $, element, plural, span, time } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const STARTS = new Set(["started", "restored", "no-capsule"]);
const ENDS = new Set(["ended", "killed", "cancelled", "fenced", "not-started", "left", "held"]);
const NOTICED = new Set(["node-marked-down", "requeued"]);
const FAILURES = new Set(["checkpoint-failed", "restore-failed", "not-started", "node-marked-down", "pages-failed", "not-saved"]);
const LANE = 30;
const TOP = 8;
const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800];

// Reads the event log as runs; exported for tests.
export function read(events, row, now, stored = []) {
  const runs = [];
  const checkpoints = new Map();
  const failures = [];
  const dumps = new Map(); // where each checkpoint began, by "epoch.sequence"
  let dump = null;
  let open = null;
  const close = (at, how) => {
    if (open) Object.assign(open, { end: Math.max(at, open.start), how });
    open = null;
  };
  for (const event of events) {
    const { event: word, node, time: at } = event;
    if (STARTS.has(word)) {
      if (open) {
        // Nobody has told of its end: the scheduler itself may have found its node dead.
        failures.push({ word: "lost", text: "nothing more was heard of this run", at: open.last, node: open.node });
        close(open.last, "lost");
      }
      open = { node, start: at, end: null, how: null, word, from: event.checkpoint || null, made: event.made && { node: event.made_on, begin: event.made }, epoch: event.epoch, last: at };
      runs.push(open);
    } else if (ENDS.has(word) && open && node === open.node) {
      close(at, word);
    } else if (NOTICED.has(word)) {
      close(at, "lost");
    }
    if (open && node === open.node) open.last = at;
    if (word === "dump") {
      dump = at;
      dumps.set(/ ([0-9]+\.[0-9]+) /.exec(event.text)?.[1], { node, begin: at });
    }
    if (word === "checkpoint") {
      const ship = typeof event.ship_s === "number" ? event.ship_s : 0;
      checkpoints.set(event.checkpoint, {
        name: event.checkpoint, node, begin: dump ?? at - ship, pause: (event.pause_ms || 0) / 1000, upload: at - ship, end: at, bytes: event.stored_bytes,
      });
    }
    if (FAILURES.has(word)) failures.push({ word, text: event.text, at, node: open?.node || runs[runs.length - 1]?.node || node });
  }
  if (open) {
    if (row && row.kind === "running") close(now, "running");
    else close(row?.ended && row.ended > open.last ? row.ended : open.last, "unknown");
  }
  for (const [index, run] of runs.entries()) {
    const later = runs.slice(index + 1).find((other) => other.from || other.word === "started");
    if (!later || later !== runs[index + 1]) continue;
    // What was computed after the checkpoint that the job went on from, it computes again. A node that died
    // may have told of that checkpoint's beginning only, or of nothing; the store has it then.
    const listed = stored.find((one) => one.name === later.from);
    const kept =
      later.from &&
      (checkpoints.get(later.from) || dumps.get(later.from.split("@")[1]) || (listed && { node: listed.node, begin: listed.created }) || later.made);
    if (!later.from) run.again = run.start;
    else if (kept && kept.node === run.node && kept.begin >= run.start) run.again = kept.begin;
  }
  return { runs, checkpoints: [...checkpoints.values()], failures, nodes: [...new Set(runs.map((run) => run.node))] };
}

function make(tag, attributes, title) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (title) {
    const text = document.createElementNS(SVG, "title");
    text.textContent = title;
    made.append(text);
  }
  return made;
}

export class Timeline {
  constructor() {
    this.frame = $("timeline-frame");
    this.due = null;
    this.events = [];
    this.stored = []; // every checkpoint that the store has told of
    this.row = null;
    new ResizeObserver(() => this.#soon()).observe(this.frame);
    setInterval(() => {
      if (this.row?.kind === "running" && !document.hidden) this.#soon();
    }, 1000);
    $("legend").append(
      ...[["run", "runs"], ["again", "computed again"], ["pause", "checkpoint (pause)"], ["upload", "upload"], ["failure", "failure"], ["restart", "restart"]].map(
        ([kind, text]) => element("span", { class: "key" }, element("i", { class: `swatch ${kind}`, "aria-hidden": "true" }), text),
      ),
    );
  }

  show(events, row) {
    this.events = events;
    if (row === null) this.stored = [];
    this.row = row;
    this.#soon();
  }

  know(checkpoints) {
    this.stored.push(...checkpoints.filter((one) => !this.stored.some((other) => other.name === one.name)));
    this.#soon();
  }

  #soon() {
    if (this.due) return;
    this.due = requestAnimationFrame(() => {
      this.due = null;
      this.#draw();
    });
  }

  #draw() {
    const now = Date.now() / 1000;
    const seen = read(this.events, this.row, now, this.stored);
    const box = $("timeline");
    box.hidden = seen.runs.length === 0;
    if (box.hidden) return;
    const width = Math.max(240, this.frame.clientWidth);
    const left = Math.min(110, 14 + 7.5 * Math.max(...seen.nodes.map((node) => node.length)));
    const begin = Math.min(this.row?.submitted || Infinity, seen.runs[0].start);
    // A slow clock on this side must not turn the axis round.
    const end = Math.max(begin + 1, ...seen.runs.map((run) => run.end), ...seen.failures.map((one) => one.at));
    const height = TOP + LANE * seen.nodes.length + 22;
    const x = (at) => left + ((Math.min(end, Math.max(begin, at)) - begin) / (end - begin)) * (width - left - 10);
    const y = (node) => TOP + LANE * seen.nodes.indexOf(node);
    const restarts = Math.max(0, seen.runs.length - 1);
    const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    svg.setAttribute(
      "aria-label",
      `Timeline: ${plural(seen.runs.length, "run")} on ${seen.nodes.join(", ")}; ${plural(seen.checkpoints.length, "checkpoint")}; ` +
        `${plural(restarts, "restart")}; ${plural(seen.failures.length, "failure")}; ${span(end - begin)} in all. The messages below say the same.`,
    );
    svg.append(this.#pattern());
    this.#axis(svg, begin, end, x, height, width);
    for (const node of seen.nodes) {
      const label = make("text", { x: left - 8, y: y(node) + 15, class: "lane" });
      label.textContent = node.length > 13 ? `${node.slice(0, 12)}…` : node;
      svg.append(make("line", { x1: left, x2: width - 10, y1: y(node) + 11, y2: y(node) + 11, class: "rail" }), label);
    }
    for (const [index, run] of seen.runs.entries()) this.#run(svg, run, seen.runs[index + 1], x, y);
    this.#checkpoints(svg, seen, x, y);
    for (const one of seen.failures) this.#failure(svg, one, x, y);
    this.frame.replaceChildren(svg);
  }

  #run(svg, run, next, x, y) {
    const x1 = x(run.start);
    const x2 = Math.max(x1 + 2, x(run.end));
    const top = y(run.node);
    const how = { running: "runs", lost: "was lost", unknown: "not known how it ended" }[run.how] || run.how;
    const title = `${run.node}, ${time(run.start)} to ${time(run.end)} (${span(run.end - run.start)}): ${run.from ? `from ${run.from}, ` : ""}${how}`;
    svg.append(make("rect", { x: x1, y: top + 3, width: x2 - x1, height: 16, rx: 3, class: `run ${run.how}` }, title));
    if (typeof run.again === "number") {
      const from = x(run.again);
      svg.append(make("rect", { x: from, y: top + 3, width: Math.max(1, x2 - from), height: 16, class: "again" }, `${span(run.end - run.again)} computed again`));
    }
    if (!next) return;
    const from = [x2, top + 11];
    const to = [x(next.start), y(next.node) + 11];
    const bend = Math.max(14, (to[0] - from[0]) / 2);
    svg.append(
      make("path", { d: `M${from} C${from[0] + bend},${from[1]} ${to[0] - bend},${to[1]} ${to}`, class: "restart" }, `${span(next.start - run.end)} until it ran again on ${next.node}`),
      make("circle", { cx: to[0], cy: to[1], r: 3.5, class: "restart-end" }),
    );
  }

  #checkpoints(svg, seen, x, y) {
    let last = -1;
    for (const one of seen.checkpoints) {
      if (!seen.nodes.includes(one.node)) continue;
      const at = x(one.begin);
      const top = y(one.node);
      // More than one in a pixel are drawn as one.
      if (Math.abs(at - last) < 1) continue;
      last = at;
      svg.append(
        make("rect", { x: x(one.upload), y: top + 21, width: Math.max(1.5, x(one.end) - x(one.upload)), height: 3, class: "upload" }),
        make("rect", { x: at, y: top, width: Math.max(2, x(one.begin + one.pause) - at), height: 21, class: "pause" }, `${one.name} at ${time(one.begin)}: stood still for ${(1000 * one.pause).toFixed(0)} ms`),
      );
    }
  }

  #failure(svg, one, x, y) {
    const at = x(one.at);
    const middle = y(one.node) + 11;
    const mark = make("g", { class: "failure" }, `${time(one.at)} ${one.word}: ${one.text}`);
    mark.append(make("circle", { cx: at, cy: middle, r: 7 }), make("path", { d: `M${at - 3},${middle - 3}l6,6m0,-6l-6,6` }));
    svg.append(mark);
  }

  #axis(svg, begin, end, x, height, width) {
    const step = STEPS.find((one) => ((x(end) - x(begin)) * one) / (end - begin) >= 70) || 2592000;
    for (let at = 0; at <= end - begin; at += step) {
      const where = x(begin + at);
      if (where > width - 24 && at > 0) break;
      const label = make("text", { x: where, y: height - 4, class: at ? "tick" : "tick first" });
      label.textContent = at ? `+${span(at)}` : time(begin);
      svg.append(make("line", { x1: where, x2: where, y1: TOP - 4, y2: height - 16, class: "grid" }), label);
    }
  }

  #pattern() {
    const pattern = make("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
    pattern.append(make("rect", { width: 2.5, height: 6, class: "hatch" }));
    const defs = make("defs", {});
    defs.append(pattern);
    return defs;
  }
}
