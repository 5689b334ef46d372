// A relay that only pipes: the upstream's bytes, unread, to the client.
// node_pipe.js PORT UPSTREAM_URL
const http = require("node:http");
const [port, upstream] = process.argv.slice(2);
const { Agent, request: ask } = require(upstream.split("://")[0]);
const agent = new Agent({ keepAlive: true });

http.createServer((request, response) => {
  const options = { agent, method: "POST", headers: request.headers };
  const asked = ask(`${upstream}/chat/completions`, options, (answer) => {
    response.writeHead(answer.statusCode, answer.headers);
    answer.pipe(response);
  });
  asked.on("error", () => response.destroy());
  request.pipe(asked);
  response.on("close", () => asked.destroy());
}).listen(Number(port), "127.0.0.1", 1024);
