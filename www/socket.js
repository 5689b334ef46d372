"use strict";

/* A WebSocket that comes back: what sse.js does for a stream, for the other transport.

   The protocol has no resume and no back-off, and a page can neither see a ping nor notice
   that the other end is gone. So the url is asked for anew for each attempt (it carries
   `?after=`, the id of the last message), and a socket that brings nothing for 10 s is
   given up: the server says something every 4 s, so it is a zombie, open on this side only.
   A refused handshake looks to a page like a network that is gone: the server is asked why.

     url()                     where to connect to, this time
     onmessage(text)
     onstate(state, detail)    as in sse.js
     name                      under which its frames are shown */

const Socket = {
  open({ name, url, protocols = [], onmessage, onstate }) {
    let socket = null;

    async function connect(signal) {
      const to = url();
      let isRefused = true;
      wire.record(name, "out", `GET ${to}\nUpgrade: websocket`, "request");
      socket = network.socket(to, protocols);
      await new Promise((ended) => {
        socket.onopen = () => {
          isRefused = false;
          kept.heard();
          onstate("open");
        };
        socket.onmessage = ({ data }) => {
          kept.failures = 0;
          kept.heard();
          wire.record(name, "in", data);
          onmessage(data);
        };
        socket.onclose = signal.onabort = ended;
      });
      // Without waiting for `close`: a zombie never answers the closing handshake.
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close();
      const reason = isRefused ? await network.refusal(signal) : "";
      throw Object.assign(new Error(reason), { reason });
    }

    const kept = new SSE.Kept({ connect, onstate, isFinal: ({ reason }) => Boolean(reason) });
    return {
      get isOpen() { return socket?.readyState === WebSocket.OPEN; },
      send(text) {
        wire.record(name, "out", text);
        socket.send(text);
      },
      close: () => kept.close(),
    };
  },
};
