// The commands panel's form: a new job, and the script that it becomes.

import { post } from "./api.js";
import { $, saveAs, setText } from "./words.js";

export class Form {
  constructor(onSubmitted, say) {
    this.form = $("form");
    this.onSubmitted = onSubmitted;
    this.say = say;
    this.touched = new Set();
    this.all = false; // whether mistakes in untouched fields are shown too
    this.asked = 0;
    this.timer = null;
    this.form.addEventListener("input", (event) => {
      if (event.target.name) this.touched.add(event.target.name);
      this.#kind();
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.preview(), 200);
    });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    $("save-script").addEventListener("click", () => {
      if (this.script) saveAs(`${this.#fileName()}.sh`, this.script);
    });
    this.script = null;
  }

  begin(facts) {
    if (!$("f-directory").value) $("f-directory").value = facts.home;
    const list = $("partitions");
    list.replaceChildren();
    for (const partition of facts.partitions) {
      const option = document.createElement("option");
      option.value = partition.name;
      list.append(option);
      if (partition.default) $("f-partition").placeholder = partition.name;
    }
    this.preview();
  }

  values() {
    return Object.fromEntries([...new FormData(this.form)].map(([name, value]) => [name, String(value)]));
  }

  async preview() {
    const turn = ++this.asked;
    try {
      const answer = await post("api/preview", this.values());
      if (turn === this.asked) this.#show(answer.script, answer.fields);
    } catch (error) {
      if (turn === this.asked) this.say(error.message, true);
    }
  }

  async #submit() {
    this.all = true;
    $("submit").disabled = true;
    try {
      const answer = await post("api/jobs", this.values());
      this.all = false;
      this.touched.clear();
      this.onSubmitted(answer.job);
    } catch (error) {
      if (error.fields) {
        this.#show(null, error.fields);
        const first = [...this.form.elements].find((field) => field.name in error.fields);
        if (first?.closest("details")) first.closest("details").open = true;
        first?.focus();
        this.say("Some fields need another look.", true);
      } else {
        this.say([error.message, error.hint].filter(Boolean).join(" – "), true);
      }
    } finally {
      $("submit").disabled = false;
    }
  }

  #show(script, wrong) {
    this.script = script;
    const shown = $("script");
    shown.classList.toggle("pending", script === null);
    setText(shown, script ?? "It appears here as soon as the fields above say what is to be run.");
    $("save-script").disabled = script === null;
    for (const field of this.form.elements) {
      const place = field.name && $(`e-${field.name}`);
      if (!place) continue;
      const why = this.all || this.touched.has(field.name) ? wrong[field.name] || "" : "";
      setText(place, why);
      if (why) field.setAttribute("aria-invalid", "true");
      else field.removeAttribute("aria-invalid");
    }
  }

  #kind() {
    const script = this.values().kind === "script";
    setText($("f-text-label"), script ? "Script, with its #! line" : "Command, as you would type it");
    const text = $("f-text");
    text.rows = script ? 10 : 3;
    text.placeholder = script ? "#!/bin/bash" : "./lu 2000 500";
  }

  #fileName() {
    return (this.values().name || "job").replaceAll(/[^A-Za-z0-9_.-]+/g, "-").replace(/^[-.]+/, "") || "job";
  }
}
