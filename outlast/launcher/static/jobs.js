// The list of jobs: one element a job, made once, and changed only where the job has changed.

import { $, ago, element, plural, setText } from "./words.js";

const WORDS = { pending: "pending", held: "held", running: "running", done: "done", failed: "failed", ended: "canceled", lost: "lost" };
const ACTIVE = new Set(["pending", "held", "running", "lost"]);

export function stateWord(row) {
  if (row.kind === "running" && row.state !== "RUNNING") return row.state.toLowerCase().replaceAll("+", ", ");
  if (row.kind === "failed") return row.state.split("+")[0].toLowerCase().replaceAll("_", " ");
  return WORDS[row.kind] || row.state.toLowerCase();
}

export class JobList {
  constructor(onChoose) {
    this.onChoose = onChoose;
    this.rows = new Map();
    this.entries = new Map();
    this.order = []; // ids, the newest first
    this.chosen = null;
    this.loaded = false;
    this.list = $("job-list");
    this.list.addEventListener("click", (event) => {
      const entry = event.target.closest("[role=option]");
      if (entry) this.onChoose(entry.dataset.job);
    });
    this.list.addEventListener("keydown", (event) => this.#key(event));
    for (const id of ["find", "which"]) $(id).addEventListener("input", () => this.#filter());
    $("find").addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") {
        event.preventDefault();
        this.#focus(this.#visible()[0]);
      }
    });
    setInterval(() => this.#ages(), 5000);
  }

  take(news) {
    if (news.all) {
      const there = new Set(news.rows.map((row) => row.id));
      for (const id of [...this.rows.keys()]) if (!there.has(id)) this.#drop(id);
    }
    news.gone.forEach((id) => this.#drop(id));
    const fresh = [];
    for (const row of news.rows) {
      if (!this.rows.has(row.id)) fresh.push(row.id);
      this.rows.set(row.id, row);
    }
    if (fresh.length) this.#insert(fresh);
    for (const row of news.rows) this.#show(row);
    this.loaded = true;
    this.#count();
  }

  choose(id) {
    for (const other of [this.chosen, id]) {
      this.entries.get(other)?.node.setAttribute("aria-selected", String(other === id));
    }
    this.chosen = id;
    this.#tabStop(this.entries.get(id)?.node);
    this.entries.get(id)?.node.scrollIntoView({ block: "nearest" });
  }

  #insert(ids) {
    ids.sort((one, other) => Number(other) - Number(one));
    for (const id of ids) this.#make(id);
    if (!this.order.length || Number(ids[ids.length - 1]) > Number(this.order[0])) {
      this.list.prepend(...ids.map((id) => this.entries.get(id).node));
      this.order.unshift(...ids);
    } else {
      this.order = [...this.order, ...ids].sort((one, other) => Number(other) - Number(one));
      this.list.append(...this.order.map((id) => this.entries.get(id).node));
    }
    // Until somebody is in the list, one gets into it at its top.
    if (this.chosen === null && !this.list.contains(document.activeElement)) this.#tabStop(this.#visible()[0]);
  }

  #make(id) {
    const parts = {
      name: element("span", { class: "job-name" }),
      state: element("span", { class: "badge" }),
      facts: element("span", { class: "job-facts" }),
      newest: element("span", { class: "job-newest" }),
    };
    const node = element(
      "li",
      { role: "option", "data-job": id, tabindex: "-1", "aria-selected": String(id === this.chosen) },
      element("span", { class: "job-line" }, parts.name, parts.state),
      element("span", { class: "job-line minor" }, parts.facts, parts.newest),
    );
    this.entries.set(id, { node, ...parts });
  }

  #show(row) {
    const entry = this.entries.get(row.id);
    setText(entry.name, row.name || "(no name)");
    setText(entry.state, stateWord(row));
    if (entry.state.dataset.kind !== row.kind) entry.state.dataset.kind = row.kind;
    const facts = [row.id];
    if (row.nodes) facts.push(row.nodes);
    if (row.restarts) facts.push(plural(row.restarts, "restart"));
    if (row.checkpoints) facts.push(plural(row.checkpoints, "checkpoint"));
    setText(entry.facts, facts.join(" · "));
    this.#age(row, entry);
    entry.node.hidden = !this.#matches(row);
  }

  #age(row, entry) {
    setText(entry.newest, row.newest ? ago(row.newest.created) : "");
    if (row.newest && !entry.newest.title) entry.newest.title = "the newest checkpoint";
  }

  #ages() {
    if (document.hidden) return;
    for (const [id, row] of this.rows) if (row.newest) this.#age(row, this.entries.get(id));
  }

  #drop(id) {
    this.entries.get(id)?.node.remove();
    this.entries.delete(id);
    this.rows.delete(id);
    this.order = this.order.filter((other) => other !== id);
  }

  #matches(row) {
    const which = $("which").value;
    if (which !== "all" && ACTIVE.has(row.kind) !== (which === "active")) return false;
    const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = `${row.id} ${row.name} ${row.nodes} ${stateWord(row)} ${row.state}`.toLowerCase();
    return words.every((word) => text.includes(word));
  }

  #filter() {
    for (const [id, row] of this.rows) this.entries.get(id).node.hidden = !this.#matches(row);
    this.#count();
    const stop = this.list.querySelector('[tabindex="0"]');
    if (!stop || stop.hidden) this.#tabStop(this.#visible()[0]);
  }

  #count() {
    const shown = this.#visible().length;
    setText($("jobs-count"), shown === this.rows.size ? `${shown}` : `${shown} of ${this.rows.size}`);
    const empty = $("jobs-empty");
    empty.hidden = shown > 0 || !this.loaded;
    setText(empty, this.rows.size ? "No job is like that." : "No jobs yet. What you submit, here or with sbatch, appears here.");
  }

  #visible() {
    return this.order.map((id) => this.entries.get(id).node).filter((node) => !node.hidden);
  }

  #tabStop(node) {
    if (!node) return;
    for (const old of this.list.querySelectorAll('[tabindex="0"]')) old.setAttribute("tabindex", "-1");
    node.setAttribute("tabindex", "0");
  }

  #focus(node) {
    if (!node) return;
    this.#tabStop(node);
    node.focus();
  }

  #key(event) {
    const nodes = this.#visible();
    const at = nodes.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: nodes.length - 1, PageDown: at + 10, PageUp: at - 10 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      this.#focus(nodes[Math.min(nodes.length - 1, Math.max(0, to))]);
    } else if ((event.key === "Enter" || event.key === " ") && at >= 0) {
      event.preventDefault();
      this.onChoose(nodes[at].dataset.job);
    }
  }
}
