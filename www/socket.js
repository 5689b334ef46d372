"use strict";

/* A WebSocket that comes back: what sse.js does for a stream, for the other transport.

   The protocol has no resume and no back-off, and a page can neither see a ping nor notice
   that the other end is gone. So the url is asked for anew for each attempt (it carries
   `?after=`, the id of the last message), and a socket that brings nothing for 10 s is
   given up: the server says something every 4 s, so it is a zombie, open on this side only.
   A refused handshake looks to a page like a network that is gone: the server is asked why. */

const Socket = (() => {
  const DEFAULTS = {
    url() {}, // where to connect to, this time
    protocols: [],
    make: (url, protocols) => network.socket(url, protocols),
    refusal: () => network.refusal(), // why we are not let in; "" if that is not it
    silence: 10000, // ms without a message
    patience: 5000, // ms in which it must open ...
    stale: 5000, // ... and after which a silent one is not trusted on waking up
    onmessage() {}, // (text)
    onstate() {}, // as in sse.js: ("connecting" | "open" | "waiting" | "closed", detail)
  };

  function open(options) {
    const settings = { ...DEFAULTS, ...options };
    let socket = null;
    let dog = null; // watches over the socket
    let timer = 0; // of the wait before an attempt
    let attempt = 0; // since the last message
    let isOpen = false;
    let closed = false;

    function connect() {
      clearTimeout(timer);
      settings.onstate("connecting", { attempt });
      try {
        socket = settings.make(settings.url(), settings.protocols);
      } catch (error) {
        return again(error);
      }
      const giveUp = new AbortController();
      giveUp.signal.onabort = () => again(giveUp.signal.reason);
      dog = SSE.watchdog(giveUp, settings.patience);
      socket.onopen = opened;
      socket.onmessage = ({ data }) => receive(data);
      socket.onclose = (event) => broken(event);
    }

    function opened() {
      isOpen = true;
      dog.heard();
      dog.limit = settings.silence;
      settings.onstate("open");
    }

    function receive(data) {
      attempt = 0;
      dog.heard();
      settings.onmessage(data);
    }

    async function broken(event) {
      const wasOpen = isOpen;
      again(event);
      const reason = wasOpen ? "" : await settings.refusal();
      if (reason && !closed && !isOpen) finish(Object.assign(new Error(reason), { reason }));
    }

    function again(failure) {
      drop();
      const wait = SSE.jitter(attempt++);
      settings.onstate("waiting", { wait, until: Date.now() + wait, failure });
      timer = setTimeout(connect, wait);
    }

    /* Without waiting for `close`: a zombie never answers the closing handshake. */
    function drop() {
      clearTimeout(timer);
      dog?.stop();
      isOpen = false;
      if (!socket) return;
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close();
      socket = null;
    }

    function finish(reason) {
      closed = true;
      for (const [target, type] of SSE.REVIVALS) target.removeEventListener(type, hurry);
      drop();
      settings.onstate("closed", reason);
    }

    function hurry({ type } = {}) {
      if (type === "visibilitychange" && document.hidden) return;
      if (socket && dog.quiet() < settings.stale) return;
      drop();
      connect();
    }

    for (const [target, type] of SSE.REVIVALS) target.addEventListener(type, hurry);
    connect();
    return {
      get isOpen() { return isOpen && socket.readyState === WebSocket.OPEN; },
      send(text) { socket.send(text); },
      reconnect() { if (!socket && !closed) connect(); }, // instead of the rest of the wait
      close() { if (!closed) finish(); },
    };
  }

  return { open };
})();
