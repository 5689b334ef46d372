"use strict";

/* Markdown that grows, token by token: as much of it as models write, made of DOM nodes
   and never of HTML. Images and HTML stay text, and formulas are shown as they are written.

   A line that has come whole is put where it belongs, once: it goes on with the blocks that
   are open, ends some of them and begins others. The line that is still being written is
   put there, too, and taken back before the next frame. Of the lines before it, only those
   of the last paragraph are drawn again; one that has grown long is ended, and another one
   carries on. So the work for a token does not grow with the answer. */

const Markdown = (() => {
  const LONG = 4000; // characters of a line, a paragraph, or one element of code
  const ROWS = 200; // of a table, or items of a list, before another one carries on
  const DEPTH = 8; // of lists in quotes in lists; of emphasis in emphasis
  const BUDGET = 8; // ms of one frame

  /* What a line can begin: each is a method of Sheet. */
  const BLOCKS = {
    rule: /^ {0,3}([-*_])( *\1){2,} *$/,
    heading: /^ {0,3}(#{1,6})[ \t]+(.+?)(?: +#+)? *$/,
    code: /^( *)(`{3,}|~{3,}) *([^\s`]*)[^`]*$/,
    quote: /^ {0,3}> ?([^]*)/,
    item: /^( *)(?:[-*+]|(\d{1,9})[.)])(?:[ \t]+|$)([^]*)/,
    paragraph: /[^]*/,
  };
  /* What ends a paragraph: the first four, and of lists only one that is sure to be one. */
  const INTERRUPTIONS = [...Object.values(BLOCKS).slice(0, 4), /^ *(?:[-*+]|1[.)])[ \t]+\S/];
  const DELIMITER = /^(?=.*\|) *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;
  /* The beginning of a line that may still become one of these is not shown yet. */
  const UNDECIDED = /^[\s>]*([-+*_=#|:\s]*|\d{1,9}[.)]?|[`~\\$]{1,2}|(`{3}|~{3}).*)$/;

  const isBlank = (line) => line.trim() === "";
  const interrupts = (line) => INTERRUPTIONS.some((pattern) => pattern.test(line));
  const indentOf = (line) => line.search(/\S|$/);
  const dedent = (line, width) => line.slice(Math.min(width, indentOf(line)));

  /* The line above the dashes is the head of a table. */
  const isTable = (head, dashes) =>
    head.includes("|") && DELIMITER.test(dashes) && cells(head).length === cells(dashes).length;

  function cells(line) {
    const inner = line.trim().replace(/^\||(?<!\\)\|$/g, "");
    return inner.split(/(?<!\\)\|/).map((cell) => cell.replaceAll("\\|", "|").trim());
  }

  const alignment = (dash) => (!dash.endsWith(":") ? "" : dash.startsWith(":") ? "center" : "end");

  // ------------------------------------------------------------------ within a block

  const LABEL = /\[(?<label>(?:\\.|`[^`]*`|\[[^[\]]*\]|[^[\]\\`])+)\]/.source;
  const TARGET = /(?<target>https?:\/\/(?:\\\S|\([^\s()]*\)|[^\s()<>\\])+)/.source;
  /* Not of an address: the punctuation behind it, and a bracket that it did not open. */
  const PART = /\([^\s<>()]*\)|[^\s<>()"`|\u3000-\u303f\uff00-\uffef]/.source;
  /* What can stand in a text. Formulas, first, are shown as they are written. */
  const INLINE = [
    /\\\([^]*?\\\)|\\\[[^]*?\\\]|\$\$[^]*?\$\$|\$[^\s$](?:[^$\n]*[^\s$])?\$(?!\d)/,
    /\\(?<escaped>[\\`*_~#|<>&$+.!\n-])/,
    /(?<!`)(?<ticks>`+)(?<code>[^]*?[^`])\k<ticks>(?!`)/,
    `${LABEL}\\(<?${TARGET}>?(?:\\s+"[^"]*")?\\s*\\)`,
    `(?<address>https?://(?:${PART})+(?<![.,;:!?*_'\\]}]))`,
    /<(?<bracketed>https?:\/\/[^\s<>]+)>/,
    /(?<mark>\*+|_+)/,
  ];
  /* While it grows, what is begun is taken for what it will be. */
  const BEGUN = [/`+(?<begunCode>[^]*)/, `${LABEL.replace("label", "begunLabel")}\\([^\\s()]*$`];
  const either = (...all) => new RegExp(all.map((one) => new RegExp(one).source).join("|"), "g");
  const [WHOLE, GROWING] = [either(...INLINE), either(...INLINE, ...BEGUN)];
  /* Behind it no emphasis begins: 2*3*4, snake_case. In Chinese, words have no space between. */
  const WORD = /[\p{N}_]|(?![\u2e80-\ud7ff\uf900-\ufaff])\p{L}/u;

  function inline(text, block, { isOpen = false, isLink = false } = {}) {
    const begun = [{ parts: [] }]; // the text, and in it emphasis that has no end yet
    let shown = 0;
    for (const found of text.matchAll(isOpen ? GROWING : WHOLE)) {
      const before = text[found.index - 1] ?? " ";
      add(begun, text.slice(shown, found.index));
      shown = found.index + found[0].length;
      if (found.groups.mark) shown -= emphasize(begun, found[0], before, text[shown] ?? " ");
      else add(begun, make(found, isLink));
    }
    add(begun, text.slice(shown));
    while (begun.length > 1) close(begun, isOpen);
    block.append(...begun[0].parts);
  }

  /* Ends or begins emphasis. Returns how many characters of the mark are only text. */
  function emphasize(begun, mark, before, after) {
    let left = mark;
    const isEnd = (one) => one.mark === left || (left.length === 3 && left.startsWith(one.mark));
    const mayEnd = !isBlank(before) && (mark.length > 1 || !WORD.test(after));
    while (mayEnd && begun.some(isEnd)) {
      while (!isEnd(begun.at(-1))) close(begun, false);
      left = left.slice(begun.at(-1).mark.length);
      close(begun, true);
    }
    const mayBegin = !isBlank(after) && !WORD.test(before) && begun.length <= DEPTH;
    if (left !== mark || mark.length > 3 || !mayBegin) return left.length;
    if (mark.length > 1) begun.push({ mark: mark.slice(0, 2), parts: [] });
    if (mark.length !== 2) begun.push({ mark: mark[0], parts: [] });
    return 0;
  }

  const add = (begun, ...parts) => begun.at(-1).parts.push(...parts);

  /* Emphasis that has its end is an element. If the end does not come, the mark is text. */
  function close(begun, isEnded) {
    const { mark, parts } = begun.pop();
    if (isEnded) add(begun, element(mark.length === 1 ? "em" : "strong", {}, ...parts));
    else add(begun, mark, ...parts);
  }

  function make({ 0: all, groups }, isLink) {
    const { escaped, code = groups.begunCode, label = groups.begunLabel, target } = groups;
    if (code) return element("code", {}, code.trim());
    const address = target?.replace(/\\([\W_])/g, "$1") ?? groups.address ?? groups.bracketed;
    if (isLink || !(label || address)) return escaped ?? all;
    const link = element("a", { target: "_blank", rel: "noreferrer" });
    if (address) link.href = element("a", { href: address }).href; // as browsers write it
    if (label) inline(label, link, { isLink: true });
    else link.append(address);
    return link;
  }

  // ------------------------------------------------------------------------- growing

  class Sheet {
    rest = ""; // of the text: what is on its way to the page, and the line being written
    isCut = false; // it begins within a line, which had grown long
    isEnded = false;
    topRank = 6; // of headings
    containers = []; // quotes and items that are open: {element, inner(line)}
    leaf = null; // the block that the next line may go on with: {take(), pen, ...}
    added = []; // nodes, by the line that is being written

    constructor(root, ondraw = () => {}) {
      Object.assign(this, { root, ondraw });
    }

    append(text) {
      this.rest += text;
      plan(this);
    }

    /* Resolves once all of it is on the page. */
    finish() {
      this.isEnded = true;
      plan(this);
      return new Promise((resolve) => (this.onfinish = resolve));
    }

    draw(until) {
      for (const node of this.added) node.remove();
      Object.assign(this, this.before);
      let isMore = true;
      while (isMore && performance.now() < until) isMore = this.putLine();
      const isOver = this.isEnded && !isMore;
      this.before = { containers: this.containers, leaf: this.leaf && { ...this.leaf } };
      this.added = [];
      if (isOver || !(isMore || UNDECIDED.test(this.rest))) this.put(this.rest);
      this.drawText(!isOver);
      this.pen?.classList.remove("pen");
      this.pen = isOver ? null : this.leaf?.pen;
      this.pen?.classList.add("pen");
      this.ondraw();
      if (isOver) this.onfinish();
      if (isMore) plan(this);
    }

    /* Puts the next line that is whole, or a piece of a long one, and says whether it has. */
    putLine() {
      const next = this.rest.slice(0, LONG);
      const isWhole = next.includes("\n");
      if (!isWhole && next.length < LONG) return false;
      const end = isWhole ? next.indexOf("\n") : next.search(/[^ 。]*$/) || LONG;
      this.put(next.slice(0, end));
      this.isCut = !isWhole;
      if (this.isCut && this.leaf?.text) this.carryOn();
      this.rest = this.rest.slice(isWhole ? end + 1 : end);
      return true;
    }

    put(line) {
      if (this.isCut) return this.leaf?.box ? this.writeCode(line) : this.paragraph(line);
      let text = line;
      let depth = 0; // of the containers that go on
      for (const { inner } of this.containers) {
        const rest = inner(text);
        if (rest === undefined) break;
        text = rest;
        depth += 1;
      }
      if (this.leaf?.take(text, depth === this.containers.length)) return;
      this.end(depth);
      this.begin(text);
    }

    begin(text) {
      const blocks = this.containers.length < DEPTH ? BLOCKS : { paragraph: BLOCKS.paragraph };
      const name = Object.keys(blocks).find((block) => blocks[block].test(text));
      this[name](...blocks[name].exec(text));
    }

    end(depth = this.containers.length) {
      this.drawText(false);
      this.leaf = null;
      this.containers = this.containers.slice(0, depth);
    }

    drawText(isOpen) {
      const { pen, text } = this.leaf ?? {};
      if (text === undefined) return;
      pen.replaceChildren();
      if (isOpen && /^\|[^\n]*$/.test(text)) return; // the head of a table, it seems
      inline(isOpen ? text.replace(/[*_`]{1,3}$/, "") : text, pen, { isOpen });
    }

    /* Adds a block to the innermost container. */
    add(block) {
      if (this.parent === this.root) block.dir = "auto";
      return this.place(this.parent, block);
    }

    get parent() { return this.containers.at(-1)?.element ?? this.root; }

    place(parent, node) {
      parent.append(node);
      this.added.push(node);
      return node;
    }

    // ---------------------------- what a line begins: each block gets what its pattern found

    rule() {
      this.add(element("hr"));
    }

    /* Headings go down one by one, whatever ranks the model begins with. */
    heading(line, { length: rank }, text) {
      this.topRank = Math.min(this.topRank, rank);
      const pen = this.add(element(`h${Math.min(6, rank - this.topRank + 2)}`));
      this.leaf = { take: () => false, pen, text };
    }

    paragraph(text) {
      if (isBlank(text)) return;
      const take = (next, isInside) => {
        const { leaf } = this;
        const above = leaf.text.slice(leaf.text.lastIndexOf("\n") + 1);
        if (isInside && isTable(above, next)) return this.beginTable(above, next);
        if (isBlank(next) || interrupts(next)) return false;
        if (!isInside && BLOCKS.item.test(next)) return false;
        leaf.text += `\n${next.trim()}`;
        if (leaf.text.length > LONG) this.carryOn();
        return true;
      };
      this.leaf = { take, pen: this.add(element("p")), text: text.trim() };
    }

    /* Ends a paragraph that has grown long; the next line, or piece, looks like more of it. */
    carryOn() {
      this.leaf.pen.classList.add("goes-on");
      this.end();
    }

    code(line, indent, mark, language) {
      const copy = copyButton(() => box.textContent.slice(head.textContent.length));
      const head = element("p", { className: "code-head" }, element("span", {}, language), copy);
      const box = this.add(element("div", { className: "code" }, head));
      const end = new RegExp(`^ *${mark}${mark[0]}* *$`);
      const take = (text, isInside) => {
        if (!isInside) return false;
        if (end.test(text)) this.leaf = null;
        else this.writeCode(dedent(text, indent.length));
        return true;
      };
      this.leaf = { take, box, size: 0 };
    }

    writeCode(text) {
      const { leaf } = this;
      if (leaf.pen && !this.isCut) this.place(leaf.pen, new Text("\n"));
      if (!leaf.pen || leaf.size > LONG) {
        leaf.pen = element("code");
        leaf.size = 0;
        this.place(leaf.box, element("pre", { dir: "ltr" }, leaf.pen));
      }
      leaf.size += text.length;
      this.place(leaf.pen, new Text(text));
    }

    quote(line, rest) {
      const inner = (next) => BLOCKS.quote.exec(next)?.[1];
      this.open({ element: this.add(element("blockquote")), inner }, rest);
    }

    item(line, indent, start, rest) {
      const name = start ? "ol" : "ul";
      const { lastChild } = this.parent;
      const isNext = lastChild?.localName === name && lastChild.childElementCount < ROWS;
      const list = isNext ? lastChild : this.add(element(name, start ? { start } : {}));
      const inner = (next) => {
        const text = next.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    "));
        // Models forget to indent code: what is not in the list then is so only after its end.
        const isInside = isBlank(text) || indentOf(text) >= indent.length + 2 || this.leaf?.box;
        return isInside ? dedent(text, line.length - rest.length) : undefined;
      };
      this.open({ element: this.place(list, element("li")), inner }, rest);
    }

    open(container, rest) {
      this.containers = [...this.containers, container];
      this.begin(rest);
    }

    beginTable(head, dashes) {
      const { leaf } = this;
      leaf.text = leaf.text.slice(0, -head.length - 1);
      this.end();
      if (!leaf.text) leaf.pen.remove();
      this.table(cells(head), cells(dashes).map(alignment));
      return true;
    }

    table(head, align) {
      const body = element("tbody");
      const take = (text, isInside) => {
        if (!isInside || isBlank(text) || interrupts(text)) return false;
        if (body.childElementCount === ROWS) this.table(head, align);
        this.place(this.leaf.body, this.row("td", cells(text)));
        return true;
      };
      this.leaf = { take, body, align };
      const table = element("table", {}, element("thead", {}, this.row("th", head)), body);
      const scrolled = { className: "table", tabIndex: 0, role: "group", ariaLabel: say("table") };
      this.add(element("div", scrolled, table));
    }

    row(tag, texts) {
      const row = element("tr");
      this.leaf.align.forEach((className, n) => {
        const cell = row.appendChild(element(tag, { className }));
        inline(texts[n] ?? "", cell);
        if (n < texts.length) this.leaf.pen = cell;
      });
      return row;
    }
  }

  // -------------------------------------------------------------------------- frames

  const waiting = new Set();

  /* Once a frame, all of them together in the time of one; a hidden tab has no frames. */
  function plan(sheet) {
    if (!waiting.size) (document.hidden ? setTimeout : requestAnimationFrame)(draw);
    waiting.add(sheet);
  }

  function draw() {
    const until = performance.now() + BUDGET;
    const sheets = [...waiting];
    waiting.clear();
    for (const sheet of sheets) sheet.draw(until);
  }

  return Sheet;
})();

/* A button that copies what there is when it is pressed. */
function copyButton(text) {
  const button = element("button", { type: "button", className: "plain" }, say("copy"));
  button.addEventListener("click", async () => {
    await copy(text());
    button.focus(); // which the text area may have had
    button.textContent = say("copied");
    setTimeout(() => (button.textContent = say("copy")), 1500);
  });
  return button;
}

/* The clipboard proper is there on https, localhost and file:// only, and may be denied. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // as it was done before
    const area = element("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}
