"""The pages as their users meet them, in real Chromium: the clock, what is on the wire,
both languages, a narrow screen."""

import re

import pytest
from kit import FIN, HOLD, WWW, check_axe, delta, enter_room, from_disk, from_http, said, speak, sse
from kit.pages import ask

VIEWS = ["chat", "clock", "room"]


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
    source = "".join(path.read_text() for path in WWW.glob("*.js"))
    assert set(re.findall(r'say\("([^"]+)"', source)) <= set(words)
    html = (WWW / "index.html").read_text()
    tags = re.findall(r"<[^/!][^>]*>", html)
    for english, chinese in [("aria-label=", "data-zh-label="), ("placeholder=", "data-zh-hint=")]:
        assert all((english in tag) == (chinese in tag) for tag in tags)
    untranslated = re.findall(r"<(?![^>]*data-zh)[^>]*>([^<>]*[a-z][^<>]*)<", html)
    assert untranslated == ["chatstream", "chatstream", JAVASCRIPT]


JAVASCRIPT = "This page is its scripts: it needs JavaScript."


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
    expect(page.locator("#face")).to_contain_text(re.compile(r"\d"))
    check("clock")
    page.click("nav a[href='#room']")
    check("room, before joining")
    enter_room(page, "Ann", expect)
    speak(page, "Hello")
    expect(said(page).last).to_have_text("Hello")
    check("room")
    context.close()
