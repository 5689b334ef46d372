// One timer, one loop over all responses: what a careful Node author writes.
// node_loop.js PORT RATE
const http = require("node:http");
const [port, rate] = process.argv.slice(2).map(Number);
const readers = new Set();

http.createServer((request, response) => {
  response.writeHead(200, {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
  });
  response.flushHeaders();
  readers.add(response);
  response.on("close", () => readers.delete(response));
}).listen(port, "127.0.0.1", 1024);

function tick() {
  const stamp = String(process.hrtime.bigint()).padStart(18, "0");
  const event = `data: {"content": "@${stamp} "}\n\n`;
  for (const response of readers) response.write(event);
}

// setInterval rounds to whole milliseconds and drops what it missed: keep to the clock.
const start = performance.now();
let sent = 0;
function run() {
  const due = Math.floor(((performance.now() - start) * rate) / 1000);
  if (due > sent) { sent = due; tick(); }
  setTimeout(run, Math.max(0, start + ((sent + 1) * 1000) / rate - performance.now()));
}
if (rate) run();
