"use strict";

/* The chat: one POST, whose answer is an event stream, token by token.

   The answer belongs to the server; a tab only reads it. So the tab remembers the answer's
   id and how far it has read, and any tab, this one reloaded or a second one, goes on from
   there with GET /answers/{id}. The conversation itself lies in localStorage, where the
   tabs tell each other of new questions; what an answer says, each hears from the server. */

{
  const ASK = "chatgptApi/chatgpt_qa_stream";
  const CONVERSATION = "chatstream.conversation"; // [{role, content, state, id, ...}]
  const PROGRESS = "chatstream.progress"; // how far the answer under way has come
  const UNDER_WAY = ["waiting", "receiving"];

  const question = $("question");
  const log = $("log");
  let messages = store.get(CONVERSATION) ?? [];
  let live = null; // {answer, stream}: what this tab is reading
  const drawn = new WeakMap(); // message -> its elements

  // ------------------------------------------------------------ asking and following

  function ask(text) {
    messages.push({ role: "user", content: text });
    add(messages.at(-1));
    begin();
  }

  function begin() {
    const history = messages.filter(({ content }) => content);
    const body = JSON.stringify({
      messages: history.map(({ role, content }) => ({ role, content })),
    });
    const answer = { role: "assistant", content: "", state: "waiting", asked: Date.now() };
    messages.push(answer);
    save();
    add(answer);
    toEnd();
    const headers = { "Content-Type": "application/json" };
    follow(answer, address(ASK), { method: "POST", headers, body });
  }

  function follow(answer, url, options) {
    const run = { answer };
    live = run;
    run.stream = SSE.open(url, {
      ...options,
      fetch: wire.fetch("wire-chat"),
      onbytes: wire.recorder("wire-chat"),
      onopen: (response) => opened(run, response),
      onevent: (event) => live === run && receive(answer, event),
      onstate: (now, detail) => changed(run, now, detail),
    });
    refresh();
  }

  /* From here on the answer is known by its id: a connection that breaks is made again
     as a reader of it, not as another question. */
  function opened(run, response) {
    const { answer } = run;
    const id = answer.id ?? response.headers.get("X-Answer-Id");
    if (run.stopped) return giveUp(run, id);
    if (!answer.id && id) {
      answer.id = id;
      save();
    }
    return id && { url: address(`answers/${id}`) };
  }

  function receive(answer, event) {
    if (event.data === "[DONE]") return end(answer, "done");
    const { content, error } = JSON.parse(event.data);
    if (error) return fail(answer, error);
    if (!content) return;
    answer.latest = Date.now() - answer.asked;
    answer.first ??= answer.latest;
    answer.tokens = (answer.tokens ?? 0) + 1;
    answer.content += content;
    answer.state = "receiving";
    drawn.get(answer).text.append(content);
    if (answer.tokens === 1) refresh();
  }

  function fail(answer, error) {
    if (error.type === "stopped") end(answer, "stopped");
    else end(answer, "failed", say("trouble-failed", error.message));
  }

  function changed(run, now, detail) {
    wire.state("wire-chat", now, detail);
    if (live !== run) return;
    run.now = now;
    if (now === "closed") refused(run.answer, detail);
    else refresh();
  }

  /* The stream has ended without the answer's own last word. */
  function refused(answer, failure) {
    const { status, body } = failure;
    if (status === 204) end(answer, "done");
    else if (status === 404 && answer.id) end(answer, "failed", say("trouble-lost"));
    else if (status) end(answer, "failed", say("trouble-refused", status, reason(body)));
    else end(answer, "failed", say("trouble-network", SERVER.host));
  }

  function reason(body) {
    try {
      return JSON.parse(body).error.message;
    } catch {
      return body.slice(0, 200); // from something in between, a proxy say
    }
  }

  function end(answer, state, trouble) {
    const run = live;
    live = null;
    Object.assign(answer, { state, trouble, took: Date.now() - answer.asked });
    if (!run.stopped) run.stream.close();
    drawn.get(answer).text.finish();
    finishDrawing(answer);
    save();
    refresh();
    announce(trouble || say(`answer-${state}`, answer.content));
  }

  /* Before the response has come, nobody knows the answer's id: then the request stays
     open until it does. */
  function stop() {
    const run = live;
    const { id } = run.answer;
    run.stopped = !id;
    end(run.answer, "stopped");
    if (id) giveUp(run, id);
    question.focus();
  }

  /* If this gets lost too: the server does not go on for long when nobody reads. */
  function giveUp(run, id) {
    run.stream.close();
    wire.fetch("wire-chat")(address(`answers/${id}`), { method: "DELETE" }).catch(() => {});
  }

  // -------------------------------------------------------- reloads and other tabs

  function save() {
    store.set(CONVERSATION, messages);
  }

  function saveProgress() {
    if (!live?.answer.id) return;
    const { id, content, tokens, first, latest } = live.answer;
    const last = live.stream.lastEventId;
    store.set(PROGRESS, { id, content, tokens, first, latest, last });
  }

  function resume() {
    const answer = messages.at(-1);
    if (!answer || !UNDER_WAY.includes(answer.state)) return;
    if (!answer.id) return interrupted(answer);
    follow(answer, address(`answers/${answer.id}`), { lastEventId: answer.last });
  }

  /* Not saved: should it be another tab that is asking just now, that one will tell. */
  function interrupted(answer) {
    Object.assign(answer, { state: "failed", trouble: say("trouble-interrupted") });
    finishDrawing(answer);
  }

  /* Another tab has asked, ended or cleared. What we are reading ourselves we know best. */
  function adopt(theirs) {
    const [ours, last] = [messages.at(-1), theirs.at(-1)];
    const same = messages.length === theirs.length && ours?.asked === last?.asked
      && ours?.id === last?.id;
    if (same && (live || ours?.state === last?.state)) return;
    const run = live;
    live = null;
    run?.stream.close();
    messages = theirs;
    drawAll();
  }

  // ------------------------------------------------------------------------ drawing

  function drawAll() {
    const answer = messages.at(-1);
    const progress = store.get(PROGRESS);
    if (answer?.id && answer.id === progress?.id && UNDER_WAY.includes(answer.state)) {
      Object.assign(answer, progress);
    }
    log.replaceChildren();
    messages.forEach(add);
    refresh();
    if (messages.length) toEnd();
    resume();
  }

  function add(message) {
    const mine = message.role === "user";
    const body = element("div", { className: "text" });
    const article = element("article", { className: mine ? "question" : "answer" }, body);
    article.setAttribute("aria-label", say(mine ? "you" : "answer"));
    const text = new GrowingText(body, () => (stick(), stats(message)));
    drawn.set(message, { article, text });
    log.append(article);
    text.append(message.content);
    if (!mine && UNDER_WAY.includes(message.state)) article.classList.add("under-way");
    else text.finish();
    if (!mine) addFoot(message);
  }

  function addFoot(answer) {
    const numbers = element("span", { className: "stats" });
    const foot = element("p", { className: "answer-foot" }, numbers);
    Object.assign(drawn.get(answer), { numbers, foot, counted: 0 });
    drawn.get(answer).article.append(foot);
    if (!UNDER_WAY.includes(answer.state)) finishDrawing(answer);
  }

  function finishDrawing(answer) {
    const { article, foot } = drawn.get(answer);
    article.classList.remove("under-way");
    stats(answer, true);
    if (answer.content) foot.append(copyButton(answer));
    if (answer.trouble) article.append(trouble(answer));
    stick();
  }

  function stats(answer, now = false) {
    const parts = drawn.get(answer);
    if (!parts.numbers) return;
    if (!now && Date.now() - parts.counted < 250) return; // to be read, not to flicker
    parts.counted = Date.now();
    parts.numbers.replaceChildren(...summary(answer));
  }

  function summary({ state, asked, first, latest, tokens, took }) {
    const parts = state === "stopped" ? [element("strong", {}, say("stopped"))] : [];
    const add = (...words) => parts.push(element("span", {}, say(...words)));
    if (!tokens) return parts;
    const seconds = (took ?? Date.now() - asked) / 1000;
    const writing = (latest - first) / 1000;
    add("stats-first", decimal(first / 1000, 2));
    if (tokens > 1 && writing > 0.1) add("stats-rate", decimal((tokens - 1) / writing));
    add("stats-tokens", tokens.toLocaleString(LANGUAGE));
    add("stats-total", decimal(seconds));
    return parts;
  }

  function trouble(answer) {
    const box = element("div", { className: "trouble" }, element("p", {}, answer.trouble));
    const again = element("button", { type: "button" }, say("again"));
    again.addEventListener("click", () => tryAgain(answer));
    box.append(again); // seen under the last answer only
    return box;
  }

  function tryAgain(answer) {
    if (live || answer !== messages.at(-1)) return;
    messages.pop();
    drawn.get(answer).article.remove();
    begin();
    question.focus();
  }

  function copyButton(answer) {
    const button = element("button", { type: "button", className: "plain" }, say("copy"));
    button.addEventListener("click", async () => {
      await copy(answer.content);
      button.textContent = say("copied");
      setTimeout(() => (button.textContent = say("copy")), 1500);
    });
    return button;
  }

  /* The clipboard proper is there on https, localhost and file:// only. */
  async function copy(text) {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const area = element("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }

  /* What stands under the field, and which buttons there are. */
  function refresh() {
    $("welcome").hidden = messages.length > 0;
    $("chat-title").classList.toggle("unseen", messages.length > 0);
    $("fresh").disabled = messages.length === 0;
    $("send").hidden = Boolean(live);
    $("stop").hidden = !live;
    $("chat-state").textContent = words();
  }

  let model = null; // its name, once the server has said it
  let lookedFor = false;

  function words() {
    if (!live) {
      if (model) return say("chat-ready", model);
      return lookedFor ? say("chat-none", SERVER.host) : say("chat-hello");
    }
    const { answer, now } = live;
    if (now === "waiting") return say("chat-lost");
    if (now === "connecting" && answer.id) return say("chat-resuming");
    return say(answer.tokens ? "chat-receiving" : "chat-waiting");
  }

  async function findServer(attempt = 0) {
    try {
      ({ model } = await (await fetch(address("healthz"))).json());
    } catch {
      setTimeout(findServer, SSE.jitter(attempt), attempt + 1);
    }
    lookedFor = true;
    refresh();
  }

  // ------------------------------------------------------------------------- input

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value.trim();
    if (live || !text) return;
    question.value = "";
    fit();
    question.focus();
    ask(text);
  });

  question.addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // 229: Safari's last Enter
    if (event.key !== "Enter" || event.shiftKey || composing) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });

  addEventListener("keydown", (event) => {
    const stops = event.key === "Escape" && !event.isComposing && shown === "chat";
    if (stops && live) stop();
  });

  $("stop").addEventListener("click", ({ detail }) => {
    if (live && detail < 2) stop(); // the second half of a double click on Send is no Stop
  });

  $("fresh").addEventListener("click", () => {
    if (live) stop();
    messages = [];
    save();
    drawAll();
    question.focus();
  });

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
      if (!live) ask(say(key));
    });
    $("examples").append(element("li", {}, button));
  }

  views.chat.grows = () => messages.length > 0;
  addEventListener("storage", ({ key }) => {
    if (key === CONVERSATION) adopt(store.get(CONVERSATION) ?? []);
  });
  addEventListener("pagehide", saveProgress);
  setInterval(saveProgress, 1000);
  addEventListener("DOMContentLoaded", () => (drawAll(), findServer()));
}
