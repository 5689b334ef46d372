"use strict";

/* Bytes on the wire. What a browser sends around a message is not for a page to see: these
   are the heads that browsers send, built from what this one says of itself, in HTTP/1.1;
   and what HTTP's chunks and WebSocket's frames add. Computed, so shown with a "≈". */

const heads = (() => {
  const size = (lines) => lines.reduce((sum, line) => sum + line.length + 2, 2);
  const written = (headers) => [...headers].map((pair) => pair.join(": "));

  const ORIGIN = location.protocol === "file:" ? "null" : location.origin;

  function request(url, extra = {}) {
    const { pathname, search, host, origin } = new URL(url);
    const own = origin === location.origin;
    return size([
      `GET ${pathname}${search} HTTP/1.1`, `Host: ${host}`, "Connection: keep-alive",
      ...UNCACHED, ...browser(), ...hints(),
      `Sec-Fetch-Site: ${own ? "same-origin" : "cross-site"}`,
      "Sec-Fetch-Mode: cors", "Sec-Fetch-Dest: empty",
      ...(own ? [] : [`Origin: ${ORIGIN}`]),
      ...written(Object.entries({ Accept: "*/*", ...extra })),
    ]);
  }

  function handshake(url) {
    const { pathname, search, host } = new URL(url);
    return size([
      `GET ${pathname}${search} HTTP/1.1`, `Host: ${host}`, "Connection: Upgrade",
      ...UNCACHED, ...browser(), `Origin: ${ORIGIN}`, "Upgrade: websocket",
      "Sec-WebSocket-Version: 13", `Sec-WebSocket-Key: ${"x".repeat(24)}`,
      "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
    ]);
  }

  const UNCACHED = ["Pragma: no-cache", "Cache-Control: no-cache"];

  function browser() {
    const [first, ...others] = navigator.languages;
    const ranked = others.map((language, i) => `,${language};q=0.${9 - i}`);
    return [
      `User-Agent: ${navigator.userAgent}`, "Accept-Encoding: gzip, deflate, br, zstd",
      `Accept-Language: ${first}${ranked.join("")}`,
    ];
  }

  /* Chromium's client hints. */
  function hints() {
    const data = navigator.userAgentData;
    if (!data) return [];
    const brands = data.brands.map(({ brand, version }) => `"${brand}";v="${version}"`);
    return [
      `sec-ch-ua: ${brands.join(", ")}`, "sec-ch-ua-mobile: ?0",
      `sec-ch-ua-platform: "${data.platform}"`,
    ];
  }

  return {
    request,
    handshake,
    handshakeAnswer: 129, // 101, Upgrade, Connection, Sec-WebSocket-Accept
    response: ({ status, headers }) => size([`HTTP/1.1 ${status} `, ...written(headers)]),
    chunk: (length) => length + length.toString(16).length + 4,
    frame: (length) => length + (length < 126 ? 2 : length < 65536 ? 4 : 10),
  };
})();
