"use strict";

/* Markdown that grows, token by token: as much of it as models write, made of DOM nodes
   and never of HTML. Images and HTML stay text, and formulas are shown as they are written.

   A line that has come whole is put where it belongs, once: it goes on with the blocks that
   are open, ends some of them and begins others. The line that is still being written is
   put there, too, and taken back before the next frame. Of the lines before it, only those
   of the last paragraph are drawn again; one that has grown long is ended, and another one
   carries on. So the work for a token does not grow with the answer. */

const Markdown = (() => {
  const LONG = 4000; // characters of a paragraph, or of one element of code
  const ROWS = 200; // of a table, or items of a list, before another one carries on
  const DEPTH = 8; // of lists in quotes in lists; of emphasis in emphasis
  const BUDGET = 8; // ms of one frame

  const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
  const HEADING = /^ {0,3}(#{1,6})[ \t]+(.+?)(?: +#+)? *$/;
  const FENCE = /^( *)(`{3,}|~{3,}) *([^\s`]*)[^`]*$/;
  const QUOTE = /^ {0,3}> ?/;
  const ITEM = /^( *)(?:[-*+]|(\d{1,9})[.)])([ \t]+|$)/;
  const DELIMITER = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;
  /* The beginning of a line that may still become one of these is not shown yet. */
  const UNDECIDED = /^[\s>]*([-+*_=#|:\s]*|\d{1,9}[.)]?|[`~\\$]{1,2}|(`{3}|~{3}).*)$/;

  /* What a line can begin. Containers hold blocks of their own. */
  const BLOCKS = [
    { pattern: RULE, begin: beginRule },
    { pattern: HEADING, begin: beginHeading },
    { pattern: FENCE, begin: beginCode },
    { pattern: QUOTE, begin: beginQuote, isContainer: true },
    { pattern: ITEM, begin: beginItem, isContainer: true },
    { pattern: /[^]*/, begin: beginParagraph },
  ];

  const isBlank = (line) => line.trim() === "";
  const indentOf = (line) => /^\s*/.exec(line)[0].replaceAll("\t", "    ").length;

  function dedent(line, width) {
    if (width === 0) return line;
    return " ".repeat(Math.max(0, indentOf(line) - width)) + line.trimStart();
  }

  /* Whether a line ends a paragraph. Only a list that is sure to be one does. */
  function interrupts(line) {
    const item = ITEM.exec(line);
    if (item) return line.length > item[0].length && (item[2] ?? "1") === "1";
    return [RULE, HEADING, FENCE, QUOTE].some((pattern) => pattern.test(line));
  }

  // ------------------------------------------------------------- how each block begins
  //
  // `sheet` is the Markdown that the block is part of, the second argument what its pattern
  // has found. A block that goes on becomes the sheet's leaf: {element, pen, take(), ...}.

  function beginRule(sheet) {
    sheet.add(element("hr"));
  }

  /* Headings go down one by one, whatever ranks the model begins with. */
  function beginHeading(sheet, [, { length: rank }, text]) {
    sheet.topRank = Math.min(sheet.topRank, rank);
    const heading = sheet.add(element(`h${Math.min(6, rank - sheet.topRank + 2)}`));
    sheet.leaf = { element: heading, pen: heading, text, take: () => false };
  }

  function beginParagraph(sheet, [text]) {
    const paragraph = sheet.add(element("p"));
    sheet.leaf = { element: paragraph, pen: paragraph, text: text.trim(), take: takeText };
    carryOn(sheet);
  }

  function takeText(sheet, text, isInside) {
    if (isBlank(text) || interrupts(text) || (!isInside && ITEM.test(text))) return false;
    sheet.leaf.text += `\n${text.trim()}`;
    carryOn(sheet);
    return true;
  }

  /* Ends a paragraph that has grown long, at a space or anywhere. */
  function carryOn(sheet) {
    const { element: paragraph, text } = sheet.leaf;
    if (text.length <= LONG) return;
    const end = endOfPiece(text);
    sheet.leaf.text = text.slice(0, end);
    paragraph.classList.add("goes-on");
    sheet.end(sheet.containers.length);
    beginParagraph(sheet, [text.slice(end)]);
  }

  function endOfPiece(text) {
    const half = text.slice(0, LONG / 2);
    const at = half.search(/[\s。，、；：！？][^\s。，、；：！？]*$/);
    if (at <= 0) return half.length;
    return isBlank(half[at]) ? at : at + 1;
  }

  function beginCode(sheet, [, indent, mark, language]) {
    const pieces = () => [...box.querySelectorAll("code")].map((code) => code.textContent);
    const copy = copyButton(() => pieces().join(""));
    const head = element("p", { className: "code-head" }, element("span", {}, language), copy);
    const box = sheet.add(element("div", { className: "code" }, head));
    const end = new RegExp(`^ *${mark[0]}{${mark.length},} *$`);
    sheet.leaf = { box, end, take: takeCode, indent: indent.length, isEmpty: true };
    addCode(sheet);
  }

  function addCode(sheet) {
    const { leaf } = sheet;
    leaf.element = leaf.pen = element("code");
    leaf.length = 0;
    sheet.place(leaf.box, element("pre", { dir: "ltr" }, leaf.element));
  }

  function takeCode(sheet, text, isInside) {
    const { leaf } = sheet;
    if (!isInside) return false;
    if (leaf.end.test(text)) {
      sheet.leaf = null;
      return true;
    }
    if (!leaf.isEmpty) sheet.place(leaf.element, new Text("\n"));
    leaf.isEmpty = false;
    writeCode(sheet, dedent(text, leaf.indent));
    return true;
  }

  function writeCode(sheet, text) {
    if (sheet.leaf.length > LONG) addCode(sheet);
    sheet.leaf.length += text.length;
    sheet.place(sheet.leaf.element, new Text(text));
  }

  function beginQuote(sheet, [mark], line) {
    const quote = sheet.add(element("blockquote"));
    const inner = (next) => (QUOTE.test(next) ? next.replace(QUOTE, "") : null);
    sheet.open({ element: quote, inner }, line.slice(mark.length));
  }

  function beginItem(sheet, [mark, indent, number, space], line) {
    const name = number ? "ol" : "ul";
    const { lastChild } = sheet.parent;
    const isNext = lastChild?.localName === name && lastChild.childElementCount < ROWS;
    const list = isNext ? lastChild : sheet.add(element(name, number ? { start: number } : {}));
    const width = mark.length - (space.length > 4 ? space.length - 1 : 0) + (space ? 0 : 1);
    const isInside = (next) => isBlank(next) || indentOf(next) >= indent.length + 2;
    // Models forget to indent code: what is not in the list then is so only after its end.
    const inner = (next) =>
      isInside(next) || sheet.leaf?.take === takeCode ? dedent(next, width) : null;
    const item = sheet.place(list, element("li"));
    sheet.open({ element: item, inner }, line.slice(width));
  }

  /* A line of dashes makes the head of a table of the line above it. */
  function isTable(head, marks) {
    if (!head.includes("|") || !marks.includes("|") || !DELIMITER.test(marks)) return false;
    return cells(head).length === cells(marks).length;
  }

  function beginTable(sheet, head, align) {
    const body = element("tbody");
    const [headRow, pen] = row("th", head, align);
    const table = element("table", {}, element("thead", {}, headRow), body);
    const scrolled = { className: "table", tabIndex: 0, role: "group", ariaLabel: say("table") };
    sheet.add(element("div", scrolled, table));
    sheet.leaf = { element: body, pen, take: takeRow, head, align, rows: 0 };
  }

  function takeRow(sheet, text, isInside) {
    if (!isInside || isBlank(text) || interrupts(text)) return false;
    if (sheet.leaf.rows === ROWS) beginTable(sheet, sheet.leaf.head, sheet.leaf.align);
    const [line, pen] = row("td", cells(text), sheet.leaf.align);
    sheet.place(sheet.leaf.element, line);
    sheet.leaf.pen = pen;
    sheet.leaf.rows += 1;
    return true;
  }

  function cells(line) {
    const inner = line.trim().replaceAll("\\|", "\0").replace(/^\||\|$/g, "");
    return inner.split("|").map((cell) => cell.replaceAll("\0", "|").trim());
  }

  const alignment = (mark) => (!mark.endsWith(":") ? "" : mark.startsWith(":") ? "center" : "end");

  /* A row, and the last of its cells that was written. */
  function row(tag, texts, align) {
    const made = align.map((className, n) => {
      const cell = element(tag, { className });
      inline(texts[n] ?? "", cell, { depth: 0 });
      return cell;
    });
    return [element("tr", {}, ...made), made[Math.min(texts.length, made.length) - 1]];
  }

  // ------------------------------------------------------------------ within a block

  const MARKS = /\\|`+|\*+|_+|\[|<?https?:\/\/|\$/g;
  const FORMULA = /\\\([^]*?\\\)|\\\[[^]*?\\\]|\$\$[^]*?\$\$|\$[^\s$](?:[^$\n]*[^\s$])?\$(?!\d)/y;
  const LABEL = /\[((?:\\.|`[^`]*`|\[[^[\]]*\]|[^[\]\\`])+)\]/.source;
  const TARGET = /\(<?((?:\\\S|\([^\s()]*\)|[^\s()<>\\])+)>?(?:\s+"[^"]*")?\s*\)/.source;
  /* Not of an address: the punctuation behind it, and a bracket that it did not open. */
  const PART = /\([^\s<>()]*\)|[^\s<>()"`|\u3000-\u303f\uff00-\uffef]/.source;
  const LAST = /\([^\s<>()]*\)|[^\s<>()"`|\u3000-\u303f\uff00-\uffef.,;:!?*_'\]}]/.source;

  /* What can begin at a mark, and what it is, unless it is only text. In a `context` that is
     open there may be more to come: what is begun is taken for what it will be. */
  const INLINE = [
    [FORMULA, ([all]) => all],
    [/\\([\\`*_~#|<>&$+.!\n-])/y, ([, escaped]) => escaped],
    [/(`+)([^]*?[^`])\1(?!`)/y, ([, , code]) => codeOf(code)],
    [/`+([^]*)/y, ([, code], { isOpen }) => isOpen && codeOf(code)],
    [new RegExp(LABEL + TARGET, "y"), ([, label, url], context) =>
      linkTo(url.replace(/\\([!-/:-@[-`{-~])/g, "$1"), label, context)],
    [new RegExp(`${LABEL}\\([^\\s()]*$`, "y"), ([, label], context) => linkToCome(label, context)],
    [/<(https?:\/\/[^\s<>]+)>/y, ([, url], context) => autolink(url, context)],
    [new RegExp(`https?://(?:${PART})*(?:${LAST})`, "y"), ([url], context) => autolink(url, context)],
    ...emphasis("\\*", "[\\p{N}_]|(?![\\u2e80-\\ud7ff\\uf900-\\ufaff])\\p{L}"),
    ...emphasis("_", "[\\p{L}\\p{N}_]"),
  ];

  /* `word` is what a mark must not stand behind to begin, or before to end. So snake_case
     and 2*3*4 are not emphasis; a word in Chinese, where no space is, can be. How many
     pieces are between two of them has a limit, so that many marks are little work. */
  function emphasis(m, word) {
    const stop = `${m}\\\\\``;
    const within = `[^${stop}]+(?=[${stop}])|\\\\[^]|\`+[^\`]+\`+(?!\`)|${m}(?=\\s)`;
    const bold = `(?:${within}|${m}(?![\\s${m}])[^${m}]+${m}){1,49}?`;
    const italic = `(?:${within}|${m}(?=${word})|${m}${m}(?!\\s)[^${m}]+${m}${m}){1,49}?`;
    const rule = (marks, text, end) => [
      new RegExp(`(?<!${word})(${marks})(?!\\s)(${text})(?<!\\s)${marks}(?!${end})`, "uy"),
      ([, mark, inner], { depth }) => emphasized(mark.length, inner, { depth: depth + 1 }),
    ];
    const unfinished = new RegExp(`(?<!${word})(${m}{1,3})(?![\\s${m}])([^]*)`, "uy");
    return [
      rule(m + m + m, `[^${m}]{1,999}`, m), rule(m + m, bold, m), rule(m, italic, `${word}|${m}`),
      [unfinished, ([, mark, inner], { isOpen, depth }) => {
        const isLikely = isOpen && (mark.length > 1 || !inner.includes("\n"));
        return isLikely && emphasized(mark.length, inner, { isOpen, depth: depth + 1 });
      }],
    ];
  }

  function emphasized(width, text, context) {
    if (context.depth > DEPTH) return null;
    const outer = element(width === 1 ? "em" : "strong");
    inline(text, width === 3 ? outer.appendChild(element("em")) : outer, context);
    return outer;
  }

  function inline(text, parent, context) {
    const marks = new RegExp(MARKS);
    let shown = 0;
    for (let found; (found = marks.exec(text));) {
      const [made, end] = make(text, found.index, context);
      if (!made) continue;
      parent.append(text.slice(shown, found.index), made);
      shown = marks.lastIndex = end;
    }
    parent.append(text.slice(shown));
  }

  /* What begins here, and where it ends. */
  function make(text, at, context) {
    for (const [pattern, what] of INLINE) {
      pattern.lastIndex = at;
      const found = pattern.exec(text);
      const made = found && what(found, context);
      if (made) return [made, at + found[0].length];
    }
    return [];
  }

  function codeOf(text) {
    const line = text.replaceAll("\n", " ");
    return element("code", {}, /^ .*[^ ].* $/.test(line) ? line.slice(1, -1) : line);
  }

  function linkTo(address, label, context) {
    try {
      const { href, protocol } = new URL(address);
      if (!["https:", "http:"].includes(protocol)) return null;
      return link(label, context, { href, target: "_blank", rel: "noopener noreferrer" });
    } catch {
      return null; // not whole: no page of ours
    }
  }

  /* Its marks are not Markdown. */
  function autolink(url, context) {
    const made = linkTo(url, "", context);
    made?.append(url);
    return made;
  }

  const linkToCome = (label, context) => context.isOpen && link(label, context);

  /* One level from the deepest, at which there are no links. */
  function link(label, { depth }, properties = {}) {
    if (depth >= DEPTH - 1) return null;
    const made = element("a", properties);
    inline(label, made, { depth: DEPTH - 1 });
    return made;
  }

  // ------------------------------------------------------------------------- growing

  class Sheet {
    constructor(root, ondraw = () => {}) {
      Object.assign(this, { root, ondraw });
      this.pending = ""; // not looked at yet
      this.line = ""; // the beginning of one ...
      this.isCut = false; // ... or the rest, if it had grown long
      this.topRank = 6; // of headings
      this.containers = []; // quotes and items that are open: {element, inner(line)}
      this.leaf = null; // the block that the next line may go on with
      this.added = []; // nodes, by the line that is being written
      this.isEnded = false;
    }

    append(text) {
      this.pending += text;
      plan(this);
    }

    /* Resolves once all of it is on the page. */
    finish() {
      this.isEnded = true;
      plan(this);
      return new Promise((resolve) => (this.onfinish = resolve));
    }

    /* Whether all is drawn, before the time is over. */
    draw(until) {
      this.takeBack();
      do {
        this.putLines(this.line + this.pending.slice(0, LONG));
        this.pending = this.pending.slice(LONG);
      } while (this.pending && performance.now() < until);
      const isOver = this.isEnded && !this.pending;
      this.before = { containers: this.containers, leaf: this.leaf && { ...this.leaf } };
      this.added = [];
      if (isOver || !UNDECIDED.test(this.line)) this.put(this.line);
      this.drawText(!isOver);
      this.pen?.classList.remove("pen");
      this.pen = isOver ? null : this.leaf?.pen;
      this.pen?.classList.add("pen");
      this.ondraw();
      if (isOver) this.onfinish();
      return !this.pending;
    }

    takeBack() {
      for (const node of this.added) node.remove();
      Object.assign(this, this.before);
    }

    putLines(text) {
      const lines = text.split("\n");
      this.line = lines.pop();
      for (const line of lines) {
        this.put(line);
        this.isCut = false;
      }
      while (this.line.length > LONG) {
        const end = endOfPiece(this.line);
        this.put(this.line.slice(0, end));
        this.line = this.line.slice(end);
        this.isCut = true;
      }
    }

    /* Puts a line where it belongs. */
    put(line) {
      if (this.isCut) return this.putRest(line);
      let text = line;
      let depth = 0; // of the containers that go on
      for (const { inner } of this.containers) {
        const rest = inner(text);
        if (rest === null) break;
        text = rest;
        depth += 1;
      }
      const { leaf } = this;
      const head = leaf?.take === takeText ? leaf.text.slice(leaf.text.lastIndexOf("\n") + 1) : "";
      if (isTable(head, text)) return this.putTable(depth, head, text);
      if (leaf?.take(this, text, depth === this.containers.length)) return;
      this.end(depth);
      this.begin(text);
    }

    putRest(text) {
      if (this.leaf?.take === takeCode) return writeCode(this, text);
      if (this.leaf?.take !== takeText) return this.begin(text);
      this.leaf.text += text;
      carryOn(this);
    }

    putTable(depth, head, marks) {
      const { leaf } = this;
      leaf.text = leaf.text.slice(0, -head.length - 1);
      this.end(depth);
      if (!leaf.text) leaf.element.remove();
      beginTable(this, cells(head), cells(marks).map(alignment));
    }

    begin(text) {
      if (isBlank(text)) return;
      const isDeep = this.containers.length >= DEPTH;
      const blocks = isDeep ? BLOCKS.filter(({ isContainer }) => !isContainer) : BLOCKS;
      const { pattern, begin } = blocks.find((block) => block.pattern.test(text));
      begin(this, pattern.exec(text), text);
    }

    open(container, rest) {
      this.containers = [...this.containers, container];
      this.begin(rest);
    }

    end(depth) {
      this.drawText(false);
      this.leaf = null;
      this.containers = this.containers.slice(0, depth);
    }

    drawText(isOpen) {
      const { element: parent, text } = this.leaf ?? {};
      if (text === undefined) return;
      parent.replaceChildren();
      if (isOpen && /^\|[^\n]*$/.test(text)) return; // the head of a table, it seems
      inline(isOpen ? text.replace(/[*_`]{1,3}$/, "") : text, parent, { isOpen, depth: 0 });
    }

    get parent() { return this.containers.at(-1)?.element ?? this.root; }

    /* Adds a block to the innermost container. */
    add(block) {
      if (this.parent === this.root) block.dir = "auto";
      return this.place(this.parent, block);
    }

    place(parent, node) {
      parent.append(node);
      this.added.push(node);
      return node;
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
    for (const sheet of sheets) if (!sheet.draw(until)) plan(sheet);
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
    return await navigator.clipboard.writeText(text);
  } catch {
    // as it was done before
  }
  const area = element("textarea", { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
