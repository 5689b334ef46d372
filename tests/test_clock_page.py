"""The clock view in real Chromium: the picture of three ways to be told the time, what
a cut does to each of them, the numbers, and what is on the wire."""

import re
import signal
from itertools import pairwise, product

import pytest
from kit import (
    HOLD,
    WWW,
    Gate,
    Line,
    Profile,
    Scripted,
    answer,
    check_axe,
    fits,
    from_disk,
    from_http,
    last_answer,
    wait_until,
)
from kit.pages import ask, over

WAYS = ["polling", "stream", "socket"]
SIZES = {"phone": 320, "desk": 1280}


def value(page, row, way):
    """A number of the table of the three ways."""
    cell = page.locator(f"tr.row-{row} td").nth(WAYS.index(way))
    return int(re.sub(r"\D", "", cell.text_content()) or 0)


def until_told(page, ticks=2):
    for way in WAYS:
        wait_until(lambda way=way: value(page, "seen", way) >= ticks)


@pytest.fixture(scope="module", params=[from_http, from_disk], ids=["http", "disk"])
def ticking(chromium, demo, request):
    """A clock view that has ticked for a while, for tests that only look at it."""
    profile = Profile(chromium.new_context(locale="en-US"))
    page = profile.open(request.param(demo, "clock"))
    until_told(page, 3)
    yield page
    profile.context.close()
    assert profile.problems == []


def verdict(page, way):
    return page.locator("#picture .verdict").nth(WAYS.index(way))


def cut(page, seconds):
    page.evaluate(f"document.querySelector('#clock-cut button').value = {seconds}")
    page.locator("#clock-cut button").first.click()


def cut_and_back(page, expect):
    """A cut that is longer than what was told before it."""
    until_told(page, 1)
    cut(page, 3.2)
    state = page.locator("#clock-cut [role=status]")
    expect(state).to_have_text("The network is cut.")
    expect(state).to_have_text("The network is back.", timeout=20_000)


# ------------------------------------------------------------------------- the picture


def points(page, part):
    """The dots of one kind, or the lines of one kind, as [[x, y], ...] each."""
    path = page.locator(f"#picture path.{part}").get_attribute("d") or ""
    pieces = [piece for piece in path.split("M") if piece]
    numbers = [re.findall(r"-?[\d.]+", piece) for piece in pieces]
    return [[(float(x), float(y)) for x, y in pairs(found)] for found in numbers]


def pairs(numbers):
    return zip(numbers[::2], numbers[1::2], strict=False)


def heights(page, part):
    return {line[0][1] for line in points(page, part)}


def test_each_tick_is_drawn_as_it_came(ticking):
    """A zigzag of questions and answers; two open connections with a drop for each."""
    page = ticking
    assert len(points(page, "call")) >= 2
    assert all(len(call) == 3 for call in points(page, "call"))
    assert len(points(page, "bar")) == 2
    assert len(points(page, "drop")) >= 4
    assert len(heights(page, "told")) == 6
    assert points(page, "cut") == []


def test_a_cut_grows_while_it_lasts_and_counts_down(profile, demo, expect):
    page = profile.open(from_http(demo, "clock"))
    until_told(page)
    cut(page, 60)
    words = page.locator("#picture .cut-words")
    expect(words).to_have_text(re.compile("Network cut. Back in 5[0-9] s"))
    before = words.text_content()
    expect(words).not_to_have_text(before)
    assert len(points(page, "cut")) == 3
    band = "document.querySelector('#picture .cut').getBoundingClientRect().left"
    left = page.evaluate(band)
    wait_until(lambda: page.evaluate(band) < left - 10)
    assert all(len(call) == 2 for call in points(page, "call")[-1:])  # half way
    expect(page.locator("#picture-words")).to_contain_text("nothing reaches the page")


def test_who_lost_ticks_in_a_cut_and_who_caught_up(profile, demo, expect):
    """In a browser, too, that lacks AbortSignal.any: it came with Safari 17.4."""
    profile.context.add_init_script("delete AbortSignal.any; delete AbortSignal.timeout;")
    page = profile.open(from_http(demo, "clock"))
    cut_and_back(page, expect)
    expect(verdict(page, "polling")).to_have_text(re.compile(r"\d lost for good"))
    for way in ("stream", "socket"):
        expect(verdict(page, way)).to_have_text(re.compile(r"none lost, \d caught up"))
        assert value(page, "missed", way) == 0
        assert value(page, "connections", way) == 2
        assert value(page, "median", way) < 500  # of what was not caught up on
    first = min(heights(page, "told"))  # the first lane alone, on the server's line
    wait_until(lambda: heights(page, "untold") == {first})
    drops = points(page, "drop")
    for lane in {drop[0][1] for drop in drops}:
        ends = [end for (_, top), (end, _) in drops if top == lane]
        assert min(after - before for before, after in pairwise(ends)) < 2  # they fan in
    sentence = page.locator("#picture-words")
    said = r"Short connections: .*good: [1-9].*SSE and WebSocket: none lost, \d caught up"
    expect(sentence).to_have_text(re.compile(said))
    expect(page.locator("#announcer")).to_contain_text("none lost")
    name = "Short connection: \\d lost for good; SSE: none lost, \\d caught up; WebSocket: "
    expect(page.get_by_role("img", name=re.compile(name))).to_be_visible()


def test_motion_is_reduced_for_those_who_ask(chromium, demo):
    places = """() => new Promise((resolve) => {
      const found = new Set(), until = performance.now() + 1000;
      const look = () => {
        found.add(document.querySelector('#picture svg g').getAttribute('transform'));
        if (performance.now() < until) requestAnimationFrame(look);
        else resolve(found.size);
      };
      look();
    })"""
    counts = {}
    page = chromium.new_page()
    page.goto(from_http(demo, "clock"))
    until_told(page, 1)
    for motion in ("reduce", "no-preference"):
        page.emulate_media(reduced_motion=motion)
        counts[motion] = page.evaluate(places)
    page.close()
    assert counts["reduce"] <= 3
    assert counts["no-preference"] >= 5


# ------------------------------------------------------------------- what is measured


def test_the_clock_ticks(ticking, expect):
    page = ticking
    face = page.locator("#face")
    expect(face).to_have_text(re.compile(r"\d\d:\d\d:\d\d"))
    before = face.inner_text()
    expect(face).not_to_have_text(before)
    expect(page.locator("#clock-words")).to_have_text("Connected.")
    expect(page.locator("#clock-age")).to_have_text(re.compile(r"Last tick [01]\.\d s ago\."))
    assert value(page, "requests", "polling") >= 2
    assert value(page, "requests", "stream") == value(page, "requests", "socket") == 1


def test_the_table_is_folded_away_and_says_what_to_take(ticking, expect):
    page = ticking
    expect(page.locator("#ways")).to_be_hidden()
    page.click("#numbers summary")
    for row in ("Who speaks", "After a cut", "Take it for"):
        expect(page.get_by_role("rowheader", name=row)).to_be_visible()


def test_polls_come_at_any_moment_of_a_second(profile, demo):
    page = profile.context.new_page()
    page.add_init_script("let n = 0; Math.random = () => (n++ % 2 ? 0.9 : 0.1)")
    page.goto(from_http(demo, "clock"))
    delays = []
    for seen in range(1, 4):
        wait_until(lambda seen=seen: value(page, "seen", "polling") >= seen)
        delays.append(value(page, "delay", "polling"))
    assert max(delays) - min(delays) > 200


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


TABLE = r"""() => Object.fromEntries(
  [...document.querySelectorAll('#ways tbody tr')].map((row) => [
    row.className.slice(4),
    [...row.cells].slice(1).map((cell) => Number(cell.textContent.replace(/\D/g, ''))),
  ]),
)"""


def test_the_bytes_shown_are_those_on_the_wire(profile, demo):
    """They are computed. So they are compared with what a line really carries."""
    with Line(demo.port) as line:
        page = profile.open(f"{over(line)}#clock")
        wait_until(lambda: value(page, "seen", "polling") >= 3)
        heads = [["GET /time "], ["GET /clock ", "text/event-stream"], ["GET /clock ", "Upgrade:"]]

        def is_right():
            """Not while a tick is on its way to the table."""
            table = page.evaluate(TABLE)
            shown = zip(table["sent"], table["received"], strict=True)
            passed = [line.passed(*head) for head in heads]
            return list(shown) == [pytest.approx(both, rel=0.1) for both in passed]

        wait_until(is_right)
        assert page.evaluate(TABLE)["connections"] == [1, 1, 1]
        page.close()


# ------------------------------------------------------------- lines that misbehave


def test_a_stream_that_is_held_back_is_noticed(profile, demo, expect):
    """By a proxy that buffers, say: ticks in clumps."""
    with Line(demo.port) as line:
        page = profile.open(f"{over(line)}#clock")
        wait_until(lambda: value(page, "seen", "stream") >= 2)
        notice = page.locator("#clumps")
        expect(notice).to_be_hidden()
        for _ in range(3):
            line.stall()
            page.wait_for_timeout(2100)
            line.flow()
            page.wait_for_timeout(100)
        expect(notice).to_be_visible()
        expect(notice).to_contain_text("holds the stream back")
        page.close()


def test_a_line_that_goes_silent_is_noticed_after_ten_seconds(profile, demo, expect):
    """Nothing breaks, nothing comes: both kinds of stream look for another way."""
    with Line(demo.port) as line:
        page = profile.context.new_page()
        page.clock.install()
        page.goto(f"{over(line)}#clock")
        wait_until(lambda: value(page, "seen", "stream") >= 2)
        wait_until(lambda: value(page, "seen", "socket") >= 2)
        line.stall()
        page.clock.fast_forward(11_000)
        expect(page.locator("#clock-words")).not_to_have_text("Connected.")
        line.flow()
        page.clock.fast_forward(5_000)
        for way in ("stream", "socket"):
            wait_until(lambda way=way: value(page, "connections", way) == 2)
            assert value(page, "missed", way) == 0
        page.close()


@pytest.mark.parametrize("event", ["online", "pageshow", "visibilitychange"])
def test_waking_up_looks_again_at_once(profile, demo, event):
    with Line(demo.port) as line:
        page = profile.context.new_page()
        page.clock.install()
        page.goto(f"{over(line)}#clock")
        wait_until(lambda: value(page, "seen", "stream") >= 1)
        wait_until(lambda: value(page, "seen", "socket") >= 1)
        line.stall()
        page.clock.fast_forward(6_000)  # no more than a pause, as far as one can tell
        assert value(page, "connections", "stream") == 1
        on = "document" if event == "visibilitychange" else "window"
        page.evaluate(f"{on}.dispatchEvent(new Event('{event}'))")
        line.flow()
        for way in ("stream", "socket"):
            wait_until(lambda way=way: value(page, "connections", way) == 2)
        page.close()


def test_the_server_started_again_under_the_clock(profile, serve, expect):
    profile.network_fails = True
    server = serve()
    page = profile.open(from_http(server, "clock"))
    for way in ("stream", "socket"):
        wait_until(lambda way=way: value(page, "seen", way) >= 1)
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


# ------------------------------------------------------------------------- on the wire


def test_the_frames_can_be_seen(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    page.click("#wire summary")
    expect(page.locator("#wire-empty")).to_be_visible()
    ask(page, upstream.script(*answer("One ", "two.")))
    frames = page.locator("#wire-body")
    for text in ("POST /chatgptApi/", "x-answer-id: ", 'data: {"content":"One "}', "id: "):
        expect(frames).to_contain_text(text)
    expect(frames).to_contain_text("data: [DONE]")
    page.click("nav a[href='#clock']")
    for name in ("Clock: short connections", "Clock: SSE", "Clock: WebSocket"):
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


def frames(page, name):
    return page.get_by_role("list", name=name)


def is_at_its_end(frames):
    return frames.evaluate("list => list.scrollHeight - list.scrollTop - list.clientHeight < 2")


def test_the_panel_follows_and_leaves_its_reader_alone(profile, demo, expect):
    page = profile.open(from_http(demo, "clock"))
    page.click("#wire summary")
    streamed = frames(page, "Clock: SSE")
    wait_until(lambda: value(page, "seen", "polling") >= 2)
    page.evaluate(
        "for (const way of ['polling', 'stream', 'socket']) "
        "for (let n = 0; n < 20; n += 1) wire.record(`wire-${way}`, 'in', 'more')"
    )
    expect(streamed.get_by_text("more")).to_have_count(20)
    for name in ("Clock: SSE", "Clock: WebSocket", "Clock: short connections"):
        wait_until(lambda name=name: is_at_its_end(frames(page, name)))
    streamed.evaluate("list => list.scrollTop = 0")
    seen = value(page, "seen", "stream")
    wait_until(lambda: value(page, "seen", "stream") >= seen + 2)
    assert streamed.evaluate("list => list.scrollTop") == 0
    wait_until(lambda: is_at_its_end(frames(page, "Clock: WebSocket")))


def test_the_heads_stay_however_much_has_come_since(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    page.click("#wire summary")
    pause = 0.01
    words = [step for n in range(120) for step in (f"word{n} ", pause)]
    ask(page, upstream.script(*answer(*words)))
    rows = frames(page, "Chat: SSE over fetch")
    expect(last_answer(page)).to_contain_text("word119")
    expect(rows).to_contain_text("word119")
    expect(rows).not_to_contain_text("word2 ")
    expect(rows).to_contain_text("POST /chatgptApi/")
    expect(rows).to_contain_text("HTTP 200")


# ------------------------------------------------------------------------------- looks


def test_axe_finds_nothing_in_the_clock(chromium, demo, axe, expect):
    context = chromium.new_context(bypass_csp=True)
    page = context.new_page()

    def check(state):
        for scheme, (size, width) in product(["light", "dark"], SIZES.items()):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 800})
            check_axe(page, axe, f"{state}, {scheme}, {size}")

    page.goto(from_http(demo, "clock"))
    until_told(page, 1)
    check("ticking")
    cut(page, 30)
    check("cut")
    page.evaluate("network.cut(0)")
    expect(verdict(page, "stream")).to_contain_text("caught up", timeout=15_000)
    page.click("#numbers summary")
    page.click("#wire summary")
    expect(page.locator("#wire-body li").first).to_be_visible()
    page.evaluate("document.getElementById('clumps').hidden = false")
    check("all of it unfolded")
    context.close()


def test_the_clock_fits_a_narrow_screen(chromium, demo):
    context = chromium.new_context(viewport={"width": 320, "height": 640})
    pages = [context.new_page() for _ in range(2)]
    for page, language in zip(pages, ["en", "zh"], strict=True):
        page.goto(from_http(demo, "clock", lang=language))
    for page in pages:
        until_told(page, 1)
        cut(page, 1)
        page.click("#numbers summary")
    overlap = """() => {
      const boxes = (of) => [...document.querySelectorAll(`#picture ${of}`)]
        .map((text) => text.getBoundingClientRect());
      const verdicts = boxes('.verdict');
      return boxes('.title').some(({ right }, n) => right > verdicts[n].left);
    }"""
    for page, letters in product(pages, ["17px", "34px"]):
        wait_until(lambda page=page: value(page, "late", "stream"))
        page.evaluate(f"document.documentElement.style.fontSize = '{letters}'")
        page.wait_for_timeout(300)  # it is drawn five times a second
        fits(page, 320)
        assert not page.evaluate(overlap)
    context.close()
