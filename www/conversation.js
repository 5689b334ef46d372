"use strict";

/* What was said in the chat: kept in localStorage, one conversation a server, the same for
   all its tabs.

   Each tab writes all of it, and two tabs may do so at the same moment. So a tab joins what
   it finds there, or hears of later, with what it has itself: message by message, by their
   keys. A message that was taken out is remembered as such, else another tab's copy would
   bring it back. Of two conversations, the one that was begun later counts. */

const UNDER_WAY = ["waiting", "receiving"];
const isUnderWay = ({ state }) => UNDER_WAY.includes(state);

const conversation = (() => {
  const NAME = `chatstream.conversation ${SERVER.origin}${SERVER.pathname}`;
  let held = begin();

  function begin() {
    return { begun: 0, messages: [], dropped: [] };
  }

  function join(ours, theirs) {
    if (!theirs?.messages || theirs.begun < ours.begun) return ours;
    if (theirs.begun > ours.begun) return theirs;
    const dropped = [...new Set([...ours.dropped, ...theirs.dropped])];
    const found = new Map(theirs.messages.map((message) => [message.key, message]));
    const messages = ours.messages.map((message) => further(message, found.get(message.key)));
    const known = new Set(messages.map(({ key }) => key));
    messages.push(...theirs.messages.filter(({ key }) => !known.has(key)));
    messages.sort((one, other) => one.at - other.at);
    return { ...ours, dropped, messages: messages.filter(({ key }) => !dropped.includes(key)) };
  }

  /* Our own copy, unless we only wait and theirs knows more. */
  function further(ours, theirs) {
    if (!theirs || !isUnderWay(ours) || self.reading.has(ours.key)) return ours;
    if (!isUnderWay(theirs)) return Object.assign(ours, theirs);
    return Object.assign(ours, { id: ours.id ?? theirs.id });
  }

  function save() {
    held = join(held, store.get(NAME));
    store.set(NAME, held);
  }

  /* Only then do we say it again: else two tabs would answer each other for ever. */
  function isBehind(theirs) {
    const known = new Set(theirs?.messages?.map((message) => message.key));
    return held.begun > theirs?.begun || held.dropped.length > theirs?.dropped.length
      || held.messages.some((message) => !known.has(message.key));
  }

  function replace(other) {
    held = { ...other, begun: Date.now() };
    store.set(NAME, held);
  }

  addEventListener("storage", ({ key }) => {
    if (key !== NAME && key !== null) return;
    const theirs = key ? store.get(NAME) : { ...begin(), begun: Date.now() };
    held = join(held, theirs);
    if (key && isBehind(theirs)) store.set(NAME, held);
    self.onchange();
  });

  const self = {
    reading: new Map(), // the keys of answers that this tab itself reads
    onchange() {},
    get messages() { return held.messages; },
    save,
    add(message) {
      const key = `${Date.now()}-${Math.random().toString(36).slice(2)}`;
      held.messages.push(Object.assign(message, { key }));
      save();
      return message;
    },
    drop(messages) {
      const keys = messages.map(({ key }) => key);
      held.dropped.push(...keys);
      held.messages = held.messages.filter(({ key }) => !keys.includes(key));
      save();
    },
    /* Begins anew; returns what takes that back. */
    clear() {
      const before = held;
      replace(begin());
      return () => replace(before);
    },
  };
  held = join(held, store.get(NAME));
  return self;
})();
