"""The pages as their users open them."""

from .common import ROOT, wait_until

WWW = ROOT / "www"


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


def from_http(server, view="", **query):
    parameters = "&".join(f"{name}={value}" for name, value in query.items())
    return f"{server.http}/?{parameters}#{view}"


def from_disk(server, view="", **query):
    page = f"{(WWW / 'index.html').as_uri()}?server={server.http}"
    return "&".join([page, *(f"{n}={v}" for n, v in query.items())]) + f"#{view}"


def over(line):
    return f"{line.url}/"


# ------------------------------------------------------------------------- the chat


def ask(page, question):
    page.fill("#question", question)
    page.keyboard.press("Enter")


def last_answer(page):
    return page.locator("#log .answer > .text").last


def questions_on(page):
    """The questions on the page."""
    return page.locator(".question .text")


STORED = """() => Object.entries(localStorage)
  .filter(([name]) => name.startsWith('chatstream.conversation '))
  .map(([, message]) => JSON.parse(message))
  .sort((one, other) => one.at - other.at)"""


def stored(page):
    """The conversation, as it is kept for a reload and for other tabs."""
    return page.evaluate(STORED)


# ------------------------------------------------------------------------- the room


def enter_room(page, name, expect):
    page.fill("#name", name)
    page.click("#join button")
    expect(page.locator("#room-state")).to_have_text("Connected")


def speak(page, text):
    page.fill("#words", text)
    page.keyboard.press("Enter")


def said(page):
    return page.locator("#talk article:not(.pending) .said")


# ------------------------------------------------------------------------------ looks

AXE = "axe.run().then((results) => results.violations)"


def check_axe(page, axe, state):
    """Nothing that a screen reader or a keyboard would stumble over."""
    page.evaluate(axe)
    told = [(v["id"], [n["html"] for n in v["nodes"]]) for v in page.evaluate(AXE)]
    assert told == [], state


def fits(page, width):
    wait_until(lambda: page.evaluate("document.documentElement.scrollWidth") == width)
