// The same loop over the streams of Node's HTTP/2 server.
// node_http2.js PORT RATE CERTIFICATE KEY
const fs = require("node:fs");
const http2 = require("node:http2");
const feed = require("./feed.js");
const [port, rate, certificate, key] = process.argv.slice(2);
const options = { cert: fs.readFileSync(certificate), key: fs.readFileSync(key) };
const readers = new Set();

http2.createSecureServer(options).on("stream", (stream) => {
  stream.respond({
    ":status": 200,
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
  });
  readers.add(stream);
  stream.on("error", () => {});
  stream.on("close", () => readers.delete(stream));
}).listen(Number(port), "127.0.0.1", 1024);

feed.run(Number(rate), (event) => {
  for (const stream of readers) stream.write(event);
});
