// An HTTP server that the program asks itself, with a connection that it keeps; says "tick N ok" while it answers.
const fs = require("fs");
const http = require("http");

const agent = new http.Agent({ keepAlive: true });
const server = http.createServer((request, response) => response.end("pong"));
let number = 0;

function tick(word) {
  fs.writeSync(1, `tick ${number++} ${word}\n`);
  if (fs.existsSync("stop")) process.exit(3);
  setTimeout(ask, 20);
}

function ask() {
  http
    .get({ port: server.address().port, host: "127.0.0.1", agent }, (response) => {
      let body = "";
      response.on("data", (data) => (body += data));
      response.on("end", () => tick(body === "pong" ? "ok" : "wrong"));
    })
    .on("error", (error) => tick(error.code));
}

server.listen(0, "127.0.0.1", () => {
  fs.writeSync(1, "ready\n");
  ask();
});
