"use strict";

/* The chat: one POST, whose answer is an event stream, token by token.

   The answer belongs to the server; a tab only reads it. So the tab remembers the answer's
   id and how far it has read, and any tab, this one reloaded or a second one, goes on from
   there with GET /answers/{id}. What an answer says, each tab hears from the server. */

{
  const SAID = `chatstream.conversation ${SERVER.origin}${SERVER.pathname} `; // and a message's key
  const DRAFT = "chatstream.draft"; // what is in the field, and whether it has the focus
  const MODEL = "chatstream.model"; // the one that was chosen
  const AT_ONCE = 100; // ms after a connection opens: what comes then was missed before

  const question = $("question");
  const log = $("log");
  let turns = []; // one for each message of the conversation, in order
  const dropped = new Set(); // the keys of the messages that this tab has dropped
  let watched = null; // the Turn of an answer that was opened by its address
  let editing = null; // the Turn of the question that is being edited ...
  let draft = ""; // ... and what was in the field before
  let model; // the server's own, by name; null if there is no server
  let models = [];
  let looking = 0;
  let cleared = []; // the messages of the conversation that can be brought back

  const running = () => turns.filter((turn) => turn.isRead);
  const isBusy = () => running().length > 0;
  const current = () => (watched?.isRead ? watched : running().at(-1));

  // ------------------------------------------------------------ asking and following

  const newMessage = (fields) => ({
    key: `${Date.now()}-${random()}`,
    role: "assistant", content: "", reasoning: "", last: "", events: 0, caught: 0, ...fields,
  });

  function ask(content) {
    const at = Date.now() + Math.random(); // of two tabs in the same moment, too, one is first
    add(newMessage({ role: "user", content, at }));
    begin(at + 0.001);
  }

  function begin(at) {
    const choice = $("model").value || undefined;
    cleared = [];
    send(add(newMessage({ state: "under way", at, choice, model: choice ?? model })));
    toEnd();
    question.focus();
  }

  /* A question that is sent twice, by a page that was reloaded before it had heard the
     answer's id, is asked once: by its key the server knows it again. */
  function send(turn) {
    const { at, key, choice } = turn.message;
    const before = turns.filter(({ message, isUnderWay }) => message.at < at && !isUnderWay);
    const said = before.filter(({ message }) => message.content);
    const messages = said.map(({ message: { role, content } }) => ({ role, content }));
    const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
    const body = JSON.stringify({ messages, model: choice });
    follow(turn, "chatgptApi/chatgpt_qa_stream", { method: "POST", headers, body });
  }

  function follow(turn, path, options) {
    turn.stream = SSE.open(address(path), {
      ...options,
      ...wire.tap("wire-chat"),
      onopen: (response) => opened(turn, response),
      onevent: (event) => receive(turn, event),
      onstate: (now, detail) => changed(turn, now, detail),
    });
    refresh();
  }

  /* From here on the answer is known by its id: a connection that breaks is made again
     as a reader of it, not as another question. */
  function opened(turn, response) {
    const { message } = turn;
    message.id ??= response.headers.get("X-Answer-Id");
    if (!turn.isUnderWay) return giveUp(turn);
    save(turn);
    turn.resumed = message.events && Date.now();
    return message.id && { url: address(`answers/${message.id}`) };
  }

  function receive(turn, { data, lastEventId }) {
    const { message } = turn;
    if (data === "[DONE]") return end(turn, "done");
    const { content, reasoning, finish_reason: finish, error } = JSON.parse(data);
    if (error) return fail(turn, error);
    message.last = lastEventId;
    if (finish) message.finish = finish;
    if (!content && !reasoning) return;
    message.latest = Date.now() - message.at;
    message.first ??= message.latest;
    message.events += 1;
    if (turn.resumed && Date.now() - turn.resumed < AT_ONCE) message.caught += 1;
    turn.take(content, reasoning);
    if (message.events === 1) refresh();
  }

  function fail(turn, { type, message }) {
    if (type === "stopped") return end(turn, "stopped");
    const trouble = type === "abandoned" ? "trouble-abandoned" : "trouble-failed";
    end(turn, "failed", say(trouble, message));
  }

  function changed(turn, now, detail) {
    wire.state("wire-chat", now, detail);
    if (!turn.isUnderWay) return; // it was stopped before it had an id
    turn.now = now;
    if (now === "closed") return detail && refused(turn, detail); // else we closed it ourselves
    turn.putOnHold(now !== "open" && Boolean(turn.message.id));
    refresh();
  }

  /* The stream has ended without the answer's own last word. */
  function refused(turn, { status, reason }) {
    if (status === 204) return end(turn, "done");
    if (status === 401) askForToken();
    if (status === 404 && turn.message.id) return end(turn, "failed", say("trouble-lost"));
    if (status) return end(turn, "failed", say("trouble-refused", status, reason));
    setTimeout(() => { // a page that is left is gone by then
      if (!turn.isUnderWay) return;
      lookForServer();
      end(turn, "failed", say("trouble-network", SERVER.host));
    });
  }

  async function end(turn, state, trouble) {
    const { message } = turn;
    Object.assign(message, { state, trouble, took: Date.now() - message.at });
    message.model ??= model;
    if (message.id) turn.stream.done();
    save(turn);
    const drawn = turn.end();
    refresh();
    await drawn;
    announce(trouble || `${say(state === "done" ? "answer" : "stopped")}: ${turn.spoken()}`);
  }

  function stop() {
    for (const turn of running()) {
      end(turn, "stopped");
      giveUp(turn);
    }
    question.focus();
  }

  /* Before the response has come, nobody knows the answer's id: then the request stays open
     until it does. If this gets lost: the server does not go on for long when nobody reads. */
  function giveUp({ stream, message: { id } }) {
    if (!id) return;
    stream.close();
    wire.tap("wire-chat").fetch(address(`answers/${id}`), { method: "DELETE" }).catch(() => {});
  }

  // -------------------------------------------------------------- the last turn again

  const acts = { again, regenerate: again, edit };

  function again(answer) {
    drop([answer]);
    begin(Date.now());
  }

  function edit(turn) {
    if (!isEditing()) draft = question.value;
    fill(turn.message.content, turn);
  }

  /* Not if its question was cleared since, here or in another tab. */
  const isEditing = () => turns.includes(editing);

  /* Without a text, with what was in the field before a question was edited. */
  function fill(text = draft, edited = null) {
    editing = edited;
    if (!edited) draft = "";
    question.value = text;
    question.focus();
    refresh();
  }

  // ------------------------------------------- the page, its store, and the other tabs
  //
  // What was said is kept in localStorage, one conversation a server, the same for all tabs.
  // Each message is an entry of its own: of two tabs that write at the same moment, neither
  // takes back what the other wrote.

  /* What the page shows becomes what was said: at first, and when another tab has asked,
     ended or cleared. What we are reading ourselves we know best. `atStart`: what has no id
     yet, no tab may be left that is asking it. */
  function sync(atStart = false) {
    dropped.forEach(forget); // a tab that had not heard of it may have written it once more
    const names = store.keys().filter((name) => name.startsWith(SAID));
    arrange(names.map((name) => store.get(name)).filter(Boolean).map((message) => {
      const turn = turns.find((ours) => ours.message.key === message.key);
      return turn && (turn.isRead || !turn.isUnderWay) ? turn : new Turn(message, acts);
    }));
    for (const turn of turns.filter(({ isUnderWay, isRead }) => isUnderWay && !isRead)) {
      const { id, last } = turn.message;
      if (id) follow(turn, `answers/${id}`, { lastEventId: last });
      else if (atStart) send(turn);
    }
  }

  function arrange(next) {
    for (const { stream, article } of turns.filter((turn) => !next.includes(turn))) {
      stream?.close();
      article.remove();
    }
    turns = next.sort((one, other) => one.message.at - other.message.at);
    turns.forEach(({ article }, n) => {
      if (log.children[n] !== article) log.insertBefore(article, log.children[n] ?? null);
      article.classList.toggle("latest", n >= turns.length - 2);
    });
    refresh();
  }

  function add(message) {
    const turn = new Turn(message, acts);
    dropped.delete(message.key);
    save(turn);
    arrange([...turns, turn]);
    return turn;
  }

  function drop(unwanted) {
    for (const { message } of unwanted) dropped.add(message.key);
    dropped.forEach(forget);
    arrange(turns.filter((turn) => !unwanted.includes(turn)));
  }

  const forget = (key) => store.remove(SAID + key);

  function save(turn) {
    if (turn !== watched) store.set(SAID + turn.message.key, turn.message);
  }

  views.chat = { enter: refresh, grows: () => turns.length > 0 };

  /* `#answer/<id>`: an answer by its own address, on whatever device. */
  views.answer = {
    grows: () => true,
    enter() {
      const [, id] = location.hash.split("/");
      watched = new Turn(newMessage({ id, state: "under way", at: Date.now(), model: "" }), null);
      $("watched").replaceChildren(watched.article);
      follow(watched, `answers/${id}`);
    },
    leave() {
      watched.stream.close();
      watched = null;
    },
  };

  // -------------------------------------------------------------------------- state

  /* What stands under the field, and what there is to see. */
  function refresh() {
    const hidden = {
      "welcome": turns.length > 0,
      "fresh": turns.length === 0,
      "undo": cleared.length === 0,
      "editing": !isEditing(),
      "send": isBusy(),
      "stop": !isBusy(),
      "cut-chat": !current() && !network.left,
    };
    for (const [id, isHidden] of Object.entries(hidden)) $(id).hidden = isHidden;
    $("chat-title").classList.toggle("unseen", $("welcome").hidden);
    log.classList.toggle("busy", isBusy());
    $("chat-state").textContent = words();
    stick();
  }

  function words() {
    const turn = current();
    if (turn?.message.id && turn.now !== "open") return say(`line-${turn.now}`);
    if (turn) return say(turn.message.events ? "chat-receiving" : "chat-waiting");
    if (cleared.length) return say("cleared");
    if (models.length > 1) return say("chat-choose");
    if (model) return say("chat-ready", model);
    return model === null ? say("chat-none", SERVER.host) : say("line-connecting");
  }

  async function lookForServer(failures = 0) {
    clearTimeout(looking);
    try {
      ({ model } = await (await network.fetch(address("healthz"))).json());
      const response = await network.fetch(address("v1/models"));
      models = response.ok ? (await response.json()).data.map(({ id }) => id) : [];
    } catch {
      [model, models] = [null, []];
      looking = setTimeout(lookForServer, SSE.jitter(failures), failures + 1);
    }
    const choice = models.length > 1 ? models : []; // the first is the server's own
    const option = (name) => new Option(name, name, false, name === store.get(MODEL));
    $("model").hidden = choice.length === 0;
    $("model").replaceChildren(...choice.map(option));
    refresh();
  }

  // ------------------------------------------------------------------------- input

  $("ask").addEventListener("submit", () => {
    const text = question.value.trim();
    if (!text) return;
    if (isBusy()) return void ($("chat-state").textContent = say("chat-busy"));
    if (isEditing()) drop(turns.slice(turns.indexOf(editing)));
    fill();
    ask(text);
  });

  addEventListener("keydown", (event) => {
    const { key, target, isComposing, keyCode, shiftKey } = event;
    if (isComposing || keyCode === 229) return; // 229: Safari's last Enter
    if (key === "Enter" && target === question && !shiftKey) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
    if (key !== "Escape" || shown !== "chat") return;
    if (isEditing()) fill();
    else if (isBusy()) stop();
  });

  $("stop").addEventListener("click", ({ detail }) => {
    if (detail < 2) stop(); // the second half of a double click on Send is no Stop
  });

  $("fresh").addEventListener("click", () => {
    stop();
    cleared = turns.map(({ message }) => message);
    drop(turns);
  });

  $("undo").addEventListener("click", () => {
    cleared.splice(0).forEach(add);
    toEnd();
    question.focus();
  });

  $("cancel").addEventListener("click", () => fill());
  $("model").addEventListener("change", ({ target }) => store.set(MODEL, target.value));

  $("examples").addEventListener("click", ({ target }) => {
    if (target.matches("button")) ask(target.textContent);
  });

  /* A reload keeps what has come of an answer, what was being written, and the place to
     write it. */
  addEventListener("pagehide", () => {
    running().forEach(save);
    const draft = { text: question.value, focused: document.activeElement === question };
    store.set(DRAFT, draft, "sessionStorage");
  });

  network.controls($("cut-chat"), refresh);
  addEventListener("storage", () => sync());
  const before = store.get(DRAFT, "sessionStorage");
  question.value = before?.text ?? "";
  if (before?.focused) question.focus();
  sync(true);
  lookForServer();
}
