"use strict";

/* Text that grows. However fast the tokens come, the page is touched once a frame; and each
   paragraph is an element of its own, so that only the last one is laid out again: the
   work for a token does not grow with the length of the answer. A paragraph without end is
   broken, where a line may end, into several that look like one. A line of ``` begins
   and ends code. */

const LONG_BLOCK = 3000; // characters
const LINE_END = /[\s。，、；：！？]/g; // Chinese has no spaces
const CODE_LINE_END = /\n/g;

class GrowingText {
  constructor(element, ondraw = () => {}) {
    Object.assign(this, { element, ondraw });
    this.pending = ""; // not on the page yet
    this.block = null; // the paragraph or code that is being written
    this.length = 0; // of the block
    this.continues = false; // whether the next block is more of the last one
    this.inCode = false;
    this.lineBegun = false;
    this.frame = 0;
  }

  append(text) {
    this.pending += text;
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  /* A hidden tab has no frames: the end of a text does not wait for one. */
  finish() {
    cancelAnimationFrame(this.frame);
    this.draw();
    this.write(this.pending);
    this.pending = "";
  }

  draw() {
    this.frame = 0;
    const lines = this.pending.split("\n");
    this.pending = lines.pop();
    for (const line of lines) this.endLine(line);
    if (this.lineBegun || !/^(`{1,2}$|```)/.test(this.pending)) { // may be a fence yet
      this.write(this.pending);
      this.lineBegun ||= this.pending !== "";
      this.pending = "";
    }
    this.ondraw();
  }

  endLine(line) {
    if (!this.lineBegun && line.startsWith("```")) {
      this.inCode = !this.inCode;
      this.endBlock();
    } else if (!this.lineBegun && line === "" && !this.inCode) {
      this.endBlock();
    } else {
      this.write(`${line}\n`); // a newline at the end of a block takes no room
    }
    this.lineBegun = false;
  }

  endBlock() {
    this.block = null;
    this.continues = false;
  }

  write(text) {
    for (let start = 0, end; start < text.length; start = end) {
      this.block ??= this.addBlock();
      end = this.endOfBlock(text, start);
      this.block.append(text.slice(start, end || text.length));
      this.length += (end || text.length) - start;
      if (!end) return;
      this.block = null;
      this.continues = true;
    }
  }

  /* Where in this text a block that has grown long may end; 0: not here. */
  endOfBlock(text, start) {
    const lineEnd = this.inCode ? CODE_LINE_END : LINE_END;
    lineEnd.lastIndex = start + Math.max(0, LONG_BLOCK - this.length);
    return lineEnd.test(text) ? lineEnd.lastIndex : 0;
  }

  addBlock() {
    const block = document.createElement(this.inCode ? "pre" : "p");
    block.className = this.continues ? "continued" : "";
    this.element.append(block);
    this.continues = false;
    this.length = 0;
    return block;
  }
}
