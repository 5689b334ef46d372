"use strict";

/* One message of the chat on the page: a question, or an answer with its reasoning, what
   became of it, its numbers, and what can be done with it. */

class Turn {
  constructor(message, acts) {
    Object.assign(this, { message, acts });
    this.isQuestion = message.role === "user";
    this.body = element("div", { className: "text" });
    const className = this.isQuestion ? "question" : "answer";
    this.article = element("article", { className }, this.body);
    this.article.setAttribute("aria-label", say(this.isQuestion ? "you" : "answer"));
    if (this.isQuestion) this.drawQuestion();
    else this.drawAnswer();
  }

  drawQuestion() {
    this.body.dir = "auto";
    this.body.textContent = this.message.content;
    this.article.append(this.button("edit"));
  }

  drawAnswer() {
    this.text = new Markdown(this.body, () => this.grown());
    this.numbers = element("span", { className: "stats" });
    this.foot = element("p", { className: "answer-foot" }, this.numbers);
    this.hold = element("p", { className: "hold", hidden: true });
    this.article.append(this.hold, this.foot);
    this.counted = 0;
    this.thinking = null;
    const { reasoning, content } = this.message;
    if (reasoning) this.reason(reasoning);
    if (content) this.append(content);
    this.isGrowing = isUnderWay(this.message);
    this.article.classList.toggle("under-way", this.isGrowing);
    if (!this.isGrowing) this.end();
  }

  grown() {
    this.count();
    stick();
  }

  /* What the model thinks before it speaks, folded away. */
  reason(text) {
    if (!this.thinking) {
      this.summary = element("summary", {}, say("thinking"));
      this.thinking = element("div", { className: "text" });
      const details = { className: "thinking" };
      this.article.prepend(element("details", details, this.summary, this.thinking));
      this.thoughts = new Markdown(this.thinking, stick);
    }
    this.thoughts.append(text);
  }

  append(text) {
    if (this.summary) this.summary.textContent = say("thought");
    this.text.append(text);
  }

  /* The connection: "open", or why nothing comes. */
  connection(state, wait = 0) {
    clearInterval(this.countdown);
    const isOpen = state === "open" || !this.message.id;
    this.article.classList.toggle("on-hold", !isOpen);
    this.hold.hidden = isOpen;
    if (isOpen) return stick();
    const until = Date.now() + wait;
    const tell = () => {
      const seconds = Math.ceil((until - Date.now()) / 1000);
      this.hold.textContent = seconds > 0 ? say("hold-waiting", seconds) : say("hold-connecting");
    };
    tell();
    if (state === "waiting") this.countdown = setInterval(tell, 250);
    stick();
  }

  /* Resolves once all of it is on the page. */
  end() {
    const { message, article, foot } = this;
    this.connection("open");
    this.isGrowing = false;
    article.classList.remove("under-way");
    this.count(true);
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

  /* What a screen reader is to say: without the words around code. */
  spoken() {
    this.body.classList.add("spoken");
    const text = this.body.innerText;
    this.body.classList.remove("spoken");
    return text;
  }

  trouble() {
    const words = element("p", { dir: "auto" }, this.message.trouble);
    const ways = this.message.isWatched ? [] : [this.button("again", "turn")];
    return element("div", { className: "trouble" }, words, ...ways);
  }

  /* Those of the last turn only are seen. */
  button(name, className = "turn plain") {
    const button = element("button", { type: "button", className }, say(name));
    button.addEventListener("click", () => this.acts[name](this.message));
    return button;
  }

  link() {
    const { id } = this.message;
    return element("a", { className: "plain", href: `#answer/${id}`, title: say("link-title") }, say("link"));
  }

  count(now = false) {
    if (!now && Date.now() - this.counted < 250) return; // to be read, not to flicker
    this.counted = Date.now();
    this.numbers.replaceChildren(...this.summarize());
  }

  summarize() {
    const { state, at, first, latest, events, caught, took, finish, model, isWatched } = this.message;
    const parts = [];
    const add = (...words) => parts.push(element("span", {}, say(...words)));
    if (state === "stopped") parts.push(element("strong", {}, say("stopped")));
    if (finish) parts.push(element("strong", {}, say(finish === "length" ? "cut-short" : "finish", finish)));
    if (model) parts.push(element("span", { className: "model" }, model));
    if (!events) return parts;
    if (isWatched) return [...parts, element("span", {}, say("stats-events", events))];
    const writing = (latest - first) / 1000;
    add("stats-first", decimal(first / 1000, 2));
    if (events > 1 && writing > 0.1) add("stats-rate", decimal((events - 1) / writing));
    add("stats-events", events.toLocaleString(LANGUAGE));
    if (caught) add("stats-caught", caught.toLocaleString(LANGUAGE));
    add("stats-total", decimal((took ?? Date.now() - at) / 1000));
    return parts;
  }
}
