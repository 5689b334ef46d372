"""The pages as their users meet them, in real Chromium: from http and from disk, with
the server gone and back, over lines that break, in two tabs, in Chinese, at 320 px."""

import re
import signal

import pytest
from kit import (
    DONE,
    FIN,
    HOLD,
    ROOT,
    Gate,
    Line,
    Scripted,
    answer,
    delta,
    free_port,
    need_module,
    npm_packages,
    plain,
    sse,
    wait_until,
)

WWW = ROOT / "www"
VIEWS = ["chat", "clock", "room"]


@pytest.fixture(scope="module")
def expect(chromium):
    return need_module("playwright.sync_api", "pip install playwright").expect


class Profile:
    """One browser of one user: its tabs share what it stores."""

    def __init__(self, context):
        self.context = context
        self.problems = []
        self.network_fails = False  # the test sees to that: the browser reports it

    def open(self, url):
        page = self.context.new_page()
        page.on("console", lambda message: self._hear(message.type, message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(url)
        return page

    def _hear(self, kind, text):
        network = "Failed to load resource" in text or "WebSocket connection" in text
        if kind in ("error", "warning") and not (network and self.network_fails):
            self.problems.append(text)


@pytest.fixture
def profile(chromium, serve):  # so that it is closed before the servers are
    context = chromium.new_context(locale="en-US")
    profile = Profile(context)
    yield profile
    context.close()
    assert profile.problems == []


@pytest.fixture(scope="module")
def model(shared, upstream):
    """A server whose model says what a test tells it to, also to a page from disk."""
    flags = ["--upstream", upstream.url, "--model", "scripted"]
    return shared(*flags, "--allow-origin", "null")


def from_http(server, view="", **query):
    parameters = "&".join(f"{name}={value}" for name, value in query.items())
    return f"{server.http}/?{parameters}#{view}"


def from_disk(server, view="", **query):
    page = f"{(WWW / 'index.html').as_uri()}?server={server.http}"
    return "&".join([page, *(f"{n}={v}" for n, v in query.items())]) + f"#{view}"


@pytest.fixture(params=[from_http, from_disk], ids=["http", "disk"])
def where(request):
    return request.param


def ask(page, question):
    page.fill("#question", question)
    page.keyboard.press("Enter")


def last_answer(page):
    return page.locator(".answer .text").last


# --------------------------------------------------------------------------- the chat


def test_an_answer_comes_token_by_token(profile, model, upstream, where, expect):
    gate = Gate()
    page = profile.open(where(model))
    expect(page.locator("#chat-state")).to_have_text("Ready. Model: scripted")
    ask(page, upstream.script(*answer("One ", gate, "two ", "three.")))
    expect(last_answer(page)).to_have_text("One")
    expect(page.locator("#chat-state")).to_have_text("Receiving")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_hidden()
    gate.open()
    expect(last_answer(page)).to_have_text("One two three.")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#question")).to_be_focused()


def test_the_demo_needs_nothing(profile, demo, where, expect):
    page = profile.open(where(demo))
    page.locator("#examples button").first.click()
    expect(page.locator(".question")).to_have_text("What is a long connection?")
    expect(last_answer(page)).to_contain_text("demo", timeout=10_000)


def test_an_answer_is_counted(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    ask(page, upstream.script(*answer("One ", 0.3, "two ", "three.")))
    stats = page.locator(".stats")
    numbers = ["first token after {}", "{} tokens/s", "{} tokens", "{} s in all"]
    patterns = [re.compile(number.replace("{}", r"[\d.]+")) for number in numbers]
    expect(stats.locator("span")).to_have_text(patterns)
    expect(stats).to_contain_text("3 tokens")


def test_a_finished_answer_is_announced_once(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    page.evaluate("""() => {
      window.announced = [];
      new MutationObserver((records) => {
        for (const record of records) {
          for (const node of record.addedNodes) announced.push(node.textContent);
        }
      }).observe(document.getElementById('announcer'), { childList: true });
    }""")
    ask(page, upstream.script(*answer("One ", 0.1, "two ", 0.1, "three.")))
    expect(page.locator("#send")).to_be_visible()
    expect(last_answer(page)).to_have_text("One two three.")
    assert page.evaluate("announced") == ["Answer: One two three."]
    expect(page.get_by_role("log", name="Conversation")).to_have_attribute("aria-live", "off")


def test_the_model_is_told_what_was_said_before(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    first = upstream.script(*answer("First."))
    ask(page, first)
    expect(page.locator("#send")).to_be_visible()
    second = upstream.script(*answer("Second."))
    ask(page, second)
    expect(last_answer(page)).to_have_text("Second.")
    (asked,) = upstream.asked(second)
    assert [(said["role"], said["content"]) for said in asked.json["messages"]] == [
        ("user", first),
        ("assistant", "First."),
        ("user", second),
    ]


def test_text_is_text(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    evil = "<img src=x onerror=alert(1)><b>bold</b>"
    ask(page, upstream.script(*answer(evil)))
    expect(last_answer(page)).to_have_text(evil)
    assert page.locator("#log img, #log b").count() == 0


def test_paragraphs_and_code(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    text = "One\nline.\n\nTwo `x`.\n```py\nif a:\n\n    b\n```\nThree."
    ask(page, upstream.script(*answer(*text)))  # letter by letter
    expect(page.locator("#send")).to_be_visible()
    blocks = last_answer(page).locator("> *")
    assert [
        (block.evaluate("e => e.tagName"), block.text_content().rstrip("\n"))
        for block in blocks.all()
    ] == [
        ("P", "One\nline."),
        ("P", "Two `x`."),
        ("PRE", "if a:\n\n    b"),
        ("P", "Three."),
    ]


def test_an_answer_can_be_copied(profile, model, upstream, expect):
    profile.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = profile.open(from_http(model))
    text = "One.\n\n```\ncode\n```\n"
    ask(page, upstream.script(*answer(*text)))
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == text


# ------------------------------------------------------------------------- the keyboard


def test_shift_enter_begins_a_line_and_enter_sends(profile, model, upstream, expect):
    prompt = upstream.script(*answer("Yes."))
    page = profile.open(from_http(model))
    page.fill("#question", "First")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type(prompt)
    expect(page.locator("#question")).to_have_value(f"First\n{prompt}")
    assert page.locator(".question").count() == 0
    page.fill("#question", prompt)
    page.keyboard.press("Enter")
    expect(page.locator(".question")).to_have_text(prompt)


def test_enter_in_an_input_method_chooses_and_does_not_send(profile, demo, expect):
    page = profile.open(from_http(demo))
    page.focus("#question")
    typing = profile.context.new_cdp_session(page)
    composition = {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6}
    typing.send("Input.imeSetComposition", composition)
    enter = {"type": "keyDown", "key": "Enter", "windowsVirtualKeyCode": 13}
    page.evaluate("""() => addEventListener('keydown', (event) => {
      window.composing = event.isComposing;
    }, true)""")
    typing.send("Input.dispatchKeyEvent", enter)
    assert page.evaluate("composing") is True  # else this test shows nothing
    expect(page.locator("#question")).to_have_value("ni hao")
    assert page.locator(".question").count() == 0
    typing.send("Input.insertText", {"text": "你好"})
    page.keyboard.press("Enter")
    expect(page.locator(".question")).to_have_text("你好")


def test_all_can_be_reached_by_keyboard(profile, demo, expect):
    page = profile.open(from_http(demo))
    reached = []
    while "On the wire" not in reached:
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("""() => {
          const { activeElement: at } = document;
          const outline = getComputedStyle(at).outlineStyle;
          if (outline === 'none') throw new Error(`not seen: ${at.outerHTML}`);
          return at.labels?.[0]?.textContent || at.textContent;
        }""")
        )
        assert len(reached) < 20, reached
    wanted = ["Chat", "Clock", "Room", "中文", "Your message", "Send", "On the wire"]
    assert [name for name in reached if name in wanted] == wanted
    page.keyboard.press("Enter")
    expect(page.locator("#wire-body")).to_be_visible()


# -------------------------------------------------------------------------------- stop


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_keeps_what_has_come(profile, model, upstream, expect, how):
    prompt = upstream.script(*sse(delta("One "), delta("two "), HOLD))
    page = profile.open(from_http(model))
    ask(page, prompt)
    expect(last_answer(page)).to_have_text("One two")
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.click("#stop")
    expect(page.locator(".stats")).to_contain_text("Stopped")
    expect(last_answer(page)).to_have_text("One two")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#question")).to_be_focused()
    wait_until(lambda: upstream.asked(prompt)[0].closed_at)
    page.reload()
    expect(page.locator(".stats")).to_contain_text("Stopped")
    expect(last_answer(page)).to_have_text("One two")


def test_stop_before_the_first_token(profile, model, upstream, expect):
    prompt = upstream.script(*sse(HOLD))
    page = profile.open(from_http(model))
    ask(page, prompt)
    expect(page.locator("#chat-state")).to_have_text("Waiting for the first token")
    wait_until(lambda: upstream.asked(prompt))
    page.keyboard.press("Escape")
    expect(page.locator(".stats")).to_have_text("Stopped")
    expect(page.locator("#send")).to_be_visible()
    wait_until(lambda: upstream.asked(prompt)[0].closed_at, 5)


def test_stop_before_the_response(profile, model, upstream, expect):
    """Nobody knows the answer's id yet: it is stopped once it is known."""
    gate = Gate()
    prompt = upstream.script(gate, *sse(delta("late"), HOLD))
    page = profile.open(from_http(model))
    ask(page, prompt)
    wait_until(lambda: upstream.asked(prompt))
    page.click("#stop")
    expect(page.locator(".stats")).to_have_text("Stopped")
    gate.open()
    wait_until(lambda: upstream.asked(prompt)[0].closed_at, 5)
    expect(last_answer(page)).to_have_text("")


def test_a_double_click_on_send_does_not_stop(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    page.fill("#question", upstream.script(*answer(0.5, "Yes.")))
    page.dblclick("#send")
    expect(last_answer(page)).to_have_text("Yes.")


# ------------------------------------------------------------- reloads and second tabs


def test_an_answer_goes_on_after_a_reload(profile, model, upstream, where, expect):
    gate = Gate()
    prompt = upstream.script(*answer("One ", "two ", gate, "three ", "four."))
    page = profile.open(where(model))
    ask(page, prompt)
    expect(last_answer(page)).to_have_text("One two")
    page.reload()
    expect(last_answer(page)).to_have_text("One two")
    expect(page.locator("#stop")).to_be_visible()
    gate.open()
    expect(last_answer(page)).to_have_text("One two three four.")
    expect(page.locator(".stats")).to_contain_text("4 tokens")
    assert len(upstream.asked(prompt)) == 1


def test_a_second_tab_reads_along(profile, model, upstream, where, expect):
    gate = Gate()
    prompt = upstream.script(*answer("One ", gate, "two."))
    first = profile.open(where(model))
    ask(first, prompt)
    expect(last_answer(first)).to_have_text("One")
    second = profile.open(where(model))
    expect(last_answer(second)).to_have_text("One")
    gate.open()
    for tab in (first, second):
        expect(last_answer(tab)).to_have_text("One two.")
        expect(tab.locator("#send")).to_be_visible()
    assert len(upstream.asked(prompt)) == 1


def test_what_one_tab_asks_the_other_shows(profile, model, upstream, expect):
    first, second = profile.open(from_http(model)), profile.open(from_http(model))
    gate = Gate()
    ask(first, upstream.script(*answer("One ", gate, "two.")))
    expect(last_answer(second)).to_have_text("One")
    second.click("#stop")
    expect(first.locator(".stats")).to_contain_text("Stopped")
    expect(first.locator("#send")).to_be_visible()
    gate.open()
    second.click("#fresh")
    expect(first.locator("#welcome")).to_be_visible()
    assert first.locator("article").count() == 0


def test_another_view_does_not_end_an_answer(profile, model, upstream, expect):
    gate = Gate()
    page = profile.open(from_http(model))
    ask(page, upstream.script(*answer("One ", gate, "two.")))
    expect(last_answer(page)).to_have_text("One")
    page.click("nav a[href='#clock']")
    gate.open()
    page.click("nav a[href='#chat']")
    expect(last_answer(page)).to_have_text("One two.")


# ------------------------------------------------------------------------------ trouble


def test_a_failure_says_what_happened_and_can_be_tried_again(profile, model, upstream, expect):
    scripts = iter([sse(delta("Half"), FIN), answer("All of it.")])
    prompt = upstream.script(lambda heard: next(scripts))
    page = profile.open(from_http(model))
    ask(page, prompt)
    trouble = page.locator(".trouble")
    expect(trouble).to_contain_text("The answer broke off: ")
    expect(last_answer(page)).to_have_text("Half")
    page.reload()
    expect(trouble).to_contain_text("The answer broke off: ")
    page.get_by_role("button", name="Try again").click()
    expect(last_answer(page)).to_have_text("All of it.")
    expect(trouble).to_have_count(0)
    expect(page.locator("article")).to_have_count(2)


def test_a_refusal_is_shown_in_the_servers_words(profile, model, upstream, expect):
    profile.network_fails = True  # a 401 is written to the console
    error = {"message": "That key is not known.", "type": "auth", "code": None}
    page = profile.open(from_http(model))
    ask(page, upstream.script(plain(401, {"error": error | {"param": None}})))
    refused = "The server refused (401): That key is not known."
    expect(page.locator(".trouble p")).to_have_text(refused)
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_a_page_from_disk_needs_leave_to_ask_a_real_model(profile, relay, expect):
    profile.network_fails = True
    page = profile.open(from_disk(relay))
    ask(page, "Hello?")
    expect(page.locator(".trouble")).to_contain_text("--allow-origin null")


def test_a_server_that_is_not_there(profile, serve, expect):
    profile.network_fails = True
    server = serve()
    page = profile.open(from_http(server))
    expect(page.locator("#chat-state")).to_have_text("Ready. Model: demo")
    server.stop()
    ask(page, "Hello?")
    expect(page.locator(".trouble")).to_contain_text("could not be reached")
    serve("--port", str(server.port))
    page.get_by_role("button", name="Try again").click()
    expect(last_answer(page)).to_contain_text("demo")


def test_from_disk_it_waits_for_the_server(profile, serve, expect):
    profile.network_fails = True
    port = free_port()
    page = profile.open(f"{(WWW / 'index.html').as_uri()}?server=localhost:{port}")
    none = f"No server at localhost:{port}. To start one: python chatstream.py"
    expect(page.locator("#chat-state")).to_have_text(none)
    serve("--port", str(port))
    expect(page.locator("#chat-state")).to_have_text("Ready. Model: demo", timeout=20_000)


def test_a_server_killed_in_mid_answer_and_started_again(profile, serve, upstream, expect):
    profile.network_fails = True
    flags = ["--upstream", upstream.url, "--model", "scripted"]
    server = serve(*flags)
    page = profile.open(from_http(server))
    scripts = iter([sse(delta("Half "), HOLD), answer("All of it.")])
    ask(page, upstream.script(lambda heard: next(scripts)))
    expect(last_answer(page)).to_have_text("Half")
    server.signal(signal.SIGKILL)
    expect(page.locator("#chat-state")).to_contain_text("Connection lost")
    serve(*flags, "--port", str(server.port))
    gone = "The server no longer has this answer"
    expect(page.locator(".trouble")).to_contain_text(gone, timeout=20_000)
    expect(last_answer(page)).to_have_text("Half")
    page.get_by_role("button", name="Try again").click()
    expect(last_answer(page)).to_have_text("All of it.")


@pytest.fixture
def line(model, profile):
    with Line(model.port) as line:
        yield line
        profile.network_fails = True  # that it ends now is no problem of the page's


def over(line):
    return f"{line.url}/"


def test_a_line_cut_in_mid_answer(profile, line, upstream, expect):
    profile.network_fails = True
    gate = Gate()
    prompt = upstream.script(*answer("One ", gate, "two ", "three."))
    page = profile.open(over(line))
    ask(page, prompt)
    expect(last_answer(page)).to_have_text("One")
    line.is_down = True
    line.cut()
    expect(page.locator("#chat-state")).to_contain_text("Connection lost")
    gate.open()
    line.is_down = False
    expect(last_answer(page)).to_have_text("One two three.", timeout=20_000)
    assert len(upstream.asked(prompt)) == 1


def test_a_line_cut_before_the_first_token(profile, line, upstream, expect):
    profile.network_fails = True
    gate = Gate()
    prompt = upstream.script(*sse(b": thinking\n\n", gate, delta("One."), DONE))
    page = profile.open(over(line))
    ask(page, prompt)
    expect(page.locator("#chat-state")).to_have_text("Waiting for the first token")
    wait_until(lambda: has_id(page))
    line.cut()
    gate.open()
    expect(last_answer(page)).to_have_text("One.", timeout=20_000)
    assert len(upstream.asked(prompt)) == 1


def has_id(page):
    """Whether the response to the question has begun."""
    return page.evaluate("JSON.parse(localStorage['chatstream.conversation']).at(-1).id")


def test_a_line_that_brings_byte_by_byte(profile, line, upstream, expect):
    line.byte_by_byte = True
    page = profile.open(over(line))
    text = "你好，👩‍👩‍👧 …!"
    ask(page, upstream.script(*answer(*text)))
    expect(last_answer(page)).to_have_text(text)


def test_a_stalled_line_is_noticed(profile, line, upstream, expect):
    """No byte for as long as three keep-alives should have come."""
    gate = Gate()
    prompt = upstream.script(*answer("One ", gate, "two."))
    page = profile.context.new_page()
    page.clock.install()
    page.goto(over(line))
    ask(page, prompt)
    expect(last_answer(page)).to_have_text("One")
    line.stall()
    gate.open()
    page.clock.fast_forward(46_000)
    wait_until(lambda: page.locator("#chat-state").inner_text() != "Receiving")
    line.flow()
    page.clock.fast_forward(5_000)
    expect(last_answer(page)).to_have_text("One two.")
    assert len(upstream.asked(prompt)) == 1


# --------------------------------------------------------------------------- scrolling


def test_the_page_follows_only_a_reader_who_is_at_the_end(profile, model, upstream, expect):
    more, rest = Gate(), Gate()
    lines = [f"line {n}\n\n" for n in range(40)]
    page = profile.open(from_http(model))
    ask(page, upstream.script(*answer(*lines, more, *lines, rest, "the end")))
    expect(page.get_by_text("line 39")).to_be_in_viewport()
    expect(page.locator("#jump")).to_be_hidden()
    page.mouse.wheel(0, -600)
    expect(page.locator("#jump")).to_be_visible()
    before = page.evaluate("scrollY")
    more.open()
    expect(page.get_by_text("line 39")).to_have_count(2)
    assert page.evaluate("scrollY") == before
    page.get_by_role("button", name="Jump to latest").click()
    expect(page.get_by_text("line 39").last).to_be_in_viewport()
    expect(page.locator("#jump")).to_be_hidden()
    rest.open()
    expect(page.get_by_text("the end", exact=True)).to_be_in_viewport()


def test_a_long_answer_is_laid_out_in_parts(profile, model, upstream, expect):
    """Else each token would cost as much as all the text before it."""
    page = profile.open(from_http(model))
    words = "".join(f"word{n} " for n in range(3000))
    chinese = "长连接就是一直开着的连接。" * 1000
    code = "".join(f"line {n}\n" for n in range(1000))
    text = f"{words}\n\n{chinese}\n```\n{code}```\nThe end."
    ask(page, upstream.script(*answer(*re.findall("(?s).{1,20}", text))))
    for _ in range(2):
        expect(page.locator("#send")).to_be_visible(timeout=20_000)
        parts = last_answer(page).locator("> *")
        sizes = parts.evaluate_all("all => all.map((part) => part.textContent.length)")
        assert len(text) - 12 <= sum(sizes) <= len(text)
        assert max(sizes) < 3100
        gaps = page.locator("p:has(+ p.continued), pre:has(+ pre.continued)")
        assert gaps.count() >= 8
        below = gaps.evaluate_all("all => all.map(p => getComputedStyle(p).marginBottom)")
        assert set(below) == {"0px"}  # it looks like one
        page.reload()  # then all of it comes at once


# --------------------------------------------------------------------------- the clock


def value(page, row, way):
    """A number of the table of the three ways."""
    column = ["polling", "stream", "socket"].index(way)
    text = page.locator(f"tr.row-{row} td").nth(column).inner_text()
    return int(re.sub(r"\D", "", text) or 0)


def test_the_clock_ticks(profile, demo, where, expect):
    page = profile.open(where(demo, "clock"))
    face = page.locator("#face")
    expect(face).to_have_text(re.compile(r"\d\d:\d\d:\d\d"))
    before = face.inner_text()
    expect(face).not_to_have_text(before)
    expect(page.locator("#clock-words")).to_have_text("Connected.")
    expect(page.locator("#clock-age")).to_have_text(re.compile(r"Last tick [01]\.\d s ago\."))
    for way in ("polling", "stream", "socket"):
        wait_until(lambda way=way: value(page, "seen", way) >= 2)
    wait_until(lambda: value(page, "requests", "polling") >= 2)
    assert value(page, "requests", "stream") == value(page, "requests", "socket") == 1


def test_a_gap_is_told(profile, expect):
    """A clock that was left for longer than it remembers."""
    profile.network_fails = True  # it is no clock for the two others
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        b"Access-Control-Allow-Origin: *\r\n\r\n"
    )
    gap = b'event: gap\ndata: {"missed": 12}\n\ndata: now\nid: clock-1700000000\n\n'
    with Scripted([head + gap, HOLD]) as server:
        page = profile.open(f"{(WWW / 'index.html').as_uri()}?server={server.url}#clock")
        expect(page.locator("#clock-age")).to_contain_text("12 missed.")


def test_a_cut_network_and_who_catches_up(profile, demo, expect):
    page = profile.open(from_http(demo, "clock"))
    for way in ("polling", "stream", "socket"):
        wait_until(lambda way=way: value(page, "seen", way) >= 2)
    page.evaluate("document.querySelector('[data-cut]').dataset.cut = 3")
    page.locator("[data-cut]").first.click()
    expect(page.locator("#cut-state")).to_have_text("The network is cut.")
    expect(page.locator("#cut-state")).to_have_text("The network is back.")
    wait_until(lambda: value(page, "missed", "polling") >= 1)
    for way in ("stream", "socket"):
        wait_until(lambda way=way: value(page, "late", way) >= 1)
        assert value(page, "missed", way) == 0
        assert value(page, "connections", way) == 2
    expect(page.locator("#clock-words")).to_have_text("Connected.")
    assert page.locator(".strip").nth(1).locator(".late").count() >= 1
    assert page.locator(".strip").nth(0).locator(".missed").count() >= 1


def test_the_server_started_again_under_the_clock(profile, serve, expect):
    profile.network_fails = True
    server = serve()
    page = profile.open(from_http(server, "clock"))
    for way in ("stream", "socket"):
        wait_until(lambda way=way: value(page, "seen", way) >= 2)
    server.signal(signal.SIGKILL)
    expect(page.locator("#clock-words")).to_contain_text("Connection lost")
    server.process.wait()
    serve("--port", str(server.port))
    expect(page.locator("#clock-words")).to_have_text("Connected.", timeout=20_000)
    for way in ("stream", "socket"):
        wait_until(lambda way=way: value(page, "connections", way) == 2, 20)
        seen = value(page, "seen", way)
        wait_until(lambda way=way, seen=seen: value(page, "seen", way) > seen)
        assert value(page, "missed", way) == 0


def test_the_clock_is_let_go_when_it_is_out_of_view(profile, serve, expect):
    page = profile.open(from_http(serve(), "clock"))
    readers = "fetch('healthz').then((r) => r.json()).then((health) => health.readers)"
    wait_until(lambda: page.evaluate(readers) == 2)
    page.click("nav a[href='#chat']")
    wait_until(lambda: page.evaluate(readers) == 0)


TABLE = r"""() => Object.fromEntries(
  [...document.querySelectorAll('#ways tbody tr')].map((row) => [
    row.className.slice(4),
    [...row.cells].slice(1).map((cell) => Number(cell.innerText.replace(/\D/g, ''))),
  ]),
)"""


def test_the_bytes_shown_are_those_on_the_wire(profile, demo):
    """They are computed. So they are compared with what a line really carries."""
    with Line(demo.port) as line:
        page = profile.open(f"{line.url}/#clock")
        wait_until(lambda: value(page, "seen", "polling") >= 5)
        table = page.evaluate(TABLE)
        passed = [
            line.passed("GET /time "),
            line.passed("GET /clock ", "text/event-stream"),
            line.passed("GET /clock ", "Upgrade: websocket"),
        ]
        page.close()
    for n in range(3):
        up, down = passed[n]
        assert table["sent"][n] == pytest.approx(up, rel=0.1)
        assert table["received"][n] == pytest.approx(down, rel=0.1)
        assert table["connections"][n] == 1


# ---------------------------------------------------------------------------- the room


def join(page, name, expect):
    page.fill("#name", name)
    page.click("#join button")
    expect(page.locator("#room-state")).to_have_text("Connected")


def speak(page, text):
    page.fill("#words", text)
    page.keyboard.press("Enter")


def said(page):
    return page.locator("#talk .said")


def test_two_in_the_room(profile, serve, where, expect):
    server = serve()
    ann = profile.open(where(server, "room"))
    join(ann, "Ann", expect)
    bob = profile.open(where(server, "room"))
    join(bob, "Bob", expect)
    expect(ann.locator("#talk")).to_contain_text("Bob joined")
    for page in (ann, bob):
        expect(page.locator("#members")).to_have_text("Here now: 2")
    speak(ann, "Hello <b>Bob</b>")
    expect(said(bob)).to_have_text("Hello <b>Bob</b>")
    expect(bob.locator("#talk strong")).to_have_text("Ann")
    speak(bob, "Hello Ann")
    expect(said(ann)).to_have_text(["Hello <b>Bob</b>", "Hello Ann"])
    expect(ann.locator("#talk .own .said")).to_have_text("Hello <b>Bob</b>")
    expect(ann.locator("#words")).to_have_value("")
    bob.click("#leave")
    expect(ann.locator("#talk")).to_contain_text("Bob left")
    expect(ann.locator("#members")).to_have_text("Here now: 1")
    expect(bob.locator("#join")).to_be_visible()


def test_a_reload_stays_in_the_room(profile, serve, expect):
    page = profile.open(from_http(serve(), "room"))
    join(page, "Ann", expect)
    speak(page, "Hello")
    expect(said(page)).to_have_text("Hello")
    page.reload()
    expect(page.locator("#room-state")).to_have_text("Connected")
    expect(said(page)).to_have_text("Hello")
    expect(page.locator("#talk .own")).to_have_count(1)


@pytest.fixture
def party(profile, serve, expect):
    """Ann over a line that the test can break, Bob on a sound one."""
    server = serve()
    with Line(server.port) as line:
        bob = profile.open(from_http(server, "room"))
        join(bob, "Bob", expect)
        yield line, bob


def test_what_was_said_during_a_cut_follows(profile, party, expect):
    profile.network_fails = True
    line, bob = party
    ann = profile.open(f"{line.url}/#room")
    join(ann, "Ann", expect)
    speak(bob, "before")
    expect(said(ann)).to_have_text("before")
    line.is_down = True
    line.cut()
    expect(ann.locator("#room-state")).to_contain_text("Connection lost")
    speak(bob, "meanwhile")
    speak(ann, "not yet")
    expect(ann.locator("#room-state")).to_contain_text("not sent yet")
    expect(ann.locator("#words")).to_have_value("not yet")
    line.is_down = False
    expect(said(ann)).to_have_text(["before", "meanwhile"], timeout=20_000)
    ann.press("#words", "Enter")
    expect(said(bob)).to_have_text(["before", "meanwhile", "not yet"])


def test_a_zombie_is_noticed_within_a_minute(profile, party, expect):
    """A connection that stays open and brings nothing, no heartbeat either."""
    line, bob = party
    ann = profile.context.new_page()
    ann.clock.install()
    ann.goto(f"{line.url}/#room")
    join(ann, "Ann", expect)
    speak(bob, "before")
    expect(said(ann)).to_have_text("before")
    line.stall()
    speak(bob, "meanwhile")
    ann.clock.fast_forward(59_000)
    expect(ann.locator("#room-state")).not_to_have_text("Connected")
    line.flow()
    ann.clock.fast_forward(5_000)
    expect(said(ann)).to_have_text(["before", "meanwhile"])
    expect(ann.locator("#room-state")).to_have_text("Connected")


def test_the_server_started_again_under_the_room(profile, serve, expect):
    profile.network_fails = True
    server = serve()
    page = profile.open(from_http(server, "room"))
    join(page, "Ann", expect)
    server.signal(signal.SIGKILL)
    expect(page.locator("#room-state")).to_contain_text("Connection lost")
    server.process.wait()
    serve("--port", str(server.port))
    expect(page.locator("#room-state")).to_have_text("Connected", timeout=20_000)
    speak(page, "Still here")
    expect(said(page)).to_have_text("Still here")


# ------------------------------------------------------------------------- on the wire


def test_the_frames_can_be_seen(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    page.click("#wire summary")
    expect(page.locator("#wire-empty")).to_be_visible()
    ask(page, upstream.script(*answer("One ", "two.")))
    frames = page.locator("#wire-body")
    for text in (
        "POST /chatgptApi/",
        "x-answer-id: ",
        'data: {"content":"One "}',
        "id: ",
    ):
        expect(frames).to_contain_text(text)
    expect(frames).to_contain_text("data: [DONE]")
    page.click("nav a[href='#clock']")
    for name in ("Clock: polling", "Clock: SSE", "Clock: WebSocket"):
        expect(page.get_by_role("heading", name=name)).to_be_visible()
    expect(page.get_by_role("list", name="Clock: SSE")).to_contain_text("retry: ")
    expect(page.get_by_role("list", name="Clock: SSE")).to_contain_text("id: clock-")
    expect(page.get_by_role("list", name="Clock: WebSocket")).to_contain_text('{"id":"clock-')
    expect(page.get_by_role("heading", name="Chat: SSE over fetch")).to_be_hidden()


def test_a_resume_can_be_seen(profile, line, upstream, expect):
    profile.network_fails = True
    gate = Gate()
    page = profile.open(over(line))
    ask(page, upstream.script(*answer("One ", gate, "two.")))
    expect(last_answer(page)).to_have_text("One")
    page.click("#wire summary")
    line.cut()
    gate.open()
    expect(last_answer(page)).to_have_text("One two.", timeout=20_000)
    expect(page.locator("#wire-body")).to_contain_text("Last-Event-ID: ")


# ------------------------------------------------------------------ languages and looks


def test_chinese_by_address_and_by_browser(chromium, profile, demo, expect):
    page = profile.open(from_http(demo, lang="zh"))
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.locator("#send")).to_have_text("发送")
    page.get_by_role("link", name="English").click()
    expect(page.locator("#send")).to_have_text("Send")
    page.get_by_role("link", name="中文").click()
    expect(page.locator("#send")).to_have_text("发送")
    context = chromium.new_context(locale="zh-CN")
    theirs = context.new_page()
    theirs.goto(from_http(demo))
    expect(theirs.locator("#send")).to_have_text("发送")
    context.close()


def test_the_language_keeps_the_server_and_the_view(profile, demo, expect):
    page = profile.open(from_disk(demo, "room"))
    page.get_by_role("link", name="中文").click()
    expect(page.get_by_role("heading", name="房间")).to_be_visible()
    assert demo.http in page.evaluate("SERVER.href")


def test_no_word_is_missing_in_either_language(profile, demo):
    page = profile.open(from_http(demo))
    words = page.evaluate("WORDS")
    for key, versions in words.items():
        english, chinese = versions
        assert bool(english) == bool(chinese), key
        assert re.findall(r"\{\d\}", english) == sorted(re.findall(r"\{\d\}", chinese))
    source = "".join(path.read_text() for path in WWW.iterdir())
    used = set(re.findall(r'(?:say\(|data-(?:say|label|placeholder)=)"([^"]+)"', source))
    assert used <= set(words)


def test_nothing_is_wider_than_a_narrow_screen(chromium, demo):
    context = chromium.new_context(viewport={"width": 320, "height": 640})
    page = context.new_page()
    for language in ("en", "zh"):
        for view in VIEWS:
            page.goto(from_http(demo, view, lang=language))
            page.click("#wire summary")
            wide = "document.documentElement.scrollWidth"
            assert page.evaluate(wide) == 320, (language, view)
            page.click("#wire summary")
    context.close()


def test_from_disk_the_default_server_is_asked(page):
    page.goto((WWW / "index.html").as_uri())
    assert page.evaluate("SERVER.href") == "http://localhost:4001/"


def test_the_policy_is_strict(profile, demo):
    """Nothing inline, nothing from elsewhere, no text that becomes a document."""
    page = profile.context.new_page()
    head = page.goto(from_http(demo)).headers
    policy = head["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    for act in (
        "document.body.innerHTML = '<p>x</p>'",
        "document.body.insertAdjacentHTML('beforeend', '<p>x</p>')",
        "setTimeout('1')",
    ):
        with pytest.raises(Exception, match="Trusted"):
            page.evaluate(f"() => {{ {act}; }}")
    html = (WWW / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", html)


# -------------------------------------------------------------------------------- axe


@pytest.fixture(scope="session")
def axe():
    """The source of axe-core."""
    folder = npm_packages("axe-core@4") / "node_modules" / "axe-core"
    return (folder / "axe.min.js").read_text()


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(chromium, model, upstream, axe, expect, scheme, width):
    size = {"width": width, "height": 800}
    context = chromium.new_context(viewport=size, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()

    def check(state):
        page.evaluate(axe)
        found = page.evaluate("axe.run().then((results) => results.violations)")
        told = [(v["id"], [node["html"] for node in v["nodes"]]) for v in found]
        assert told == [], state

    page.goto(from_http(model))
    check("empty")
    ask(page, upstream.script(*sse(delta("One\n```\ncode\n```\n"), HOLD)))
    expect(page.locator(".answer pre")).to_be_visible()
    check("streaming")
    page.keyboard.press("Escape")
    ask(page, upstream.script(*sse(delta("Half"), FIN)))
    expect(page.locator(".trouble")).to_be_visible()
    page.click("#wire summary")
    expect(page.locator("#wire-body li").first).to_be_visible()
    check("stopped, failed, with frames")
    page.click("nav a[href='#clock']")
    wait_until(lambda: value(page, "seen", "stream") >= 1)
    check("clock")
    page.click("nav a[href='#room']")
    check("room, before joining")
    join(page, "Ann", expect)
    speak(page, "Hello")
    expect(said(page).last).to_have_text("Hello")
    check("room")
    context.close()
