// A relay that only pipes: the upstream's bytes, unread, to the client.
// node_pipe.js PORT UPSTREAM_PORT
const http = require("node:http");
const [port, upstream] = process.argv.slice(2).map(Number);
const agent = new http.Agent({ keepAlive: true });

http.createServer((request, response) => {
  const options = {
    agent, port: upstream, host: "127.0.0.1", method: "POST",
    path: "/v1/chat/completions", headers: request.headers,
  };
  const asked = http.request(options, (answer) => {
    response.writeHead(answer.statusCode, answer.headers);
    answer.pipe(response);
  });
  request.pipe(asked);
  response.on("close", () => asked.destroy());
}).listen(port, "127.0.0.1", 1024);
