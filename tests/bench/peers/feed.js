// The source of the Node peers: one timer, and the newest event for a reader that joins.
// In the same process, which spares them the upstream that chatstream reads from.
exports.newest = "";

// setInterval rounds to whole milliseconds and drops what it missed: keep to the clock.
exports.run = (rate, send) => {
  const start = performance.now();
  let sent = 0;
  function run() {
    const due = Math.floor(((performance.now() - start) * rate) / 1000);
    if (due > sent) { sent = due; tick(send); }
    setTimeout(run, Math.max(0, start + ((sent + 1) * 1000) / rate - performance.now()));
  }
  if (rate) run();
};

function tick(send) {
  const stamp = String(process.hrtime.bigint()).padStart(18, "0");
  exports.newest = `data: {"content": "@${stamp} "}\n\n`;
  send(exports.newest);
}
