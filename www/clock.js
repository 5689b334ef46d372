"use strict";

/* The clock, told in three ways at once: asked for again and again, as an event stream, and
   over a WebSocket. All three are measured here, as they happen: the face shows what the
   event stream says. */

{
  const STRIP = 30; // seconds shown of each way
  const REMEMBERED = 120; // seconds of each way: the delays that the median is of
  const LATE = 1500; // ms after its second: not delivered but caught up
  const EVERY = 1000; // ms between two polls

  // --------------------------------------------------------- what was seen of each way

  class Way {
    constructor() {
      Object.assign(this, { state: "connecting", connections: 0, requests: 0 });
      Object.assign(this, { sent: 0, received: 0, seen: 0, late: 0 });
      this.first = this.last = null; // seconds
      this.arrivals = new Map(); // second -> ms of delay, the newest of them
    }

    /* `tick` is {id, data}; the number in a clock's id is its second. */
    arrived({ id }) {
      const second = Number(id.split("-").at(-1));
      if (this.arrivals.has(second)) return; // asked for twice within its second
      const delay = Date.now() - second * 1000;
      fastest = Math.min(fastest, delay);
      this.arrivals.set(second, delay);
      if (this.arrivals.size > REMEMBERED) this.arrivals.delete(this.arrivals.keys().next().value);
      this.seen += 1;
      this.late += delay - skew() > LATE ? 1 : 0;
      this.first ??= second;
      this.last = Math.max(this.last, second);
    }

    get delays() { return [...this.arrivals.values()].map((delay) => delay - skew()); }

    /* Of the seconds between the first and the last that it has told. */
    get missed() { return this.first ? this.last - this.first + 1 - this.seen : 0; }
  }

  /* The clocks of two machines differ. If even the fastest tick is early, or a second late,
     they do: then delays are relative to it. */
  let fastest = Infinity;
  const skew = () => (fastest < -50 || fastest > LATE ? fastest : 0);

  let ways = {};
  let gaps = 0; // what the server itself said that we missed
  let running = null; // what has to be stopped when the view is left

  // ------------------------------------------------------------------ the three ways

  function poll() {
    const way = ways.polling;
    const url = address("time");
    const ask = wire.fetch("wire-polling", counted(way));
    let asking = false;
    async function once() {
      if (asking) return; // an answer that takes longer than a second
      asking = true;
      try {
        const response = await ask(url, { cache: "no-store", signal: timeout(5000) });
        const text = await response.text();
        way.received += heads.response(response) + text.length;
        wire.record("wire-polling", "in", text);
        way.arrived(JSON.parse(text));
        way.state = "idle";
      } catch {
        way.state = "failed";
      }
      asking = false;
    }
    once();
    const timer = setInterval(once, EVERY);
    const stopCounting = countConnections(way, url);
    return () => (clearInterval(timer), stopCounting());
  }

  /* AbortSignal.timeout(), for browsers that lack it. */
  function timeout(ms) {
    const controller = new AbortController();
    setTimeout(() => controller.abort(), ms);
    return controller.signal;
  }

  /* A browser keeps a connection for its next request; whether it did, it tells in the
     timing of the request. The first one may be left over from the page's own files. */
  function countConnections(way, url) {
    const observer = new PerformanceObserver((list) => {
      for (const { connectStart, connectEnd } of list.getEntriesByName(url)) {
        if (!connectStart) way.connections = NaN; // not told to another origin
        else if (connectEnd > connectStart || !way.connections) way.connections += 1;
      }
      performance.clearResourceTimings();
    });
    observer.observe({ type: "resource" });
    return () => observer.disconnect();
  }

  function stream() {
    const way = ways.stream;
    const url = address("clock");
    const recorder = wire.recorder("wire-stream");
    const opened = SSE.open(url, {
      fetch: wire.fetch("wire-stream", counted(way)),
      onopen(response) {
        way.connections += 1;
        way.received += heads.response(response);
      },
      onbytes(bytes) {
        way.received += heads.chunk(bytes.length);
        recorder(bytes);
      },
      onevent(event) {
        if (event.type === "gap") gaps += JSON.parse(event.data).missed;
        else if (event.type === "message") way.arrived({ id: event.lastEventId, data: event.data });
      },
      onstate(state, detail) {
        way.state = state;
        way.detail = detail;
        wire.state("wire-stream", state, detail);
      },
    });
    return opened;
  }

  function socket() {
    const way = ways.socket;
    let last = "";
    return Socket.open({
      url: () => socketAddress("clock", { after: last }),
      make(url) {
        wire.record("wire-socket", "out", `GET ${url}\nUpgrade: websocket`);
        return countedSocket(way, url);
      },
      onmessage(text) {
        way.received += heads.frame(new TextEncoder().encode(text).length);
        wire.record("wire-socket", "in", text);
        const { id, data } = JSON.parse(text);
        if (!id) return; // a gap
        last = id;
        way.arrived({ id, data });
      },
      onstate(state, detail) {
        way.state = state;
        if (state === "open") {
          way.connections += 1;
          way.received += heads.handshakeAnswer;
        }
        wire.state("wire-socket", state, detail);
      },
    });
  }

  /* The network of the page, which counts what each way sends. */
  const counted = (way) => (url, init) => {
    if (!network.left) {
      way.requests += 1;
      way.sent += heads.request(url, init.headers);
    }
    return network.fetch(url, init);
  };

  function countedSocket(way, url) {
    const made = network.socket(url);
    way.requests += 1;
    way.sent += heads.handshake(url);
    return made;
  }

  // ------------------------------------------------------------------------ drawing

  const clock = (second) => (second ? time.format(second * 1000) : "–");
  const milliseconds = (ms) => (ms === undefined ? "–" : `${Math.round(ms)} ms`);
  const bytes = (count) => `≈ ${Math.round(count).toLocaleString(LANGUAGE)}`;
  const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
  const ROWS = {
    "row-says": (way) => clock(way.last),
    "row-state": (way) => say(`state-${way.state}`),
    "row-strip": null, // drawn, not written
    "row-delay": (way) => milliseconds(way.delays.at(-1)),
    "row-median": (way) => milliseconds(median(way.delays)),
    "row-seen": (way) => way.seen,
    "row-late": (way) => way.late,
    "row-missed": (way) => way.missed,
    "row-connections": (way) => (Number.isNaN(way.connections) ? "–" : way.connections),
    "row-requests": (way) => way.requests,
    "row-sent": (way) => bytes(way.sent),
    "row-received": (way) => bytes(way.received),
    "row-cost": (way) => bytes((way.sent + way.received) / (way.seen || 1)),
  };
  const cells = {}; // "row-says polling" -> its element

  function drawTable() {
    const names = Object.keys(makeWays());
    const corner = element("td");
    const titles = names.map((name) => element("th", { scope: "col" }, say(name)));
    const rows = Object.keys(ROWS).map((row) => {
      const label = element("th", { scope: "row" }, say(row));
      const values = names.map((name) => (cells[`${row} ${name}`] = element("td")));
      return element("tr", { className: row }, label, ...values);
    });
    $("ways").append(
      element("thead", {}, element("tr", {}, corner, ...titles)),
      element("tbody", {}, ...rows),
    );
    keepRoles($("ways"));
    for (const name of names) cells[`row-strip ${name}`].append(emptyStrip());
  }

  /* On a narrow screen its rows are grids: said aloud, it stays a table. */
  function keepRoles(table) {
    const roles = {
      "thead, tbody": "rowgroup", "tr": "row", "td": "cell",
      "thead th": "columnheader", "tbody th": "rowheader",
    };
    table.setAttribute("role", "table");
    for (const [which, role] of Object.entries(roles)) {
      for (const part of table.querySelectorAll(which)) part.setAttribute("role", role);
    }
  }

  function emptyStrip() {
    const bars = Array.from({ length: STRIP }, () => element("i"));
    const strip = element("div", { className: "strip" }, ...bars);
    strip.setAttribute("role", "img");
    return strip;
  }

  function draw() {
    for (const [name, way] of Object.entries(ways)) {
      for (const [row, value] of Object.entries(ROWS)) {
        if (value) write(cells[`${row} ${name}`], String(value(way)));
      }
      drawStrip(cells[`row-strip ${name}`].firstChild, way);
    }
    drawFace(ways.stream);
  }

  /* One bar a second, the last one newest. Only what was seen begins a strip. */
  function drawStrip(strip, way) {
    const now = Math.max(...Object.values(ways).map(({ last }) => last));
    const count = { seen: 0, late: 0, missed: 0 };
    [...strip.children].forEach((bar, i) => {
      const second = now - STRIP + 1 + i;
      const delay = way.arrivals.get(second);
      let kind = "";
      if (delay !== undefined) kind = delay - skew() > LATE ? "late" : "seen";
      else if (way.first && second > way.first && second < now) kind = "missed";
      if (kind) count[kind] += 1;
      if (bar.className !== kind) bar.className = kind;
      const told = delay === undefined ? "" : `: ${milliseconds(delay - skew())}`;
      bar.title = kind ? `${clock(second)}${told}` : "";
    });
    strip.setAttribute("aria-label", say("strip", count.seen, count.late, count.missed));
  }

  function drawFace(way) {
    const parts = [];
    if (way.last) {
      write($("face"), clock(way.last));
      const age = Math.max(0, Date.now() - skew() - way.last * 1000);
      parts.push(say("clock-age", decimal(age / 1000)));
    }
    if (gaps) parts.push(say("clock-missed", gaps));
    write($("clock-words"), say(`clock-${way.state}`, way.detail?.message));
    write($("clock-age"), parts.join(" "));
  }

  /* Only what has changed, so that a screen reader or a selection is left in peace. */
  function write(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  // -------------------------------------------------------------- coming and going

  const makeWays = () => ({
    polling: new Way(), stream: new Way(), socket: new Way(),
  });

  views.clock = {
    enter() {
      ways = makeWays(); // each visit measures anew
      gaps = 0;
      fastest = Infinity;
      running = { stopPolling: poll(), stream: stream(), socket: socket() };
      running.timer = setInterval(draw, 200);
      draw();
    },
    leave() {
      running.stopPolling();
      running.stream.close();
      running.socket.close();
      clearInterval(running.timer);
      running = null;
    },
  };

  network.controls($("clock-cut"));
  drawTable();
}
