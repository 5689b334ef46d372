"use strict";

/* Server-sent events over fetch: the HTML standard's section 9.2, with what its own
   EventSource lacks (POST, headers, a watchdog for silence, a last word on failure).

     const stream = SSE.open("/clock", { onevent, onstate });
     onevent({ type, data, lastEventId })
     onstate("connecting")
     onstate("open", response)
     onstate("waiting", { wait })   ms until the next attempt
     onstate("closed", reason)      for good: a Refused (with status and reason), another
                                    Error, or undefined after close() and done()
     stream.close()                 nothing more is wanted
     stream.done()                  the last event has come: the server may end the stream

   A connection that breaks, ends or falls silent is made again, and says in `Last-Event-ID`
   where to go on; so is one that was answered by a 5xx. 204 means that there is nothing more;
   a 4xx, or anything that is not an event stream, would be the same the next time: these are
   final. A POST goes out once. It is sent again only with a `Last-Event-ID`, which tells the
   server what it would continue, or if the server was too busy and said when to come again. */

const SSE = (() => {
  const DEFAULTS = {
    base: 1000, // ms: the first range of the back-off ...
    cap: 8000, // ... and where it stops doubling
    silence: 10000, // ms without a byte: two of the server's keep-alives
    patience: 5000, // ms in which a new attempt must bring the response's head ...
    stale: 5000, // ... and after which a silent stream is not trusted on waking up
    method: "GET",
    lastEventId: "",
    fetch: (url, init) => fetch(url, init),
    onevent() {},
    onstate() {}, // see above
    onopen() {}, // (response); may return {url, method, headers, body} to reconnect with
    onbytes() {}, // (Uint8Array) as it came
  };

  // ------------------------------------------------------------------ reading a stream

  /* Text in, in pieces of any size; events out. Sections 9.2.5 and 9.2.6. */
  class Parser {
    constructor({ onevent, onretry = () => {}, lastEventId = "" }) {
      Object.assign(this, { onevent, onretry, lastEventId });
      this.id = lastEventId; // outlives its block, counts only from its blank line
      this.bareId = ""; // of a block whose data has not come
      this.type = "";
      this.data = "";
      this.line = "";
      this.afterCR = false;
    }

    feed(text) {
      if (this.afterCR && text[0] === "\n") text = text.slice(1); // a CRLF cut in half
      this.afterCR = text.endsWith("\r");
      const [first, ...more] = text.split(/\r\n|\r|\n/);
      this.line += first;
      for (const next of more) {
        this.take(this.line);
        this.line = next;
      }
    }

    take(line) {
      if (line === "") return this.dispatch();
      const [, field, value] = /^([^:]*):? ?([^]*)$/.exec(line);
      if (field === "data") this.data += `${value}\n`;
      else if (field === "event") this.type = value;
      else if (field === "retry" && /^[0-9]+$/.test(value)) this.onretry(Number(value));
      else if (field === "id" && !value.includes("\0")) {
        this.id = value;
        if (this.data === "") this.bareId = value;
      }
    }

    dispatch() {
      const { type, data, id } = this;
      Object.assign(this, { type: "", data: "", lastEventId: id });
      if (data === "") return; // an empty `data:` line is data, none is not
      this.onevent({ type: type || "message", data: data.slice(0, -1), lastEventId: id });
    }
  }

  /* The server's last word: 204, a refusal, or something that is not an event stream. */
  class Refused extends Error {
    constructor(response, body) {
      super(`HTTP ${response.status}`);
      Object.assign(this, { status: response.status, body });
      const after = response.headers.get("Retry-After") || "";
      this.retryAfter = /^[0-9]+$/.test(after) ? Math.min(after * 1000, 60000) : undefined;
      this.mayRepeat = response.headers.get("x-should-retry") !== "false";
    }

    /* In the server's own words, if it has any. */
    get reason() {
      try {
        return String(JSON.parse(this.body).error.message);
      } catch {
        return this.body.trim().slice(0, 200) || this.message; // a proxy's, say
      }
    }
  }

  // ------------------------------------------------------------- keeping a connection

  const REVIVALS = [[window, "online"], [window, "pageshow"], [document, "visibilitychange"]];

  /* The wait before a new attempt is drawn at random from a range that doubles with each
     failure ("full jitter"): a thousand readers of a server that went away do not come
     back at once. */
  const jitter = (failures, base = DEFAULTS.base, cap = DEFAULTS.cap) =>
    Math.random() * Math.min(cap, base * 2 ** failures);

  /* Makes a connection again and again. `connect(signal)` makes one, says heard() at each sign
     of life, and throws the reason when it has ended. Whoever wakes up, comes online or looks
     at the page again does not wait.

     An attempt that brings nothing for so many ms is given up: the laptop slept, the NAT forgot
     the connection, packets vanish without a word. */
  class Kept {
    failures = 0; // since something was received: to open alone says nothing
    retry = 0; // ms that the server asked for, on top of which comes the jitter
    isClosed = false;
    isHurried = false; // the next attempt need not wait
    attempt = null; // the AbortController of the last one
    wake = () => {};

    constructor(settings) {
      this.settings = { ...DEFAULTS, mayRepeat: () => true, ...settings };
      for (const [target, type] of REVIVALS) target.addEventListener(type, this);
      this.run();
    }

    async run() {
      const { connect, onstate, isFinal, mayRepeat, silence, patience } = this.settings;
      // A first question may be long, and its line slow; and it cannot be asked again.
      let limit = mayRepeat() ? silence : 3 * silence;
      while (!this.isClosed) {
        onstate("connecting");
        this.attempt = new AbortController();
        this.heard(limit);
        const looking = setInterval(() => this.quiet < this.limit || this.giveUp(), 250);
        const failure = await connect(this.attempt.signal).catch((error) => error);
        clearInterval(looking);
        this.giveUp(); // lets go of a response that we refused to read, too
        limit = patience;
        if (isFinal(failure)) this.close(failure);
        if (!this.isClosed && !this.isHurried) await this.pause(failure);
        this.isHurried = false;
      }
    }

    heard(limit = this.settings.silence) {
      this.limit = limit;
      this.heardAt = Date.now(); // performance.now() may stand still while a computer sleeps
    }

    get quiet() { return Date.now() - this.heardAt; }

    giveUp() {
      this.attempt.abort(new Error("silence"));
    }

    async pause({ retryAfter = 0 }) {
      const { base, cap, onstate } = this.settings;
      const wait = Math.max(this.retry, retryAfter) + jitter(this.failures, base, cap);
      this.failures += 1;
      onstate("waiting", { wait });
      await new Promise((resolve) => {
        this.wake = resolve;
        setTimeout(resolve, wait);
      });
    }

    handleEvent({ type }) {
      if (type === "visibilitychange" && document.hidden) return;
      this.wake();
      const { stale, mayRepeat } = this.settings;
      if (this.quiet < stale || !mayRepeat()) return;
      this.isHurried = true;
      this.giveUp();
    }

    /* `grace`: ms in which the other side may still end the connection itself. */
    close(reason, grace = 0) {
      if (this.isClosed) return;
      this.isClosed = true;
      for (const [target, type] of REVIVALS) target.removeEventListener(type, this);
      if (grace) setTimeout(() => this.giveUp(), grace);
      else this.giveUp();
      this.wake();
      this.settings.onstate("closed", reason);
    }
  }

  // ------------------------------------------------------------------ a stream, kept

  const isStream = ({ status, headers }) =>
    status === 200 && /^text\/event-stream\s*(;|$)/i.test(headers.get("Content-Type"));

  // Header values are bytes, and ids are UTF-8: fetch wants one character for each byte.
  const bytesOf = (text) => String.fromCharCode(...new TextEncoder().encode(text));

  function open(url, options) {
    const settings = { ...DEFAULTS, ...options };
    let request = { ...settings, url };
    let { lastEventId } = settings;

    async function connect(signal) {
      const { method, headers: own, body } = request;
      const resume = lastEventId && { "Last-Event-ID": bytesOf(lastEventId) };
      const headers = { ...own, Accept: "text/event-stream", ...resume };
      const init = { method, headers, body, cache: "no-store", signal };
      const response = await settings.fetch(request.url, init);
      if (!isStream(response)) throw new Refused(response, await response.text());
      kept.heard();
      request = { method: "GET", ...(settings.onopen(response) || request) };
      settings.onstate("open", response);
      await read(response.body.getReader());
    }

    async function read(reader) {
      const decoder = new TextDecoder(); // drops the one byte order mark that is allowed
      const parser = new Parser({ onevent, onretry: (ms) => (kept.retry = ms), lastEventId });
      for (;;) {
        const { done, value } = await reader.read();
        if (done) throw new Error("the stream ended");
        kept.heard();
        settings.onbytes(value);
        parser.feed(decoder.decode(value, { stream: true }));
        if (!kept.isClosed) lastEventId = parser.lastEventId || nameOf(parser);
      }
    }

    /* A question that is asked anew before its first event has come must say which answer
       it means. So the server names the answer in its first block, ahead of any data; that
       line counts at once. It stands for "nothing seen yet", so nothing can be lost. */
    const nameOf = (parser) => (settings.method === "GET" ? "" : parser.bareId);

    function onevent(event) {
      if (kept.isClosed) return; // by the event before this one, in the same piece
      kept.failures = 0;
      lastEventId = event.lastEventId;
      try {
        settings.onevent(event);
      } catch (error) {
        reportError(error); // a bug in the page is no reason to connect again
      }
    }

    const mayRepeat = () => request.method === "GET" || lastEventId !== "";

    function isFinal(failure) {
      if (!(failure instanceof Refused)) return !mayRepeat();
      if (failure.status < 500 || !failure.mayRepeat) return true;
      const invited = failure.status === 503 && failure.retryAfter !== undefined;
      return !mayRepeat() && !(invited && kept.failures < 3);
    }

    const kept = new Kept({ ...settings, connect, isFinal, mayRepeat });
    return {
      get lastEventId() { return lastEventId; },
      close: () => kept.close(),
      done: () => kept.close(undefined, 1000), // an abort would look like a failure
    };
  }

  return { open, Parser, Refused, Kept, jitter };
})();
