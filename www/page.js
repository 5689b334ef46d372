"use strict";

/* What every part of the page uses: where the server is, elements, views, announcements. */

const $ = (id) => document.getElementById(id);

/* Served by chatstream, the page talks to where it came from; opened from disk, to the default
   one. `?server=` names another. */
const SERVER = (() => {
  const given = query.get("server");
  if (given) return new URL(given.includes("://") ? given : `http://${given}`);
  const isServed = location.protocol.startsWith("http");
  return new URL(".", isServed ? location.href : "http://localhost:4001/");
})();

const address = (path) => new URL(path, SERVER).href;
const socketAddress = (path) => address(path).replace("http", "ws");

/* element("p", {className: "note"}, "text", child): text is only ever text. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/* Once, and gone again, so that it is not read a second time while browsing the page. What
   takes longer than some minutes to say is better read where it stands. */
function announce(text) {
  const line = element("p", {}, text.slice(0, 5000));
  $("announcer").append(line);
  setTimeout(() => line.remove(), 5000);
}

const random = () => Math.random().toString(36).slice(2, 10);

/* Only what has changed, so that a screen reader or a selection is left in peace. */
function write(part, text) {
  if (part.textContent !== text) part.textContent = text;
}

/* Storage can be full, or forbidden: then the page forgets, and works. */
const store = {
  get: (key, of = "localStorage") => tried(() => JSON.parse(window[of].getItem(key))),
  set: (key, value, of = "localStorage") =>
    tried(() => window[of].setItem(key, JSON.stringify(value))),
  remove: (key) => tried(() => localStorage.removeItem(key)),
  keys: () => tried(() => Object.keys(localStorage)) ?? [],
};

function tried(act) {
  try {
    return act();
  } catch {
    return null;
  }
}

const time = new Intl.DateTimeFormat(LANGUAGE, { timeStyle: "medium", hourCycle: "h23" });
const decimal = (value, digits = 1) =>
  value.toLocaleString(LANGUAGE, { minimumFractionDigits: digits, maximumFractionDigits: digits });

/* Views: sections of one page, so that an answer goes on while one looks at the clock. Each may
   have enter(), leave() and grows(). The clock's connections live only while it is in view: a
   browser opens six HTTP/1.1 connections to a host, over all its tabs, and a stream keeps one. */
const views = { chat: {}, clock: {}, room: {}, answer: {} };
let shown = null;

/* A view that grows downwards is scrolled along only while its reader is at the end. */
let atEnd = true;
const END = 1e9; // px: further down than any page
const places = {}; // where each view was left

const grows = () => Boolean(views[shown]?.grows?.());

function toEnd() {
  atEnd = true;
  window.scrollTo(0, END);
}

function stick() {
  if (atEnd && grows()) toEnd();
  $("jump").hidden = atEnd || !grows();
}

function look() {
  atEnd = document.documentElement.scrollHeight - innerHeight - scrollY < 40;
  $("jump").hidden = atEnd || !grows();
}

addEventListener("scroll", look, { passive: true });
addEventListener("resize", stick); // the keyboard of a phone, for one
$("jump").addEventListener("click", toEnd);

function show() {
  const [, wanted = "chat"] = /^#(clock|room|answer\/[\w-]+)$/.exec(location.hash) ?? [];
  const [name] = wanted.split("/"); // #answer/<id>: the rest is for the view to read
  if (shown) places[shown] = atEnd && grows() ? END : scrollY;
  for (const part of document.querySelectorAll("[data-view]")) {
    part.classList.toggle("elsewhere", !part.matches(`[data-view~=${name}]`));
  }
  for (const link of document.querySelectorAll("nav a")) {
    link.ariaCurrent = link.hash === `#${name}` ? "page" : null;
  }
  $("language").hash = location.hash;
  document.title = `${$(`${name}-title`).textContent} · chatstream`;
  views[shown]?.leave?.();
  shown = name;
  views[name].enter?.();
  window.scrollTo(0, places[name] ?? (grows() ? END : 0));
  look();
}

/* The other language is another address of the same page: a reload, which an answer under
   way survives as it survives any other. */
function translate() {
  const lang = IS_CHINESE ? "en" : "zh";
  query.set("lang", lang);
  Object.assign($("language"), { search: query, lang, hreflang: lang });
  document.documentElement.lang = LANGUAGE;
  if (!IS_CHINESE) return;
  const all = (selector) => document.querySelectorAll(selector);
  for (const part of all("[data-zh]")) part.textContent = part.dataset.zh;
  for (const part of all("[data-zh-label]")) part.ariaLabel = part.dataset.zhLabel;
  for (const part of all("[data-zh-hint]")) part.placeholder = part.dataset.zhHint;
}

translate();
addEventListener("hashchange", show);
addEventListener("submit", (event) => event.preventDefault()); // the scripts send what a form has
addEventListener("DOMContentLoaded", show); // after all deferred scripts
