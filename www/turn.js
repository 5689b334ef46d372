"use strict";

/* One message of the chat on the page: a question, or an answer with its reasoning, what
   became of it, its numbers, and what can be done with it. */

class Turn {
  stream = null; // of SSE.open(), once this tab reads the answer
  counted = 0; // ms: when the numbers were last drawn

  /* `acts`: what can be done with it, by name; null if it is only watched. */
  constructor(message, acts) {
    Object.assign(this, { message, acts });
    const className = message.role === "user" ? "question" : "answer";
    this.body = element("div", { className: "text" });
    this.article = element("article", { className, ariaLabel: say(className) }, this.body);
    if (className === "question") this.drawQuestion();
    else this.drawAnswer();
  }

  get isUnderWay() { return this.message.state === "under way"; }

  get isRead() { return this.stream !== null && this.isUnderWay; }

  drawQuestion() {
    this.body.dir = "auto";
    this.body.textContent = this.message.content;
    this.article.append(this.button("edit"));
  }

  drawAnswer() {
    this.hold = element("p", { className: "hold", hidden: true }, say("hold"));
    this.numbers = element("span", { className: "stats" });
    this.foot = element("p", { className: "answer-foot" }, this.numbers);
    this.article.append(this.hold, this.foot);
    this.text = new Markdown(this.body, () => this.grown());
    this.article.classList.toggle("under-way", this.isUnderWay);
    this.draw(this.message.content, this.message.reasoning);
    if (!this.isUnderWay) this.end();
  }

  grown() {
    if (Date.now() - this.counted > 250) this.count(); // to be read, not to flicker
    stick();
  }

  /* More of the answer, or of what the model thinks before it speaks. */
  take(content = "", reasoning = "") {
    this.message.content += content;
    this.message.reasoning += reasoning;
    this.draw(content, reasoning);
  }

  draw(content, reasoning) {
    if (reasoning) {
      this.thoughts ??= this.foldThoughts();
      this.thoughts.append(reasoning);
    }
    if (!content) return;
    if (this.summary) this.summary.textContent = say("thought");
    this.text.append(content);
  }

  foldThoughts() {
    const body = element("div", { className: "text" });
    this.summary = element("summary", {}, say("thinking"));
    this.article.prepend(element("details", { className: "thinking" }, this.summary, body));
    return new Markdown(body, stick);
  }

  /* Whether nothing comes, because the connection is gone. */
  putOnHold(isOnHold) {
    this.article.classList.toggle("on-hold", isOnHold);
    this.hold.hidden = !isOnHold;
    stick();
  }

  /* Resolves once all of it is on the page. */
  end() {
    const { message, article, foot, acts } = this;
    this.putOnHold(false);
    article.classList.remove("under-way");
    this.count();
    if (message.trouble) article.append(this.trouble());
    else if (acts) foot.append(this.button(message.state === "done" ? "regenerate" : "again"));
    if (message.content) foot.append(copyButton(() => message.content));
    const href = `#answer/${message.id}`;
    const link = { className: "plain", href, title: say("link-title") };
    if (message.id && acts) foot.append(element("a", link, say("link")));
    this.thoughts?.finish();
    return this.text.finish();
  }

  /* What a screen reader is to say: without the words around code. (`innerText` would lay out
     all of a long answer.) */
  spoken() {
    const said = ":is(h2, h3, h4, h5, h6, p, pre, th, td):not(.code-head)";
    return [...this.body.querySelectorAll(said)].map((part) => part.textContent).join("\n");
  }

  trouble() {
    const words = element("p", { dir: "auto" }, this.message.trouble);
    const ways = this.acts ? [this.button("again", "turn")] : [];
    return element("div", { className: "trouble box" }, words, ...ways);
  }

  /* Those of the last turn only are seen. */
  button(name, className = "turn plain") {
    const onclick = () => this.acts[name](this);
    return element("button", { type: "button", className, onclick }, say(name));
  }

  count() {
    const { state, at, first, latest, events, caught, took, finish, model } = this.message;
    const isTimed = events && this.acts; // what is watched is not read as it is written
    const writing = (latest - first) / 1000;
    const parts = [];
    const add = (text, className = "") => parts.push(element("span", { className }, text));
    this.counted = Date.now();
    if (state === "stopped") add(say("stopped"), "fate");
    if (finish) add(say(finish === "length" ? "cut-short" : "finish", finish), "fate");
    if (model) add(model, "model");
    if (isTimed) add(say("stats-first", decimal(first / 1000, 2)));
    if (isTimed && writing > 0.1) add(say("stats-rate", decimal((events - 1) / writing)));
    if (events) add(say("stats-events", decimal(events, 0)));
    if (isTimed && caught) add(say("stats-caught", decimal(caught, 0)));
    if (isTimed) add(say("stats-total", decimal((took ?? this.counted - at) / 1000)));
    this.numbers.replaceChildren(...parts);
  }
}
