// Small things that every panel needs: elements, times and sizes in words.

export const $ = (id) => document.getElementById(id);

// Text is only ever set as text: nothing that a job or the scheduler says is taken for markup.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const day = new Intl.DateTimeFormat("en-CA", { year: "numeric", month: "2-digit", day: "2-digit" });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export function time(seconds) {
  const date = new Date(seconds * 1000);
  const today = day.format(new Date()) === day.format(date);
  return today ? clock.format(date) : `${day.format(date)} ${clock.format(date)}`;
}

export function span(seconds) {
  if (seconds < 120) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} d`;
}

export const ago = (seconds) => `${span(Date.now() / 1000 - seconds)} ago`;

export function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${unit ? bytes.toFixed(1) : bytes} ${units[unit]}`;
}

export const milliseconds = (value) => (typeof value === "number" ? `${value.toFixed(0)} ms` : "–");

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

// Keeps a box scrolled to its end until somebody scrolls up, and again when he is back at the end.
export class AtEnd {
  constructor(box, onChange = () => {}) {
    this.box = box;
    this.on = true;
    this.onChange = onChange;
    let last = 0;
    box.addEventListener("scroll", () => {
      const end = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
      if (end) this.set(true);
      else if (box.scrollTop < last) this.set(false);
      last = box.scrollTop;
    });
    new ResizeObserver(() => this.keep()).observe(box);
  }

  set(on) {
    if (on === this.on) return;
    this.on = on;
    this.onChange(on);
  }

  keep() {
    if (this.on) this.box.scrollTop = this.box.scrollHeight;
  }
}

export function saveAs(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
