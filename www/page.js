"use strict";

/* What every part of the page uses: where the server is, elements, views, announcements. */

const $ = (id) => document.getElementById(id);

/* Served by chatstream, the page talks to where it came from; opened from disk, or with a
   `?server=` that is not an address, to the default one. */
const SERVER = (() => {
  const given = query.get("server");
  const isServed = location.protocol.startsWith("http");
  try {
    if (given) return new URL(given.includes("://") ? given : `http://${given}`);
  } catch {
    // the default's name then shows in what the page says
  }
  return new URL(isServed ? new URL(".", location.href) : "http://localhost:4001/");
})();

const address = (path) => new URL(path, SERVER).href;

function socketAddress(path, parameters) {
  const url = new URL(path, SERVER);
  url.protocol = SERVER.protocol.replace("http", "ws");
  for (const [name, value] of Object.entries(parameters)) {
    if (value) url.searchParams.set(name, value);
  }
  return url.href;
}

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

/* Only what has changed, so that a screen reader or a selection is left in peace. */
function write(part, text) {
  if (part.textContent !== text) part.textContent = text;
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
const grows = () => Boolean(views[shown]?.grows?.());

function toEnd() {
  atEnd = true;
  window.scrollTo(0, pageEnd());
}

function stick() {
  if (atEnd && grows()) window.scrollTo(0, pageEnd());
  $("jump").hidden = atEnd || !grows();
}

function look() {
  atEnd = pageEnd() - scrollY < 40;
  $("jump").hidden = atEnd || !grows();
}

addEventListener("scroll", look, { passive: true });
addEventListener("resize", stick); // the keyboard of a phone, for one
$("jump").addEventListener("click", toEnd);

function show() {
  const [wanted] = location.hash.slice(1).split("/"); // #answer/<id> is the chat's to read
  const name = Object.hasOwn(views, wanted) ? wanted : "chat";
  if (name === shown) return;
  if (shown) places[shown] = { atEnd, top: scrollY };
  for (const part of document.querySelectorAll("[data-view]")) {
    part.classList.toggle("elsewhere", part.dataset.view !== name);
  }
  for (const link of document.querySelectorAll("nav a")) {
    const isShown = link.hash === `#${name}`;
    link.ariaCurrent = isShown ? "page" : null;
    if (isShown) document.title = `${link.textContent} · chatstream`;
  }
  views[shown]?.leave?.();
  shown = name;
  views[name].enter?.();
  const { atEnd: wasAtEnd, top = 0 } = places[name] ?? {};
  window.scrollTo(0, wasAtEnd ? pageEnd() : top);
  look();
}

function translate() {
  document.documentElement.lang = LANGUAGE;
  if (!IS_CHINESE) return;
  const all = (selector) => document.querySelectorAll(selector);
  for (const part of all("[data-zh]")) part.textContent = part.dataset.zh;
  for (const part of all("[data-zh-label]")) part.ariaLabel = part.dataset.zhLabel;
  for (const part of all("[data-zh-hint]")) part.placeholder = part.dataset.zhHint;
}

/* The other language is another address of the same page: a reload, which an answer under
   way survives as it survives any other. */
function linkOtherLanguage() {
  const other = IS_CHINESE ? "en" : "zh";
  query.set("lang", other);
  const href = `?${query}${location.hash}`;
  Object.assign($("language"), { href, lang: other, hreflang: other });
}

translate();
linkOtherLanguage();
addEventListener("hashchange", () => {
  show();
  linkOtherLanguage();
});
addEventListener("DOMContentLoaded", show); // after all deferred scripts
