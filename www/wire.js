"use strict";

/* On the wire: the last frames of each connection, as they came. Recorded always, drawn
   only while somebody looks, and ten times a second at most. */

const wire = (() => {
  const KEPT = 40; // frames of each connection
  const LONGEST = 2000; // characters of a frame
  const VIEWS = {
    "wire-chat": "chat", "wire-polling": "clock", "wire-stream": "clock",
    "wire-socket": "clock", "wire-room": "room",
  };
  const MARKS = { in: "←", out: "→", note: "·" };
  const connections = new Map(); // name -> rows not drawn yet, and its section
  const panel = $("wire");
  let drawing = 0;

  /* One row: what came "in", what went "out", or a "note" about the connection itself. */
  function record(name, direction, text) {
    if (!connections.has(name)) connections.set(name, { rows: [], part: null });
    const { rows } = connections.get(name);
    rows.push({ at: Date.now(), direction, text: text.slice(0, LONGEST) });
    if (rows.length > KEPT) rows.shift();
    plan();
  }

  function plan() {
    if (panel.open) drawing ||= setTimeout(draw, 100);
  }

  function draw() {
    drawing = 0;
    $("wire-empty").hidden = [...connections.keys()].some((name) => VIEWS[name] === shown);
    for (const [name, connection] of connections) {
      connection.part ??= section(name);
      connection.part.hidden = VIEWS[name] !== shown;
      if (!connection.part.hidden) fill(connection.part.lastChild, connection.rows);
    }
  }

  function fill(list, rows) {
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    list.append(...rows.splice(0).map(row));
    while (list.children.length > KEPT) list.firstChild.remove();
    if (atEnd) list.scrollTop = list.scrollHeight;
  }

  function section(name) {
    const list = element("ol", { tabIndex: 0 });
    list.setAttribute("aria-label", say(name));
    list.setAttribute("role", "list");
    const part = element("section", {}, element("h2", {}, say(name)), list);
    $("wire-body").append(part);
    return part;
  }

  function row({ at, direction, text }) {
    const mark = element("span", { className: "mark", title: say(`wire-${direction}`) });
    mark.textContent = MARKS[direction];
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", say(`wire-${direction}`));
    return element("li", { className: direction },
      element("time", {}, time.format(at)), mark, element("pre", {}, text));
  }

  /* sse.js hands over bytes; a character cut in half is completed by the next piece. */
  function recorder(name) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return (bytes) => record(name, "in", decoder.decode(bytes, { stream: true }));
  }

  /* What sse.js and socket.js say of a connection, in the page's words. */
  function state(name, now, detail) {
    if (now === "waiting") record(name, "note", say("wire-waiting", decimal(detail.wait / 1000)));
    else if (now === "closed") record(name, "note", say("wire-closed", detail?.message ?? ""));
    else record(name, "note", say(`wire-${now}`));
  }

  /* fetch() that shows what is asked and the head of what is answered. `through` is the
     fetch that does it. */
  function recordedFetch(name, through = network.fetch) {
    return async (url, init) => {
      record(name, "out", request(url, init));
      const response = await through(url, init);
      const head = [...response.headers].map((pair) => pair.join(": "));
      record(name, "in", [`HTTP ${response.status}`, ...head].join("\n"));
      return response;
    };
  }

  function request(url, { method = "GET", headers = {}, body = "" } = {}) {
    const head = Object.entries(headers).map((pair) => pair.join(": "));
    return [`${method} ${new URL(url).pathname}`, ...head, ...(body ? ["", body] : [])].join("\n");
  }

  panel.addEventListener("toggle", plan);
  addEventListener("hashchange", plan);
  return { record, recorder, state, fetch: recordedFetch };
})();
