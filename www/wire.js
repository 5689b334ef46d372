"use strict";

/* On the wire: the last frames of each connection, as they came, and the heads of its last
   request and response, however long ago they were. Recorded always, drawn only while
   somebody looks, and ten times a second at most. */

const wire = (() => {
  const KEPT = 40; // frames of each connection
  const LONGEST = 2000; // characters of a frame
  const VIEWS = {
    "wire-chat": "chat answer", "wire-polling": "clock", "wire-stream": "clock",
    "wire-socket": "clock", "wire-room": "room",
  };
  const MARKS = { in: "←", out: "→", note: "·" };
  const connections = Object.fromEntries(Object.entries(VIEWS).map(makeConnection));
  const panel = $("wire");
  let drawing = 0;

  function makeConnection([name, view]) {
    const list = element("ol", { tabIndex: 0, role: "list", ariaLabel: say(name) });
    const section = element("section", { hidden: true }, element("h2", {}, say(name)), list);
    const connection = { view, section, list, rows: [], follows: true };
    list.addEventListener("scroll", () => { // one who reads further up is left there
      const below = list.scrollHeight - list.scrollTop - list.clientHeight;
      if (list.clientHeight) connection.follows = below < 40;
    });
    $("wire-body").append(section);
    return [name, connection];
  }

  /* One row: what came "in", what went "out", or a "note" about the connection itself. A
     `head` ("request", "response") stays until the next of its kind. */
  function record(name, direction, text, head = "") {
    const { rows } = connections[name];
    const before = head && rows.find((row) => row.head === head);
    if (before) before.head = "";
    rows.push({ at: Date.now(), direction, text: text.slice(0, LONGEST), head });
    if (rows.length > KEPT) rows.splice(rows.findIndex((row) => !row.head), 1)[0].item?.remove();
    plan();
  }

  function plan() {
    if (panel.open) drawing ||= setTimeout(draw, 100);
  }

  function draw() {
    drawing = 0;
    const all = Object.values(connections);
    for (const one of all) one.section.hidden = !(one.rows.length && one.view.includes(shown));
    $("wire-empty").hidden = all.some(({ section }) => !section.hidden);
    for (const { rows, list, follows } of all) { // now each has its height
      for (const row of rows.filter(({ item }) => !item)) list.append((row.item = makeItem(row)));
      if (follows) list.scrollTop = list.scrollHeight;
    }
  }

  function makeItem({ at, direction, text }) {
    const title = say(`wire-${direction}`);
    const about = { className: "mark", role: "img", title, ariaLabel: title };
    const parts = [element("time", {}, time.format(at)), element("span", about, MARKS[direction])];
    return element("li", { className: direction }, ...parts, element("pre", {}, text));
  }

  /* What sse.js and socket.js say of a connection, in the page's words. */
  function state(name, now, detail) {
    const wait = now === "waiting" ? decimal(detail.wait / 1000) : "";
    record(name, "note", say(`wire-${now}`, wait || detail?.message || ""));
  }

  /* Options for SSE.open() that show what is asked, the head of what is answered, and what
     comes then. `through` is the fetch() that does it. */
  function tap(name, through = network.fetch) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      async fetch(url, init) {
        record(name, "out", request(url, init), "request");
        const response = await through(url, init);
        record(name, "in", `HTTP ${response.status}${lines(response.headers)}`, "response");
        return response;
      },
      /* A character cut in half is completed by the next piece. */
      onbytes: (bytes) => record(name, "in", decoder.decode(bytes, { stream: true })),
    };
  }

  const lines = (headers) => [...headers].map(([name, value]) => `\n${name}: ${value}`).join("");

  function request(url, { method = "GET", headers = {}, body }) {
    const { pathname, search } = new URL(url);
    const head = `${method} ${pathname}${search}${lines(Object.entries(headers))}`;
    return [head, body].filter(Boolean).join("\n\n");
  }

  panel.addEventListener("toggle", () => {
    document.body.classList.toggle("wire-open", panel.open); // `:has` would cost each token
    plan();
  });
  addEventListener("hashchange", plan);
  return { record, state, tap };
})();
