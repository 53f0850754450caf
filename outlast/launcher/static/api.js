// Speaks with the server: the token, requests, and the stream of news.

const KEPT = "outlast-token";

// The token stays in this tab's own storage, which no other site and no other port can read.
export function takeTokenFromAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  const found = words.get("token");
  if (found) {
    sessionStorage.setItem(KEPT, found);
    words.delete("token");
    history.replaceState(null, "", location.pathname + location.search + (words.size ? `#${words}` : ""));
  }
}

export function setToken(text) {
  const found = /#token=([^&\s]+)/.exec(text);
  sessionStorage.setItem(KEPT, found ? found[1] : text.trim());
}

export class Refused extends Error {
  constructor(status, answer) {
    super(answer.error || `the server answered ${status}`);
    this.status = status;
    this.hint = answer.hint || null;
    this.fields = answer.fields || null;
  }
}

function headers() {
  return { Authorization: `Bearer ${sessionStorage.getItem(KEPT) || ""}` };
}

async function answerOf(response) {
  let answer = {};
  try {
    answer = await response.json();
  } catch {
    // A proxy's own error page, maybe.
  }
  if (!response.ok) throw new Refused(response.status, answer);
  return answer;
}

export async function get(path) {
  return answerOf(await fetch(path, { headers: headers(), cache: "no-store" }));
}

export async function post(path, body, signal) {
  return answerOf(
    await fetch(path, {
      method: "POST",
      headers: { ...headers(), "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    }),
  );
}

// Follows the server's stream until it is stopped, and through every break of the connection.
// EventSource cannot send the token, hence fetch.
export class News {
  constructor(onMessage, onState) {
    this.onMessage = onMessage;
    this.onState = onState;
    this.mark = "";
    this.job = null;
    this.controller = null;
  }

  follow(job) {
    this.job = job;
    this.controller?.abort();
    this.controller = new AbortController();
    this.#run(this.controller);
  }

  async #run(controller) {
    let wait = 500;
    while (!controller.signal.aborted) {
      try {
        const query = new URLSearchParams({ since: this.mark });
        if (this.job) query.set("job", this.job);
        const response = await fetch(`api/stream?${query}`, {
          headers: headers(),
          cache: "no-store",
          signal: controller.signal,
        });
        if (!response.ok) await answerOf(response);
        this.onState("live");
        this.onMessage("begin", { job: this.job });
        wait = 500;
        await this.#read(response.body, controller);
      } catch (error) {
        if (controller.signal.aborted) return;
        if (error instanceof Refused && error.status === 401) {
          this.onState("locked");
          return;
        }
      }
      if (controller.signal.aborted) return;
      this.onState("broken");
      await new Promise((done) => setTimeout(done, wait));
      wait = Math.min(2 * wait, 10000);
    }
  }

  async #read(body, controller) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done || controller.signal.aborted) return;
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const event = /^event: (.*)$/m.exec(part);
        const data = /^data: (.*)$/m.exec(part);
        if (!event || !data) continue;
        const message = JSON.parse(data[1]);
        if (event[1] === "jobs") this.mark = message.mark;
        this.onMessage(event[1], message);
      }
    }
  }
}
