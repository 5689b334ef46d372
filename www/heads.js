"use strict";

/* Bytes on the wire. What a browser sends around a message is not for a page to see: these
   are the heads that browsers send, built from what this one says of itself, in HTTP/1.1;
   and what HTTP's chunks and WebSocket's frames add. Computed, so shown with a "≈". */

const heads = (() => {
  const size = (lines) => lines.reduce((sum, line) => sum + line.length + 2, 2);
  const written = (headers) => [...headers].map((pair) => pair.join(": "));

  const ORIGIN = `Origin: ${location.protocol === "file:" ? "null" : location.origin}`;

  const HANDSHAKE = [
    ORIGIN, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
    `Sec-WebSocket-Key: ${"x".repeat(24)}`,
    "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
  ];

  function common(url) {
    const { pathname, search, host } = new URL(url);
    const [first, ...others] = navigator.languages;
    const ranked = others.map((language, i) => `,${language};q=0.${9 - i}`);
    return [
      `GET ${pathname}${search} HTTP/1.1`, `Host: ${host}`,
      "Pragma: no-cache", "Cache-Control: no-cache",
      `User-Agent: ${navigator.userAgent}`, "Accept-Encoding: gzip, deflate, br, zstd",
      `Accept-Language: ${first}${ranked.join("")}`,
    ];
  }

  function fetched(url, extra) {
    const own = new URL(url).origin === location.origin;
    return [
      "Connection: keep-alive", `Sec-Fetch-Site: ${own ? "same-origin" : "cross-site"}`,
      "Sec-Fetch-Mode: cors", "Sec-Fetch-Dest: empty", ...(own ? [] : [ORIGIN]), ...hints(),
      ...written(Object.entries({ Accept: "*/*", ...extra })),
    ];
  }

  /* Chromium's client hints. */
  function hints() {
    const { brands = [], platform } = navigator.userAgentData ?? {};
    if (!platform) return [];
    const named = brands.map(({ brand, version }) => `"${brand}";v="${version}"`).join(", ");
    return [`sec-ch-ua: ${named}`, "sec-ch-ua-mobile: ?0", `sec-ch-ua-platform: "${platform}"`];
  }

  return {
    request: (url, extra = {}) => size([...common(url), ...fetched(url, extra)]),
    handshake: (url) => size([...common(url), ...HANDSHAKE]),
    handshakeAnswer: 129, // 101, Upgrade, Connection, Sec-WebSocket-Accept
    response: ({ status, headers }) => size([`HTTP/1.1 ${status} `, ...written(headers)]),
    chunk: (length) => length + length.toString(16).length + 4,
    frame: (length) => length + (length < 126 ? 2 : length < 65536 ? 4 : 10),
  };
})();
