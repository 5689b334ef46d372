// The room with `ws`, as its own documentation broadcasts.
// ws_room.js PORT
const { WebSocket, WebSocketServer } = require("ws");
const server = new WebSocketServer({ port: Number(process.argv[2]), host: "127.0.0.1" });

server.on("connection", (socket) => {
  socket.on("error", () => {});
  socket.on("message", (text) => {
    const message = `${text}--返回数据`;
    for (const member of server.clients)
      if (member.readyState === WebSocket.OPEN) member.send(message);
  });
});
