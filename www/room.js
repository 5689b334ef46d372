"use strict";

/* The room: what one says, all hear, over a WebSocket that comes back. After a cut it asks
   for what was said after the last message it has, so nothing is missed.

   A message of our own carries a key. Until it comes back with that key it is pending, and
   should the connection break before, its words return to the field: whether anybody has
   heard them is not known. If they come back later after all, they leave the field again. */

{
  // What a tab uses it takes out of the storage: a second tab, or a duplicate of the tab with a
  // copy of its storage, then does not sit down on the same seat.
  const NAME = "chatstream.name"; // in localStorage
  const SEAT = "chatstream.seat"; // in sessionStorage, over a reload: {tab, name}
  const KEPT = 500; // messages on the page
  const NAMED = 20; // of those who are here
  const HISTORY = 1500; // ms in which what arrives is old: shown, not read aloud

  const talk = $("talk");
  const field = $("words");
  const present = new Set(); // the names we have heard of, and not that they left
  const unheard = new Map(); // key -> {text, article}; without an article, back in the field
  const seat = store.get(SEAT, "sessionStorage") ?? {};
  const tab = seat.tab ?? random();
  let name;
  let socket = null; // while we are in the room
  let last = ""; // the id to go on after
  store.set(SEAT, null, "sessionStorage");

  function join(as) {
    name = as;
    store.set(NAME, null);
    talk.ariaLive = "off";
    setTimeout(() => (talk.ariaLive = "polite"), HISTORY);
    socket = Socket.open({
      name: "wire-room",
      url: () => socketAddress(`room?${new URLSearchParams({ name, after: last })}`),
      protocols: ["chatstream.v1"],
      onmessage: hear,
      onstate: changed,
    });
    refresh();
  }

  function leave() {
    store.set(NAME, name);
    socket.close();
    last = "";
    unheard.clear();
    present.clear();
    talk.replaceChildren();
    socket = null;
    refresh();
    $("room-state").textContent = "";
    $("name").focus();
  }

  function hear(text) {
    const event = JSON.parse(text);
    if (event.id) last = event.id;
    if (event.name) present.add(event.name);
    if (event.type === "left") present.delete(event.name);
    if ("members" in event) showPresent(event.members);
    HEARD[event.type]?.(event); // else a heartbeat, or something newer than this page
  }

  const HEARD = {
    message(event) {
      delivered(event.key);
      const who = element("strong", { dir: "auto" }, event.name);
      const at = new Date(event.at);
      const when = element("time", { dateTime: at.toISOString() }, time.format(at));
      const isOwn = event.key?.startsWith(`${tab}-`);
      show(message(isOwn ? "own" : "", event.text, who, " ", when));
    },
    joined: (event) => note("joined", event.name),
    left: (event) => note("left", event.name),
    gap: (event) => note("room-gap", event.missed),
    error: ({ key, error }) => giveBack(error.message, key && [key]),
  };

  function message(className, text, ...head) {
    const said = element("p", { className: "said", dir: "auto" }, text);
    return element("article", { className }, element("p", { className: "who" }, ...head), said);
  }

  const note = (...words) => show(element("p", { className: "note", dir: "auto" }, say(...words)));

  function show(shown) {
    talk.append(shown);
    if (talk.children.length > KEPT) talk.firstChild.remove();
    stick();
  }

  /* The server counts; the names are those we have heard, and some left unheard. */
  function showPresent(count) {
    const names = [...present].slice(0, NAMED);
    const listed = names.join(IS_CHINESE ? "、" : ", ");
    const others = count - names.length;
    const all = others ? say("here-more", listed, others) : listed;
    const isKnown = listed && present.size <= count;
    $("members").hidden = !count;
    $("members").textContent = say("here", isKnown ? all : count);
  }

  // ------------------------------------------------------------- what we say ourselves

  function speak(text) {
    const key = `${tab}-${random()}`;
    socket.send(JSON.stringify({ text, key }));
    const article = message("own pending", text, say("pending"));
    unheard.set(key, { text, article });
    talk.append(article);
    toEnd();
  }

  function delivered(key) {
    const { text, article } = unheard.get(key) ?? {};
    if (!article && field.value === text) field.value = "";
    article?.remove();
    unheard.delete(key);
  }

  function giveBack(reason, keys = [...unheard.keys()]) {
    const pending = keys.map((key) => unheard.get(key)).filter((said) => said?.article);
    for (const said of pending.reverse()) {
      said.article.remove();
      said.article = null;
      field.value = [said.text, field.value].filter(Boolean).join(" ");
    }
    if (pending.length) note("room-returned", reason);
  }

  // -------------------------------------------------------------------------- state

  function changed(state, detail) {
    wire.state("wire-room", state, detail);
    $("room-state").textContent = say(`line-${state}`, detail?.reason);
    if (state !== "open") showPresent(0); // until the server says who is there
    if (state === "waiting") giveBack(say("room-cut"));
    if (state !== "closed" || !detail) return;
    socket = null; // for good
    refresh();
  }

  function refresh() {
    $("join").hidden = $("room-lead").hidden = Boolean(socket);
    $("speak").hidden = $("leave").hidden = !socket;
    stick();
  }

  $("join").addEventListener("submit", () => {
    join($("name").value.trim());
    field.focus();
  });

  $("speak").addEventListener("submit", () => {
    const text = field.value;
    if (!text.trim()) return;
    if (!socket.isOpen) return void ($("room-state").textContent = say("room-unsent"));
    field.value = "";
    speak(text);
  });

  $("leave").addEventListener("click", leave);
  addEventListener("pagehide", () => {
    store.set(SEAT, { tab, name: socket && name }, "sessionStorage");
    if (socket) store.set(NAME, name);
  });

  views.room = { grows: () => Boolean(socket) };
  const guest = say("guest", 100 + Math.floor(Math.random() * 900));
  $("name").value = seat.name || store.get(NAME) || guest;
  if (seat.name) join(seat.name); // as before a reload
  else refresh();
}
