"use strict";

/* What was said in the chat: kept in localStorage, one conversation a server, the same for
   all its tabs.

   Each tab writes all of it, and two tabs may do so at the same moment. So a tab joins what
   it finds there, or hears of later, with what it has itself: message by message, by their
   keys. A message that was taken out is remembered as such, else another tab's copy would
   bring it back. Of two conversations, the one that was begun later counts. */

const isUnderWay = ({ state }) => ["waiting", "receiving"].includes(state);

const conversation = (() => {
  const NAME = `chatstream.conversation ${SERVER.origin}${SERVER.pathname}`;
  const reading = new Map(); // key -> Turn: the answers that this tab itself reads
  let held = join(begin(0), store.get(NAME));

  function begin(begun) {
    return { begun, messages: [], dropped: [] };
  }

  function join(ours, theirs) {
    if (!theirs?.dropped || theirs.begun < ours.begun) return ours;
    if (theirs.begun > ours.begun) return theirs;
    const dropped = [...new Set([...ours.dropped, ...theirs.dropped])];
    const joined = new Map(theirs.messages.map((message) => [message.key, message]));
    for (const message of ours.messages) {
      joined.set(message.key, further(message, joined.get(message.key)));
    }
    const messages = [...joined.values()].filter(({ key }) => !dropped.includes(key));
    return { ...ours, dropped, messages: messages.sort((one, other) => one.at - other.at) };
  }

  /* Our own copy, unless we only wait and theirs knows more. */
  function further(ours, theirs) {
    if (!theirs || !isUnderWay(ours) || reading.has(ours.key)) return ours;
    if (!isUnderWay(theirs)) return Object.assign(ours, theirs);
    return Object.assign(ours, { id: ours.id ?? theirs.id });
  }

  function save() {
    held = join(held, store.get(NAME));
    store.set(NAME, held);
  }

  /* Only then do we say it again: else two tabs would answer each other for ever. */
  function isBehind(theirs) {
    const known = new Set(theirs?.messages?.map(({ key }) => key));
    return held.begun > theirs?.begun || held.dropped.length > theirs?.dropped.length
      || held.messages.some(({ key }) => !known.has(key));
  }

  function replace(other) {
    held = { ...other, begun: Date.now() };
    store.set(NAME, held);
  }

  return {
    reading,
    get messages() { return held.messages; },
    save,
    add(message) {
      const key = `${Date.now()}-${Math.random().toString(36).slice(2)}`;
      held.messages.push(Object.assign(message, { key }));
      save();
    },
    drop(messages) {
      held.dropped.push(...messages.map(({ key }) => key));
      held.messages = held.messages.filter((message) => !messages.includes(message));
      save();
    },
    /* Begins anew; returns what takes that back. */
    clear() {
      const before = held;
      replace(begin());
      return () => replace(before);
    },
    /* Calls `heard()` when another tab has said something. */
    listen(heard) {
      addEventListener("storage", ({ key }) => {
        if (key !== NAME && key !== null) return;
        const theirs = key ? store.get(NAME) : begin(Date.now());
        held = join(held, theirs);
        if (key && isBehind(theirs)) store.set(NAME, held);
        heard();
      });
    },
  };
})();
