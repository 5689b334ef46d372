"use strict";

/* The clock, told in three ways at once: asked for again and again, as an event stream, and
   over a WebSocket. All three are measured here, as they happen: the face shows what the
   event stream says. */

{
  const REMEMBERED = 120; // seconds of each way
  const LATE = 1500; // ms after its second: not delivered but caught up
  const CLUMPS = 3; // within half a minute are no accident
  const EVERY = 1000; // ms: between two ticks, and on average between two polls
  const { NAMES } = picture;

  // --------------------------------------------------------- what was seen of each way

  class Way {
    state = "connecting";
    connections = 0;
    requests = 0;
    sent = 0; // bytes
    received = 0;
    seen = 0; // ticks
    late = 0;
    first = null; // seconds
    last = null;
    latest = 0; // ms: when the last tick came ...
    together = false; // ... and whether it came with the one before
    clumps = []; // ms: when two or more came at once
    arrivals = new Map(); // second -> {at, delay, late}, ms
    spans = []; // {from, to}: when a connection was open
    calls = []; // {from, to, failed}: questions, and when their answers came

    /* The number in the id of a tick is its second. */
    arrived(id) {
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
      if (settled && together && !this.together) remember(this.clumps, at, CLUMPS);
      this.together = together;
      this.latest = at;
    }

    opened() {
      this.connections += 1;
      remember(this.spans, { from: Date.now(), to: null });
    }

    /* Whatever it was, it is not open now. */
    changed(state, detail) {
      Object.assign(this, { state, detail });
      if (state !== "open" && this.spans.length) this.spans.at(-1).to ??= Date.now();
    }

    delays(arrivals = [...this.arrivals.values()]) {
      return arrivals.map(({ delay }) => delay - skew());
    }

    /* What was caught up on says how long the cut was, not how quick the way is. */
    get prompt() { return this.delays([...this.arrivals.values()].filter(({ late }) => !late)); }

    /* Of the seconds between the first and the last that it has told. */
    get missed() { return this.first ? this.last - this.first + 1 - this.seen : 0; }

    get cost() { return (this.sent + this.received) / (this.seen || 1); }

    get verdict() {
      if (this.missed) return say("picture-lost", this.missed);
      return this.late ? say("picture-late", this.late) : say("picture-none");
    }
  }

  function remember(list, item, size = REMEMBERED) {
    list.push(item);
    if (list.length > size) list.shift();
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
  let running = null; // the three ways, while the view is shown
  let drawing = 0;

  // ------------------------------------------------------------------ the three ways

  function poll() {
    const way = ways.polling;
    const url = address("time");
    const { fetch: ask } = wire.tap("wire-polling", counted(way));
    let timer = 0;
    let slot = 0; // the server's second in which we asked last
    async function once() {
      slot = Math.max(slot + 1, secondNow());
      const call = { from: Date.now() };
      const controller = new AbortController(); // AbortSignal.timeout() is younger
      const limit = setTimeout(() => controller.abort(), 5000);
      try {
        const response = await ask(url, { cache: "no-store", signal: controller.signal });
        const text = await response.text();
        way.received += heads.response(response) + text.length;
        wire.record("wire-polling", "in", text);
        way.arrived(JSON.parse(text).id);
        way.state = "idle";
      } catch {
        call.failed = true;
        way.state = "failed";
      }
      clearTimeout(limit);
      remember(way.calls, { ...call, to: Date.now() });
      if (timer) timer = setTimeout(once, untilAfter(slot));
    }
    timer = setTimeout(once, EVERY * (1 + Math.random())); // then the offset is known
    const stopCounting = countConnections(way, url);
    return {
      close() {
        clearTimeout(timer);
        timer = 0;
        stopCounting();
      },
    };
  }

  /* Once in each of the server's seconds, at a moment of it that is drawn anew: a poll does
     not know when the ticks come, and its delay must be no accident of when it began. */
  function untilAfter(second) {
    const next = (second + 1) * EVERY + offset();
    return next + EVERY * (0.05 + 0.8 * Math.random()) - Date.now();
  }

  const secondNow = () => Math.floor((Date.now() - offset()) / EVERY);

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
    const tap = wire.tap("wire-stream", counted(way));
    return SSE.open(address("clock"), {
      fetch: tap.fetch,
      onopen(response) {
        way.opened();
        way.received += heads.response(response);
      },
      onbytes(bytes) {
        way.received += heads.chunk(bytes.length);
        tap.onbytes(bytes);
      },
      onevent({ type, data, lastEventId }) {
        if (type === "gap") gaps += JSON.parse(data).missed;
        else if (type === "message") way.arrived(lastEventId);
      },
      onstate(state, detail) {
        way.changed(state, detail);
        wire.state("wire-stream", state, detail);
      },
    });
  }

  function socket() {
    const way = ways.socket;
    let last = "";
    return Socket.open({
      url: () => socketAddress("clock", { after: last }),
      make(url) {
        wire.record("wire-socket", "out", `GET ${url}\nUpgrade: websocket`, "request");
        const made = network.socket(url); // or it throws: nothing was sent
        way.requests += 1;
        way.sent += heads.handshake(url);
        return made;
      },
      onmessage(text) {
        way.received += heads.frame(new TextEncoder().encode(text).length);
        wire.record("wire-socket", "in", text);
        const { id } = JSON.parse(text);
        if (!id) return; // a gap
        last = id;
        way.arrived(id);
      },
      onstate(state, detail) {
        way.changed(state, detail);
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

  // ------------------------------------------------------------------------ drawing

  const clock = (second) => (second ? time.format(second * 1000) : "–");
  const milliseconds = (ms) => (ms === undefined ? "–" : `${Math.round(ms)} ms`);
  const bytes = (count) => `≈ ${Math.round(count).toLocaleString(LANGUAGE)}`;
  const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
  const TOLD = ["row-speaks", "row-resumes", "row-use"]; // the same for ever
  const ROWS = {
    "row-says": (way) => clock(way.last),
    "row-state": (way) => say(`state-${way.state}`),
    "row-delay": (way) => milliseconds(way.delays().at(-1)),
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

  /* On a narrow screen its rows are grids: with roles, it stays a table when it is read. */
  function drawTable() {
    const titles = NAMES.map((name) => cell("th", say(name), "columnheader"));
    const rows = [...TOLD, ...Object.keys(ROWS)].map((row) => {
      const values = NAMES.map((name) => {
        const said = TOLD.includes(row) ? say(`${row}-${name}`) : "";
        return (cells[`${row} ${name}`] = cell("td", said));
      });
      const label = cell("th", say(row), "rowheader");
      return element("tr", { role: "row", className: row }, label, ...values);
    });
    const head = element("tr", { role: "row" }, cell("td", ""), ...titles);
    $("ways").append(
      element("thead", { role: "rowgroup" }, head), element("tbody", { role: "rowgroup" }, ...rows),
    );
  }

  const cell = (tag, text, role = "cell") => element(tag, { role }, text);

  function draw() {
    const now = Date.now();
    drawFace(ways.stream);
    for (const name of NAMES) {
      for (const [row, value] of Object.entries(ROWS)) {
        write(cells[`${row} ${name}`], String(value(ways[name])));
      }
    }
    const left = Math.ceil(network.left / 1000);
    const cutSays = left ? say("picture-cutting", left) : "";
    const tickAt = (second) => second * 1000 + skew();
    picture.draw({ ways, cuts, tickAt, cutSays, newest: secondNow() }, now);
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

  /* Once, when all is back; the live sentence itself would never stop talking. */
  function cutChanged() {
    if (!running) return;
    const now = Date.now();
    if (cuts.at(-1)?.to === null) cuts.at(-1).to = now;
    if (network.left) return void cuts.push({ from: now, to: null });
    setTimeout(() => running && !network.left && announce(sentence()), 4000);
  }

  // -------------------------------------------------------------- coming and going

  function frame() {
    if (!running) return;
    picture.move(Date.now());
    requestAnimationFrame(frame);
  }

  views.clock = {
    enter() {
      ways = { polling: new Way(), stream: new Way(), socket: new Way() }; // measured anew
      cuts = network.left ? [{ from: Date.now(), to: null }] : [];
      gaps = 0;
      fastest = Infinity;
      running = [poll(), stream(), socket()];
      drawing = setInterval(draw, 200);
      draw();
      frame();
    },
    leave() {
      for (const way of running) way.close();
      clearInterval(drawing);
      running = null;
    },
  };

  network.controls($("clock-cut"), cutChanged);
  drawTable();
  picture.build($("picture"));
}
