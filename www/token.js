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
  const field = $("token-field");

  /* `/time` is refused for the token only; elsewhere a 401 may be the model's. */
  const fits = async (headers = {}) =>
    (await fetch(address("time"), { method: "HEAD", headers })).status !== 401;

  $("token").addEventListener("submit", async (event) => {
    event.preventDefault();
    $("token-state").textContent = "";
    const token = field.value.trim();
    if (await fits({ Authorization: `Bearer ${token}` }).catch(() => true)) {
      const url = new URL(SERVER);
      url.searchParams.set("token", token);
      url.hash = location.hash;
      location.assign(url);
    } else {
      $("token-state").textContent = say("token-wrong");
      field.select();
    }
  });

  fits().then((isOpen) => isOpen || askForToken(), () => {});
}
