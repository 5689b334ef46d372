"use strict";

/* A server that is protected refuses everything but its pages until it has the token. The
   page asks for it once and visits `/?token=...`: the server then sets a cookie, which goes
   with every request of this browser, with those of EventSource and WebSocket, too. */

function askForToken() {
  if (!$("token").hidden) return;
  $("token").hidden = false;
  $("token-field").focus();
}

{
  /* `/time` is refused for the token only; elsewhere a 401 may be the model's. */
  async function fits(headers = {}) {
    const response = await fetch(address("time"), { method: "HEAD", headers });
    await response.text(); // what is not read looks like a failure
    return response.status !== 401;
  }

  $("token").addEventListener("submit", async () => {
    const token = $("token-field").value.trim();
    const isRight = await fits({ Authorization: `Bearer ${token}` }).catch(() => true);
    $("token-state").textContent = isRight ? "" : say("token-wrong");
    if (!isRight) return $("token-field").select();
    location.assign(address(`?token=${encodeURIComponent(token)}${location.hash}`));
  });

  fits().then((isOpen) => isOpen || askForToken(), () => {});
}
