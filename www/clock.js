"use strict";

/* The clock, told in three ways at once: asked for again and again, as an event stream, and
   over a WebSocket. All three are measured here, as they happen: the face shows what the
   event stream says. */

{
  const REMEMBERED = 120; // seconds of each way
  const LATE = 1500; // ms after its second: not delivered but caught up
  const EVERY = 1000; // ms: between two ticks, and on average between two polls
  const { NAMES } = picture;

  // --------------------------------------------------------- what was seen of each way

  class Way {
    name; // of the three NAMES
    state = "connecting";
    connections = 0;
    requests = 0;
    sent = 0; // bytes
    received = 0;
    seen = 0; // ticks
    late = 0;
    first = null; // seconds
    last = null;
    arrivals = new Map(); // second -> {at, delay, late}, ms
    spans = []; // {from, to}: when a connection was open
    calls = []; // {from, to, failed}: questions, and when their answers came

    /* During a cut, nothing is. */
    asked(size) {
      if (network.left) return;
      this.requests += 1;
      this.sent += size;
    }

    /* The number in the id of a tick is its second. */
    arrived(id) {
      const second = Number(id.split("-").at(-1));
      if (this.arrivals.has(second)) return second; // asked for twice within its second
      const at = Date.now();
      const delay = at - second * 1000;
      fastest = Math.min(fastest ?? delay, delay);
      const before = this.spans.length > 1 && second * 1000 + skew() < this.spans.at(-1).from;
      const late = before || delay - skew() > LATE;
      this.arrivals.set(second, { at, delay, late });
      if (this.arrivals.size > REMEMBERED) this.arrivals.delete(this.arrivals.keys().next().value);
      this.seen += 1;
      this.late += late ? 1 : 0;
      this.first ??= second;
      this.last = Math.max(this.last, second);
      return second;
    }

    /* What was "open" before is open no more. */
    changed(state, detail) {
      wire.state(`wire-${this.name}`, state, detail);
      if (this.state === "open") this.spans.at(-1).to = Date.now();
      Object.assign(this, { state, detail });
      if (state !== "open") return;
      this.connections += 1;
      remember(this.spans, { from: Date.now(), to: null });
    }

    get words() { return say(`line-${this.state}`, this.detail?.reason); }

    get delay() { return this.arrivals.get(this.last)?.delay - skew(); }

    /* In order, without what was caught up on: that says how long the cut was, not how quick
       the way is. */
    get delays() {
      const prompt = [...this.arrivals.values()].filter(({ late }) => !late);
      return prompt.map(({ delay }) => delay - skew()).sort((one, other) => one - other);
    }

    get median() { return this.delays[this.delays.length >> 1]; }

    /* Of the seconds between the first and the last that it has told. */
    get missed() { return this.first ? this.last - this.first + 1 - this.seen : 0; }

    get cost() { return (this.sent + this.received) / (this.seen || 1); }

    get verdict() {
      if (this.missed) return say("picture-lost", this.missed);
      return this.late ? say("picture-late", this.late) : say("picture-none");
    }
  }

  function remember(list, item) {
    list.push(item);
    if (list.length > REMEMBERED) list.shift();
  }

  /* ms: after a second begins by our clock, its tick has come at the earliest. The clocks of
     two machines differ. If even the fastest tick is early, or a second late, they do: then
     delays are relative to it. */
  let fastest = null;
  const skew = () => (fastest < -50 || fastest > LATE ? fastest : 0);

  const ways = {}; // "polling" -> its Way
  let cuts = []; // {from, to}
  let gaps = 0; // what the server itself said that we missed
  let running = null; // the three ways, while the view is shown
  let drawing = 0;

  // ------------------------------------------------------------------ the three ways

  function poll() {
    const way = ways.polling;
    const url = address("time");
    const { fetch: ask } = wire.tap("wire-polling", counted(way));
    let timer = setTimeout(once, EVERY * (1 + Math.random())); // then `fastest` is known
    performance.clearResourceTimings();

    async function once() {
      countConnections(way, url);
      const call = { from: Date.now() };
      const controller = new AbortController(); // AbortSignal.timeout() is younger
      const limit = setTimeout(() => controller.abort(), 5000);
      let second = secondNow();
      try {
        const response = await ask(url, { cache: "no-store", signal: controller.signal });
        const text = await response.text();
        way.received += heads.response(response) + text.length;
        wire.record("wire-polling", "in", text);
        second = way.arrived(JSON.parse(text).id);
        way.state = "idle";
      } catch {
        call.failed = true;
        way.state = "failed";
      }
      clearTimeout(limit);
      remember(way.calls, { ...call, to: Date.now() });
      if (!running || way !== ways.polling) return;
      timer = setTimeout(once, momentOf(second + 1) - Date.now());
    }

    return { close: () => clearTimeout(timer) };
  }

  const secondNow = () => Math.floor((Date.now() - (fastest ?? 0)) / EVERY);

  /* Each of the server's seconds is asked for once, at a moment of it that is drawn anew: a
     poll does not know when the ticks come, and its delay must be no accident of when it began. */
  const momentOf = (second) => (second + 0.05 + 0.8 * Math.random()) * EVERY + (fastest ?? 0);

  /* A browser keeps a connection for its next request; whether it did, it tells in the
     timing of the request, though not to another origin. The first connection may be left over
     from the page's own files. */
  function countConnections(way, url) {
    for (const { connectStart, connectEnd } of performance.getEntriesByName(url)) {
      const isNew = connectEnd > connectStart || way.connections === 0;
      if (connectStart && isNew) way.connections += 1;
    }
    performance.clearResourceTimings();
  }

  function stream() {
    const way = ways.stream;
    const tap = wire.tap("wire-stream", counted(way));
    return SSE.open(address("clock"), {
      fetch: tap.fetch,
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
        if (state === "open") way.received += heads.response(detail);
      },
    });
  }

  function socket() {
    const way = ways.socket;
    let last = "";
    return Socket.open({
      name: "wire-socket",
      url() {
        const url = socketAddress(last ? `clock?after=${last}` : "clock");
        way.asked(heads.handshake(url));
        return url;
      },
      onmessage(text) {
        way.received += heads.frame(new TextEncoder().encode(text).length);
        const { id } = JSON.parse(text);
        if (!id) return; // a gap
        last = id;
        way.arrived(id);
      },
      onstate(state, detail) {
        way.changed(state, detail);
        if (state === "open") way.received += heads.handshakeAnswer;
      },
    });
  }

  const counted = (way) => (url, init) => {
    way.asked(heads.request(url, init.headers));
    return network.fetch(url, init);
  };

  // ------------------------------------------------------------------------ drawing

  const clock = (second) => (second ? time.format(second * 1000) : "–");
  const milliseconds = (ms) => (Number.isFinite(ms) ? `${Math.round(ms)} ms` : "–");
  const bytes = (count) => `≈ ${decimal(count, 0)}`;

  /* The rows of the table, by what they show of a Way. */
  const FORMATS = {
    last: clock, words: String, delay: milliseconds, median: milliseconds, seen: String,
    late: String, missed: String, connections: (count) => `${count || "–"}`, requests: String,
    sent: bytes, received: bytes, cost: bytes,
  };

  /* On a narrow screen its rows are grids: with roles, it stays a table when it is read. */
  const ROLES = {
    rowgroup: "thead, tbody", row: "tr", cell: "td",
    columnheader: "thead th", rowheader: "tbody th",
  };
  for (const [role, parts] of Object.entries(ROLES)) {
    for (const part of $("ways").querySelectorAll(parts)) part.role = role;
  }

  function draw() {
    const now = Date.now();
    for (const [what, format] of Object.entries(FORMATS)) {
      const [, ...cells] = $("ways").querySelector(`.row-${what}`).cells;
      cells.forEach((cell, n) => write(cell, format(ways[NAMES[n]][what])));
    }
    const left = Math.ceil(network.left / 1000);
    const cutSays = left ? say("picture-cutting", left) : "";
    const tickAt = (second) => second * 1000 + skew();
    picture.draw({ ways, cuts, tickAt, cutSays, newest: secondNow() }, now);
    write($("picture-words"), sentence());
    $("clumps").hidden = !isHeldBack(now);
    const { last, words } = ways.stream;
    write($("clock-words"), say("sentence", words));
    if (!last) return;
    write($("face"), clock(last));
    const age = say("clock-age", decimal(Math.max(0, now - tickAt(last)) / 1000));
    write($("clock-age"), gaps ? `${age} ${say("clock-missed", gaps)}` : age);
  }

  /* What one sees in the picture, in words. */
  function sentence() {
    const { polling, stream, socket } = ways;
    if (network.left) return say("sees-cut");
    if (Math.min(polling.seen, stream.seen, socket.seen) < 4) return say("sees-nothing");
    const times = decimal(polling.cost / stream.cost, 0);
    const delay = decimal(Math.max(0, ...polling.delays) / 1000);
    const short = say("sees-short", times, delay, polling.missed);
    const late = Math.max(stream.late, socket.late);
    const missed = [stream.missed, socket.missed];
    if (missed.some(Boolean)) return `${short} ${say("sees-missed", ...missed)}`;
    return `${short} ${late ? say("sees-late", late) : say("sees-none")}`;
  }

  /* Whether ticks come in clumps, three times in half a minute and long after the connection
     began; or not at all, while a short answer, which nobody holds back, tells of them. */
  function isHeldBack(now) {
    const { polling, stream } = ways;
    const since = Math.max(now - 30000, (stream.spans.at(-1)?.from ?? now) + 3000);
    const pauses = [...stream.arrivals.values()].filter(({ at }) => at > since)
      .map(({ at }, n, all) => at - all[n - 1]?.at);
    const clumps = pauses.filter((pause, n) => pause < 300 && !(pauses[n - 1] < 300));
    const isSilent = polling.last - (stream.last ?? polling.first) > 5;
    const isBack = !network.left && now - (cuts.at(-1)?.to ?? 0) > 6000;
    return clumps.length >= 3 || (isSilent && isBack);
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
      for (const name of NAMES) ways[name] = Object.assign(new Way(), { name }); // measured anew
      cuts = network.left ? [{ from: Date.now(), to: null }] : [];
      gaps = 0;
      fastest = null;
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
  picture.build($("picture"));
}
