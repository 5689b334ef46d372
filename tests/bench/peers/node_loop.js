// One timer, one loop over all responses: what a careful Node author writes.
// node_loop.js PORT RATE [CERTIFICATE KEY]
const fs = require("node:fs");
const feed = require("./feed.js");
const [port, rate, certificate, key] = process.argv.slice(2);
const { createServer } = require(certificate ? "node:https" : "node:http");
const options = certificate
  ? { cert: fs.readFileSync(certificate), key: fs.readFileSync(key) } : {};
const readers = new Set();

createServer(options, (request, response) => {
  response.writeHead(200, {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
  });
  response.flushHeaders();
  if (feed.newest) response.write(feed.newest);
  readers.add(response);
  response.on("close", () => readers.delete(response));
}).listen(Number(port), "127.0.0.1", 1024);

feed.run(Number(rate), (event) => {
  for (const response of readers) response.write(event);
});
