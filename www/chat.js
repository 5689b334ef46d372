"use strict";

/* The chat: one POST, whose answer is an event stream, token by token.

   The answer belongs to the server; a tab only reads it. So the tab remembers the answer's
   id and how far it has read, and any tab, this one reloaded or a second one, goes on from
   there with GET /answers/{id}. What an answer says, each tab hears from the server. */

{
  const ASK = "chatgptApi/chatgpt_qa_stream";
  const PROGRESS = `chatstream.progress ${SERVER.origin}${SERVER.pathname}`; // of answers under way
  const DRAFT = "chatstream.draft"; // what is in the field, and whether it has the focus
  const MODEL = "chatstream.model"; // the one that was chosen
  const AT_ONCE = 100; // ms after a connection opens: what comes then was missed before

  const question = $("question");
  const log = $("log");
  const turns = new Map(); // a message's key -> its Turn
  const runs = new Map(); // an answer's key -> what this tab is reading of it
  const FROM_THE_START = { content: "", reasoning: "", events: 0, caught: 0, first: null, last: "" };
  const ACTS = { again, regenerate: again, edit };
  let editing = null; // the question that is being edited
  let restore = null; // brings back the conversation that was cleared
  let watched = null; // the Turn of an answer that was opened by its address

  // ------------------------------------------------------------ asking and following

  function ask(content) {
    const at = Date.now() + Math.random(); // of two tabs in the same moment, too, one is first
    conversation.add({ role: "user", content, at });
    begin(at);
  }

  function begin(at) {
    const model = $("model").value || server.model;
    const answer = { role: "assistant", content: "", state: "waiting", model, at };
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
    follow(answer, turns.get(answer.key), address(ASK), { method: "POST", headers, body });
  }

  function follow(answer, turn, url, options) {
    const run = { answer, turn, now: "connecting" };
    runs.set(answer.key, run);
    run.stream = SSE.open(url, {
      ...options,
      fetch: wire.fetch("wire-chat"),
      onbytes: wire.recorder("wire-chat"),
      onopen: (response) => opened(run, response),
      onevent: (event) => isRead(run) && receive(run, event),
      onstate: (now, detail) => changed(run, now, detail),
    });
    refresh();
  }

  const isRead = (run) => runs.get(run.answer.key) === run;

  /* From here on the answer is known by its id: a connection that breaks is made again
     as a reader of it, not as another question. */
  function opened(run, response) {
    const { answer } = run;
    const id = answer.id ?? response.headers.get("X-Answer-Id");
    if (run.stopped) return giveUp(run, id);
    if (!answer.id && id) {
      answer.id = id;
      conversation.save();
    }
    run.resumed = answer.events ? Date.now() : 0;
    return id && { url: address(`answers/${id}`) };
  }

  function receive(run, event) {
    const { answer, turn } = run;
    if (event.data === "[DONE]") return end(run, "done");
    const { content, reasoning, finish_reason: finish, error } = JSON.parse(event.data);
    if (error) return fail(run, error);
    if (finish) answer.finish = finish;
    if (reasoning) {
      answer.reasoning = (answer.reasoning ?? "") + reasoning;
      turn.reason(reasoning);
    }
    if (content) {
      answer.content += content;
      turn.append(content);
    }
    if (content || reasoning) count(run);
  }

  function count({ answer, resumed }) {
    answer.latest = Date.now() - answer.at;
    answer.first ??= answer.latest;
    answer.events = (answer.events ?? 0) + 1;
    if (resumed && Date.now() - resumed < AT_ONCE) answer.caught = (answer.caught ?? 0) + 1;
    answer.state = "receiving";
    if (answer.events === 1) refresh();
  }

  const TROUBLE = { abandoned: "trouble-abandoned", server_stopping: "trouble-stopping" };

  function fail(run, error) {
    if (error.type === "stopped") end(run, "stopped");
    else end(run, "failed", say(TROUBLE[error.type] ?? "trouble-failed", error.message));
  }

  function changed(run, now, detail) {
    wire.state("wire-chat", now, detail);
    if (!isRead(run)) return;
    run.now = now;
    if (now === "closed") return refused(run, detail);
    run.turn.connection(now, detail?.wait);
    refresh();
  }

  /* The stream has ended without the answer's own last word. */
  function refused(run, failure) {
    const { status, reason } = failure;
    if (status === 204) return end(run, "done");
    if (status === 401) askForToken();
    if (status === 404 && run.answer.id) return end(run, "failed", say("trouble-lost"));
    if (status) return end(run, "failed", say("trouble-refused", status, reason));
    setTimeout(() => isRead(run) && unreachable(run)); // a page that is left is gone by then
  }

  function unreachable(run) {
    server.look();
    end(run, "failed", say("trouble-network", SERVER.host));
  }

  async function end(run, state, trouble) {
    const { answer, turn } = run;
    runs.delete(answer.key);
    Object.assign(answer, { state, trouble, took: Date.now() - answer.at });
    answer.model ??= server.model;
    if (!run.stopped) run.stream.done();
    if (turn !== watched) conversation.save();
    const drawn = turn.end();
    refresh();
    await drawn;
    announce(trouble || say(`answer-${state}`, turn.spoken()));
  }

  /* Before the response has come, nobody knows the answer's id: then the request stays
     open until it does. */
  function stop() {
    for (const run of [...runs.values()]) {
      if (run.turn === watched) continue;
      const { id } = run.answer;
      run.stopped = !id;
      end(run, "stopped");
      if (id) giveUp(run, id);
    }
    question.focus();
  }

  /* If this gets lost too: the server does not go on for long when nobody reads. */
  function giveUp(run, id) {
    run.stream.close();
    wire.fetch("wire-chat")(address(`answers/${id}`), { method: "DELETE" }).catch(() => {});
  }

  const isBusy = () => [...runs.values()].some(({ turn }) => turn !== watched);

  // -------------------------------------------------------------- the last turn again

  function again(answer) {
    if (isBusy() || answer !== conversation.messages.at(-1)) return;
    conversation.drop([answer]);
    begin(Date.now());
    question.focus();
  }

  function edit(asked) {
    if (isBusy()) return;
    editing = asked;
    put(asked.content);
    refresh();
  }

  function put(text) {
    question.value = text;
    question.focus();
    fit();
  }

  function stopEditing() {
    editing = null;
    put("");
    refresh();
  }

  // -------------------------------------------------------- reloads and other tabs

  function saveProgress() {
    const entries = [...runs.values()].filter(({ answer }) => answer.id).map((run) => {
      const { content, reasoning, events, first, latest, caught } = run.answer;
      const last = run.stream.lastEventId;
      return [run.answer.key, { content, reasoning, events, first, latest, caught, last }];
    });
    if (entries.length) store.set(PROGRESS, Object.fromEntries(entries));
  }

  /* What the page shows becomes what was said: at first, and when another tab has asked,
     ended or cleared. What we are reading ourselves we know best. */
  function sync() {
    const { messages } = conversation;
    const keys = new Set(messages.map(({ key }) => key));
    for (const key of turns.keys()) if (!keys.has(key)) drop(key);
    const progress = store.get(PROGRESS) ?? {};
    messages.forEach((message, n) => {
      if (isStale(message)) drop(message.key);
      if (!turns.has(message.key)) {
        if (isUnderWay(message)) Object.assign(message, FROM_THE_START, progress[message.key]);
        turns.set(message.key, new Turn(message, ACTS));
      }
      const { article } = turns.get(message.key);
      if (log.children[n] !== article) log.insertBefore(article, log.children[n] ?? null);
      article.classList.toggle("latest", n >= messages.length - 2);
    });
    refresh();
  }

  /* Another tab has read an answer to its end, of which this one has read nothing. */
  function isStale(message) {
    const { key } = message;
    return turns.get(key)?.isGrowing && !isUnderWay(message) && !runs.has(key);
  }

  function drop(key) {
    const run = runs.get(key);
    runs.delete(key);
    run?.stream.close();
    turns.get(key).article.remove();
    turns.delete(key);
  }

  /* `atStart`: what has no id yet, no tab may be left that is asking it. */
  function resume(atStart = false) {
    for (const answer of conversation.messages.filter(isUnderWay)) {
      const { id, key, last } = answer;
      if (runs.has(key)) continue;
      if (id) follow(answer, turns.get(key), address(`answers/${id}`), { lastEventId: last });
      else if (atStart) send(answer);
    }
  }

  /* `#answer/<id>`: an answer by its own address, on whatever device. */
  function watch() {
    const [, id] = /^#answer\/([\w.-]+)$/.exec(location.hash) ?? [];
    if (watched?.message.id === id) return;
    if (watched) runs.get(watched.message.key)?.stream.close();
    if (watched) runs.delete(watched.message.key);
    watched = null;
    $("watched").replaceChildren();
    if (id) {
      const answer = { role: "assistant", content: "", state: "waiting", id };
      Object.assign(answer, { key: `watched ${id}`, at: Date.now(), isWatched: true, model: "" });
      watched = new Turn(answer, {});
      $("watched").append(watched.article);
      follow(answer, watched, address(`answers/${id}`));
    }
    refresh();
  }

  // -------------------------------------------------------------------------- state

  /* What stands under the field, and which buttons there are. */
  function refresh() {
    const isEmpty = conversation.messages.length === 0;
    const isRunning = isBusy();
    $("watch").hidden = !watched;
    log.hidden = $("ask").hidden = Boolean(watched);
    $("welcome").hidden = !isEmpty || Boolean(watched);
    $("chat-title").classList.toggle("unseen", !isEmpty || Boolean(watched));
    $("fresh").disabled = isEmpty || Boolean(watched);
    $("undo").hidden = !restore || Boolean(watched);
    $("editing").hidden = !editing;
    $("send").hidden = isRunning;
    $("stop").hidden = !isRunning;
    log.classList.toggle("busy", isRunning);
    $("chat-state").textContent = words();
    $("cut-chat").hidden = runs.size === 0 && !network.left;
    stick();
  }

  function words() {
    const run = [...runs.values()].at(-1);
    if (!run) {
      if (restore) return say("cleared");
      if (server.models.length > 1) return say("chat-choose");
      if (server.model) return say("chat-ready", server.model);
      return server.isLookedFor ? say("chat-none", SERVER.host) : say("chat-hello");
    }
    const { answer, now } = run;
    if (now === "waiting") return say("chat-lost");
    if (now === "connecting" && answer.id) return say("chat-resuming");
    return say(answer.events ? "chat-receiving" : "chat-waiting");
  }

  const server = {
    model: null, // its name, once the server has said it
    models: [],
    isLookedFor: false,

    async look(attempt = 0) {
      clearTimeout(this.timer);
      Object.assign(this, { model: null, models: [] });
      try {
        ({ model: this.model } = await (await network.fetch(address("healthz"))).json());
        this.models = await listModels();
      } catch {
        this.timer = setTimeout(() => this.look(attempt + 1), SSE.jitter(attempt));
      }
      this.isLookedFor = true;
      offerModels(this.models);
      refresh();
    },
  };

  async function listModels() {
    const response = await network.fetch(address("v1/models"));
    if (!response.ok) return [];
    return (await response.json()).data.map(({ id }) => id);
  }

  function offerModels(models) {
    const chosen = store.get(MODEL);
    const select = $("model");
    select.hidden = models.length < 2;
    select.replaceChildren();
    if (select.hidden) return;
    select.append(...models.map((name) => element("option", { value: name }, name)));
    select.value = models.includes(chosen) ? chosen : server.model;
  }

  // ------------------------------------------------------------------------- input

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value.trim();
    if (!text) return;
    if (isBusy()) return void ($("chat-state").textContent = say("chat-busy"));
    const { messages } = conversation;
    const from = editing ? messages.indexOf(editing) : -1;
    editing = null;
    put("");
    if (from >= 0) conversation.drop(messages.slice(from));
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
    if (editing) stopEditing();
    else if (isBusy()) stop();
  });

  $("stop").addEventListener("click", ({ detail }) => {
    if (isBusy() && detail < 2) stop(); // the second half of a double click on Send is no Stop
  });

  $("fresh").addEventListener("click", () => {
    stop();
    restore = conversation.clear();
    sync();
    question.focus();
  });

  $("undo").addEventListener("click", () => {
    restore();
    restore = null;
    sync();
    toEnd();
    question.focus();
  });

  $("cancel").addEventListener("click", stopEditing);
  $("model").addEventListener("change", ({ target }) => store.set(MODEL, target.value));

  function fit() {
    if (CSS.supports("field-sizing", "content")) return;
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight}px`;
  }

  question.addEventListener("input", fit);

  for (const key of ["example-1", "example-2", "example-3"]) {
    const button = element("button", { type: "button" }, say(key));
    button.addEventListener("click", () => {
      question.focus();
      if (!isBusy()) ask(say(key));
    });
    $("examples").append(element("li", {}, button));
  }

  /* A reload keeps what was being written, and the place to write it. */
  function saveDraft() {
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
  conversation.reading = runs;
  conversation.onchange = () => (sync(), resume());
  addEventListener("hashchange", watch);
  addEventListener("pagehide", () => (saveProgress(), saveDraft()));
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
