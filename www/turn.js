"use strict";

/* One message of the chat on the page: a question, or an answer with its reasoning, what
   became of it, its numbers, and what can be done with it. */

const SAID = ":is(h2, h3, h4, h5, h6, p, pre, th, td)";

class Turn {
  constructor(message, acts) {
    Object.assign(this, { message, acts });
    const className = message.role === "user" ? "question" : "answer";
    this.body = element("div", { className: "text" });
    const ariaLabel = say(className === "question" ? "you" : "answer");
    this.article = element("article", { className, ariaLabel }, this.body);
    if (className === "question") this.drawQuestion();
    else this.drawAnswer();
  }

  drawQuestion() {
    this.body.dir = "auto";
    this.body.textContent = this.message.content;
    this.article.append(this.button("edit"));
  }

  drawAnswer() {
    this.numbers = element("span", { className: "stats" });
    this.foot = element("p", { className: "answer-foot" }, this.numbers);
    this.hold = element("p", { className: "hold", hidden: true });
    this.article.append(this.hold, this.foot);
    this.text = new Markdown(this.body, () => this.grown());
    this.counted = 0; // ms: when the numbers were last drawn
    this.isGrowing = isUnderWay(this.message);
    this.article.classList.toggle("under-way", this.isGrowing);
    this.draw(this.message.content, this.message.reasoning);
    if (!this.isGrowing) this.end();
  }

  grown() {
    if (Date.now() - this.counted > 250) this.count(); // to be read, not to flicker
    stick();
  }

  /* More of the answer, or of what the model thinks before it speaks. */
  take(content = "", reasoning = "") {
    this.message.content += content;
    if (reasoning) this.message.reasoning = (this.message.reasoning ?? "") + reasoning;
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

  /* The connection: "open", or why nothing comes. */
  connection(state, wait = 0) {
    clearInterval(this.countdown);
    const isOpen = state === "open" || !this.message.id;
    this.article.classList.toggle("on-hold", !isOpen);
    this.hold.hidden = isOpen;
    const until = Date.now() + wait;
    const tell = () => {
      const seconds = Math.ceil((until - Date.now()) / 1000);
      this.hold.textContent = seconds > 0 ? say("hold-waiting", seconds) : say("hold-connecting");
    };
    tell();
    if (!isOpen) this.countdown = setInterval(tell, 250);
    stick();
  }

  /* Resolves once all of it is on the page. */
  end() {
    const { message, article, foot } = this;
    this.connection("open");
    this.isGrowing = false;
    article.classList.remove("under-way");
    this.count();
    if (message.trouble) article.append(this.trouble());
    else if (!message.isWatched) foot.append(this.button(this.way()));
    if (message.content) foot.append(copyButton(() => message.content));
    if (message.id && !message.isWatched) foot.append(this.link());
    this.thoughts?.finish();
    return this.text.finish();
  }

  way() {
    return this.message.state === "done" ? "regenerate" : "again";
  }

  /* What a screen reader is to say: without the words around code. (`innerText` would lay out
     all of a long answer.) */
  spoken() {
    const parts = this.body.querySelectorAll(`${SAID}:not(.code-head)`);
    return [...parts].map(({ textContent }) => textContent).join("\n");
  }

  trouble() {
    const words = element("p", { dir: "auto" }, this.message.trouble);
    const ways = this.message.isWatched ? [] : [this.button("again", "turn")];
    return element("div", { className: "trouble box" }, words, ...ways);
  }

  /* Those of the last turn only are seen. */
  button(name, className = "turn plain") {
    const button = element("button", { type: "button", className }, say(name));
    button.addEventListener("click", () => this.acts[name](this.message));
    return button;
  }

  link() {
    const href = `#answer/${this.message.id}`;
    return element("a", { className: "plain", href, title: say("link-title") }, say("link"));
  }

  count() {
    const { state, at, first, latest, events, caught, took, finish, model } = this.message;
    const isTimed = events && !this.message.isWatched; // else it is not read as it is written
    const writing = (latest - first) / 1000;
    const parts = [];
    const add = (text, className = "") => parts.push(element("span", { className }, text));
    this.counted = Date.now();
    if (state === "stopped") add(say("stopped"), "fate");
    if (finish) add(say(finish === "length" ? "cut-short" : "finish", finish), "fate");
    if (model) add(model, "model");
    if (isTimed) add(say("stats-first", decimal(first / 1000, 2)));
    if (isTimed && writing > 0.1) add(say("stats-rate", decimal((events - 1) / writing)));
    if (events) add(say("stats-events", events.toLocaleString(LANGUAGE)));
    if (isTimed && caught) add(say("stats-caught", caught.toLocaleString(LANGUAGE)));
    if (isTimed) add(say("stats-total", decimal((took ?? this.counted - at) / 1000)));
    this.numbers.replaceChildren(...parts);
  }
}
