"use strict";

/* The room: what one says, all hear, over a WebSocket that comes back. After a cut it asks
   for what was said after the last message it has, so nothing is missed.

   A message of our own carries a key. Until it comes back with that key it is pending, and
   should the connection break before, its words return to the field: whether anybody has
   heard them is not known. If they come back later after all, they leave the field again. */

{
  const NAME = "chatstream.name"; // in localStorage, unless a tab uses it
  const SEAT = "chatstream.seat"; // of a tab, over a reload: {tab, name}
  const PROTOCOL = "chatstream.v1";
  const KEPT = 500; // messages on the page
  const HISTORY = 1500; // ms in which what arrives is old: shown, not read aloud

  const talk = $("talk");
  const field = $("words");
  const present = new Set(); // the names we have heard of, and not that they left
  const pending = new Map(); // key -> {text, article}: said, not heard yet
  const returned = new Map(); // key -> text: back in the field
  const seat = take(SEAT, "sessionStorage") ?? {};
  const tab = seat.tab ?? Math.random().toString(36).slice(2, 10);
  let name = "";
  let socket = null;
  let last = ""; // the id to go on after

  /* What a tab uses it takes out of the storage: a duplicate of the tab, which gets a copy
     of that, or a second tab then does not sit down on the same seat. */
  function take(key, storage) {
    const value = store.get(key, storage);
    store.set(key, null, storage);
    return value;
  }

  function putBack() {
    store.set(SEAT, { tab, name }, "sessionStorage");
    if (name) store.set(NAME, name);
  }

  function join(as) {
    name = as;
    store.set(NAME, null);
    talk.setAttribute("aria-live", "off");
    setTimeout(() => talk.setAttribute("aria-live", "polite"), HISTORY);
    socket = Socket.open({
      url: () => socketAddress("room", { name, after: last }),
      protocols: [PROTOCOL],
      onmessage: hear,
      onstate: changed,
    });
    refresh();
  }

  function leave() {
    socket.close();
    socket = null;
    last = "";
    store.set(NAME, name);
    name = "";
    pending.clear();
    talk.replaceChildren();
    present.clear();
    showPresent(0);
    refresh();
    $("name").focus();
  }

  function hear(text) {
    wire.record("wire-room", "in", text);
    const event = JSON.parse(text);
    if (event.id) last = event.id;
    if (event.name) present.add(event.name);
    if (event.type === "left") present.delete(event.name);
    if ("members" in event) showPresent(event.members);
    const shown = RENDER[event.type]?.(event);
    if (!shown) return; // a heartbeat, or something newer than this page
    talk.append(shown);
    if (talk.children.length > KEPT) talk.firstChild.remove();
    stick();
  }

  const RENDER = {
    message(event) {
      delivered(event.key);
      return message(event);
    },
    joined: (event) => note(say("joined", event.name)),
    left: (event) => note(say("left", event.name)),
    gap: (event) => note(say("room-gap", event.missed)),
    error(event) {
      const key = event.key ?? pending.keys().next().value;
      giveBack(event.error.message, [key].filter((known) => pending.has(known)));
    },
  };

  function message({ name: from, text, at, key = "" }) {
    const who = element("strong", { dir: "auto" }, from);
    const head = element("p", { className: "who" }, who, " ", when(at));
    const said = element("p", { className: "said", dir: "auto" }, text);
    return element("article", { className: key.startsWith(`${tab}-`) ? "own" : "" }, head, said);
  }

  const when = (at) =>
    element("time", { dateTime: new Date(at).toISOString() }, time.format(at));

  const note = (text) => element("p", { className: "note", dir: "auto" }, text);

  /* The server counts; the names are those we have heard, and some left unheard. */
  function showPresent(count) {
    const names = [...present].slice(0, 20).join(LANGUAGE === "en" ? ", " : "、");
    const others = count - Math.min(present.size, 20);
    const all = others ? say("here-more", names, others) : names;
    const known = names && present.size <= count ? all : count;
    $("members").hidden = !count;
    $("members").textContent = say("here", known);
  }

  // ------------------------------------------------------------- what we say ourselves

  function speak(text) {
    const key = `${tab}-${Date.now().toString(36)}${Math.random().toString(36).slice(2, 6)}`;
    const frame = JSON.stringify({ text, key });
    wire.record("wire-room", "out", frame);
    socket.send(frame);
    const article = element("article", { className: "own pending" },
      element("p", { className: "who" }, say("pending")),
      element("p", { className: "said", dir: "auto" }, text));
    pending.set(key, { text, article });
    talk.append(article);
    toEnd();
  }

  function delivered(key) {
    pending.get(key)?.article.remove();
    pending.delete(key);
    const text = returned.get(key);
    returned.delete(key);
    if (text && field.value === text) field.value = "";
  }

  function giveBack(reason, keys = [...pending.keys()]) {
    if (!keys.length) return;
    for (const key of keys) {
      const { text, article } = pending.get(key);
      article.remove();
      pending.delete(key);
      returned.set(key, text);
      field.value = [text, field.value].filter(Boolean).join(" ");
    }
    talk.append(note(say("room-returned", reason)));
    stick();
  }

  // -------------------------------------------------------------------------- state

  function changed(state, detail) {
    wire.state("wire-room", state, detail);
    $("room-state").textContent = say(`room-${state}`);
    if (state === "waiting") giveBack(say("room-cut"));
    if (state === "closed" && detail) refused(detail);
  }

  /* For good: it would be the same the next time. */
  function refused({ reason }) {
    socket = null;
    name = "";
    $("room-state").textContent = say("room-refused", reason);
    refresh();
  }

  function refresh() {
    $("join").hidden = Boolean(socket);
    $("speak").hidden = !socket;
    $("leave").hidden = !socket;
    $("room-lead").hidden = Boolean(socket);
    stick();
  }

  $("join").addEventListener("submit", (event) => {
    event.preventDefault();
    const wanted = $("name").value.trim();
    if (!wanted) return $("name").focus();
    join(wanted);
    field.focus();
  });

  $("speak").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value;
    if (!text.trim()) return;
    if (!socket.isOpen) return void ($("room-state").textContent = say("room-unsent"));
    field.value = "";
    speak(text);
  });

  $("leave").addEventListener("click", leave);
  addEventListener("pagehide", putBack);
  addEventListener("pageshow", ({ persisted }) => {
    if (persisted) take(SEAT, "sessionStorage");
  });

  views.room = {
    grows: () => Boolean(socket),
    enter() {
      if (!socket && seat.name) join(seat.name); // before a reload
      seat.name = "";
    },
  };
  const guest = say("guest", 100 + Math.floor(Math.random() * 900));
  $("name").value = seat.name || store.get(NAME) || guest;
  refresh();
}
