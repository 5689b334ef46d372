// The room with `ws`, as its own documentation broadcasts.
// ws_room.js PORT ARGUMENT [CERTIFICATE KEY]
const fs = require("node:fs");
const { WebSocket, WebSocketServer } = require("ws");
const [port, , certificate, key] = process.argv.slice(2);
const { createServer } = require(certificate ? "node:https" : "node:http");
const options = certificate
  ? { cert: fs.readFileSync(certificate), key: fs.readFileSync(key) } : {};
const http = createServer(options).listen(Number(port), "127.0.0.1", 1024);
const server = new WebSocketServer({ server: http });

server.on("connection", (socket) => {
  socket.on("error", () => {});
  socket.on("message", (text) => {
    const message = `${text}--返回数据`;
    for (const member of server.clients)
      if (member.readyState === WebSocket.OPEN) member.send(message);
  });
});
