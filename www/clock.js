"use strict";

/* The clock, told in three ways at once: asked for again and again, as an event stream, and
   over a WebSocket. All three are measured here, as they happen: the face shows what the
   event stream says. */

{
  const REMEMBERED = 120; // seconds of each way
  const LATE = 1500; // ms after its second: not delivered but caught up
  const CLUMPS = 3; // within half a minute are no accident
  const EVERY = 1000; // ms: between two ticks, and on average between two polls

  // --------------------------------------------------------- what was seen of each way

  class Way {
    constructor() {
      Object.assign(this, { state: "connecting", connections: 0, requests: 0 });
      Object.assign(this, { sent: 0, received: 0, seen: 0, late: 0 });
      this.first = this.last = null; // seconds
      this.latest = 0; // ms: when the last tick came ...
      this.together = false; // ... and whether it came with the one before
      this.clumps = []; // ms: when two or more came at once
      this.arrivals = new Map(); // second -> {at, delay, late}, ms
      this.spans = []; // {from, to}: when a connection was open
      this.calls = []; // {from, to, failed}: questions, and when their answers came
    }

    /* `tick` is {id, data}; the number in a clock's id is its second. */
    arrived({ id }) {
      const second = Number(id.split("-").at(-1));
      if (this.arrivals.has(second)) return; // asked for twice within its second
      const at = Date.now();
      const delay = at - second * 1000;
      fastest = Math.min(fastest, delay);
      const before = this.spans.length > 1 && second * 1000 + skew() < this.spans.at(-1).from;
      const late = before || delay - skew() > LATE;
      this.arrivals.set(second, { at, delay, late });
      if (this.arrivals.size > REMEMBERED) this.arrivals.delete(this.arrivals.keys().next().value);
      this.seen += 1;
      this.late += late ? 1 : 0;
      this.first ??= second;
      this.last = Math.max(this.last, second);
      this.lookForClump(at);
    }

    /* Two ticks at one instant, long after the connection began: somebody kept them. */
    lookForClump(at) {
      const settled = at - (this.spans.at(-1)?.from ?? at) > 3000;
      const together = at - this.latest < 300 && !document.hidden && at - drawnAt < 1000;
      if (settled && together && !this.together) this.clumps.push(at);
      if (this.clumps.length > CLUMPS) this.clumps.shift();
      this.together = together;
      this.latest = at;
    }

    opened() {
      this.connections += 1;
      this.spans.push({ from: Date.now(), to: null });
      if (this.spans.length > REMEMBERED) this.spans.shift();
    }

    /* Whatever it was, it is not open now. */
    changed(state) {
      this.state = state;
      const span = this.spans.at(-1);
      if (span && state !== "open") span.to ??= Date.now();
    }

    asked(call) {
      this.calls.push(call);
      if (this.calls.length > REMEMBERED) this.calls.shift();
    }

    get delays() { return this.delaysOf([...this.arrivals.values()]); }

    /* What was caught up on says how long the cut was, not how quick the way is. */
    get prompt() { return this.delaysOf([...this.arrivals.values()].filter(({ late }) => !late)); }

    delaysOf(arrivals) { return arrivals.map(({ delay }) => delay - skew()); }

    /* Of the seconds between the first and the last that it has told. */
    get missed() { return this.first ? this.last - this.first + 1 - this.seen : 0; }

    get cost() { return (this.sent + this.received) / (this.seen || 1); }

    /* The newest second that the server must have told by now. */
    get newest() { return secondNow(); }

    get verdict() {
      if (this.missed) return say("picture-lost", this.missed);
      return this.late ? say("picture-late", this.late) : say("picture-none");
    }
  }

  /* The clocks of two machines differ. If even the fastest tick is early, or a second late,
     they do: then delays are relative to it. */
  let fastest = Infinity;
  const skew = () => (fastest < -50 || fastest > LATE ? fastest : 0);

  /* By how much, and the way of a tick, the server's second begins later than ours. */
  const offset = () => (fastest === Infinity ? 0 : fastest);

  let ways = {};
  let cuts = []; // {from, to}
  let gaps = 0; // what the server itself said that we missed
  let drawnAt = 0; // ms: a page that was asleep has ticks in a clump, too
  let running = null; // what has to be stopped when the view is left

  // ------------------------------------------------------------------ the three ways

  function poll() {
    const way = ways.polling;
    const url = address("time");
    const ask = wire.fetch("wire-polling", counted(way));
    let timer = 0;
    let stopped = false;
    let slot = 0; // the server's second in which we asked last
    async function once() {
      slot = Math.max(slot + 1, secondNow());
      const call = { from: Date.now() };
      try {
        const response = await ask(url, { cache: "no-store", signal: timeout(5000) });
        const text = await response.text();
        way.received += heads.response(response) + text.length;
        wire.record("wire-polling", "in", text);
        way.arrived(JSON.parse(text));
        way.state = "idle";
      } catch {
        call.failed = true;
        way.state = "failed";
      }
      way.asked({ ...call, to: Date.now() });
      if (!stopped) timer = setTimeout(once, untilAfter(slot));
    }
    timer = setTimeout(once, EVERY * (1 + Math.random())); // then the offset is known
    const stopCounting = countConnections(way, url);
    return () => ((stopped = true), clearTimeout(timer), stopCounting());
  }

  /* Once in each of the server's seconds, at a moment of it that is drawn anew: a poll does
     not know when the ticks come, and its delay must be no accident of when it began. */
  function untilAfter(second) {
    const next = (second + 1) * EVERY + offset();
    return next + EVERY * (0.05 + 0.8 * Math.random()) - Date.now();
  }

  const secondNow = () => Math.floor((Date.now() - offset()) / EVERY);

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
        way.opened();
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
        way.changed(state);
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
        wire.record("wire-socket", "out", `GET ${url}\nUpgrade: websocket`, "request");
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
        way.changed(state);
        if (state === "open") {
          way.opened();
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
  const TOLD = ["row-speaks", "row-resumes", "row-use"]; // the same for ever
  const ROWS = {
    "row-says": (way) => clock(way.last),
    "row-state": (way) => say(`state-${way.state}`),
    "row-delay": (way) => milliseconds(way.delays.at(-1)),
    "row-median": (way) => milliseconds(median(way.prompt)),
    "row-seen": (way) => way.seen,
    "row-late": (way) => way.late,
    "row-missed": (way) => way.missed,
    "row-connections": (way) => (Number.isNaN(way.connections) ? "–" : way.connections),
    "row-requests": (way) => way.requests,
    "row-sent": (way) => bytes(way.sent),
    "row-received": (way) => bytes(way.received),
    "row-cost": (way) => bytes(way.cost),
  };
  const cells = {}; // "row-says polling" -> its element

  function drawTable() {
    const names = Object.keys(makeWays());
    const corner = element("td");
    const titles = names.map((name) => element("th", { scope: "col" }, say(name)));
    const rows = [...TOLD, ...Object.keys(ROWS)].map((row) => {
      const label = element("th", { scope: "row" }, say(row));
      const values = names.map((name) => (cells[`${row} ${name}`] = element("td")));
      return element("tr", { className: row }, label, ...values);
    });
    $("ways").append(
      element("thead", {}, element("tr", {}, corner, ...titles)),
      element("tbody", {}, ...rows),
    );
    keepRoles($("ways"));
    for (const row of TOLD) {
      for (const name of names) cells[`${row} ${name}`].textContent = say(`${row}-${name}`);
    }
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

  function draw() {
    const now = Date.now();
    drawFace(ways.stream);
    for (const [name, way] of Object.entries(ways)) {
      for (const [row, value] of Object.entries(ROWS)) {
        write(cells[`${row} ${name}`], String(value(way)));
      }
    }
    const left = Math.ceil(network.left / 1000);
    const cutSays = left ? say("picture-cutting", left) : "";
    const tickAt = (second) => second * 1000 + skew();
    picture.draw({ ways, cuts, tickAt, cutSays }, now);
    write($("picture-words"), sentence());
    $("clumps").hidden = !isHeldBack(now);
    drawnAt = now;
  }

  function drawFace(way) {
    const parts = [];
    if (way.last) {
      write($("face"), clock(way.last));
      const age = Math.max(0, Date.now() - skew() - way.last * 1000);
      parts.push(say("clock-age", decimal(age / 1000)));
    }
    if (gaps) parts.push(say("clock-missed", gaps));
    const { status, reason, message } = way.detail ?? {};
    write($("clock-words"), say(`clock-${way.state}`, status ? reason : message));
    write($("clock-age"), parts.join(" "));
  }

  /* What one sees in the picture, in words. */
  function sentence() {
    const { polling, stream, socket } = ways;
    if (network.left) return say("sees-cut");
    if (Math.min(polling.seen, stream.seen, socket.seen) < 5) return say("sees-nothing");
    const times = decimal(polling.cost / stream.cost, 0);
    const delay = decimal(Math.max(0, ...polling.prompt) / 1000);
    const parts = [say("sees-short", times, delay, polling.missed)];
    const late = Math.max(stream.late, socket.late);
    if (stream.missed || socket.missed) parts.push(say("sees-missed", stream.missed, socket.missed));
    else parts.push(late ? say("sees-late", late) : say("sees-none"));
    return parts.join(" ");
  }

  /* Nobody holds back a short answer: the stream is compared with it. */
  function isHeldBack(now) {
    const { polling, stream } = ways;
    const since = Math.max(stream.latest, stream.spans[0]?.from ?? now, cuts.at(-1)?.to ?? 0);
    const silent = now - since > 6000 && polling.last > (stream.last ?? 0) + 5;
    const clumped = stream.clumps.length === CLUMPS && now - stream.clumps[0] < 30000;
    return clumped || (silent && !network.left);
  }

  /* Only what has changed, so that a screen reader or a selection is left in peace. */
  function write(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  /* Once, when all is back; the live sentence itself would never stop talking. */
  function cutChanged() {
    if (!running) return;
    const now = Date.now();
    if (cuts.at(-1)?.to === null) cuts.at(-1).to = now;
    if (network.left) return void cuts.push({ from: now, to: null });
    setTimeout(() => running && !network.left && announce(sentence()), 4000);
  }

  // -------------------------------------------------------------- coming and going

  const makeWays = () => ({
    polling: new Way(), stream: new Way(), socket: new Way(),
  });

  function frame() {
    if (!running) return;
    picture.move(Date.now());
    requestAnimationFrame(frame);
  }

  views.clock = {
    enter() {
      ways = makeWays(); // each visit measures anew
      cuts = network.left ? [{ from: Date.now(), to: null }] : [];
      gaps = 0;
      fastest = Infinity;
      running = {};
      Object.assign(running, { stopPolling: poll(), stream: stream(), socket: socket() });
      running.timer = setInterval(draw, 200);
      draw();
      frame();
    },
    leave() {
      running.stopPolling();
      running.stream.close();
      running.socket.close();
      clearInterval(running.timer);
      running = null;
    },
  };

  network.controls($("clock-cut"), cutChanged);
  drawTable();
  picture.build($("picture"));
}
