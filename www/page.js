"use strict";

/* What every part of the page uses: where the server is, elements, views, announcements. */

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);

/* Served by chatstream, the page talks to where it came from; opened from disk, to the
   default address. `?server=` names another one. */
const SERVER = (() => {
  const given = query.get("server");
  try {
    if (given) return new URL(given.includes("://") ? given : `http://${given}`);
  } catch {
    // not an address: the default, whose name then shows in what the page says
  }
  const served = location.protocol.startsWith("http");
  return new URL(served ? new URL(".", location.href) : "http://localhost:4001/");
})();

const address = (path) => new URL(path, SERVER).href;
const socketAddress = (path, parameters = {}) => {
  const url = new URL(path, SERVER);
  url.protocol = SERVER.protocol.replace("http", "ws");
  for (const [name, value] of Object.entries(parameters)) {
    if (value) url.searchParams.set(name, value);
  }
  return url.href;
};

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

/* Storage can be full, or forbidden: then the page forgets, and works. */
const store = {
  get(key, storage = "localStorage") {
    try {
      return JSON.parse(window[storage].getItem(key));
    } catch {
      return null;
    }
  },
  set(key, value, storage = "localStorage") {
    try {
      window[storage].setItem(key, JSON.stringify(value));
    } catch {
      // see above
    }
  },
};

const time = new Intl.DateTimeFormat(LANGUAGE, {
  hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
});
const decimal = (value, digits = 1) => value.toLocaleString(LANGUAGE, {
  minimumFractionDigits: digits, maximumFractionDigits: digits,
});

/* Views: sections of one page, so that an answer goes on while one looks at the clock. The
   clock's connections live only while it is in view: a browser opens six HTTP/1.1
   connections to a host, over all its tabs, and a stream keeps one for itself. */
const views = { chat: {}, clock: {}, room: {} };
let shown = null;

/* A view that grows downwards is scrolled along only while its reader is at the end. */
let atEnd = true;
const places = {}; // where each view was left

const pageEnd = () => document.documentElement.scrollHeight - innerHeight;

function toEnd() {
  atEnd = true;
  window.scrollTo(0, pageEnd());
}

function stick() {
  if (atEnd && views[shown]?.grows?.()) window.scrollTo(0, pageEnd());
  offerJump();
}

function offerJump() {
  $("jump").hidden = atEnd || !views[shown]?.grows?.();
}

function look() {
  atEnd = pageEnd() - scrollY < 40;
  offerJump();
}

addEventListener("scroll", look, { passive: true });
addEventListener("resize", stick); // the keyboard of a phone, for one
$("jump").addEventListener("click", toEnd);

function show() {
  const [wanted] = location.hash.slice(1).split("/"); // #answer/<id> is the chat's to read
  const name = Object.hasOwn(views, wanted) ? wanted : "chat";
  if (name === shown) return;
  const before = shown;
  if (before) places[before] = { atEnd, top: scrollY };
  shown = name;
  for (const part of document.querySelectorAll("[data-view]")) {
    part.classList.toggle("elsewhere", part.dataset.view !== name);
  }
  for (const link of document.querySelectorAll("nav a[href^='#']")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${say(name)} · chatstream`;
  if (before) views[before].leave?.();
  views[name].enter?.();
  const place = places[name];
  window.scrollTo(0, place?.atEnd ? pageEnd() : place?.top ?? 0);
  look();
}

function translate() {
  document.documentElement.lang = LANGUAGE;
  for (const part of document.querySelectorAll("[data-say]")) {
    part.textContent = say(part.dataset.say);
  }
  for (const part of document.querySelectorAll("[data-label]")) {
    part.setAttribute("aria-label", say(part.dataset.label));
  }
  for (const part of document.querySelectorAll("[data-placeholder]")) {
    part.placeholder = say(part.dataset.placeholder);
  }
}

/* The other language is another address of the same page: a reload, which an answer under
   way survives as it survives any other. */
function linkOtherLanguage() {
  const other = LANGUAGE === "zh-CN" ? "en" : "zh";
  const link = $("language");
  query.set("lang", other);
  link.href = `?${query}${location.hash}`;
  link.lang = link.hreflang = other;
}

translate();
linkOtherLanguage();
addEventListener("hashchange", () => (show(), linkOtherLanguage()));
addEventListener("DOMContentLoaded", show); // after all deferred scripts
