"use strict";

/* A WebSocket that comes back: what sse.js does for a stream, for the other transport.

   The protocol has no resume and no back-off, and a page can neither see a ping nor notice
   that the other end is gone. So the url is asked for anew for each attempt (it carries
   `?after=`, the id of the last message), and a socket silent for longer than the server's
   own heartbeat allows is given up: a zombie, open on this side only. */

const Socket = (() => {
  const DEFAULTS = {
    url() {}, // where to connect to, this time
    protocols: [],
    make: (url, protocols) => new WebSocket(url, protocols),
    silence: 55000, // ms without a message: two of the room's heartbeats
    onmessage() {}, // (text)
    onstate() {}, // ("connecting" | "open" | "waiting" | "closed", detail)
  };

  function open(options) {
    const settings = { ...DEFAULTS, ...options };
    let socket = null;
    let timer = 0; // the wait before an attempt, or the watch over an open socket
    let heard = 0;
    let attempt = 0;

    function connect() {
      clearTimeout(timer);
      settings.onstate("connecting");
      try {
        socket = settings.make(settings.url(), settings.protocols);
      } catch (error) {
        return again(error);
      }
      socket.onopen = () => settings.onstate("open");
      socket.onmessage = ({ data }) => receive(data);
      socket.onclose = (event) => again(event);
      heard = performance.now();
      watch();
    }

    function receive(data) {
      attempt = 0;
      heard = performance.now();
      settings.onmessage(data);
    }

    function watch() {
      const left = heard + settings.silence - performance.now();
      if (left <= 0) again(new Error("silence"));
      else timer = setTimeout(watch, left);
    }

    function again(reason) {
      drop();
      const wait = SSE.jitter(attempt++);
      settings.onstate("waiting", { wait, failure: reason });
      timer = setTimeout(connect, wait);
    }

    /* Without waiting for `close`: a zombie never answers the closing handshake. */
    function drop() {
      clearTimeout(timer);
      if (!socket) return;
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close();
      socket = null;
    }

    const hurry = () => document.hidden || socket || connect();
    const revivals = [[window, "online"], [document, "visibilitychange"]];
    for (const [target, type] of revivals) target.addEventListener(type, hurry);
    connect();
    return {
      get isOpen() { return socket?.readyState === WebSocket.OPEN; },
      send(text) { socket.send(text); },
      reconnect: hurry, // now, instead of after the rest of the wait
      close() {
        for (const [target, type] of revivals) target.removeEventListener(type, hurry);
        drop();
        settings.onstate("closed");
      },
    };
  }

  return { open };
})();
