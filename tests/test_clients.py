"""Clients as they are: the OpenAI SDKs, fetch-event-source, a browser's own, curl."""

import json
import subprocess

import pytest
from kit import (
    CHAT,
    DONE,
    FIN,
    HOLD,
    ROOM_PROTOCOL,
    Proxy,
    answer,
    asking,
    delta,
    need,
    need_module,
    npm_packages,
    plain,
    site,
    sse,
    wait_until,
    whole_answer,
)

TALK = [{"role": "user", "content": "Hello"}]


def talk(prompt):
    return asking(prompt)["messages"]


# ------------------------------------------------------------------- OpenAI for Python


@pytest.fixture(scope="module")
def openai():
    return need_module("openai", "pip install openai")


@pytest.fixture
def client(openai):
    """client(server): the SDK with nothing but another base URL."""
    opened = []

    def make(server):
        url = server.http + "/v1"
        opened.append(openai.OpenAI(base_url=url, api_key="none", max_retries=0))
        return opened[-1].chat.completions

    yield make
    for one in opened:
        one.close()


def test_python_streams_and_reads_whole(client, quick_demo):
    completions = client(quick_demo)
    chunks = list(completions.create(model="demo", messages=TALK, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(chunks) > 10
    assert chunks[-1].choices[0].finish_reason == "stop"
    whole = completions.create(model="demo", messages=TALK)
    assert whole.choices[0].message.content == text
    assert whole.usage.total_tokens > 0


def test_python_gets_usage_when_it_asks(client, quick_demo):
    options = {"include_usage": True}
    create = client(quick_demo).create
    stream = create(model="demo", messages=TALK, stream=True, stream_options=options)
    assert list(stream)[-1].usage.completion_tokens > 0


def test_python_lists_the_models(openai, demo):
    with openai.OpenAI(base_url=demo.http + "/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["demo"]


def test_python_raises_bad_request(openai, client, demo):
    with pytest.raises(openai.BadRequestError) as raised:
        client(demo).create(model="demo", messages="not a list")
    assert raised.value.type == "invalid_request_error"
    assert raised.value.body["message"]


REFUSALS = {
    400: "BadRequestError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
}


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("status", REFUSALS)
def test_python_raises_what_the_upstream_said(openai, client, relay, upstream, status, streamed):
    error = {"message": "No.", "type": "t", "param": None, "code": "c"}
    prompt = upstream.script(plain(status, {"error": error}))
    with pytest.raises(getattr(openai, REFUSALS[status])) as raised:
        client(relay).create(model="scripted", messages=talk(prompt), stream=streamed)
    assert "No." in raised.value.message


def test_python_raises_in_mid_stream(openai, client, relay, upstream):
    prompt = upstream.script(*sse(delta("Hel"), FIN))
    stream = client(relay).create(model="scripted", messages=talk(prompt), stream=True)
    assert next(stream).choices[0].delta.content == "Hel"
    with pytest.raises(openai.APIError) as raised:
        next(stream)
    assert raised.value.message


def test_python_raises_when_a_whole_answer_is_cut(openai, client, relay, upstream):
    prompt = upstream.script(whole_answer("Hello")[:-5], FIN)
    with pytest.raises(openai.APIStatusError):
        client(relay).create(model="scripted", messages=talk(prompt))


def test_python_closes_and_the_upstream_stops(client, relay, upstream):
    prompt = upstream.script(*sse(delta("Hel"), HOLD))
    stream = client(relay).create(model="scripted", messages=talk(prompt), stream=True)
    next(stream)
    stream.close()
    wait_until(lambda: upstream.asked(prompt)[0].closed_at, 2)


def test_python_gets_tool_calls(client, relay, upstream):
    function = {"name": "weather", "arguments": '{"city": "Bonn"}'}
    call = {"index": 0, "id": "call_1", "type": "function", "function": function}
    chunk = delta()
    chunk["choices"][0]["delta"] = {"role": "assistant", "tool_calls": [call]}
    prompt = upstream.script(*sse(chunk, delta(finish="tool_calls"), DONE))
    stream = client(relay).create(model="scripted", messages=talk(prompt), stream=True)
    got = next(stream).choices[0].delta.tool_calls[0].function
    assert got.arguments == function["arguments"]


# ---------------------------------------------------------------------- OpenAI for Node


@pytest.fixture(scope="session")
def packages():
    """A folder with the npm packages and an empty page."""
    folder = npm_packages("openai", "@microsoft/fetch-event-source")
    (folder / "page.html").write_text("<!doctype html><title>page</title>")
    return folder


NODE = """
import OpenAI from 'openai';
const [baseURL, prompt] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0 });
const ask = { messages: [{ role: 'user', content: prompt }] };
const said = { chunks: 0, text: '' };
try {
  const stream = await client.chat.completions.create({ ...ask, stream: true });
  for await (const chunk of stream) {
    said.chunks += 1;
    said.text += chunk.choices[0]?.delta?.content ?? '';
  }
  const whole = await client.chat.completions.create(ask);
  said.whole = whole.choices[0].message.content;
} catch (error) {
  said.error = error.constructor.name;
  said.status = error.status;
  said.message = error.message;
}
console.log(JSON.stringify(said));
"""


@pytest.fixture
def node(packages, tmp_path):
    """node(server, prompt): what the SDK makes of it."""
    (tmp_path / "node_modules").symlink_to(packages / "node_modules")
    (tmp_path / "ask.mjs").write_text(NODE)

    def ask(server, prompt):
        run = ["node", str(tmp_path / "ask.mjs"), server.http + "/v1", prompt]
        done = subprocess.run(run, check=True, capture_output=True, timeout=30)
        return json.loads(done.stdout)

    return ask


def test_node_streams_and_reads_whole(node, quick_demo):
    said = node(quick_demo, "Hello")
    assert "error" not in said
    assert said["chunks"] > 10
    assert said["whole"] == said["text"]
    assert "undefined" not in said["text"]


def test_node_throws_bad_request(node, relay, upstream):
    error = {"message": "No.", "type": "invalid_request_error", "code": None}
    said = node(relay, upstream.script(plain(400, {"error": error})))
    assert (said["error"], said["status"]) == ("BadRequestError", 400)
    assert "No." in said["message"]


def test_node_throws_in_mid_stream(node, relay, upstream):
    said = node(relay, upstream.script(*sse(delta("Hel"), FIN)))
    assert said["text"] == "Hel"
    assert said["error"] == "APIError"
    assert said["message"]


# ---------------------------------------------------------------------------- browsers


@pytest.fixture(scope="module")
def elsewhere(packages):
    """Another origin, with fetch-event-source on it: a front-end developer's server."""
    with site(packages) as url:
        yield url


@pytest.fixture(scope="module")
def friend(shared, elsewhere):
    """The demo, open to the pages of that origin."""
    return shared("--allow-origin", elsewhere)


@pytest.fixture(scope="module")
def friendly_relay(shared, elsewhere, upstream):
    flags = ["--allow-origin", elsewhere, "--upstream", upstream.url, "--model", "m"]
    return shared(*flags)


@pytest.fixture
def tab(page, elsewhere):
    page.goto(elsewhere + "/page.html")
    return page


FETCH_EVENT_SOURCE = """async ([url, body]) => {
  const path = '/node_modules/@microsoft/fetch-event-source/lib/esm/index.js';
  const { fetchEventSource } = await import(path);
  const seen = { text: '', times: [], opens: 0, done: false, events: [] };
  const abort = new AbortController();
  await fetchEventSource(url, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify(body),
    signal: abort.signal,
    openWhenHidden: true,
    async onopen() { seen.opens += 1; },
    onmessage(message) {
      seen.events.push(message.event);
      if (message.data === '[DONE]') { seen.done = true; return abort.abort(); }
      seen.text += JSON.parse(message.data).content;
      seen.times.push(Math.round(performance.now() / 10));
    },
    onerror() { return 50; },
  });
  return seen;
}"""


def test_fetch_event_source_unmodified(tab, friend):
    seen = tab.evaluate(FETCH_EVENT_SOURCE, [friend.http + CHAT, asking("Hello")])
    assert seen["done"]
    assert "undefined" not in seen["text"]
    assert len(seen["text"]) > 50
    assert len(set(seen["times"])) > 10
    assert seen["opens"] == 1


def test_fetch_event_source_through_a_line_that_breaks(tab, friendly_relay, upstream):
    words = [f"word{n:02} " for n in range(30)]
    paced = [step for word in words for step in (word, 0.02)]
    prompt = upstream.script(*answer("First: ", 0.4, *paced))
    with Proxy(friendly_relay.port) as proxy:
        proxy.cut_at(b"word03", b"word10", b"id: ", b"word25", b"[DONE]")
        seen = tab.evaluate(FETCH_EVENT_SOURCE, [proxy.url + CHAT, asking(prompt)])
        assert proxy.cuts == 5
    assert seen["text"] == "First: " + "".join(words)
    assert seen["done"]
    assert len(upstream.asked(prompt)) == 1


def test_fetch_event_source_is_told_of_a_failure(tab, friendly_relay, upstream):
    prompt = upstream.script(*sse(delta("Hel"), FIN))
    seen = tab.evaluate(FETCH_EVENT_SOURCE, [friendly_relay.http + CHAT, asking(prompt)])
    assert (seen["text"], seen["done"]) == ("Hel", False)
    assert seen["events"][-1] == "error"
    assert len(upstream.asked(prompt)) == 1


EVENT_SOURCE = """([url, count]) => new Promise((resolve) => {
  const seen = [];
  const source = new EventSource(url);
  source.onmessage = (message) => {
    seen.push([message.lastEventId, message.data]);
    if (seen.length === count) { source.close(); resolve(seen); }
  };
})"""


def test_event_source_on_the_clock(tab, demo):
    """From any origin: the clock is public."""
    seen = tab.evaluate(EVENT_SOURCE, [demo.http + "/clock", 3])
    numbers = [int(last_id.rpartition("-")[2]) for last_id, _ in seen]
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert all(data.startswith("The server time is: ") for _, data in seen)


def test_event_source_comes_back_by_itself_and_misses_no_tick(tab, demo):
    with Proxy(demo.port) as proxy:
        proxy.cut_at(b"The server time")
        seen = tab.evaluate(EVENT_SOURCE, [proxy.url + "/clock", 3])
        assert proxy.cuts == 1
    numbers = [int(last_id.rpartition("-")[2]) for last_id, _ in seen]
    assert numbers == list(range(numbers[0], numbers[0] + 3))


OPEN_SOCKET = """([url, protocols]) => new Promise((resolve, reject) => {
  window.heard = [];
  window.socket = new WebSocket(url, protocols);
  socket.onmessage = (message) => heard.push(message.data);
  socket.onclose = (event) => { window.code = event.code; };
  socket.onopen = resolve;
  socket.onerror = reject;
})"""


def test_websocket_in_two_tabs(tab, friend):
    other = tab.context.new_page()
    other.goto(tab.url)
    for one in (tab, other):
        one.evaluate(OPEN_SOCKET, [friend.ws, []])
    tab.evaluate("socket.send('hello')")
    for one in (tab, other):
        one.wait_for_function("heard.length > 0")
        assert one.evaluate("heard") == ["hello--返回数据"]


def test_websocket_with_the_subprotocol(tab, friend):
    url = friend.ws + "/room?name=Ann"
    tab.evaluate(OPEN_SOCKET, [url, [ROOM_PROTOCOL]])
    assert tab.evaluate("socket.protocol") == ROOM_PROTOCOL
    tab.evaluate("socket.send(JSON.stringify({text: 'hello'}))")
    tab.wait_for_function("heard.some((data) => JSON.parse(data).type === 'message')")


def test_websocket_sees_why_it_was_closed(tab, friend):
    for text, code in [("'x'.repeat(5000)", 1009), ("new Uint8Array(3)", 1003)]:
        tab.evaluate(OPEN_SOCKET, [friend.ws, []])
        tab.evaluate(f"socket.send({text})")
        tab.wait_for_function("window.code")
        assert tab.evaluate("code") == code
        tab.evaluate("window.code = undefined")


def test_a_foreign_page_gets_nothing_that_costs(tab, demo):
    failed = "([url, body]) => fetch(url, {method: 'POST', body}).catch(() => 'no')"
    assert tab.evaluate(failed, [demo.http + CHAT, json.dumps(asking("Hello"))]) == "no"
    opened = f"({OPEN_SOCKET})([url, []]).then(() => 'yes', () => 'no')"
    assert tab.evaluate(f"(url) => {opened}", demo.ws) == "no"


# -------------------------------------------------------------------------------- curl


def test_curl_on_the_clock(demo):
    curl = [need("curl", "apt-get install curl"), "-sN", "--max-time", "2.2"]
    done = subprocess.run(
        [*curl, demo.http + "/clock"], check=False, capture_output=True, text=True
    )
    ids = [line for line in done.stdout.splitlines() if line.startswith("id: ")]
    assert 2 <= len(ids) <= 4
    numbers = [int(line.rpartition("-")[2]) for line in ids]
    assert numbers == list(range(numbers[0], numbers[0] + len(ids)))
