"""The pages as their users meet them, in real Chromium: the clock, what is on the wire,
both languages, a narrow screen."""

import re
import signal

import pytest
from kit import (
    FIN,
    HOLD,
    WWW,
    Gate,
    Line,
    Scripted,
    answer,
    ask,
    check_axe,
    delta,
    enter_room,
    from_disk,
    from_http,
    last_answer,
    over,
    said,
    speak,
    sse,
    wait_until,
)

VIEWS = ["chat", "clock", "room"]


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
    expect(page.locator("#clock-age")).to_have_text(
        re.compile(r"Last tick [01]\.\d s ago\.")
    )
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
        page = profile.open(
            f"{(WWW / 'index.html').as_uri()}?server={server.url}#clock"
        )
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
    expect(page.get_by_role("list", name="Clock: WebSocket")).to_contain_text(
        '{"id":"clock-'
    )
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
    used = set(
        re.findall(r'(?:say\(|data-(?:say|label|placeholder)=)"([^"]+)"', source)
    )
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


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(chromium, model, upstream, axe, expect, scheme, width):
    size = {"width": width, "height": 800}
    context = chromium.new_context(viewport=size, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()

    def check(state):
        check_axe(page, axe, state)

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
    enter_room(page, "Ann", expect)
    speak(page, "Hello")
    expect(said(page).last).to_have_text("Hello")
    check("room")
    context.close()
