"""The chat as its users meet it, in real Chromium: from http and from disk, with the
server gone and back, over lines that break, in two tabs, on two screens."""

import re
import signal

import pytest
from kit import (
    DONE,
    FIN,
    HOLD,
    WWW,
    Gate,
    answer,
    check_axe,
    delta,
    fits,
    free_port,
    from_disk,
    from_http,
    last_answer,
    plain,
    sse,
    stored,
    wait_until,
)
from kit.pages import ask, over, questions_on

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
    expect(questions_on(page)).to_have_text("What is a long connection?")
    expect(last_answer(page)).to_contain_text("demo", timeout=10_000)


def test_an_answer_is_counted(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    ask(page, upstream.script(*answer("One ", 0.3, "two ", "three.")))
    stats = page.locator(".stats")
    numbers = ["scripted", "first token after {}", "{} events/s", "{} events", "{} s in all"]
    patterns = [re.compile(number.replace("{}", r"[\d.]+")) for number in numbers]
    expect(stats.locator("span")).to_have_text(patterns)
    expect(stats).to_contain_text("3 events")


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
    ask(page, upstream.script(*answer("# A\n- b *c*\n\n```py\nd\n```\n")))
    wait_until(lambda: page.evaluate("announced")[1:] == ["Answer: A\nb c\nd"])
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


def test_an_answer_can_be_copied_without_the_clipboard_proper(profile, model, upstream, expect):
    denied = "navigator.clipboard.writeText = () => Promise.reject(new Error())"
    profile.context.add_init_script(denied)
    page = profile.open(from_http(model))
    ask(page, upstream.script(*answer("One.")))
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_focused()
    page.locator("#question").focus()
    page.keyboard.press("ControlOrMeta+v")
    expect(page.locator("#question")).to_have_value("One.")


def test_an_answer_can_be_copied(profile, model, upstream, expect):
    profile.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = profile.open(from_http(model))
    text = "One.\n\n```\ncode\n```\n"
    ask(page, upstream.script(*answer(*text)))
    expect(page.get_by_role("button", name="Copy")).to_have_count(2)
    code, whole = page.get_by_role("button", name="Copy").all()
    whole.click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == text
    code.click()
    wait_until(lambda: page.evaluate("navigator.clipboard.readText()") == "code")


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
    expect(questions_on(page)).to_have_text(prompt)


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
    expect(questions_on(page)).to_have_text("你好")


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
    expect(page.locator(".stats")).to_contain_text("Stopped")
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
    expect(page.locator(".stats")).to_contain_text("Stopped")
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
    expect(page.locator(".stats")).to_contain_text("4 events")
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
    return stored(page)[-1].get("id")


def test_a_line_that_brings_byte_by_byte(profile, line, upstream, expect):
    page = profile.open(over(line))
    line.byte_by_byte = True
    text = "你好，👩‍👩‍👧 …!"
    ask(page, upstream.script(*answer(*text)))
    expect(last_answer(page)).to_have_text(text)


def test_a_stalled_line_is_noticed(profile, line, upstream, expect):
    """No byte for as long as two keep-alives should have come."""
    gate = Gate()
    prompt = upstream.script(*answer("One ", gate, "two."))
    page = profile.context.new_page()
    page.clock.install()
    page.goto(over(line))
    ask(page, prompt)
    expect(last_answer(page)).to_have_text("One")
    line.stall()
    gate.open()
    page.clock.fast_forward(11_000)
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


# ---------------------------------------------------------------- a network that is cut


def test_an_answer_is_on_hold_while_the_network_is_cut(profile, model, upstream, where, expect):
    gate = Gate()
    prompt = upstream.script(*answer("One ", gate, "two ", "three."))
    page = profile.open(where(model))
    expect(page.locator("#cut-chat")).to_be_hidden()
    ask(page, prompt)
    expect(last_answer(page)).to_have_text("One")
    page.evaluate("network.cut(1)")
    expect(page.locator(".answer .hold")).to_contain_text("On hold: ")
    expect(page.locator("#chat-state")).to_contain_text("Connection lost")
    expect(page.locator("#cut-chat")).to_contain_text("The network is cut.")
    gate.open()
    expect(last_answer(page)).to_have_text("One two three.", timeout=20_000)
    expect(page.locator(".answer .hold")).to_be_hidden()
    expect(page.locator(".stats")).to_contain_text("2 caught up")
    assert len(upstream.asked(prompt)) == 1


def test_the_chat_has_the_buttons_for_it(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    ask(page, upstream.script(*sse(delta("One"), HOLD)))
    expect(last_answer(page)).to_have_text("One")
    page.evaluate("document.querySelector('#cut-chat button').value = 1")
    page.locator("#cut-chat button").first.click()
    expect(page.locator("#cut-chat")).to_contain_text("The network is cut.")
    expect(page.locator("#cut-chat")).to_contain_text("The network is back.")
    expect(page.locator("#chat-state")).to_have_text("Receiving")


# ------------------------------------------------------------------------ the last turn


def test_an_answer_can_be_asked_for_again(profile, model, upstream, expect):
    scripts = iter([answer("First."), answer("Second.")])
    prompt = upstream.script(lambda heard: next(scripts))
    page = profile.open(from_http(model))
    ask(page, prompt)
    expect(last_answer(page)).to_have_text("First.")
    page.get_by_role("button", name="Ask again").click()
    expect(last_answer(page)).to_have_text("Second.")
    expect(page.locator("#log article")).to_have_count(2)
    first, second = upstream.asked(prompt)
    assert first.json["messages"] == second.json["messages"]
    page.reload()
    expect(last_answer(page)).to_have_text("Second.")
    expect(page.locator("#log article")).to_have_count(2)


def test_the_last_question_can_be_edited(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    first = upstream.script(*answer("First."))
    ask(page, first)
    expect(last_answer(page)).to_have_text("First.")
    expect(page.locator("#send")).to_be_visible()
    wrong = upstream.script(*answer("Wrong."))
    ask(page, wrong)
    expect(last_answer(page)).to_have_text("Wrong.")
    expect(page.get_by_role("button", name="Edit")).to_have_count(1)
    page.get_by_role("button", name="Edit").click()
    expect(page.locator("#question")).to_have_value(wrong)
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#question")).to_have_value("")
    page.get_by_role("button", name="Edit").click()
    right = upstream.script(*answer("Right."))
    ask(page, right)
    expect(last_answer(page)).to_have_text("Right.")
    expect(questions_on(page)).to_have_text([first, right])
    said = upstream.asked(right)[0].json["messages"]
    assert [message["content"] for message in said] == [first, "First.", right]


def test_a_draft_is_back_after_an_edit(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    asked = upstream.script(*answer("One."))
    ask(page, asked)
    expect(last_answer(page)).to_have_text("One.")
    page.fill("#question", "a draft")
    page.get_by_role("button", name="Edit").click()
    expect(page.locator("#question")).to_have_value(asked)
    page.keyboard.press("Escape")
    expect(page.locator("#question")).to_have_value("a draft")
    page.get_by_role("button", name="Edit").click()
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_have_value("a draft")


def test_a_question_that_was_cleared_is_not_edited(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    ask(page, upstream.script(*answer("One.")))
    expect(last_answer(page)).to_have_text("One.")
    other = profile.open(from_http(model))
    page.get_by_role("button", name="Edit").click()
    expect(page.locator("#editing")).to_be_visible()
    other.get_by_role("button", name="New chat").click()
    expect(page.locator("#editing")).to_be_hidden()
    ask(page, upstream.script(*answer("Two.")))
    expect(last_answer(page)).to_have_text("Two.")
    expect(questions_on(page)).to_have_count(1)


def test_a_stopped_answer_can_be_tried_again(profile, model, upstream, expect):
    scripts = iter([sse(delta("Half"), HOLD), answer("All of it.")])
    page = profile.open(from_http(model))
    ask(page, upstream.script(lambda heard: next(scripts)))
    expect(last_answer(page)).to_have_text("Half")
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)
    page.click("#stop")
    page.get_by_role("button", name="Try again").click()
    expect(last_answer(page)).to_have_text("All of it.")


def test_abandoned_is_not_stopped(profile, serve, upstream, expect):
    """Nobody had read the answer for a while: that is said, and there is a way on."""
    profile.network_fails = True
    server = serve("--upstream", upstream.url, "--model", "scripted", "--linger", "0.2")
    scripts = iter([sse(delta("Half"), HOLD), answer("All of it.")])
    prompt = upstream.script(lambda heard: next(scripts))
    page = profile.open(from_http(server))
    ask(page, prompt)
    expect(last_answer(page)).to_have_text("Half")
    page.evaluate("network.cut(1)")
    wait_until(lambda: upstream.asked(prompt)[0].closed_at)
    trouble = page.locator(".trouble")
    expect(trouble).to_contain_text("nobody had read it", timeout=20_000)
    expect(page.locator(".stats")).not_to_contain_text("Stopped")
    trouble.get_by_role("button", name="Try again").click()
    expect(last_answer(page)).to_have_text("All of it.")


def test_a_conversation_that_was_cleared_comes_back(profile, model, upstream, expect):
    page, other = profile.open(from_http(model)), profile.open(from_http(model))
    prompt = upstream.script(*answer("Yes."))
    ask(page, prompt)
    expect(last_answer(page)).to_have_text("Yes.")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    expect(other.locator("#welcome")).to_be_visible()
    expect(page.locator("#chat-state")).to_have_text("Conversation cleared")
    page.get_by_role("button", name="Bring it back").click()
    for tab in (page, other):
        expect(questions_on(tab)).to_have_text(prompt)
        expect(last_answer(tab)).to_have_text("Yes.")
    expect(page.get_by_role("button", name="Bring it back")).to_be_hidden()


def test_thoughts_are_folded_away(profile, model, upstream, expect):
    gate = Gate()
    thought = delta()
    thought["choices"][0]["delta"]["reasoning_content"] = "Let me *see*."
    page = profile.open(from_http(model))
    ask(page, upstream.script(*answer(thought, gate, "Yes.")))
    summary = page.locator(".thinking summary")
    expect(summary).to_have_text("Thinking…")
    expect(page.locator(".thinking .text")).to_be_hidden()
    summary.click()
    expect(page.locator(".thinking em")).to_have_text("see")
    gate.open()
    expect(summary).to_have_text("Thoughts")
    expect(last_answer(page)).to_have_text("Yes.")
    page.reload()
    expect(page.locator(".thinking .text")).to_have_text("Let me see.")


def test_an_answer_that_was_cut_short_says_so(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    ask(page, upstream.script(*sse(delta("Half a sen"), delta(finish="length"), DONE)))
    expect(page.locator(".stats")).to_contain_text("Cut short by the model’s limit")
    expect(page.locator(".trouble")).to_have_count(0)


def test_enter_while_an_answer_runs_says_why_nothing_happens(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    ask(page, upstream.script(*sse(delta("One"), HOLD)))
    expect(last_answer(page)).to_have_text("One")
    ask(page, "And then?")
    expect(page.locator("#chat-state")).to_contain_text("An answer is under way")
    expect(page.locator("#question")).to_have_value("And then?")
    expect(questions_on(page)).to_have_count(1)


def test_the_draft_and_the_focus_survive_a_reload(profile, demo, expect):
    page = profile.open(from_http(demo))
    expect(page.locator("#question")).not_to_be_focused()
    page.fill("#question", "Half a thou")
    page.reload()
    expect(page.locator("#question")).to_have_value("Half a thou")
    expect(page.locator("#question")).to_be_focused()


# --------------------------------------------------------------------------- the model


def test_the_model_is_named_and_can_be_chosen(profile, serve, upstream, expect):
    server = serve("--upstream", upstream.url, "--model", "scripted", "--model", "other/two")
    page = profile.open(from_http(server))
    choice = page.get_by_role("combobox", name="Model")
    expect(choice).to_have_value("scripted")
    first = upstream.script(*answer("One."))
    ask(page, first)
    expect(last_answer(page)).to_have_text("One.")
    expect(page.locator("#send")).to_be_visible()
    choice.select_option("other/two")
    second = upstream.script(*answer("Two."))
    ask(page, second)
    expect(page.locator(".model")).to_have_text(["scripted", "other/two"])
    assert upstream.asked(second)[0].json["model"] == "other/two"
    page.reload()
    expect(choice).to_have_value("other/two")


def test_there_is_no_choice_of_one(profile, demo, expect):
    page = profile.open(from_http(demo))
    expect(page.locator("#chat-state")).to_have_text("Ready. Model: demo")
    expect(page.locator("#model")).to_be_hidden()


# -------------------------------------------------------------- an answer's own address


def test_an_answer_is_watched_on_two_screens(chromium, profile, model, upstream, expect):
    gate = Gate()
    page = profile.open(from_http(model))
    prompt = upstream.script(*answer("One ", gate, "two."))
    ask(page, prompt)
    wait_until(lambda: stored(page)[-1].get("id"))
    link = f"{model.http}/#answer/{stored(page)[-1]['id']}"
    context = chromium.new_context(locale="en-US")
    phone = context.new_page()
    phone.goto(link)
    watched = phone.locator("#watched .answer > .text")
    expect(watched).to_have_text("One")
    expect(phone.locator("#log")).to_be_hidden()
    expect(phone.locator("#ask")).to_be_hidden()
    gate.open()
    for text in (watched, last_answer(page)):
        expect(text).to_have_text("One two.")
    phone.get_by_role("link", name="To your conversation").click()
    expect(phone.locator("#welcome")).to_be_visible()
    assert stored(phone) == []
    context.close()
    page.get_by_role("link", name="Link", exact=True).click()
    expect(page.locator("#watched .answer > .text")).to_have_text("One two.")
    page.go_back()
    expect(questions_on(page)).to_have_text(prompt)
    assert len(upstream.asked(prompt)) == 1


def test_what_the_store_should_not_have_is_not_believed(profile, demo, expect):
    page = profile.open(from_http(demo))
    name = page.evaluate("`chatstream.conversation ${SERVER.origin}${SERVER.pathname}`")
    page.evaluate("name => localStorage.setItem(name, '{\"messages\": []}')", name)
    page.reload()
    expect(page.locator("#chat-state")).to_have_text("Ready. Model: demo")


def test_an_address_of_no_answer(profile, demo, expect):
    profile.network_fails = True
    page = profile.open(from_http(demo, "answer/nobody-knows-it"))
    expect(page.locator(".trouble")).to_contain_text("no longer has this answer")


# ------------------------------------------------------------------------ conversations


DEAF = """addEventListener('storage', (event) => {
  if (window.deaf) event.stopImmediatePropagation();
})"""
HEARS_AGAIN = """() => {
  window.deaf = false;
  const key = Object.keys(localStorage).find((name) => name.includes('conversation'));
  dispatchEvent(new StorageEvent('storage', { key }));
}"""


def test_two_tabs_that_ask_at_once_keep_both_questions(profile, model, upstream, expect):
    profile.context.add_init_script(DEAF)
    tabs = [profile.open(from_http(model)) for _ in range(2)]
    gate = Gate()
    prompts = [upstream.script(*answer(f"{n} ", gate, "end.")) for n in "AB"]
    for tab in tabs:  # neither hears of the other's question
        tab.evaluate("window.deaf = true")
    for tab, prompt in zip(tabs, prompts, strict=True):
        ask(tab, prompt)
    for tab in tabs:
        tab.evaluate(HEARS_AGAIN)
        expect(tab.locator("#log .question")).to_have_count(2)
    gate.open()
    for tab in tabs:
        answers = tab.locator("#log .answer > .text")
        expect(answers.filter(has_text="end.")).to_have_count(2)
        assert sorted(questions_on(tab).all_inner_texts()) == sorted(prompts)
        assert sorted(answers.all_inner_texts()) == ["A end.", "B end."]
    assert questions_on(tabs[0]).all_inner_texts() == questions_on(tabs[1]).all_inner_texts()
    assert [len(upstream.asked(prompt)) for prompt in prompts] == [1, 1]


def test_tabs_that_read_the_same_come_to_rest(profile, model, upstream, expect):
    """Each has numbers of its own for the answer: they are not fought over."""
    tabs = [profile.open(from_http(model)) for _ in range(2)]
    ask(tabs[0], upstream.script(*answer("One ", 0.2, "two.")))
    for tab in tabs:
        expect(last_answer(tab)).to_have_text("One two.")
        expect(tab.locator("#send")).to_be_visible()
        tab.evaluate("window.told = 0; addEventListener('storage', () => told++); 0")
    tabs[0].wait_for_timeout(400)
    assert [tab.evaluate("told") < 3 for tab in tabs] == [True, True]


def test_each_server_has_a_conversation_of_its_own(profile, serve, demo, expect):
    page = profile.open(from_disk(demo))
    ask(page, "My secret")
    expect(questions_on(page)).to_have_text("My secret")
    page.goto(from_disk(serve()))
    expect(page.locator("#welcome")).to_be_visible()
    page.goto(from_disk(demo))
    expect(questions_on(page)).to_have_text("My secret")


@pytest.mark.parametrize("name", ["constructor", "__proto__", "nonsense", "answer/.."])
def test_an_address_of_no_view_shows_the_chat(profile, demo, expect, name):
    page = profile.open(from_http(demo, name))
    expect(page.locator("#question")).to_be_visible()
    expect(page.locator("nav [aria-current]")).to_have_text("Chat")


def test_a_page_reloaded_before_it_heard_the_answers_id(profile, model, upstream, expect):
    """It asks once more, with the same key, and the model is asked once."""
    gate = Gate()
    prompt = upstream.script(gate, *answer("Yes."))
    page = profile.open(from_http(model))
    ask(page, prompt)
    wait_until(lambda: upstream.asked(prompt))
    page.reload()
    gate.open()
    expect(last_answer(page)).to_have_text("Yes.")
    assert len(upstream.asked(prompt)) == 1


def test_a_stream_that_has_ended_is_no_failure(profile, model, upstream, expect):
    page = profile.open(from_http(model))
    failed = []
    page.on("requestfailed", lambda request: failed.append(request.url))
    with page.expect_event("requestfinished", lambda r: "qa_stream" in r.url):
        ask(page, upstream.script(*answer("Yes.")))
    assert failed == []


def test_a_state_does_not_contradict_what_is_said(profile, serve, expect):
    profile.network_fails = True
    server = serve()
    page = profile.open(from_http(server))
    expect(page.locator("#chat-state")).to_have_text("Ready. Model: demo")
    server.stop()
    ask(page, "Hello?")
    expect(page.locator(".trouble")).to_contain_text("could not be reached")
    expect(page.locator("#chat-state")).to_contain_text("No server at ")


# ---------------------------------------------------------------------------- the token


def test_a_protected_server_is_opened_once(profile, serve, expect):
    profile.network_fails = True  # 401 is written to the console
    server = serve(env={"CHATSTREAM_TOKEN": "open sesame"})
    page = profile.open(from_http(server, "room"))
    token = page.get_by_label("Token")
    expect(token).to_be_focused()
    token.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#token-state")).to_have_text("That is not the server’s token.")
    token.fill("open sesame")
    page.keyboard.press("Enter")
    page.wait_for_url(f"{server.http}/#room")
    expect(token).to_be_hidden()
    page.click("#join button")
    expect(page.locator("#room-state")).to_have_text("Connected")
    page.click("nav a[href='#chat']")
    ask(page, "Hello?")
    expect(last_answer(page)).to_contain_text("demo")
    assert "sesame" not in page.evaluate("document.cookie + JSON.stringify(localStorage)")


def test_an_open_server_asks_for_no_token(profile, demo, expect):
    page = profile.open(from_http(demo))
    expect(page.locator("#chat-state")).to_have_text("Ready. Model: demo")
    expect(page.locator("#token")).to_be_hidden()


# -------------------------------------------------------------------------------- looks


def test_text_from_right_to_left(profile, model, demo, upstream, expect):
    arabic = "مرحبا **بك**.\n\n- واحد\n- اثنان\n\n| عدد | سعر |\n|---|---|\n| 1 | one |\n"
    page = profile.open(from_http(model))
    ask(page, upstream.script(*answer(arabic)))
    expect(page.locator("#send")).to_be_visible()
    sides = (
        last_answer(page)
        .locator("p, ul")
        .evaluate_all("all => all.map((part) => getComputedStyle(part).direction)")
    )
    assert sides[0] == sides[1] == "rtl"
    cells = "all => all.map((cell) => getComputedStyle(cell).textAlign)"
    assert set(last_answer(page).locator("th, td").evaluate_all(cells)) == {"right"}
    page = profile.open(from_http(demo))
    ask(page, "שלום")
    direction = "(e) => getComputedStyle(e).direction"
    assert questions_on(page).last.evaluate(direction) == "rtl"


EVERYTHING = """# One
Text with [a link](https://x.example), `code` and **bold**.
## Two
1. item
   ```py
   code
   ```
| a | b |
|---|---|
| 1 | 2 |
> quote
"""


@pytest.mark.parametrize("letters", ["100%", "200%"])
def test_an_answer_fits_a_narrow_screen(profile, model, upstream, expect, letters):
    wide = "| " + " | ".join(f"column {n}" for n in range(9)) + " |"
    table = f"\n{wide}\n{'|---' * 9}|\n{wide}\n"
    word = "x" * 200
    page = profile.open(from_http(model))
    page.set_viewport_size({"width": 320, "height": 640})
    page.evaluate(f"document.documentElement.style.fontSize = '{letters}'")
    text = f"{EVERYTHING}{table}\n{word} `{word}`\n\n```\n{word}\n```\n"
    ask(page, upstream.script(*sse(delta(text), HOLD)))
    expect(last_answer(page)).to_contain_text("column 8")
    page.evaluate("network.cut(1)")
    expect(page.locator(".answer .hold")).to_be_visible()
    fits(page, 320)
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    fits(page, 320)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_the_chat(chromium, serve, upstream, axe, expect, scheme):
    server = serve("--upstream", upstream.url, "--model", "scripted", "--model", "other")
    context = chromium.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(from_http(server))
    thought = delta()
    thought["choices"][0]["delta"]["reasoning_content"] = "Hm."
    end = delta(finish="length")
    ask(page, upstream.script(*sse(thought, delta(EVERYTHING), end, DONE)))
    expect(page.locator("#send")).to_be_visible()
    page.click(".thinking summary")
    check_axe(page, axe, "an answer with everything in it")
    page.get_by_role("button", name="Edit").click()
    check_axe(page, axe, "editing")
    page.keyboard.press("Escape")
    ask(page, upstream.script(*sse(delta("One"), HOLD)))
    expect(last_answer(page)).to_have_text("One")
    page.evaluate("network.cut(1)")
    expect(page.locator(".answer .hold").last).to_be_visible()
    check_axe(page, axe, "on hold")
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Link", exact=True).first.click()
    expect(page.locator("#watched .text").last).to_contain_text("quote")
    check_axe(page, axe, "an answer by its address")
    page.goto(from_http(server))
    page.click("#fresh")
    check_axe(page, axe, "cleared")
    page.evaluate("askForToken()")
    check_axe(page, axe, "asking for the token")
    context.close()
