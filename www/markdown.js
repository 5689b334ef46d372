"use strict";

/* Markdown that grows, token by token: as much of it as models write, made of DOM nodes
   and never of HTML. Images and HTML stay text, and formulas are shown as they are written.

   With each frame the last block is drawn again, because only the last one can still change:
   a line of dashes makes a table of the line above it. What stands before it stays as it is.
   A block that has grown long is ended, and another one that looks like the same carries
   on; so the work for a token does not grow with the answer. */

const Markdown = (() => {
  const LONG = 4000; // characters of a block
  const DEPTH = 8; // of lists in quotes in lists; of emphasis in emphasis
  const BUDGET = 8; // ms of one frame

  // ------------------------------------------------------------------------- blocks

  const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
  const ITEM = /^( *)([-*+]|(\d{1,9})[.)])( +|$)/;
  const QUOTE = /^ {0,3}> ?/;
  const FENCE = /^( *)(`{3,}|~{3,}) *([^\s`]*)[^`]*$/;
  const HEADING = /^ {0,3}(#{1,6}) +(.+?)(?: +#+)? *$/;
  const DELIMITER = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;
  /* The beginning of a line that may still become one of these is not shown yet. */
  const UNDECIDED = /^[\s>]*([-+*_=#|:\s]*|\d{1,9}[.)]?|[`~\\$]{1,2}|(`{3}|~{3}).*)$/;

  const isBlank = (line) => line.trim() === "";
  const KINDS = [skipBlank, drawRule, drawHeading, drawCode, drawTable, drawQuote, drawList,
    drawParagraph]; // each returns the line after it, or 0 if that is not what begins here

  /* Draws these lines; returns the number of the line at which the last block begins. */
  function drawBlocks(lines, parent, context) {
    let last = 0;
    for (let at = 0; at < lines.length;) {
      last = isBlank(lines[at]) ? last : at;
      at = KINDS.reduce((end, draw) => end || draw(lines, at, parent, context), 0);
    }
    return last;
  }

  function skipBlank(lines, at) {
    return isBlank(lines[at]) ? at + 1 : 0;
  }

  function drawRule(lines, at, parent) {
    if (!RULE.test(lines[at])) return 0;
    parent.append(element("hr"));
    return at + 1;
  }

  /* Headings go down one by one, whatever ranks the model begins with. */
  function drawHeading(lines, at, parent, context) {
    const found = HEADING.exec(lines[at]);
    if (!found) return 0;
    const rank = found[1].length;
    context.ranks.top = Math.min(context.ranks.top ?? rank, rank);
    const heading = element(`h${Math.min(6, rank - context.ranks.top + 2)}`);
    write(found[2], heading, context.open && at + 1 === lines.length);
    parent.append(heading);
    return at + 1;
  }

  function drawCode(lines, at, parent, { open, ranks }) {
    const found = FENCE.exec(lines[at]);
    if (!found) return 0;
    const [, indent, mark, language] = found;
    const close = new RegExp(`^ *${mark[0]}{${mark.length},} *$`);
    let end = at + 1;
    while (end < lines.length && !close.test(lines[end])) end += 1;
    const text = lines.slice(at + 1, end).map((line) => dedent(line, indent.length)).join("\n");
    const code = element("code", {}, text);
    const head = element("p", { className: "code-head" }, element("span", {}, language));
    const box = element("div", { className: "code" }, head, element("pre", { dir: "ltr" }, code));
    if (open && end >= lines.length) code.classList.add("pen");
    else head.append(copyButton(() => wholeCode(box))); // drawn again, it could not be clicked
    parent.append(box);
    return end + 1;
  }

  function wholeCode(box) {
    let text = box.lastChild.textContent;
    for (let next = box; (next = next.nextElementSibling)?.matches(".code.continued");) {
      text += (next.matches(".mid-line") ? "" : "\n") + next.lastChild.textContent;
    }
    return text;
  }

  function beginsTable(lines, at) {
    const [head = "", marks = ""] = lines.slice(at, at + 2);
    if (!head.includes("|") || !marks.includes("|") || !DELIMITER.test(marks)) return false;
    return cells(head).length === cells(marks).length;
  }

  function drawTable(lines, at, parent, { open }) {
    if (!beginsTable(lines, at)) return 0;
    let end = at + 2;
    while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end)) end += 1;
    const align = cells(lines[at + 1]).map((mark) => /^(:?)-+(:?)$/.exec(mark))
      .map(([, left, right]) => (right ? (left ? "center" : "end") : ""));
    const rows = lines.slice(at + 2, end).map((line) => row("td", cells(line), align));
    const head = element("thead", {}, row("th", cells(lines[at]), align));
    const table = element("table", {}, head, element("tbody", {}, ...rows));
    const box = element("div", { className: "table", tabIndex: 0 }, table);
    box.setAttribute("role", "group"); // it can be scrolled, so it can have the focus
    box.setAttribute("aria-label", say("table"));
    const written = Math.min(align.length, cells(lines[end - 1]).length);
    if (open && end === lines.length) table.rows[rows.length].cells[written - 1].classList.add("pen");
    parent.append(box);
    return end;
  }

  function cells(line) {
    const inner = line.trim().replaceAll("\\|", "\0").replace(/^\||\|$/g, "");
    return inner.split("|").map((cell) => cell.replaceAll("\0", "|").trim());
  }

  function row(tag, texts, align) {
    return element("tr", {}, ...align.map((className, n) => {
      const cell = element(tag, { className });
      write(texts[n] ?? "", cell, false);
      return cell;
    }));
  }

  function drawQuote(lines, at, parent, context) {
    if (!QUOTE.test(lines[at]) || context.depth >= DEPTH) return 0;
    let end = at + 1;
    while (end < lines.length && (QUOTE.test(lines[end]) || isLazy(lines, end))) end += 1;
    const quote = element("blockquote");
    const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
    drawBlocks(inner, quote, deeper(context, end === lines.length));
    parent.append(quote);
    return end;
  }

  function drawList(lines, at, parent, context) {
    const first = ITEM.exec(lines[at]);
    if (!first || context.depth >= DEPTH) return 0;
    const list = element(first[3] ? "ol" : "ul");
    if (first[3]) list.start = Number(first[3]);
    parent.append(list);
    let end = at;
    for (let next = at; isItem(lines[next], list);) {
      end = drawItem(lines, next, list, context);
      next = end;
      while (next < lines.length && isBlank(lines[next])) next += 1;
    }
    return end;
  }

  function isItem(line = "", list) {
    const found = !RULE.test(line) && ITEM.exec(line);
    return found && Boolean(found[3]) === (list.localName === "ol");
  }

  function drawItem(lines, at, list, context) {
    const [all, indent, , , space] = ITEM.exec(lines[at]);
    const width = all.length - (space.length > 4 ? space.length - 1 : 0) + (space ? 0 : 1);
    let end = at + 1; // after the last line that is not blank
    for (let next = end; next < lines.length; next += 1) {
      if (isBlank(lines[next])) continue;
      const inside = indentOf(lines[next]) >= indent.length + 2;
      if (!inside && (ITEM.test(lines[next]) || !isLazy(lines, next))) break;
      end = next + 1;
    }
    const rest = lines.slice(at + 1, end).map((line) => dedent(line, width));
    const item = element("li");
    drawBlocks([lines[at].slice(width), ...rest], item, deeper(context, end === lines.length));
    list.append(item);
    return end;
  }

  function drawParagraph(lines, at, parent, { open }) {
    let end = at + 1;
    while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end)) end += 1;
    const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
    const paragraph = element("p");
    write(text, paragraph, open && end === lines.length);
    parent.append(paragraph);
    return end;
  }

  /* Only a list that is sure to be one begins within a paragraph. */
  function interrupts(lines, at) {
    const line = lines[at];
    const item = ITEM.exec(line);
    if (item) return line.length > item[0].length && (item[3] ?? "1") === "1";
    return [RULE, QUOTE, FENCE, HEADING].some((kind) => kind.test(line)) || beginsTable(lines, at);
  }

  /* A line that goes on with a paragraph above it, though it lacks the mark or the indent. */
  function isLazy(lines, at) {
    const above = lines[at - 1].replace(QUOTE, "");
    return !isBlank(lines[at]) && !isBlank(above) && !interrupts(lines, at);
  }

  const deeper = (context, atEnd) =>
    ({ ...context, depth: context.depth + 1, open: context.open && atEnd });

  const indentOf = (line) => /^\s*/.exec(line)[0].replaceAll("\t", "    ").length;

  function dedent(line, width) {
    const indent = indentOf(line);
    return indent === 0 ? line : " ".repeat(Math.max(0, indent - width)) + line.trimStart();
  }

  // ------------------------------------------------------------------ within a block

  const MARKS = /\\[[(]|\\[\\`*_~#|>+.!\n-]|`+|\*+|_+|\[|<?https?:\/\/|\$/g;
  const LABEL = /\[((?:\\.|`[^`]*`|\[[^[\]]*\]|[^[\]\\`])+)\]/y;
  const TARGET = /\(<?((?:\([^\s()]*\)|[^\s()<>])+)>?(?:\s+"[^"]*")?\s*\)/y;
  const UNFINISHED = /\([^\s()]*$/y;
  /* Not of the address: the punctuation behind it, and a bracket that it did not open. */
  const ADDRESS = /<?(https?:\/\/(?:\([^\s<>()]*\)|[^\s<>()"`|\u3000-\u303f\uff00-\uffef])*(?:\([^\s<>()]*\)|[^\s<>()"`|\u3000-\u303f\uff00-\uffef.,;:!?*_'\]}]))>?/y;
  const FORMULA = /\\\([^]*?\\\)|\\\[[^]*?\\\]|\$\$[^]*?\$\$|\$[^\s$](?:[^$\n]*[^\s$])?\$(?!\d)/y;
  const LETTER = /[\p{L}\p{N}_]/u;
  const UNSPACED = /[\u2e80-\ud7ff\uf900-\ufaff]/; // Chinese, Japanese and Korean

  /* `open`: there may be more to come, so what is begun is taken for what it will be. */
  function write(text, parent, open) {
    if (open) parent.classList.add("pen");
    if (open && /^\|[^\n]*$/.test(text)) return; // the head of a table, it seems
    inline(open ? text.replace(/[*_`]{1,3}$/, "") : text, parent, open, 0);
  }

  function inline(text, parent, open, depth) {
    const marks = new RegExp(MARKS);
    const context = { open, depth, unclosed: new Set() }; // what nothing closes from here on
    let shown = 0;
    for (let found; (found = marks.exec(text));) {
      const made = make(text, found.index, found[0], context);
      if (!made) continue;
      const [node, end] = made;
      if (found.index > shown) parent.append(text.slice(shown, found.index));
      parent.append(node);
      shown = marks.lastIndex = end;
    }
    if (shown < text.length) parent.append(text.slice(shown));
  }

  /* What begins here, and where it ends; null: it is only text. */
  function make(text, at, mark, context) {
    if (mark[0] === "`") return makeCode(text, at, mark, context);
    if (mark[0] === "*" || mark[0] === "_") return makeEmphasis(text, at, mark, context);
    if (mark === "[") return makeLink(text, at, context);
    if (mark.endsWith("://")) return makeAddress(text, at, context);
    const formula = /[$[(]$/.test(mark);
    const found = formula && match(FORMULA, text, at);
    if (formula) return found && [found[0], at + found[0].length];
    return [mark.slice(1), at + 2]; // what a backslash stood before
  }

  function match(pattern, text, at) {
    pattern.lastIndex = at;
    return pattern.exec(text);
  }

  function makeCode(text, at, mark, { open, unclosed }) {
    const inner = new RegExp(`${mark}([^]*?[^\`])${mark}(?!\`)`, "y");
    const found = unclosed.has(mark) ? null : match(inner, text, at);
    if (!found) unclosed.add(mark);
    if (!found && !open) return null;
    const code = (found?.[1] ?? text.slice(at + mark.length)).replaceAll("\n", " ");
    const trimmed = /^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code;
    return [element("code", {}, trimmed), found ? at + found[0].length : text.length];
  }

  function makeEmphasis(text, at, mark, { open, depth, unclosed }) {
    const width = mark.length;
    if (width > 3 || depth >= DEPTH || !opens(text, at, mark)) return null;
    const start = at + width;
    let end = unclosed.has(mark) ? -1 : endOfEmphasis(text, start, mark);
    const isOpen = end < 0;
    if (isOpen) unclosed.add(mark);
    if (isOpen && (!open || (width === 1 && text.includes("\n", start)))) return null;
    if (isOpen) end = text.length;
    const outer = element(width === 1 ? "em" : "strong");
    const inner = width === 3 ? outer.appendChild(element("em")) : outer;
    inline(text.slice(start, end), inner, isOpen, depth + 1);
    return [outer, end + width];
  }

  /* Past code, escapes, and emphasis of the other width. */
  function endOfEmphasis(text, start, mark) {
    const runs = /\\[^]|(`+)[^]*?\1|\*+|_+/g;
    const width = mark.length;
    runs.lastIndex = start;
    let inner = false;
    for (let found; (found = runs.exec(text));) {
      const [run] = found;
      if (run[0] !== mark[0]) continue;
      const ends = found.index > start && closes(text, found.index, run, width);
      if (ends && run.length === width) return found.index;
      if (ends && run.length >= 3) return found.index + (inner ? 3 - width : 0);
      inner = inner ? !ends : opens(text, found.index, run);
    }
    return -1;
  }

  function opens(text, at, mark) {
    return /\S/.test(text[at + mark.length] ?? "") && !isWord(text[at - 1], mark);
  }

  function closes(text, at, mark, width) {
    const within = isWord(text[at + mark.length], mark);
    return /\S/.test(text[at - 1]) && (!within || (width > 1 && mark[0] === "*"));
  }

  /* snake_case and 2*3*4 are no emphasis; a word in Chinese, where no space is, can be. */
  function isWord(character = "", mark) {
    return LETTER.test(character) && (mark[0] === "_" || !UNSPACED.test(character));
  }

  /* What is in a link is one level from the deepest, at which there are no links. */
  function makeLink(text, at, { open, depth }) {
    const label = depth < DEPTH - 1 && match(LABEL, text, at);
    if (!label) return null;
    const next = at + label[0].length;
    const target = match(TARGET, text, next);
    const begun = open && match(UNFINISHED, text, next);
    const link = target ? linkTo(target[1]) : begun && element("a");
    if (link) inline(label[1], link, false, DEPTH - 1);
    return link && [link, next + (target ?? begun)[0].length];
  }

  function makeAddress(text, at, { depth }) {
    const found = depth < DEPTH - 1 ? match(ADDRESS, text, at) : null;
    const link = found && linkTo(found[1]);
    link?.append(found[1]);
    return link && [link, at + found[0].length];
  }

  function linkTo(address) {
    try {
      const { href, protocol } = new URL(address);
      if (protocol !== "https:" && protocol !== "http:") return null;
      return element("a", { href, target: "_blank", rel: "noopener noreferrer" });
    } catch {
      return null; // not whole: no page of ours
    }
  }

  // ------------------------------------------------------------------------- growing

  class Growing {
    constructor(root, ondraw = () => {}) {
      Object.assign(this, { root, ondraw });
      this.pending = ""; // not drawn yet
      this.tail = ""; // the source of the last block
      this.kept = null; // the last node before it
      this.continued = ""; // the class of a block that carries on
      this.ranks = {}; // of headings
      this.ended = false;
    }

    append(text) {
      this.pending += text;
      plan(this);
    }

    /* Resolves once all of it is on the page. */
    finish() {
      this.ended = true;
      plan(this);
      return new Promise((resolve) => (this.onfinish = resolve));
    }

    /* Whether all is drawn, before the time is over. */
    draw(until) {
      do {
        this.tail += this.pending.slice(0, LONG);
        this.pending = this.pending.slice(LONG);
        while (this.tail.length > LONG && this.carryOn());
        this.drawTail(this.pending !== "" || !this.ended);
      } while (this.pending && performance.now() < until);
      this.ondraw();
      if (!this.pending && this.ended) this.onfinish?.();
      return !this.pending;
    }

    drawTail(open) {
      const { root, ranks } = this;
      while (root.lastChild !== this.kept) root.lastChild.remove();
      const lines = this.tail.split("\n");
      const unsure = open && UNDECIDED.test(lines.at(-1)) ? [lines.pop()] : [];
      const last = drawBlocks(lines, root, { open, ranks, depth: 0 });
      const drawn = [];
      for (let node = root.lastChild; node !== this.kept; node = node.previousSibling) {
        node.dir = "auto";
        drawn.unshift(node);
      }
      if (this.continued) drawn[0]?.classList.add(...this.continued.split(" "));
      if (drawn.length < 2) return;
      this.continued = "";
      this.kept = drawn.at(-2);
      this.tail = [...lines.slice(last), ...unsure].join("\n");
    }

    /* Ends the last block where it stands; what follows begins as it began. */
    carryOn() {
      this.drawTail(true);
      if (this.tail.length <= LONG) return false;
      const lines = this.tail.split("\n");
      let rest = lines.splice(-1);
      const begin = beginAgain(lines);
      const item = lines.findLastIndex((line, n) => n && /^\S/.test(line) && ITEM.test(line));
      if (item > 0 && !begin.length && ITEM.test(lines[0])) rest = [...lines.splice(item), ...rest];
      const midLine = lines.length <= begin.length;
      if (midLine) rest = cut(lines, rest[0]);
      this.tail = lines.join("\n");
      this.drawTail(false);
      this.kept = this.root.lastChild;
      this.kept?.classList.add("goes-on");
      this.continued = midLine ? "continued mid-line" : "continued";
      this.tail = [...begin, ...rest].join("\n");
      return true;
    }
  }

  /* The lines without which the next ones would not be what they are. */
  function beginAgain(lines) {
    let begin = beginsTable(lines, 0) ? lines.slice(0, 2) : [];
    for (const line of lines) {
      const [fence] = begin;
      if (begin.length === 1 && new RegExp(`^ *${fence.trim()[0]}{3,} *$`).test(line)) begin = [];
      else if (!begin.length && FENCE.test(line)) begin = [line];
    }
    return begin.join().length < LONG / 4 ? begin : [];
  }

  /* A line without end: ended at a space, or anywhere. */
  function cut(lines, line) {
    const half = line.slice(0, LONG / 2);
    const end = half.search(/[\s。，、；：！？][^\s。，、；：！？]*$/) + 1 || half.length;
    lines.push(line.slice(0, end));
    return [line.slice(end)];
  }

  // -------------------------------------------------------------------------- frames

  const waiting = new Set();
  let planned = false;

  /* Once a frame, all of them together in the time of one; a hidden tab has no frames. */
  function plan(text) {
    waiting.add(text);
    if (planned) return;
    planned = true;
    if (document.hidden) setTimeout(draw);
    else requestAnimationFrame(draw);
  }

  function draw() {
    planned = false;
    const until = performance.now() + BUDGET;
    for (const text of [...waiting]) {
      if (text.draw(until)) waiting.delete(text);
    }
    for (const text of waiting) plan(text);
  }

  return Growing;
})();

/* A button that copies what there is when it is pressed. */
function copyButton(text) {
  const button = element("button", { type: "button", className: "plain" }, say("copy"));
  button.addEventListener("click", async () => {
    await copy(text());
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
