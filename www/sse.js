"use strict";

/* Server-sent events over fetch: the HTML standard's section 9.2, with what its own
   EventSource lacks (POST, headers, a watchdog for silence, a last word on failure).

     const stream = SSE.open("/clock", {
       onevent({ type, data, lastEventId }) { ... },
       onstate(state, detail) { ... },
     });
     stream.done();   the last event has come: the server may end the stream
     stream.close();  nothing more is wanted

   What onstate() hears:
     "connecting", {attempt}                 0 is the first
     "open", response
     "waiting", {wait, until, failure}       ms, and the Date.now() of the next attempt
     "closed", reason                        final: a Refused (with status and reason),
                                             another Error, or undefined after close()

   How it keeps a stream alive:
   - A connection that breaks, ends or falls silent is made again and says in
     `Last-Event-ID` where to go on. An answer of 5xx counts as a broken connection.
   - Packets can vanish without a word. The server says something every 4 s, so 10 s of
     silence are a cut; a new attempt must bring the response's head within 5 s. Who wakes
     up, comes online or looks at the page again does not wait: a stream that brought
     nothing for 5 s is made anew at once.
   - 204 means that there is nothing more; a 4xx, or anything that is no event stream,
     would be the same the next time. Both are final.
   - The wait before a new attempt is drawn at random from a range that doubles with each
     failure ("full jitter"): a thousand readers of a server that went away do not come
     back at once. Only an event received starts it over; a connection that opens and
     dies again does not.
   - What is not safe to repeat is not repeated: a POST goes out once. It is sent again
     only with a `Last-Event-ID`, which tells the server what it would continue, or if the
     server has refused it as too busy and said when to come again.
   - A hidden tab keeps its stream. */

const SSE = (() => {
  const DEFAULTS = {
    method: "GET",
    headers: {},
    body: undefined,
    lastEventId: "",
    fetch: (url, init) => fetch(url, init),
    base: 1000, // ms: the first range of the back-off ...
    cap: 8000, // ... and where it stops doubling
    silence: 10000, // ms without a byte: two of the server's keep-alives
    patience: 5000, // ms in which a new attempt must bring the response's head ...
    stale: 5000, // ... and after which a silent stream is not trusted on waking up
    onevent() {},
    onstate() {}, // see above
    onopen() {}, // (response); may return {url, method, headers, body} to reconnect with
    onbytes() {}, // (Uint8Array) as it came
  };

  /* Text in, in pieces of any size; events out. Sections 9.2.5 and 9.2.6. */
  class Parser {
    constructor({ onevent, onretry = () => {}, lastEventId = "" }) {
      Object.assign(this, { onevent, onretry, lastEventId });
      this.id = lastEventId; // outlives its block, counts only from its blank line
      this.bareId = ""; // of a block whose data has not come
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
      else if (field === "id" && !value.includes("\0")) this.named(value);
      else if (field === "retry" && /^[0-9]+$/.test(value)) this.onretry(Number(value));
    }

    named(id) {
      this.id = id;
      if (this.data.length === 0) this.bareId = id;
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

  const jitter = (attempt, base = DEFAULTS.base, cap = DEFAULTS.cap) =>
    Math.random() * Math.min(cap, base * 2 ** attempt);

  // Header values are bytes, and ids are UTF-8: fetch wants one character for each byte.
  const bytesOf = (text) => String.fromCharCode(...new TextEncoder().encode(text));

  function open(url, options) {
    const settings = { ...DEFAULTS, ...options };
    let request = { ...settings, url };
    let { lastEventId } = settings;
    let retry = 0; // ms that the server asked for, on top of which comes the jitter
    let attempt = 0; // since the last event
    let again = false; // this is not the first attempt
    let closed = false;
    let atOnce = false; // the next attempt need not wait
    let connection = new AbortController();
    let dog = null; // of the connection, while there is one
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
      settings.onstate("connecting", { attempt });
      connection = new AbortController();
      dog = watchdog(connection, again ? settings.patience : firstPatience());
      again = true;
      try {
        const response = await settings.fetch(request.url, init());
        await accept(response);
        dog.heard();
        dog.limit = settings.silence;
        request = { method: "GET", ...(settings.onopen(response) || request) };
        settings.onstate("open", response);
        await read(response.body.getReader());
      } finally {
        dog.stop();
        dog = null;
        connection.abort(); // lets go of a response that we refused to read
      }
    }

    /* A question may be long, and its line slow; and it cannot be asked again. */
    const firstPatience = () => settings.silence * (mayRepeat() ? 1 : 3);
    const mayRepeat = () => request.method === "GET" || lastEventId !== "";

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
      throw new Refused(response, body);
    }

    async function read(reader) {
      const decoder = new TextDecoder(); // drops the one byte order mark that is allowed
      const parser = new Parser({ onevent, onretry: (ms) => (retry = ms), lastEventId });
      for (;;) {
        const { done, value } = await reader.read();
        if (done) throw new Error("the stream ended");
        dog.heard();
        settings.onbytes(value);
        parser.feed(decoder.decode(value, { stream: true }));
        if (!closed) lastEventId = parser.lastEventId || nameOf(parser);
      }
    }

    /* A question that is asked anew before its first event has come must say which answer
       it means. So the server names the answer in its first block, ahead of any data; that
       line counts at once. It stands for "nothing seen yet", so nothing can be lost. */
    const nameOf = (parser) => (settings.method === "GET" ? "" : parser.bareId);

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
      if (!(failure instanceof Refused)) return !mayRepeat();
      if (failure.status < 500 || !failure.mayRepeat) return true;
      const invited = failure.status === 503 && failure.retryAfter !== undefined;
      return !mayRepeat() && !(invited && attempt < 3);
    }

    function pause(failure) {
      if (atOnce) return void (atOnce = false);
      const asked = Math.max(retry, failure.retryAfter ?? 0);
      const wait = asked + jitter(attempt++, settings.base, settings.cap);
      settings.onstate("waiting", { wait, until: Date.now() + wait, failure });
      return new Promise((resolve) => {
        const timer = setTimeout(resolve, wait);
        wake = () => (clearTimeout(timer), resolve());
      });
    }

    function finish(reason, grace = 0) {
      closed = true;
      for (const [target, type] of REVIVALS) target.removeEventListener(type, hurry);
      const last = connection;
      if (grace) setTimeout(() => last.abort(), grace);
      else last.abort();
      wake();
      settings.onstate("closed", reason);
    }

    function hurry({ type }) {
      if (type === "visibilitychange" && document.hidden) return;
      wake();
      if (!dog || dog.quiet() < settings.stale || !mayRepeat()) return;
      atOnce = true;
      connection.abort(new Error("silence"));
    }

    for (const [target, type] of REVIVALS) target.addEventListener(type, hurry);
    run();
    return {
      get lastEventId() { return lastEventId; },
      close() { if (!closed) finish(); },
      done() { if (!closed) finish(undefined, 1000); }, // an abort would look like a failure
      reconnect() { wake(); }, // now, instead of after the rest of the wait
    };
  }

  const REVIVALS = [[window, "online"], [window, "pageshow"], [document, "visibilitychange"]];

  /* A connection can be dead without a word: the laptop slept, the NAT forgot it. One clock
     may stand still while a computer sleeps, the other can be set: the later one counts.
     It looks every second, because timers sleep too. */
  function watchdog(connection, limit) {
    let heard, heardAt;
    const dog = {
      limit,
      heard() { [heard, heardAt] = [performance.now(), Date.now()]; },
      quiet: () => Math.max(performance.now() - heard, Date.now() - heardAt),
      stop() { clearTimeout(timer); },
    };
    function check() {
      const left = dog.limit - dog.quiet();
      if (left <= 0) connection.abort(new Error("silence"));
      else timer = setTimeout(check, Math.min(left, 1000));
    }
    dog.heard();
    let timer = setTimeout(check, Math.min(limit, 1000));
    return dog;
  }

  return { open, Parser, Refused, jitter, watchdog, REVIVALS };
})();
