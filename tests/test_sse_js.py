"""www/sse.js in real Chromium: the standard's parsing, and what keeps a stream up."""

import json

import pytest
from kit import FIN, HOLD, ROOT, Scripted, wait_until

SOURCE = (ROOT / "www" / "sse.js").read_bytes()

# ------------------------------------------------------------------------- parsing
#
# What comes -> the events, each [type, data, last event id], of HTML standard 9.2.5/6.


def message(data, last_id=""):
    return ["message", data, last_id]


CASES = {
    "the standard's example: three lines of data": (
        "data: YHOO\ndata: +2\ndata: 10\n\n",
        [message("YHOO\n+2\n10")],
    ),
    "the standard's example: comment, id, empty id, space kept": (
        ": test stream\n\ndata: first event\nid: 1\n\n"
        "data:second event\nid\n\ndata:  third event\n\n",
        [message("first event", "1"), message("second event"), message(" third event")],
    ),
    "the standard's example: empty data, and a block without its end": (
        "data\n\ndata\ndata\n\ndata:",
        [message(""), message("\n")],
    ),
    "the standard's example: with and without a space": (
        "data:test\n\ndata: test\n\n",
        [message("test"), message("test")],
    ),
    "an empty first line of data is kept": ("data:\ndata: below\n\n", [message("\nbelow")]),
    "nothing at all": ("", []),
    "CR": ("data: a\rdata: b\r\rdata: c\r\r", [message("a\nb"), message("c")]),
    "CRLF": ("data: a\r\ndata: b\r\n\r\n", [message("a\nb")]),
    "all three kinds of line end": (
        "data: a\r\ndata: b\ndata: c\r\n\r\ndata: d\r\r\ndata: e\n\r\n",
        [message("a\nb\nc"), message("d"), message("e")],
    ),
    "no other line ends: U+2028, U+0085, form feed": (
        "data: a\u2028b\u0085c\x0cd\n\n",
        [message("a\u2028b\u0085c\x0cd")],
    ),
    "a byte order mark": ("\ufeffdata: a\n\n", [message("a")]),
    "a second one belongs to the name of the field": (
        "\ufeff\ufeffdata: a\n\ndata: b\n\n",
        [message("b")],
    ),
    "one further on, too": (
        "data: a\n\n\ufeffdata: b\n\ndata: \ufeffc\n\n",
        [message("a"), message("\ufeffc")],
    ),
    "comments": (":\n:data: no\ndata: a\n: no\ndata: b\n:\0\n:: x\n\n", [message("a\nb")]),
    "event types": ("event: tick\ndata: a\n\ndata: b\n\n", [["tick", "a", ""], message("b")]),
    "an empty type is none": ("event: x\nevent:\ndata: a\n\n", [message("a")]),
    "the last type counts": ("event: x\ndata: a\nevent:  y\n\n", [[" y", "a", ""]]),
    "a type without data is dropped with its block": ("event: x\n\ndata: a\n\n", [message("a")]),
    "an id stays until there is another": (
        "id: 1\ndata: a\n\ndata: b\n\nid: 2\ndata: c\n\n",
        [message("a", "1"), message("b", "1"), message("c", "2")],
    ),
    "an id in a block without data counts": ("id: 7\n\ndata: a\n\n", [message("a", "7")]),
    "an id resets": ("id: 1\ndata: a\n\nid\ndata: b\n\n", [message("a", "1"), message("b")]),
    "an id with NUL is ignored": ("id: 1\nid: 2\0\ndata: a\n\n", [message("a", "1")]),
    "an id of any letters": ("id: …ü 你\ndata: a\n\n", [message("a", "…ü 你")]),
    "names are exact": (
        "Data: 1\n data: 2\ndata : 3\ndatax: 4\ndat: 5\nxdata: 6\nfoo\ndata: ok\n\n",
        [message("ok")],
    ),
    "only one space is taken off, no tab": (
        "data:\ta\ndata:  b\ndata: \ndata:c: d\n\n",
        [message("\ta\n b\n\nc: d")],
    ),
    "NUL in data is data": ("data: a\0b\n\n", [message("a\0b")]),
    "a last line without its end is nothing": ("data: a\n\ndata: b", [message("a")]),
    "a last block without its blank line is nothing": (
        "data: a\n\nid: 9\ndata: b\n",
        [message("a")],
    ),
    "letters of two, three and four bytes": ("data: ü你👩‍👩‍👧\n\n", [message("ü你👩‍👩‍👧")]),
    "a keep-alive and a retry, as this server sends them": (
        "retry: 2000\ndata: a\nid: x-0\n\n: keep-alive\ndata: b\nid: x-1\n\n",
        [message("a", "x-0"), message("b", "x-1")],
    ),
}

BYTES = {"bytes that are no UTF-8 become U+FFFD": (b"data: a\xffb\n\n", [message("a\ufffdb")])}

RETRIES = {
    "retry: 700\n": 700,
    "retry:0700\n": 700,
    "retry: 700\nretry: 30\n": 30,
    "retry: 700\nretry\n": 700,
    "retry: 700\nretry: 7x\n": 700,
    "retry: 700\nretry: -7\n": 700,
    "retry: 700\nretry: 7.5\n": 700,
    "retry: 700\nretry: 1e3\n": 700,
    "retry: 700\nretry:  7\n": 700,
    "retry: 7": 0,
}

READ = """async ([bytes, cuts]) => {
  bytes = new Uint8Array(bytes);
  function read(pieces) {
    const body = new ReadableStream({
      start(controller) {
        for (const piece of pieces) if (piece.length) controller.enqueue(piece);
        controller.close();
      },
    });
    const headers = { 'Content-Type': 'text/event-stream' };
    return new Promise((resolve) => {
      const found = [];
      const stream = SSE.open('/', {
        base: 0, // so that all of the wait is what `retry:` asked for
        fetch: async () => new Response(body, { headers }),
        onevent: ({ type, data, lastEventId }) => found.push([type, data, lastEventId]),
        onstate(now, detail) {
          if (now !== 'waiting') return;
          resolve({ events: found, retry: detail.wait, last: stream.lastEventId });
          stream.close();
        },
      });
    });
  }
  const ways = [[bytes], [...bytes].map((byte) => new Uint8Array([byte]))];
  for (let at = 1; at < bytes.length; at += 1) {
    ways.push([bytes.slice(0, at), bytes.slice(at)]);
  }
  const found = await Promise.all(ways.map(read));
  return [...new Set(found.map((one) => JSON.stringify(one)))];
}"""


@pytest.fixture(scope="module")
def script(chromium):
    """A page with nothing on it but sse.js."""
    page = chromium.new_page()
    page.add_script_tag(content=SOURCE.decode())
    yield page
    page.close()


def read_in_every_way(script, stream):
    """What came of it, the same however it was cut."""
    found = script.evaluate(READ, [list(stream), True])
    assert len(found) == 1, f"depends on where it is cut: {found}"
    return json.loads(found[0])


@pytest.mark.parametrize("name", CASES)
def test_parsing(script, name):
    stream, events = CASES[name]
    assert read_in_every_way(script, stream.encode())["events"] == events


@pytest.mark.parametrize("name", BYTES)
def test_parsing_bytes(script, name):
    stream, events = BYTES[name]
    assert read_in_every_way(script, stream)["events"] == events


@pytest.mark.parametrize("stream", RETRIES)
def test_retry(script, stream):
    assert read_in_every_way(script, stream.encode())["retry"] == RETRIES[stream]


def test_the_id_to_go_on_from_is_that_of_the_last_whole_block(script):
    found = read_in_every_way(script, b"id: 1\ndata: a\n\nid: 2\n\nid: 3\ndata: b\n")
    assert found["last"] == "2"


# ------------------------------------------------------------- what keeps it alive

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
PAGE = b"<!doctype html><link rel=icon href=data:,><script src=/sse.js></script>"
FILES = {"/": ("text/html", PAGE), "/sse.js": ("text/javascript", SOURCE)}


def status(line, *lines, body=b""):
    head = "\r\n".join([f"HTTP/1.1 {line}", *lines, f"Content-Length: {len(body)}"])
    return [f"{head}\r\nConnection: close\r\n\r\n".encode() + body, FIN]


OPEN = """([path, options]) => {
  window.seen = { events: [], states: [], waits: [], reason: null };
  window.stream = SSE.open(path, {
    base: 1, cap: 64, ...options,
    onevent: (event) => seen.events.push(event.data),
    onstate(now, detail) {
      seen.states.push(now);
      if (now === 'waiting') seen.waits.push(detail.wait);
      if (now === 'closed') seen.reason = { ...detail, message: detail?.message };
    },
  });
}"""


@pytest.fixture
def open_stream(page):
    """open_stream(*scripts, **options): (the server, what the page has seen so far)."""
    servers = []

    def start(*scripts, **options):
        server = Scripted(*scripts, files=FILES).__enter__()
        servers.append(server)
        page.goto(server.url)
        page.evaluate(OPEN, ["/stream", options])
        return server, lambda: page.evaluate("seen")

    yield start
    for server in servers:
        server.__exit__()


def until_seen(look, condition):
    wait_until(lambda: condition(look()))
    return look()


def test_goes_on_after_the_last_whole_event(open_stream):
    first = [HEAD + b"data: a\nid: x-1\n\ndata: b\nid: x-2\n\ndata: c\nid: x-", FIN]
    server, look = open_stream(first, [HEAD + b"data: c\nid: x-3\n\n", HOLD])
    seen = until_seen(look, lambda seen: len(seen["events"]) == 3)
    assert seen["events"] == ["a", "b", "c"]
    assert [asked.headers.get("last-event-id") for asked in server.asked] == [None, "x-2"]
    assert server.asked[0].headers["accept"] == "text/event-stream"


def test_an_id_goes_back_as_the_utf_8_it_came_as(open_stream):
    stream = "data: a\nid: …你!\n\n".encode()
    server, _ = open_stream([HEAD + stream, FIN], [HEAD, HOLD])
    wait_until(lambda: len(server.asked) == 2)
    sent = server.asked[1].headers["last-event-id"].encode("latin-1")
    assert sent.decode() == "…你!"


FINAL = {
    "204": (status("204 No Content"), 204),
    "401": (status("401 Unauthorized"), 401),
    "404": (status("404 Not Found"), 404),
    "429": (status("429 Too Many Requests", "Retry-After: 0"), 429),
    "no event stream": (status("200 OK", "Content-Type: text/plain", body=b"x"), 200),
    "one that only begins like it": (
        status("200 OK", "Content-Type: text/event-streams", body=b"x"),
        200,
    ),
}


@pytest.mark.parametrize("name", FINAL)
def test_final(open_stream, name):
    answer, code = FINAL[name]
    server, look = open_stream(answer)
    seen = until_seen(look, lambda seen: seen["states"][-1] == "closed")
    assert seen["states"] == ["connecting", "closed"]
    assert seen["reason"]["status"] == code
    assert len(server.asked) == 1


def test_the_words_of_a_refusal_are_passed_on(open_stream):
    _, look = open_stream(status("403 Forbidden", body=b"because"))
    seen = until_seen(look, lambda seen: seen["reason"])
    assert seen["reason"]["body"] == "because"


def test_a_server_in_trouble_is_asked_again(open_stream):
    busy = status("503 Busy")
    server, look = open_stream(busy, busy, [HEAD + b"data: a\n\n", HOLD])
    until_seen(look, lambda seen: seen["events"] == ["a"])
    assert len(server.asked) == 3


def test_the_type_may_have_parameters(open_stream):
    head = HEAD.replace(b"stream\r", b"stream; charset=utf-8\r")
    _, look = open_stream([head + b"data: a\n\n", HOLD])
    until_seen(look, lambda seen: seen["events"] == ["a"])


def test_a_post_is_not_sent_twice(open_stream):
    server, look = open_stream([HEAD, FIN], method="POST", body="ask")
    seen = until_seen(look, lambda seen: seen["states"][-1] == "closed")
    assert seen["reason"]["message"]
    assert [(asked.method, asked.body) for asked in server.asked] == [("POST", b"ask")]


def test_a_post_goes_on_where_the_server_knows_what_it_goes_on_with(open_stream):
    first = [HEAD + b"data: a\nid: x-1\n\n", FIN]
    server, _ = open_stream(first, [HEAD, HOLD], method="POST", body="ask")
    wait_until(lambda: len(server.asked) == 2)
    assert server.asked[1].method == "POST"
    assert server.asked[1].headers["last-event-id"] == "x-1"


def test_a_post_repeated_before_its_first_event_names_its_answer(open_stream):
    """By the bare id in the first block, whose data has not come."""
    first = [HEAD + b"retry: 1\nid: x\n", FIN]
    server, _ = open_stream(first, [HEAD, HOLD], method="POST", body="ask")
    wait_until(lambda: len(server.asked) == 2)
    assert [asked.method for asked in server.asked] == ["POST", "POST"]
    assert server.asked[1].headers["last-event-id"] == "x"


def test_elsewhere_an_id_without_its_event_counts_for_nothing(open_stream):
    """The event that it belongs to would be skipped."""
    server, _ = open_stream([HEAD + b"retry: 1\nid: 1\n", FIN], [HEAD, HOLD])
    wait_until(lambda: len(server.asked) == 2)
    assert "last-event-id" not in server.asked[1].headers


def test_a_question_refused_for_a_while_is_asked_again(open_stream):
    busy = status("503 Busy", "Retry-After: 0")
    whole = [HEAD + b"data: a\n\n", HOLD]
    server, look = open_stream(busy, whole, method="POST", body="ask")
    until_seen(look, lambda seen: seen["events"] == ["a"])
    assert [asked.body for asked in server.asked] == [b"ask", b"ask"]


def test_but_not_for_ever(open_stream):
    busy = status("503 Busy", "Retry-After: 0", body=b"too busy")
    server, look = open_stream(busy, method="POST", body="ask")
    seen = until_seen(look, lambda seen: seen["states"][-1] == "closed")
    assert seen["reason"]["body"] == "too busy"
    assert len(server.asked) == 4


def test_what_would_be_paid_for_twice_is_not_asked_again(open_stream):
    failed = status("503 Busy", "Retry-After: 0", "x-should-retry: false")
    server, look = open_stream(failed, method="POST", body="ask")
    until_seen(look, lambda seen: seen["states"][-1] == "closed")
    assert len(server.asked) == 1


def test_the_wait_that_the_server_asks_for_is_kept(open_stream, page):
    page.add_init_script("Math.random = () => 1")
    _, look = open_stream(status("503 Busy", "Retry-After: 7"))
    seen = until_seen(look, lambda seen: seen["waits"])
    assert seen["waits"] == [7001]


def test_the_wait_doubles_until_an_event_comes_and_no_sooner(open_stream, page):
    page.add_init_script("Math.random = () => 1")
    empty = [HEAD, FIN]  # it opens: that alone says nothing
    full = [HEAD + b"data: a\n\n", FIN]
    _, look = open_stream(*[empty] * 9, full, empty)
    seen = until_seen(look, lambda seen: len(seen["waits"]) >= 12)
    assert seen["waits"][:12] == [1, 2, 4, 8, 16, 32, 64, 64, 64, 1, 2, 4]


def test_the_wait_is_drawn_from_all_of_its_range(open_stream, page):
    page.add_init_script("Math.random = () => 0")
    _, look = open_stream([HEAD, FIN])
    seen = until_seen(look, lambda seen: len(seen["waits"]) >= 5)
    assert set(seen["waits"]) == {0}


def test_retry_is_waited_before_the_jitter(open_stream, page):
    page.add_init_script("Math.random = () => 1")
    _, look = open_stream([HEAD + b"retry: 30\n\n", FIN])
    seen = until_seen(look, lambda seen: len(seen["waits"]) >= 3)
    assert seen["waits"][:3] == [31, 32, 34]


def test_silence_is_a_broken_connection(open_stream):
    server, _ = open_stream([HEAD + b"data: a\nid: 1\n\n", HOLD], silence=150)
    wait_until(lambda: len(server.asked) == 2)
    assert server.asked[0].ended.wait(2)
    assert server.asked[1].headers["last-event-id"] == "1"


def test_a_server_that_never_answers_is_silent_too(open_stream):
    server, _ = open_stream([HOLD], silence=150)
    wait_until(lambda: len(server.asked) == 2)


def test_a_retry_without_a_head_is_given_up_sooner(open_stream):
    broken = [HEAD + b"data: a\nid: 1\n\n", FIN]
    whole = [HEAD + b"data: b\nid: 2\n\n", HOLD]
    server, look = open_stream(broken, [HOLD], whole, patience=150)
    until_seen(look, lambda seen: seen["events"] == ["a", "b"])
    assert len(server.asked) == 3


@pytest.mark.parametrize("event", ["online", "pageshow", "visibilitychange"])
def test_waking_up_looks_again_at_once(open_stream, page, event):
    """No wait, no silence of ten seconds: the page was away, and nothing has come."""
    silent = [HEAD + b"data: a\nid: x-1\n\n", HOLD]
    server, look = open_stream(silent, [HEAD, HOLD], stale=100, base=60000, cap=60000)
    until_seen(look, lambda seen: seen["events"] == ["a"])
    page.wait_for_timeout(150)
    on = "document" if event == "visibilitychange" else "window"
    page.evaluate(f"{on}.dispatchEvent(new Event('{event}'))")
    wait_until(lambda: len(server.asked) == 2)
    assert server.asked[1].headers["last-event-id"] == "x-1"
    assert "waiting" not in look()["states"]


def test_waking_up_leaves_a_question_that_cannot_be_repeated(open_stream, page):
    server, look = open_stream([HOLD], method="POST", body="ask", stale=50)
    wait_until(lambda: server.asked)
    page.wait_for_timeout(100)
    page.evaluate("dispatchEvent(new Event('online'))")
    page.wait_for_timeout(100)
    assert look()["states"] == ["connecting"]


def test_a_sleep_of_the_computer_is_silence_too(open_stream, page):
    """One of its clocks stands still meanwhile."""
    server, look = open_stream([HEAD + b"data: a\n\n", HOLD], [HEAD, HOLD])
    until_seen(look, lambda seen: seen["events"] == ["a"])
    page.evaluate("{ const now = Date.now; Date.now = () => now() + 60000; }")
    wait_until(lambda: len(server.asked) == 2)


def test_keep_alives_are_no_silence(open_stream):
    alive = [step for _ in range(8) for step in (b": keep-alive\n", 0.1)]
    server, look = open_stream([HEAD, *alive, b"data: a\n\n", HOLD], silence=500)
    until_seen(look, lambda seen: seen["events"] == ["a"])
    assert len(server.asked) == 1


def test_closing_ends_the_request_and_all_that_was_still_to_come(open_stream, page):
    two = HEAD + b"data: a\n\ndata: b\n\n"
    server, look = open_stream([0.2, two, HOLD])
    wait_until(lambda: server.asked)
    page.evaluate("stream.close()")
    seen = until_seen(look, lambda seen: seen["states"][-1] == "closed")
    assert server.asked[0].ended.wait(2)
    assert (seen["events"], len(server.asked)) == ([], 1)


def test_a_stream_that_is_done_is_left_to_its_server(open_stream, page):
    """An abort would be shown as a failure by the browser's network panel."""
    failed = []
    page.on("requestfailed", lambda request: failed.append(request.url))
    server = Scripted([HEAD + b"data: a\n\n", 0.1, b": bye\n", FIN], files=FILES)
    with server:
        page.goto(server.url)
        with page.expect_request_finished():
            page.evaluate("""() => {
              const stream = SSE.open('/stream', { onevent: () => stream.done() });
            }""")
        assert failed == []
        assert len(server.asked) == 1


def test_and_closed_if_its_server_does_not_end_it(open_stream, page):
    server, look = open_stream([HEAD + b"data: a\n\n", HOLD])
    until_seen(look, lambda seen: seen["events"] == ["a"])
    page.evaluate("stream.done()")
    assert look()["states"][-1] == "closed"
    wait_until(server.asked[0].ended.is_set)


def test_closing_in_an_event_is_the_end_of_its_piece_too(open_stream, page):
    server = Scripted([HEAD + b"data: a\n\ndata: b\n\n", HOLD], files=FILES)
    with server:
        page.goto(server.url)
        page.evaluate("""() => {
          window.got = [];
          const stream = SSE.open('/stream', {
            onevent({ data }) { got.push(data); stream.close(); },
          });
        }""")
        wait_until(lambda: server.asked)
        assert server.asked[0].ended.wait(2)
        assert page.evaluate("got") == ["a"]


def test_a_hidden_tab_keeps_its_stream(open_stream, page):
    server, look = open_stream([HEAD + b"data: a\n\n", 0.3, b"data: b\n\n", HOLD])
    until_seen(look, lambda seen: seen["events"] == ["a"])
    for hidden in ("true", "false"):
        page.evaluate(f"""() => {{
          const hidden = {{ value: {hidden}, configurable: true }};
          Object.defineProperty(document, 'hidden', hidden);
          document.dispatchEvent(new Event('visibilitychange'));
        }}""")
    until_seen(look, lambda seen: seen["events"] == ["a", "b"])
    assert len(server.asked) == 1


def test_coming_back_online_ends_the_wait(open_stream, page):
    server, look = open_stream([HEAD + b"retry: 600000\n\n", FIN], [HEAD, HOLD])
    until_seen(look, lambda seen: seen["states"][-1] == "waiting")
    page.context.set_offline(True)
    page.context.set_offline(False)
    until_seen(look, lambda seen: seen["states"][-1] == "open")
    assert len(server.asked) == 2


def test_a_bug_in_the_page_is_no_reason_to_connect_again(open_stream, page):
    errors = []
    page.on("pageerror", lambda error: errors.append(error.message))
    server = Scripted([HEAD + b"data: a\n\ndata: b\n\n", HOLD], files=FILES)
    with server:
        page.goto(server.url)
        page.evaluate("""() => {
          window.got = [];
          SSE.open('/stream', {
            onevent({ data }) { got.push(data); throw new Error('a bug'); },
          });
        }""")
        wait_until(lambda: page.evaluate("got.length") == 2)
        assert len(server.asked) == 1
    assert errors == ["a bug", "a bug"]


def test_a_stream_of_many_small_pieces_of_one_long_line(script):
    """Work for a piece must not grow with the line: this would take minutes."""
    got = script.evaluate("""() => {
      let got = 0;
      const parser = new SSE.Parser({ onevent: ({ data }) => (got = data.length) });
      parser.feed('data: ');
      for (let n = 0; n < 2000000; n += 1) parser.feed('x');
      parser.feed('\\n\\n');
      return got;
    }""")
    assert got == 2000000
