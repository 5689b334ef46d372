"""Clients that come back, as they are and with the settings that they come with: the
answer is asked for once, is whole, and its end is seen.

fetch-event-source repeats its POST; an EventSource (the browser's, Node's, Yaffle's)
follows an answer by its id and stays away after a 204; curl and httpx are told to."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from kit import CHAT, Gate, Proxy, answer, asking, need, need_module, npm_packages, site, wait_until

WORDS = [f"word{n:02} " for n in range(20)]
PACED = [step for word in WORDS for step in (word, 0.02)]
NAME = re.compile(rb"\nid: [0-9a-f]{32}\n")  # an answer's, before its first event
LAST_EVENT = re.compile(rb"data: \[DONE\]\nid: [0-9a-f]{32}-\d+\n\n")


@pytest.fixture(scope="module")
def packages():
    names = ["@microsoft/fetch-event-source", "eventsource", "event-source-polyfill"]
    return npm_packages(*names)


@pytest.fixture(scope="module")
def elsewhere(packages, tmp_path_factory):
    """A front-end developer's server."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "node_modules").symlink_to(packages / "node_modules")
    (folder / "page.html").write_text("<!doctype html><title>page</title>")
    with site(folder) as url:
        yield url


@pytest.fixture(scope="module")
def model(shared, elsewhere, upstream):
    flags = ["--allow-origin", elsewhere, "--upstream", upstream.url, "--model", "m"]
    return shared(*flags)


@pytest.fixture
def line(model):
    """The server, over a line that breaks."""
    with Proxy(model.port) as proxy:
        yield proxy


@pytest.fixture
def tab(page, elsewhere):
    page.goto(elsewhere + "/page.html")
    return page


# ------------------------------------------------------------------- fetch-event-source

FETCH_EVENT_SOURCE = """([url, body]) => {
  window.seen = [];
  const path = '/node_modules/@microsoft/fetch-event-source/lib/esm/index.js';
  import(path).then(({ fetchEventSource }) => fetchEventSource(url, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify(body),
    onmessage(message) { seen.push(message.data); },
  })).then(() => { seen.end = true; });
}"""


def begin(tab, url, prompt):
    tab.evaluate(FETCH_EVENT_SOURCE, [url + CHAT, asking(prompt)])


def heard(tab):
    """What has been said when the client has seen the end."""
    tab.wait_for_function("seen.end", timeout=20_000)
    *said, done = tab.evaluate("seen")
    assert done == "[DONE]"
    return "".join(json.loads(data)["content"] for data in said)


def test_a_reset_before_the_first_token(tab, line, upstream):
    gate = Gate()
    prompt = upstream.script(*answer(gate, *WORDS))
    line.cut_at(NAME)
    begin(tab, line.url, prompt)
    wait_until(lambda: line.cuts == 1)
    gate.open()
    assert heard(tab) == "".join(WORDS)
    assert len(upstream.asked(prompt)) == 1


def test_a_reset_before_the_model_has_answered_at_all(tab, line, upstream):
    """After 4 s the answer has a name, though the model has not said a word."""
    gate = Gate()
    prompt = upstream.script(gate, *answer(*WORDS))
    line.cut_at(NAME)
    begin(tab, line.url, prompt)
    wait_until(lambda: line.cuts == 1)
    gate.open()
    assert heard(tab) == "".join(WORDS)
    assert len(upstream.asked(prompt)) == 1


@pytest.mark.parametrize("mark", [b"word05", re.compile(rb"word10.*?\n\n", re.S)])
def test_a_reset_in_mid_answer(tab, line, upstream, mark):
    prompt = upstream.script(*answer("First: ", 0.5, *PACED))
    line.cut_at(mark)
    begin(tab, line.url, prompt)
    assert heard(tab) == "First: " + "".join(WORDS)
    assert line.cuts == 1
    assert len(upstream.asked(prompt)) == 1


def test_a_reset_after_the_last_token(tab, line, upstream):
    """The repeated POST is a 200 without events: this client repeats all others."""
    prompt = upstream.script(*answer(*PACED))
    line.cut_at(LAST_EVENT)
    begin(tab, line.url, prompt)
    assert heard(tab) == "".join(WORDS)
    assert line.cuts == 1
    assert len(upstream.asked(prompt)) == 1


HIDE = """(hidden) => {
  Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
  document.dispatchEvent(new Event('visibilitychange'));
}"""


def test_a_tab_that_is_hidden_before_the_first_token(tab, line, upstream):
    """This client hangs up, and repeats its POST when its tab is shown again."""
    gate = Gate()
    prompt = upstream.script(*answer(gate, *WORDS))
    begin(tab, line.url, prompt)
    wait_until(lambda: NAME.search(line.seen))
    tab.wait_for_timeout(500)  # so that the client has seen it, too
    tab.evaluate(HIDE, True)
    tab.evaluate(HIDE, False)
    gate.open()
    assert heard(tab) == "".join(WORDS)
    assert line.seen.count(b"HTTP/1.1 200") == 2
    assert len(upstream.asked(prompt)) == 1


# ------------------------------------------------------------------------- EventSource


def start(model, upstream, *steps):
    """Ask for an answer by these steps, and hang up: the URL to follow it at."""
    httpx = need_module("httpx", "pip install httpx")
    prompt = upstream.script(*steps)
    with httpx.stream("POST", model.http + CHAT, json=asking(prompt)) as response:
        return "/answers/" + response.headers["x-answer-id"]


NODE = """
import { EventSource } from 'eventsource';
const seen = [];
const source = new EventSource(process.argv[2]);
source.onmessage = ({ data }) => seen.push(data);
source.onerror = ({ code }) => {
  const end = source.readyState === EventSource.CLOSED;
  if (end) console.log(JSON.stringify({ seen, code }));
};
"""

IN_A_PAGE = """([url, name]) => new Promise((resolve) => {
  const seen = [];
  const source = new window[name](url);
  source.onmessage = ({ data }) => seen.push(data);
  source.onerror = () => source.readyState === source.CLOSED && resolve(seen);
  setTimeout(resolve, 20000, seen);
})"""


def node(url, packages, folder, tab):
    (folder / "node_modules").symlink_to(packages / "node_modules")
    (folder / "follow.mjs").write_text(NODE)
    command = ["node", folder / "follow.mjs", url]
    done = subprocess.run(command, check=True, capture_output=True, timeout=30)
    said = json.loads(done.stdout)
    assert said["code"] == 204
    return said["seen"]


def browser(url, packages, folder, tab):
    return tab.evaluate(IN_A_PAGE, [url, "EventSource"])


def yaffle(url, packages, folder, tab):
    """It says ?lastEventId= and does not send the header."""
    tab.add_script_tag(url="/node_modules/event-source-polyfill/src/eventsource.js")
    return tab.evaluate(IN_A_PAGE, [url, "EventSourcePolyfill"])


@pytest.mark.parametrize("client", [node, browser, yaffle])
def test_an_event_source_comes_back_and_stays_away(
    client, model, line, upstream, packages, tmp_path, tab
):
    gate = Gate()
    path = start(model, upstream, *answer(*PACED[:8], gate, *PACED[8:]))
    line.cut_at(b"word02")
    gate.open()
    *said, done = client(line.url + path, packages, tmp_path, tab)
    assert [json.loads(data)["content"] for data in said] == WORDS
    assert done == "[DONE]"
    assert line.cuts == 1


# ----------------------------------------------------------------------- curl and httpx

NAMES = ["lastEventId", "lastEventID", "last-event-id", "Last-Event-ID", "after"]


def curl(*arguments):
    need("curl", "apt-get install curl")
    return subprocess.check_output(["curl", "-sN", *arguments], text=True)


def data_of(text):
    return [line.removeprefix("data: ") for line in text.splitlines() if "data: " in line]


def ids_of(text):
    return [line.removeprefix("id: ") for line in text.splitlines() if "id: " in line]


@pytest.fixture
def ended(model, upstream):
    """The URL of an answer that has ended, its events' data and their ids."""
    url = model.http + start(model, upstream, *answer(*WORDS))
    whole = curl(url)
    return url, data_of(whole), [one for one in ids_of(whole) if "-" in one]


def test_curl_goes_on_and_sees_the_end(ended):
    url, data, ids = ended
    assert len(data) == len(ids) == len(WORDS) + 1
    for place in (0, 7, len(ids) - 2):
        rest = curl(url, "-H", f"Last-Event-ID: {ids[place]}")
        assert data_of(rest) == data[place + 1 :]
    status = curl(url, "-H", f"Last-Event-ID: {ids[-1]}", "-w", "%{http_code}")
    assert status == "204"


@pytest.mark.parametrize("name", NAMES)
def test_the_last_id_may_be_in_the_query(ended, name):
    url, data, ids = ended
    assert data_of(curl(f"{url}?{name}={ids[7]}")) == data[8:]
    assert curl(f"{url}?{name}={ids[-1]}", "-w", "%{http_code}") == "204"


def test_httpx_goes_on_and_sees_the_end(ended):
    httpx = need_module("httpx", "pip install httpx")
    url, data, ids = ended
    with httpx.Client() as client:
        with client.stream("GET", url) as response:
            for line in response.iter_lines():
                if line == f"id: {ids[7]}":
                    break
        rest = client.get(url, headers={"Last-Event-ID": ids[7]})
        assert data_of(rest.text) == data[8:]
        end = client.get(url, headers={"Last-Event-ID": ids[-1]})
        assert end.status_code == 204


def test_httpx_waits_five_seconds_and_the_model_thinks_for_longer(model, upstream):
    """After its head, and before it."""
    httpx = need_module("httpx", "pip install httpx")
    scripts = [answer(6.5, "One."), [6.5, *answer("One.")]]
    questions = [asking(upstream.script(*steps)) for steps in scripts]
    with httpx.Client() as client, ThreadPoolExecutor(2) as pool:
        ask = partial(client.post, model.http + CHAT)
        for said in pool.map(lambda question: ask(json=question), questions):
            assert data_of(said.text)[0] == '{"content":"One."}'
