"use strict";

/* A network that can be cut, here in the page: each view has the same buttons for it.

     network.fetch(url, init)        fetch(), which breaks with a cut and fails during one
     network.socket(url, protocols)  new WebSocket(), likewise (it throws during a cut)
     network.cut(seconds)            cut it; the second call replaces the first
     network.refusal(signal)         why the server lets this page do nothing: its words,
                                     or "" if it does let it or is not there
     network.left                    ms until it is back; 0 while it is there
     network.controls(place, onchange)   fills `place` with the buttons and what they did;
                                     calls onchange() at each cut and at each return

   A cut is to the page what a real one is: connections break, new ones fail, and the window
   hears `offline` and then `online`, at which sse.js and socket.js look again at once. */

const network = (() => {
  const SECONDS = [5, 20, 70];
  const places = []; // {words, count, onchange} of each group of buttons
  let cutter = new AbortController();
  let timer = 0;
  let until = 0;

  const broken = () => new TypeError("the network is cut");

  /* By hand what AbortSignal.any() does, which Safari has only since 17.4. */
  async function cuttableFetch(url, init = {}) {
    if (timer || init.signal?.aborted) throw broken();
    const either = new AbortController();
    for (const signal of [cutter.signal, init.signal]) {
      const abort = () => either.abort(signal.reason);
      signal?.addEventListener("abort", abort, { signal: either.signal });
    }
    return fetch(url, { ...init, signal: either.signal });
  }

  /* It answers a reader of an answer that nobody has: with 404, if it is for this page to
     ask. An origin that is not may not read the refusal either, but may read healthz. */
  async function refusal(signal) {
    try {
      const response = await cuttableFetch(address("answers/0"), { signal });
      const refused = [401, 403, 421].includes(response.status);
      return refused ? new SSE.Refused(response, await response.text()).reason : "";
    } catch {
      const isThere = await cuttableFetch(address("healthz"), { signal }).catch(() => null);
      return isThere ? say("refused-origin", SERVER.host) : "";
    }
  }

  function socket(url, protocols = []) {
    if (timer) throw broken();
    const made = new WebSocket(url, protocols);
    cutter.signal.addEventListener("abort", () => made.close());
    return made;
  }

  function cut(seconds) {
    clearInterval(timer);
    until = Date.now() + seconds * 1000;
    timer = setInterval(tick, 100);
    cutter.abort(broken());
    cutter = new AbortController();
    changed("offline", "cut-left");
  }

  function tick() {
    if (Date.now() < until) return countDown();
    clearInterval(timer);
    timer = until = 0;
    changed("online", "cut-over");
  }

  function changed(event, key) {
    dispatchEvent(new Event(event));
    countDown();
    for (const { words, onchange } of places) {
      words.textContent = say(key);
      onchange();
    }
  }

  /* It is for the eye: a screen reader hears of the cut and of its end. */
  function countDown() {
    const left = Math.ceil((until - Date.now()) / 1000);
    for (const { count } of places) count.textContent = timer ? say("cut-count", left) : "";
  }

  function controls(place, onchange) {
    const words = element("span", { role: "status" });
    const count = element("span", { className: "count" });
    place.ariaLabel = say("cut");
    place.append(element("span", {}, say("cut")), ...SECONDS.map(button), words, count);
    places.push({ words, count, onchange });
  }

  function button(value) {
    const onclick = ({ target }) => cut(Number(target.value));
    return element("button", { type: "button", value, onclick }, say("cut-seconds", value));
  }

  return {
    fetch: cuttableFetch, socket, refusal, cut, controls,
    get left() { return Math.max(0, until - Date.now()); },
  };
})();
