"use strict";

/* The chat: one POST, whose answer is an event stream, token by token.

   The answer belongs to the server; a tab only reads it. So the tab remembers the answer's
   id and how far it has read, and any tab, this one reloaded or a second one, goes on from
   there with GET /answers/{id}. What an answer says, each tab hears from the server. */

{
  const ASK = "chatgptApi/chatgpt_qa_stream";
  const DRAFT = "chatstream.draft"; // what is in the field, and whether it has the focus
  const MODEL = "chatstream.model"; // the one that was chosen
  const AT_ONCE = 100; // ms after a connection opens: what comes then was missed before

  const question = $("question");
  const log = $("log");
  const turns = new Map(); // a message's key -> its Turn
  const { reading } = conversation;
  let editing = null; // the question that is being edited ...
  let draft = ""; // ... and what was in the field before
  let restore = null; // brings back the conversation that was cleared
  let watched = null; // the Turn of an answer that was opened by its address

  // ------------------------------------------------------------ asking and following

  const newAnswer = (fields) => ({
    role: "assistant", content: "", state: "waiting", last: "", events: 0, caught: 0, ...fields,
  });

  function ask(content) {
    const at = Date.now() + Math.random(); // of two tabs in the same moment, too, one is first
    conversation.add({ role: "user", content, at });
    begin(at);
  }

  function begin(at) {
    const answer = newAnswer({ at, model: $("model").value || server.model });
    conversation.add(answer);
    restore = null;
    sync();
    send(answer);
    toEnd();
  }

  /* A question that is sent twice, by a page that was reloaded before it had heard the
     answer's id, is asked once: by its key the server knows it again. */
  function send(answer) {
    const before = conversation.messages.filter((said) => said.content && !isUnderWay(said)
      && (said.at < answer.at || (said.at === answer.at && said.role === "user")));
    const messages = before.map(({ role, content }) => ({ role, content }));
    const model = $("model").value ? { model: answer.model } : {};
    const headers = { "Content-Type": "application/json", "Idempotency-Key": answer.key };
    const body = JSON.stringify({ messages, ...model });
    follow(turns.get(answer.key), ASK, { method: "POST", headers, body });
  }

  function follow(turn, path, options) {
    reading.set(turn.message.key, turn);
    turn.stream = SSE.open(address(path), {
      ...options,
      ...wire.tap("wire-chat"),
      onopen: (response) => opened(turn, response),
      onevent: (event) => isRead(turn) && receive(turn, event),
      onstate: (now, detail) => changed(turn, now, detail),
    });
    refresh();
  }

  const isRead = (turn) => reading.get(turn.message.key) === turn;

  /* From here on the answer is known by its id: a connection that breaks is made again
     as a reader of it, not as another question. */
  function opened(turn, response) {
    const { message } = turn;
    const id = message.id ?? response.headers.get("X-Answer-Id");
    if (turn.isStopped) return giveUp(turn, id);
    if (!message.id && id) {
      message.id = id;
      conversation.save();
    }
    turn.resumed = message.events ? Date.now() : 0;
    return id && { url: address(`answers/${id}`) };
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
    message.state = "receiving";
    if (turn.resumed && Date.now() - turn.resumed < AT_ONCE) message.caught += 1;
    turn.take(content, reasoning);
    if (message.events === 1) refresh();
  }

  const TROUBLE = { abandoned: "trouble-abandoned", server_stopping: "trouble-stopping" };

  function fail(turn, { type, message }) {
    if (type === "stopped") end(turn, "stopped");
    else end(turn, "failed", say(TROUBLE[type] ?? "trouble-failed", message));
  }

  function changed(turn, now, detail) {
    wire.state("wire-chat", now, detail);
    if (!isRead(turn)) return;
    turn.now = now;
    if (now === "closed") return refused(turn, detail);
    turn.connection(now, detail?.wait);
    refresh();
  }

  /* The stream has ended without the answer's own last word. */
  function refused(turn, { status, reason }) {
    if (status === 204) return end(turn, "done");
    if (status === 401) askForToken();
    if (status === 404 && turn.message.id) return end(turn, "failed", say("trouble-lost"));
    if (status) return end(turn, "failed", say("trouble-refused", status, reason));
    setTimeout(() => { // a page that is left is gone by then
      if (!isRead(turn)) return;
      server.look();
      end(turn, "failed", say("trouble-network", SERVER.host));
    });
  }

  async function end(turn, state, trouble) {
    const { message } = turn;
    reading.delete(message.key);
    Object.assign(message, { state, trouble, took: Date.now() - message.at });
    message.model ??= server.model;
    if (!turn.isStopped) turn.stream.done();
    if (turn !== watched) conversation.save();
    const drawn = turn.end();
    refresh();
    await drawn;
    announce(trouble || say(`answer-${state}`, turn.spoken()));
  }

  /* Before the response has come, nobody knows the answer's id: then the request stays
     open until it does. */
  function stop() {
    for (const turn of running()) {
      const { id } = turn.message;
      turn.isStopped = !id;
      end(turn, "stopped");
      if (id) giveUp(turn, id);
    }
    question.focus();
  }

  /* If this gets lost too: the server does not go on for long when nobody reads. */
  function giveUp(turn, id) {
    turn.stream.close();
    wire.tap("wire-chat").fetch(address(`answers/${id}`), { method: "DELETE" }).catch(() => {});
  }

  const running = () => [...reading.values()].filter((turn) => turn !== watched);
  const isBusy = () => running().length > 0;

  // -------------------------------------------------------------- the last turn again

  const acts = { again, regenerate: again, edit };

  function again(answer) {
    if (isBusy() || answer !== conversation.messages.at(-1)) return;
    conversation.drop([answer]);
    begin(Date.now());
    question.focus();
  }

  function edit(asked) {
    if (isBusy()) return;
    if (!isEditing()) draft = question.value;
    put(asked.content, asked);
  }

  /* Not if its question was cleared since, here or in another tab. */
  const isEditing = () => conversation.messages.includes(editing);

  /* Into the field; without a text, what was there before a question was edited. */
  function put(text = draft, edited = null) {
    editing = edited;
    if (!edited) draft = "";
    question.value = text;
    question.focus();
    fit();
    refresh();
  }

  // -------------------------------------------------------- reloads and other tabs

  /* What the page shows becomes what was said: at first, and when another tab has asked,
     ended or cleared. What we are reading ourselves we know best. */
  function sync() {
    const { messages } = conversation;
    const keys = new Set(messages.map(({ key }) => key));
    for (const key of turns.keys()) if (!keys.has(key)) drop(key);
    messages.forEach((message, n) => {
      const { key } = message;
      // Another tab has read an answer to its end, of which this one has read nothing.
      if (turns.get(key)?.isGrowing && !isUnderWay(message) && !reading.has(key)) drop(key);
      if (!turns.has(key)) turns.set(key, new Turn(message, acts));
      const { article } = turns.get(key);
      if (log.children[n] !== article) log.insertBefore(article, log.children[n] ?? null);
      article.classList.toggle("latest", n >= messages.length - 2);
    });
    refresh();
  }

  function drop(key) {
    const turn = turns.get(key);
    turns.delete(key);
    reading.delete(key);
    turn.stream?.close();
    turn.article.remove();
  }

  /* `atStart`: what has no id yet, no tab may be left that is asking it. */
  function resume(atStart = false) {
    for (const answer of conversation.messages.filter(isUnderWay)) {
      const { id, key, last } = answer;
      if (reading.has(key)) continue;
      if (id) follow(turns.get(key), `answers/${id}`, { lastEventId: last });
      else if (atStart) send(answer);
    }
  }

  /* `#answer/<id>`: an answer by its own address, on whatever device. */
  function watch() {
    const [, id] = /^#answer\/([\w-]+)$/.exec(location.hash) ?? [];
    if (watched?.message.id === id) return;
    reading.delete(watched?.message.key);
    watched?.stream.close();
    watched = null;
    if (id) {
      const fields = { id, key: `watched ${id}`, at: Date.now(), isWatched: true, model: "" };
      watched = new Turn(newAnswer(fields), {});
      follow(watched, `answers/${id}`);
    }
    $("watched").replaceChildren(...(watched ? [watched.article] : []));
    refresh();
  }

  // -------------------------------------------------------------------------- state

  /* What stands under the field, and what there is to see. */
  function refresh() {
    const isEmpty = conversation.messages.length === 0;
    const hidden = {
      "watch": !watched,
      "log": watched,
      "ask": watched,
      "welcome": !isEmpty || watched,
      "fresh": isEmpty || watched,
      "undo": !restore || watched,
      "editing": !isEditing(),
      "send": isBusy(),
      "stop": !isBusy(),
      "cut-chat": reading.size === 0 && !network.left,
    };
    for (const [id, isHidden] of Object.entries(hidden)) $(id).hidden = Boolean(isHidden);
    $("chat-title").classList.toggle("unseen", $("welcome").hidden);
    log.classList.toggle("busy", isBusy());
    $("chat-state").textContent = words();
    stick();
  }

  function words() {
    const turn = [...reading.values()].at(-1);
    if (turn?.now === "waiting") return say("chat-lost");
    if (turn?.now === "connecting" && turn.message.id) return say("chat-resuming");
    if (turn) return say(turn.message.events ? "chat-receiving" : "chat-waiting");
    if (restore) return say("cleared");
    if (server.models.length > 1) return say("chat-choose");
    if (server.model) return say("chat-ready", server.model);
    return server.isLookedFor ? say("chat-none", SERVER.host) : say("chat-hello");
  }

  const server = {
    model: null, // its name, once the server has said it
    models: [],
    isLookedFor: false,

    async look(failures = 0) {
      clearTimeout(this.timer);
      Object.assign(this, { model: null, models: [] });
      try {
        ({ model: this.model } = await (await network.fetch(address("healthz"))).json());
        const response = await network.fetch(address("v1/models"));
        if (response.ok) this.models = (await response.json()).data.map(({ id }) => id);
      } catch {
        this.timer = setTimeout(() => this.look(failures + 1), SSE.jitter(failures));
      }
      this.isLookedFor = true;
      this.offerModels();
      refresh();
    },

    offerModels() {
      const isChoice = this.models.length > 1;
      const options = this.models.map((name) => element("option", { value: name }, name));
      const chosen = store.get(MODEL);
      $("model").hidden = !isChoice;
      $("model").replaceChildren(...(isChoice ? options : []));
      $("model").value = this.models.includes(chosen) ? chosen : this.model;
    },
  };

  // ------------------------------------------------------------------------- input

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value.trim();
    if (!text) return;
    if (isBusy()) return void ($("chat-state").textContent = say("chat-busy"));
    const { messages } = conversation;
    if (isEditing()) conversation.drop(messages.slice(messages.indexOf(editing)));
    put();
    ask(text);
  });

  question.addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // 229: Safari's last Enter
    if (event.key !== "Enter" || event.shiftKey || composing) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });

  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || shown !== "chat") return;
    if (isEditing()) put();
    else if (isBusy()) stop();
  });

  $("stop").addEventListener("click", ({ detail }) => {
    if (isBusy() && detail < 2) stop(); // the second half of a double click on Send is no Stop
  });

  $("fresh").addEventListener("click", () => {
    stop();
    restore = conversation.clear();
    sync();
  });

  $("undo").addEventListener("click", () => {
    restore();
    restore = null;
    sync();
    toEnd();
    question.focus();
  });

  $("cancel").addEventListener("click", () => put());
  $("model").addEventListener("change", ({ target }) => store.set(MODEL, target.value));

  function fit() {
    if (CSS.supports("field-sizing", "content")) return;
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight}px`;
  }

  question.addEventListener("input", fit);

  for (const button of $("examples").querySelectorAll("button")) {
    button.addEventListener("click", () => {
      question.focus();
      if (!isBusy()) ask(button.textContent);
    });
  }

  /* A reload keeps what has come of an answer, what was being written, and the place to
     write it. */
  function saveProgress() {
    if (reading.size) conversation.save();
  }

  function leave() {
    saveProgress();
    const draft = { text: question.value, focused: document.activeElement === question };
    store.set(DRAFT, draft, "sessionStorage");
  }

  function takeDraft() {
    const draft = store.get(DRAFT, "sessionStorage");
    if (draft?.text) question.value = draft.text;
    if (draft?.focused) question.focus();
    fit();
  }

  views.chat.grows = () => conversation.messages.length > 0;
  network.controls($("cut-chat"), refresh);
  conversation.listen(() => {
    sync();
    resume();
  });
  addEventListener("hashchange", watch);
  addEventListener("pagehide", leave);
  setInterval(saveProgress, 1000);
  addEventListener("DOMContentLoaded", () => {
    sync();
    toEnd();
    takeDraft();
    watch();
    server.look();
    resume(true);
  });
}
