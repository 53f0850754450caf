// The control panel's messages: a job's event log, as it grows.

import { $, AtEnd, element, milliseconds, setText, size, time } from "./words.js";

const MOST = 3000;
const KINDS = {
  started: "go", restored: "go", "begun-again": "go", released: "go", release: "go", submitted: "go",
  left: "go", thawed: "go",
  checkpoint: "good", "on-hold": "good",
  dump: "quiet", asked: "quiet", "manager-restarted": "quiet", retired: "quiet", "node-excluded": "quiet", "node-readmitted": "quiet", "lease-dropped": "quiet",
  mode: "quiet", hastened: "quiet", finding: "quiet", leaving: "quiet",
  "checkpoint-failed": "bad", "restore-failed": "bad", "not-started": "bad", "no-capsule": "bad", "node-marked-down": "bad", fenced: "bad", "not-held": "bad",
  "store-unreachable": "warn", requeued: "warn", killed: "warn", cancelled: "warn", cancel: "warn",
  held: "warn", waits: "warn", "no-guard": "warn", "not-saved": "warn", "not-left": "warn",
};

function textOf(event) {
  if (event.event === "checkpoint" && typeof event.image_bytes === "number") {
    const shipped = typeof event.ship_s === "number" ? ` in ${event.ship_s.toFixed(2)} s` : "";
    return `${event.checkpoint}: the job stood still for ${milliseconds(event.pause_ms)}; ${size(event.image_bytes)}, shipped as ${size(event.stored_bytes)}${shipped}`;
  }
  return event.text;
}

export class Messages {
  constructor() {
    this.list = $("messages");
    this.end = new AtEnd(this.list);
    this.begin(null);
  }

  begin(job) {
    this.entries = []; // {event, node}, in order of time
    this.list.setAttribute("aria-live", "off");
    this.list.replaceChildren();
    this.list.hidden = true;
    $("messages-empty").hidden = false;
    setText($("messages-empty"), job ? "Nothing yet." : "Choose a job to see what happens to it.");
    this.end.set(true);
    clearTimeout(this.timer);
    // What was there before is read by whoever wants to; only what comes from now on is announced.
    this.timer = setTimeout(() => this.list.setAttribute("aria-live", "polite"), 2500);
  }

  get events() {
    return this.entries.map((entry) => entry.event);
  }

  take(events) {
    for (const event of events) this.#insert(event);
    while (this.entries.length > MOST) this.entries.shift().node?.remove();
    const any = this.entries.length > 0;
    this.list.hidden = !any;
    $("messages-empty").hidden = any;
    this.end.keep();
  }

  #insert(event) {
    let at = this.entries.length;
    while (at > 0 && this.entries[at - 1].event.time > event.time) at -= 1;
    const entry = { event, node: this.#line(event) };
    this.list.insertBefore(entry.node, this.entries[at]?.node ?? null);
    this.entries.splice(at, 0, entry);
    // "A checkpoint begins" has said all it can once that has ended.
    if (event.event === "checkpoint" || event.event === "checkpoint-failed") this.#hideBegin(event);
  }

  #hideBegin(event) {
    for (let at = this.entries.length - 1; at >= 0; at -= 1) {
      const { event: other, node } = this.entries[at];
      if (other.event === "dump" && other.node === event.node && other.epoch === event.epoch && other.time <= event.time) {
        node.hidden = true;
        return;
      }
    }
  }

  #line(event) {
    const text = element("span", { class: "message-text" }, textOf(event));
    if (event.hint) text.append(element("span", { class: "message-hint" }, ` ${event.hint}`));
    return element(
      "li",
      { "data-kind": KINDS[event.event] || "plain", "data-event": event.event },
      element("time", { datetime: new Date(event.time * 1000).toISOString() }, time(event.time)),
      element("span", { class: "message-node" }, event.node || ""),
      element("span", { class: "message-event" }, event.event),
      text,
    );
  }
}
