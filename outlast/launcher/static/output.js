// The output panel: a job's files line by line, with what a restore takes back taken back here too.

import { post } from "./api.js";
import { $, AtEnd, element, plural, setText, size } from "./words.js";

const MOST_LINES = 5000;
const TITLES = { out: "Standard output", err: "Standard error" };

class Output {
  constructor(which, path, title, onDownload) {
    this.lines = []; // {at, node, done}, in order; marks are not among them
    this.dropped = false;
    this.follow = element("input", { type: "checkbox" });
    this.follow.checked = true;
    const save = element("button", { type: "button", class: "button small" }, "Download");
    save.setAttribute("aria-label", `Download ${title.toLowerCase()}, whole`);
    save.addEventListener("click", () => onDownload(which));
    this.problem = element("p", { class: "wrong", role: "status" });
    this.text = element("div", { class: "lines", role: "log", "aria-live": "off", "aria-label": title, tabindex: "0", "data-stream": which });
    this.end = new AtEnd(this.text, (on) => (this.follow.checked = on));
    this.follow.addEventListener("change", () => {
      this.end.set(this.follow.checked);
      this.end.keep();
    });
    this.node = element(
      "section",
      { class: "stream", "aria-label": title },
      element(
        "div",
        { class: "stream-head" },
        element("h3", {}, title),
        element("span", { class: "path", title: path }, path.split("/").pop()),
        element("label", { class: "check" }, this.follow, " Follow"),
        save,
      ),
      this.problem,
      this.text,
    );
  }

  take(message) {
    switch (message.op) {
      case "begin":
        this.#clear();
        if (message.skipped) this.#mark(`The first ${size(message.skipped)} are not shown here; Download has them.`, "quiet");
        break;
      case "lines":
        this.#add(message.lines);
        break;
      case "cut":
        this.#cut(message);
        break;
      case "skip":
        this.#mark(`${size(message.bytes)} came too fast to be shown; Download has them.`, "quiet");
        break;
      case "reset":
        this.#clear();
        this.#mark("The file was replaced, removed, or set back by more than is shown; this is how it is now.", "cut");
        this.keepMarks = true;
        break;
      case "problem":
        setText(this.problem, message.text || "");
        break;
    }
    this.end.keep();
  }

  #add(lines) {
    const fresh = document.createDocumentFragment();
    for (const [at, text, done, left] of lines) {
      const last = this.lines[this.lines.length - 1];
      if (last && last.at === at) {
        this.#fill(last.node, text, left);
        last.done = done;
        continue;
      }
      const node = element("div", { class: "line" });
      this.#fill(node, text, left);
      fresh.append(node);
      this.lines.push({ at, node, done });
    }
    this.text.append(fresh);
    if (this.lines.length > MOST_LINES) {
      for (const line of this.lines.splice(0, this.lines.length - MOST_LINES + 500)) line.node.remove();
      if (!this.dropped) {
        this.dropped = true;
        this.#mark("Earlier lines are no longer kept on this page; Download has them.", "quiet", true);
      }
    }
  }

  #fill(node, text, left) {
    setText(node, text);
    if (left) node.append(element("span", { class: "left-out" }, ` … ${left} more`));
  }

  #cut(message) {
    let taken = 0;
    while (this.lines.length && this.lines[this.lines.length - 1].at >= message.start) {
      const line = this.lines.pop();
      line.node.remove();
      taken += 1;
    }
    this.#mark(
      `Set back to byte ${message.at}, as it was at the checkpoint: ${plural(taken, "line")} taken back, to be written again.`,
      "cut",
    );
  }

  #mark(text, kind, first = false) {
    const node = element("div", { class: `mark ${kind}` }, text);
    if (first) this.text.prepend(node);
    else this.text.append(node);
  }

  #clear() {
    for (const line of this.lines) line.node.remove();
    this.lines = [];
    if (!this.keepMarks) this.text.replaceChildren();
    this.keepMarks = false;
    this.dropped = false;
  }
}

export class OutputPanel {
  constructor(say) {
    this.say = say;
    this.outputs = {};
    this.job = null;
  }

  begin(job) {
    this.job = job;
    this.outputs = {};
    this.paths = null;
    $("streams").replaceChildren();
    $("output-empty").hidden = false;
    setText($("output-subject"), "");
    setText($("output-empty"), job ? "Nothing yet." : "Choose a job to see what it prints.");
  }

  files(files) {
    this.outputs = {};
    const nodes = [];
    for (const which of ["out", "err"]) {
      if (!files[which]) continue;
      const title = which === "out" && !files.err ? "Output and errors" : TITLES[which];
      this.outputs[which] = new Output(which, files[which], title, (stream) => this.#download(stream));
      nodes.push(this.outputs[which].node);
    }
    $("streams").replaceChildren(...nodes);
    $("output-empty").hidden = nodes.length > 0;
  }

  take(message) {
    this.outputs[message.stream]?.take(message);
  }

  async #download(stream) {
    try {
      const answer = await post(`api/jobs/${this.job}/download`, { stream });
      element("a", { href: answer.path, download: "" }).click();
    } catch (error) {
      this.say(error.message, true);
    }
  }
}
