"use strict";

/* The picture of the clock view. Time runs to the right; each way of being told has two
   lines, the server's above and the page's below.

     ●   ●   ○   ○   ●     the server's ticks: told, or not (yet)
     |   |    \___\__|     how each one came: all that was missed comes at one instant
     ●───●───────────●     the page

   It is a few SVG paths: a dot is a line of no length with round ends. They are written
   anew a few times a second; from frame to frame the sheet that they are on only moves. */

const picture = (() => {
  const SECOND = 20; // all lengths are px where a letter has 16
  const GUTTER = 46; // for "server" and "page"
  const TOP = 20; // for what is said of a cut
  const LANE = 82;
  const [SERVER_Y, PAGE_Y] = [34, 68]; // in a lane
  const SLANT = 4; // of a question and of its answer, over what they took
  const EDGE = 8; // right of now
  const NARROWEST = 270; // else the words of a lane would meet
  const NAMES = ["polling", "stream", "socket"];
  const BOTTOM = TOP + NAMES.length * LANE + 20;
  const PARTS = ["cut", "bar", "line", "call", "drop", "told", "untold", "hole"];

  const reduced = matchMedia("(prefers-reduced-motion: reduce)");
  const text = (name, left, y, said = "") => make("text", { class: name, x: left, y }, said);
  const svg = make("svg", { role: "img" });
  const verdicts = {}; // "polling" -> its text
  const parts = {}; // "drop" -> its path, for all three lanes
  const cutWords = text("cut-words", "100%", TOP - 5);
  const times = make("g");
  let sheet;
  let origin = 0; // ms: x is 0 there
  let [width, unit] = [0, 1]; // of the window to the sheet; px of a length of 1

  function make(tag, attributes = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    made.append(...children);
    return set(made, attributes);
  }

  function set(part, attributes) {
    for (const [name, value] of Object.entries(attributes)) part.setAttribute(name, value);
    return part;
  }

  function build(place) {
    for (const part of PARTS) parts[part] = make("path", { class: part });
    sheet = make("g", {}, ...Object.values(parts), times);
    svg.append(make("svg", { x: GUTTER }, sheet), cutWords); // the inner one clips it
    NAMES.forEach((name, lane) => {
      const y = TOP + lane * LANE;
      svg.append(
        text("who", 0, y + SERVER_Y + 4, say("picture-server")),
        text("who", 0, y + PAGE_Y + 4, say("picture-page")),
        text("title", 0, y + 16, say(name)),
        verdicts[name] = text("verdict", "100%", y + 16),
      );
    });
    place.prepend(svg);
  }

  /* `ways`: name -> a Way of clock.js; `cuts`: [{from, to}], in ms of this page's clock, in
     which the server's second begins at tickAt(second); `newest`: the last second to tell. */
  function draw({ ways, cuts, tickAt, cutSays, newest }, now) {
    measure();
    if (now - origin > 600000) origin = now; // small numbers, whatever the date
    const shown = Math.ceil(width / SECOND) + 1; // seconds
    const since = now - shown * 1000;
    const until = now + 5000; // what is open goes on past the edge, where it is clipped
    const d = Object.fromEntries(PARTS.map((part) => [part, ""]));
    NAMES.forEach((name, lane) => {
      const way = ways[name];
      const [up, down] = [SERVER_Y, PAGE_Y].map((y) => TOP + lane * LANE + y);
      for (const { from, to } of cuts) d.cut += box(from, to ?? until, up - 9, down + 9);
      for (const { from, to } of way.spans) d.bar += box(from, to ?? until, up, down);
      for (const y of [up, down]) d.line += `M${x(since)} ${y}H${x(until)}`;
      for (const call of way.calls) d.call += zigzag(call, up, down);
      const asked = way.calls.length > 0;
      const first = Math.max(way.first ?? Infinity, newest - shown);
      for (let second = first; second <= newest; second += 1) {
        const [at, tick] = [way.arrivals.get(second)?.at, x(tickAt(second))];
        if (at) {
          d.told += dot(tick, up) + dot(x(at) + (asked ? SLANT : 0), down);
          if (!asked) d.drop += `M${tick} ${up}L${x(at)} ${down}`;
        } else if (now - tickAt(second) > 1000) { // before, it may still come
          d.untold += dot(tick, up);
        }
      }
      write(verdicts[name], way.verdict);
      verdicts[name].classList.toggle("lost", way.missed > 0);
    });
    d.hole = d.untold;
    for (const part of PARTS) set(parts[part], { d: d[part] });
    write(cutWords, cutSays);
    const told = NAMES.map((name) => `${say(name)}: ${ways[name].verdict}`);
    svg.ariaLabel = [cutSays, ...told].filter(Boolean).join("; ");
    label(since, now, cuts);
    move(now);
  }

  const x = (at) => Math.round((at - origin) / 100 * SECOND) / 10;
  const dot = (left, top) => `M${left} ${top}h0`;
  const box = (from, to, top, bottom) => `M${x(from)} ${top}H${x(to)}V${bottom}H${x(from)}z`;

  /* A question and its answer; a question that finds no server ends half way. */
  function zigzag({ from, to, failed }, up, down) {
    if (failed) return `M${x(from) - SLANT} ${down}L${x(from)} ${(up + down) / 2}`;
    const turn = Math.max((x(from) + x(to)) / 2, x(from));
    return `M${x(from) - SLANT} ${down}L${turn} ${up}L${x(to) + SLANT} ${down}`;
  }

  function label(since, now, cuts) {
    times.replaceChildren();
    for (let five = Math.ceil(since / 5000) * 5000; five <= now; five += 5000) {
      times.append(text("time", x(five), BOTTOM - 6, time.format(five)));
    }
    for (const { from, to } of cuts.filter((cut) => cut.to)) {
      const seconds = Math.round((to - from) / 1000);
      times.append(text("time", x((from + to) / 2), TOP - 5, say("picture-cut", seconds)));
    }
  }

  function measure() {
    const letter = parseFloat(getComputedStyle(svg).fontSize);
    unit = Math.min(letter / 16, svg.clientWidth / NARROWEST) || 1;
    const all = svg.clientWidth / unit;
    width = Math.max(0, all - GUTTER);
    set(svg, { viewBox: `0 0 ${all} ${BOTTOM}`, height: BOTTOM * unit });
  }

  /* Now is at the right edge. Where motion is not wanted, it moves once a second. */
  function move(now) {
    const shown = reduced.matches ? Math.floor((now - 200) / 1000) * 1000 + 200 : now;
    const left = Math.round((width - EDGE - x(shown)) * unit * devicePixelRatio);
    set(sheet, { transform: `translate(${left / unit / devicePixelRatio})` });
  }

  return { NAMES, build, draw, move };
})();
