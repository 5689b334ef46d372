"use strict";

/* The room: what one says, all hear, over a WebSocket that comes back. After a cut it asks
   for what was said after the last message it has, so nothing is missed. */

{
  const NAME = "chatstream.name";
  const PROTOCOL = "chatstream.v1";
  const KEPT = 500; // messages on the page
  const HISTORY = 1500; // ms in which what arrives is old: shown, not read aloud

  const talk = $("talk");
  let name = "";
  let socket = null;
  let last = ""; // the id to go on after

  function join(as) {
    name = as;
    store.set(NAME, name, "sessionStorage"); // two tabs may be two people
    store.set(NAME, name);
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
    store.set(NAME, null, "sessionStorage");
    talk.replaceChildren();
    showMembers(0);
    refresh();
    $("name").focus();
  }

  function hear(text) {
    wire.record("wire-room", "in", text);
    const event = JSON.parse(text);
    if (event.id) last = event.id;
    if ("members" in event) showMembers(event.members);
    const shown = RENDER[event.type]?.(event);
    if (!shown) return; // a heartbeat, or something newer than this page
    talk.append(shown);
    if (talk.children.length > KEPT) talk.firstChild.remove();
    stick();
  }

  const RENDER = {
    message: message,
    joined: (event) => note(say("joined", event.name)),
    left: (event) => note(say("left", event.name)),
    gap: (event) => note(say("room-gap", event.missed)),
    error: (event) => note(event.message),
  };

  function message({ name: from, text, at }) {
    const head = element("p", { className: "who" }, element("strong", {}, from), " ", when(at));
    const said = element("p", { className: "said" }, text);
    return element("article", { className: from === name ? "own" : "" }, head, said);
  }

  const when = (at) =>
    element("time", { dateTime: new Date(at).toISOString() }, time.format(at));

  const note = (text) => element("p", { className: "note" }, text);

  function showMembers(count) {
    $("members").hidden = !count;
    $("members").textContent = say("members", count);
  }

  function changed(state, detail) {
    wire.state("wire-room", state, detail);
    $("room-state").textContent = say(`room-${state}`);
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
    $("words").focus();
  });

  $("speak").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("words").value;
    if (!text.trim()) return;
    if (!socket.isOpen) return void ($("room-state").textContent = say("room-unsent"));
    const frame = JSON.stringify({ text });
    wire.record("wire-room", "out", frame);
    socket.send(frame);
    $("words").value = "";
    toEnd();
  });

  $("leave").addEventListener("click", leave);

  views.room = {
    grows: () => Boolean(socket),
    enter() {
      const joined = store.get(NAME, "sessionStorage");
      if (!socket && joined) join(joined); // before a reload
    },
  };
  $("name").value = store.get(NAME) ?? say("guest", 100 + Math.floor(Math.random() * 900));
  refresh();
}
