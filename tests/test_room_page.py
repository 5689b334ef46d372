"""The room as its users meet it, in real Chromium."""

import re
import signal

import pytest
from kit import Line, check_axe, enter_room, from_disk, from_http, said, speak
from kit.pages import over


def test_two_in_the_room(profile, serve, where, expect):
    server = serve()
    ann = profile.open(where(server, "room"))
    enter_room(ann, "Ann", expect)
    bob = profile.open(where(server, "room"))
    enter_room(bob, "Bob", expect)
    expect(ann.locator("#talk")).to_contain_text("Bob joined")
    for page in (ann, bob):
        expect(page.locator("#members")).to_have_text("Here now: Ann, Bob")
    speak(ann, "Hello <b>Bob</b>")
    expect(said(bob)).to_have_text("Hello <b>Bob</b>")
    expect(bob.locator("#talk strong")).to_have_text("Ann")
    speak(bob, "Hello Ann")
    expect(said(ann)).to_have_text(["Hello <b>Bob</b>", "Hello Ann"])
    expect(ann.locator("#talk .own .said")).to_have_text("Hello <b>Bob</b>")
    expect(ann.locator("#words")).to_have_value("")
    bob.click("#leave")
    expect(ann.locator("#talk")).to_contain_text("Bob left")
    expect(ann.locator("#members")).to_have_text("Here now: Ann")
    expect(bob.locator("#join")).to_be_visible()


def test_who_is_here_is_seen(profile, serve, expect):
    """Of a member who came before all that is kept, only the number is known."""
    server = serve()
    ann = profile.open(from_http(server, "room"))
    enter_room(ann, "Ann", expect)
    expect(ann.locator("#members")).to_have_text("Here now: Ann")
    bob = profile.open(from_http(server, "room"))
    enter_room(bob, "Bob", expect)
    expect(ann.locator("#members")).to_have_text("Here now: Ann, Bob")
    bob.close()
    expect(ann.locator("#members")).to_have_text("Here now: Ann")


def test_ones_own_is_what_this_tab_said(profile, serve, expect):
    """Not what somebody of the same name said."""
    server = serve()
    first = profile.open(from_http(server, "room"))
    enter_room(first, "Ann", expect)
    second = profile.open(from_http(server, "room"))
    enter_room(second, "Ann", expect)
    speak(first, "One")
    speak(second, "Two")
    expect(said(first)).to_have_text(["One", "Two"])
    expect(first.locator(".own .said")).to_have_text("One")
    expect(second.locator(".own .said")).to_have_text("Two")
    second.reload()
    expect(second.locator(".own .said")).to_have_text("Two")


def test_a_second_tab_gets_a_name_of_its_own(profile, serve, expect):
    server = serve()
    first = profile.open(from_http(server, "room"))
    enter_room(first, "Ann", expect)
    second = profile.open(from_http(server, "room"))
    expect(second.locator("#name")).to_have_value(re.compile("Guest"))
    with first.expect_popup() as popup:  # a window gets a copy of the tab's storage
        first.evaluate("open(location.href)")
    expect(popup.value.locator("#join")).to_be_visible()
    expect(popup.value.locator("#name")).to_have_value(re.compile("Guest"))
    first.close()
    third = profile.open(from_http(server, "room"))
    expect(third.locator("#name")).to_have_value("Ann")


def test_a_reload_stays_in_the_room(profile, serve, expect):
    page = profile.open(from_http(serve(), "room"))
    enter_room(page, "Ann", expect)
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
        enter_room(bob, "Bob", expect)
        yield line, bob


def test_what_was_said_during_a_cut_follows(profile, party, expect):
    profile.network_fails = True
    line, bob = party
    ann = profile.open(f"{over(line)}#room")
    enter_room(ann, "Ann", expect)
    speak(bob, "before")
    expect(said(ann)).to_have_text("before")
    line.is_down = True
    line.cut()
    expect(ann.locator("#room-state")).to_contain_text("Connection lost")
    expect(ann.locator("#members")).to_be_hidden()
    speak(bob, "meanwhile")
    speak(ann, "not yet")
    expect(ann.locator("#room-state")).to_contain_text("not sent yet")
    expect(ann.locator("#words")).to_have_value("not yet")
    line.is_down = False
    expect(said(ann)).to_have_text(["before", "meanwhile"], timeout=20_000)
    expect(ann.locator("#members")).to_contain_text("Here now")
    ann.press("#words", "Enter")
    expect(said(bob)).to_have_text(["before", "meanwhile", "not yet"])


def test_a_zombie_is_noticed(profile, party, expect):
    """A connection that stays open and brings nothing, no heartbeat either."""
    line, bob = party
    ann = profile.context.new_page()
    ann.clock.install()
    ann.goto(f"{over(line)}#room")
    enter_room(ann, "Ann", expect)
    speak(bob, "before")
    expect(said(ann)).to_have_text("before")
    line.stall()
    speak(bob, "meanwhile")
    ann.clock.fast_forward(11_000)
    expect(ann.locator("#room-state")).not_to_have_text("Connected")
    line.flow()
    ann.clock.fast_forward(5_000)
    expect(said(ann)).to_have_text(["before", "meanwhile"])
    expect(ann.locator("#room-state")).to_have_text("Connected")


def test_a_message_is_pending_until_it_is_heard(profile, party, expect):
    line, bob = party
    ann = profile.open(f"{over(line)}#room")
    enter_room(ann, "Ann", expect)
    line.stall()
    speak(ann, "Hello")
    expect(ann.locator("#talk .pending .said")).to_have_text("Hello")
    expect(ann.locator("#words")).to_have_value("")
    line.flow()
    expect(said(ann)).to_have_text("Hello")
    expect(ann.locator("#talk .pending")).to_have_count(0)
    expect(said(bob)).to_have_text("Hello")


def test_words_that_nobody_heard_come_back(profile, party, expect):
    profile.network_fails = True
    line, bob = party
    ann = profile.open(f"{over(line)}#room")
    enter_room(ann, "Ann", expect)
    line.is_deaf = True
    speak(ann, "Hello")
    expect(ann.locator("#talk .pending")).to_have_count(1)
    ann.fill("#words", "and more")
    line.cut()
    expect(ann.locator("#words")).to_have_value("Hello and more")
    expect(ann.locator("#talk .pending")).to_have_count(0)
    expect(ann.locator("#talk")).to_contain_text("Not delivered")
    line.is_deaf = False
    expect(ann.locator("#room-state")).to_have_text("Connected", timeout=20_000)
    ann.press("#words", "Enter")
    expect(said(bob)).to_have_text("Hello and more")


def test_words_that_were_heard_after_all_leave_the_field(profile, party, expect):
    """The connection broke after the server had got them."""
    profile.network_fails = True
    line, bob = party
    ann = profile.open(f"{over(line)}#room")
    enter_room(ann, "Ann", expect)
    line.stall()
    speak(ann, "Hello")
    expect(said(bob)).to_have_text("Hello")
    line.is_down = True
    line.cut()
    line.flow()
    expect(ann.locator("#words")).to_have_value("Hello")
    line.is_down = False
    expect(said(ann)).to_have_text("Hello", timeout=20_000)
    expect(ann.locator("#words")).to_have_value("")
    expect(ann.locator(".own .said")).to_have_text("Hello")


def test_a_message_that_the_room_cannot_take_comes_back(profile, serve, redis, expect):
    page = profile.open(from_http(serve("--redis", redis.url), "room"))
    enter_room(page, "Ann", expect)
    redis.stop()
    speak(page, "Hello")
    expect(page.locator("#talk")).to_contain_text("the room cannot store messages")
    expect(page.locator("#words")).to_have_value("Hello")
    expect(page.locator("#talk .pending")).to_have_count(0)


def test_a_refusal_is_said_and_is_final(profile, serve, upstream, expect):
    """A page from disk may not talk to a real model's server."""
    profile.network_fails = True
    flags = ["--upstream", upstream.url, "--model", "scripted"]
    server = serve(*flags)
    page = profile.open(from_disk(server, "room"))
    page.fill("#name", "Ann")
    page.click("#join button")
    expect(page.locator("#room-state")).to_contain_text("Refused: ")
    expect(page.locator("#room-state")).to_contain_text("--allow-origin")
    expect(page.locator("#join")).to_be_visible()


def test_the_server_started_again_under_the_room(profile, serve, expect):
    profile.network_fails = True
    server = serve()
    page = profile.open(from_http(server, "room"))
    enter_room(page, "Ann", expect)
    server.signal(signal.SIGKILL)
    expect(page.locator("#room-state")).to_contain_text("Connection lost")
    server.process.wait()
    serve("--port", str(server.port))
    expect(page.locator("#room-state")).to_have_text("Connected", timeout=20_000)
    speak(page, "Still here")
    expect(said(page)).to_have_text("Still here")


def test_axe_finds_nothing_in_the_room(chromium, party, axe, expect):
    line, _ = party
    context = chromium.new_context(bypass_csp=True)
    page = context.new_page()
    page.goto(f"{over(line)}#room")
    enter_room(page, "Ann", expect)
    line.stall()
    speak(page, "Hello")
    check_axe(page, axe, "pending")
    line.cut()
    expect(page.locator("#words")).to_have_value("Hello")
    check_axe(page, axe, "came back")
    context.close()
