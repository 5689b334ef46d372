// The article's room: nodejs-websocket, and a loop over its connections.
// article_room.js PORT
const ws = require("nodejs-websocket");

const server = ws.createServer((connection) => {
  connection.on("text", (text) => {
    for (const member of server.connections) member.sendText(`${text}--返回数据`);
  });
  connection.on("error", () => {});
}).listen(Number(process.argv[2]), "127.0.0.1");
