// The article's SSE server: Node's http, and a timer for every connection.
// article_sse.js PORT RATE
const http = require("node:http");
const [port, rate] = process.argv.slice(2).map(Number);

http.createServer((request, response) => {
  response.writeHead(200, {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
  });
  response.flushHeaders();
  if (!rate) return;
  const timer = setInterval(() => {
    const stamp = String(process.hrtime.bigint()).padStart(18, "0");
    response.write(`data: {"content": "@${stamp} "}\n\n`);
  }, 1000 / rate);
  request.on("close", () => clearInterval(timer));
}).listen(port, "127.0.0.1", 1024);
