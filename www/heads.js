"use strict";

/* Bytes on the wire. What a browser sends around a message is not for a page to see: these
   are the heads that browsers send, built from what this one says of itself, in HTTP/1.1;
   and what HTTP's chunks and WebSocket's frames add. Computed, so shown with a "≈". */

const heads = (() => {
  const size = (lines) => lines.reduce((sum, line) => sum + line.length + 2, 2);
  const written = (headers) => [...headers].map((pair) => pair.join(": "));

  const languages = navigator.languages.map((name, i) => (i ? `${name};q=0.${10 - i}` : name));
  const { brands = [], platform } = navigator.userAgentData ?? {};
  const named = brands.map(({ brand, version }) => `"${brand}";v="${version}"`);
  const hints = [ // Chromium's
    `sec-ch-ua: ${named.join(", ")}`, "sec-ch-ua-mobile: ?0", `sec-ch-ua-platform: "${platform}"`,
  ];

  const ALWAYS = [
    `Host: ${SERVER.host}`, "Pragma: no-cache", "Cache-Control: no-cache",
    `User-Agent: ${navigator.userAgent}`, "Accept-Encoding: gzip, deflate, br, zstd",
    `Accept-Language: ${languages}`,
  ];
  const FETCH = [
    "Connection: keep-alive", "Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors",
    "Sec-Fetch-Dest: empty", ...(platform ? hints : []),
  ];
  const HANDSHAKE = [
    `Origin: ${self.origin}`, "Connection: Upgrade", "Upgrade: websocket",
    "Sec-WebSocket-Version: 13", `Sec-WebSocket-Key: ${"x".repeat(24)}`,
    "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
  ];

  function request(url, lines) {
    const { pathname, search } = new URL(url);
    return size([`GET ${pathname}${search} HTTP/1.1`, ...ALWAYS, ...lines]);
  }

  return {
    request: (url, headers) =>
      request(url, [...FETCH, ...written(Object.entries({ Accept: "*/*", ...headers }))]),
    handshake: (url) => request(url, HANDSHAKE),
    handshakeAnswer: 129, // 101, Upgrade, Connection, Sec-WebSocket-Accept
    response: ({ status, headers }) => size([`HTTP/1.1 ${status} `, ...written(headers)]),
    chunk: (length) => length + length.toString(16).length + 4,
    frame: (length) => length + (length < 126 ? 2 : length < 65536 ? 4 : 10),
  };
})();
