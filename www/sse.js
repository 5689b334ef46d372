"use strict";

/* Server-sent events over fetch: the HTML standard's section 9.2, with what its own
   EventSource lacks (POST, headers, a watchdog for silence, a last word on failure).

     const stream = SSE.open("/clock", {
       onevent({ type, data, lastEventId }) { ... },
       onstate(state, detail) { ... },
     });
     stream.close();

   How it keeps a stream alive:
   - A connection that breaks, ends or falls silent is made again and says in
     `Last-Event-ID` where to go on. An answer of 5xx counts as a broken connection.
   - 204 means that there is nothing more; a 4xx, or anything that is no event stream,
     would be the same the next time. Both are final.
   - The wait before a new attempt is drawn at random from a range that doubles with each
     failure ("full jitter"): a thousand readers of a server that went away do not come
     back at once. Only an event received starts it over; a connection that opens and
     dies again does not.
   - What is not safe to repeat is not repeated: a POST goes out once. It is sent again
     only with a `Last-Event-ID`, which tells the server what it would continue.
   - A hidden tab keeps its stream. */

const SSE = (() => {
  const DEFAULTS = {
    method: "GET",
    headers: {},
    body: undefined,
    lastEventId: "",
    fetch: (url, init) => fetch(url, init),
    base: 1000, // ms: the first range of the back-off ...
    cap: 30000, // ... and where it stops doubling
    silence: 45000, // ms without a byte: three of the server's keep-alives
    onevent() {},
    onstate() {}, // ("connecting" | "open" | "waiting" | "closed", detail)
    onopen() {}, // (response); may return {url, method, headers, body} to reconnect with
    onbytes() {}, // (Uint8Array) as it came
  };

  /* Text in, in pieces of any size; events out. Sections 9.2.5 and 9.2.6. */
  class Parser {
    constructor({ onevent, onretry = () => {}, lastEventId = "" }) {
      Object.assign(this, { onevent, onretry, lastEventId });
      this.id = lastEventId; // outlives its block, counts only from its blank line
      this.type = "";
      this.data = []; // joined once: `+=` for each line would copy it all each time
      this.line = "";
      this.afterCR = false;
    }

    feed(text) {
      if (text === "") return;
      if (this.afterCR && text[0] === "\n") text = text.slice(1); // a CRLF cut in half
      this.afterCR = text === "" ? false : text.endsWith("\r");
      const lines = text.split(/\r\n|\r|\n/);
      lines[0] = this.line + lines[0];
      this.line = lines.pop();
      for (const line of lines) this.take(line);
    }

    take(line) {
      if (line === "") return this.dispatch();
      const colon = line.indexOf(":");
      if (colon === 0) return; // a comment
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "data") this.data.push(value);
      else if (field === "event") this.type = value;
      else if (field === "id" && !value.includes("\0")) this.id = value;
      else if (field === "retry" && /^[0-9]+$/.test(value)) this.onretry(Number(value));
    }

    dispatch() {
      const { type, data } = this;
      this.type = "";
      this.data = [];
      this.lastEventId = this.id;
      if (data.length === 0) return; // an empty `data:` line is data, none is not
      this.onevent({
        type: type || "message",
        data: data.join("\n"),
        lastEventId: this.lastEventId,
      });
    }
  }

  /* The server's last word: 204, a refusal, or something that is no event stream. */
  class Refused extends Error {
    constructor(status, body) {
      super(`HTTP ${status}`);
      Object.assign(this, { status, body });
    }
  }

  const jitter = (attempt, base = DEFAULTS.base, cap = DEFAULTS.cap) =>
    Math.random() * Math.min(cap, base * 2 ** attempt);

  // Header values are bytes, and ids are UTF-8: fetch wants one character for each byte.
  const bytesOf = (text) => String.fromCharCode(...new TextEncoder().encode(text));

  function open(url, options) {
    const settings = { ...DEFAULTS, ...options };
    let request = { ...settings, url };
    let { lastEventId } = settings;
    let retry = 0; // ms that the server asked for, on top of which comes the jitter
    let attempt = 0;
    let closed = false;
    let connection = new AbortController();
    let wake = () => {};

    async function run() {
      while (!closed) {
        const failure = await connect().catch((error) => error);
        if (closed) return;
        if (isFinal(failure)) return finish(failure);
        await pause(failure);
      }
    }

    async function connect() {
      settings.onstate("connecting");
      connection = new AbortController();
      const dog = watchdog(settings.silence, connection);
      try {
        const response = await settings.fetch(request.url, init());
        await accept(response);
        request = { method: "GET", ...(settings.onopen(response) || request) };
        settings.onstate("open", response);
        await read(response.body.getReader(), dog);
      } finally {
        dog.stop();
        connection.abort(); // lets go of a response that we refused to read
      }
    }

    function init() {
      const { method, headers, body } = request;
      const resume = lastEventId && { "Last-Event-ID": bytesOf(lastEventId) };
      return {
        method, body, cache: "no-store", signal: connection.signal,
        headers: { ...headers, Accept: "text/event-stream", ...resume },
      };
    }

    async function accept(response) {
      const type = response.headers.get("Content-Type") || "";
      if (response.status === 200 && /^text\/event-stream\s*(;|$)/i.test(type)) return;
      const body = response.status === 204 ? "" : await response.text();
      throw new Refused(response.status, body);
    }

    async function read(reader, dog) {
      const decoder = new TextDecoder(); // drops the one byte order mark that is allowed
      const parser = new Parser({ onevent, onretry: (ms) => (retry = ms), lastEventId });
      for (;;) {
        const { done, value } = await reader.read();
        if (done) throw new Error("the stream ended");
        dog.heard();
        settings.onbytes(value);
        parser.feed(decoder.decode(value, { stream: true }));
        if (!closed) lastEventId = parser.lastEventId;
      }
    }

    function onevent(event) {
      if (closed) return; // by the event before this one, in the same piece
      attempt = 0;
      lastEventId = event.lastEventId;
      try {
        settings.onevent(event);
      } catch (error) {
        reportError(error); // a bug in the page is no reason to connect again
      }
    }

    function isFinal(failure) {
      if (failure instanceof Refused && failure.status < 500) return true;
      return request.method !== "GET" && !lastEventId;
    }

    function pause(failure) {
      const wait = retry + jitter(attempt++, settings.base, settings.cap);
      settings.onstate("waiting", { wait, failure });
      return new Promise((resolve) => {
        const timer = setTimeout(resolve, wait);
        wake = () => (clearTimeout(timer), resolve());
      });
    }

    function finish(reason) {
      closed = true;
      for (const [target, type] of revivals) target.removeEventListener(type, hurry);
      connection.abort();
      wake();
      settings.onstate("closed", reason);
    }

    const hurry = () => document.hidden || wake();
    const revivals = [[window, "online"], [document, "visibilitychange"]];
    for (const [target, type] of revivals) target.addEventListener(type, hurry);
    run();
    return {
      get lastEventId() { return lastEventId; },
      close() { if (!closed) finish(); },
      reconnect() { wake(); }, // now, instead of after the rest of the wait
    };
  }

  /* A connection can be dead without a word: the laptop slept, the NAT forgot it. */
  function watchdog(silence, connection) {
    let heard = performance.now();
    let timer = setTimeout(check, silence);
    function check() {
      const left = heard + silence - performance.now();
      if (left <= 0) connection.abort(new Error("silence"));
      else timer = setTimeout(check, left);
    }
    return {
      heard() { heard = performance.now(); }, // no timer is touched for each piece
      stop() { clearTimeout(timer); },
    };
  }

  return { open, Parser, Refused, jitter };
})();
