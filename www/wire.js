"use strict";

/* On the wire: the last frames of each connection, as they came, and the heads of its last
   request and response, however long ago they were. Recorded always, drawn only while
   somebody looks, and ten times a second at most. */

const wire = (() => {
  const KEPT = 40; // frames of each connection
  const LONGEST = 2000; // characters of a frame
  const VIEWS = {
    "wire-chat": "chat", "wire-polling": "clock", "wire-stream": "clock",
    "wire-socket": "clock", "wire-room": "room",
  };
  const MARKS = { in: "←", out: "→", note: "·" };
  const connections = new Map(); // name -> {rows, list, follows}
  const panel = $("wire");
  let drawing = 0;

  /* One row: what came "in", what went "out", or a "note" about the connection itself. A
     `head` ("request", "response") stays until the next of its kind. */
  function record(name, direction, text, head = "") {
    if (!connections.has(name)) connections.set(name, { rows: [], list: null, follows: true });
    const { rows } = connections.get(name);
    const before = head && rows.find((row) => row.head === head);
    if (before) before.head = "";
    rows.push({ at: Date.now(), direction, text: text.slice(0, LONGEST), head, item: null });
    if (rows.length > KEPT) rows.splice(rows.findIndex((row) => !row.head), 1)[0].item?.remove();
    plan();
  }

  function plan() {
    if (panel.open) drawing ||= setTimeout(draw, 100);
  }

  function draw() {
    drawing = 0;
    $("wire-empty").hidden = [...connections.keys()].some((name) => VIEWS[name] === shown);
    for (const [name, connection] of connections) {
      connection.list ??= section(name, connection);
      connection.list.parentNode.hidden = VIEWS[name] !== shown;
    }
    for (const connection of connections.values()) fill(connection);
  }

  function fill({ rows, list, follows }) {
    for (const row of rows) {
      if (!row.item) list.append((row.item = itemOf(row)));
    }
    if (follows) list.scrollTop = list.scrollHeight;
  }

  function section(name, connection) {
    const list = element("ol", { tabIndex: 0 });
    list.addEventListener("scroll", () => { // one who reads further up is left there
      const below = list.scrollHeight - list.scrollTop - list.clientHeight;
      if (list.clientHeight) connection.follows = below < 40;
    });
    list.setAttribute("aria-label", say(name));
    list.setAttribute("role", "list");
    $("wire-body").append(element("section", {}, element("h2", {}, say(name)), list));
    return list;
  }

  function itemOf({ at, direction, text }) {
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
      record(name, "out", request(url, init), "request");
      const response = await through(url, init);
      const head = [...response.headers].map((pair) => pair.join(": "));
      record(name, "in", [`HTTP ${response.status}`, ...head].join("\n"), "response");
      return response;
    };
  }

  function request(url, { method = "GET", headers = {}, body = "" } = {}) {
    const head = Object.entries(headers).map((pair) => pair.join(": "));
    const { pathname, search } = new URL(url);
    return [`${method} ${pathname}${search}`, ...head, ...(body ? ["", body] : [])].join("\n");
  }

  panel.addEventListener("toggle", () => {
    document.body.classList.toggle("wire-open", panel.open); // `:has` would cost each token
    plan();
  });
  addEventListener("hashchange", plan);
  return { record, recorder, state, fetch: recordedFetch };
})();
