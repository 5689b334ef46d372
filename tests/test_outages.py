"""Packets vanish without a word, for 5 to 25 seconds, in the middle of everything.

A server and its clients are machines of their own (network namespaces). Each client
has a raw reader of an answer, a raw member of the room, and our page, twice, in
Chromium. All outages begin at once, are watched by one run, and each test looks at
one of them.
"""

import json
import math
import re
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import pytest
import trio
from kit import (
    CHAT,
    CHROMIUM_FLAGS,
    FULL,
    OPENAI,
    PING,
    PONG,
    ROOM_PROTOCOL,
    TEXT,
    Cut,
    Network,
    Upstream,
    answer,
    asking,
    command,
    connect,
    fetch,
    frame,
    make_certificate,
    need,
    need_module,
    raw_member,
    read_frame,
    servers,
    stream,
    wait_until,
    whole_answer,
)

LENGTHS = [5, 10, 15, 20, 25, *([45] if FULL else [])]
BACK = 15  # seconds after the network's return within which all goes on
SILENCE, HEAD = 10, 5  # what a client calls a cut; how long a retry may take
LONG = LENGTHS[-1] + 10  # seconds that the answer takes
WORDS = [f"word{n:03} " for n in range(4 * LONG)]
MESSAGES = [f"message{n:03}" for n in range(2 * LONG)]
LAST = "that is all"
WHOLE = {"chat": [word.strip() for word in WORDS], "room": MESSAGES}


@dataclass
class Outage:
    """What a client has heard, each with when it came."""

    length: int
    over: float = math.inf  # when the network was back
    words: list = field(default_factory=list)
    said: list = field(default_factory=list)
    page: dict = field(default_factory=dict)  # what its pages show
    page_back: dict = field(default_factory=dict)  # how long after the return
    problems: list = field(default_factory=list)

    def back(self, heard):
        """How long after the network's return something came."""
        return next((at for at, _ in heard if at > self.over), math.inf) - self.over

    def look_at(self, page):
        """Does it show more than it did when the network came back?"""
        for kind, words in page.items():
            if len(words) > len(self.page[kind]):
                self.page_back.setdefault(kind, time.monotonic() - self.over)


# ------------------------------------------------------------------------- raw clients


async def patiently(connect):
    """Connect again and again, until one connection sees the end."""
    while True:
        try:
            with trio.fail_after(HEAD) as head:
                return await connect(head)
        except* (OSError, Cut, trio.TooSlowError, trio.BrokenResourceError):
            pass
        await trio.sleep(1)


async def read_answer(url, question, words):
    """Any client that repeats its POST with the last id, as the article's does."""
    last_id = {}

    async def connect(head):
        async with stream("POST", url, last_id, question) as response:
            assert response.status == 200
            head.deadline, response.connection.patience = math.inf, SILENCE
            while event := await response.event():
                last_id["Last-Event-ID"] = event.id
                if event.data != "[DONE]":
                    words.append((time.monotonic(), event.json["content"]))

    await patiently(connect)


async def be_in_the_room(url, said):
    """Any member that says which event it has seen last."""
    after = ""

    async def connect(head):
        nonlocal after
        protocol = {"Sec-WebSocket-Protocol": ROOM_PROTOCOL}
        async with raw_member(f"{url}/room?after={after}", protocol) as member:
            head.deadline, member.patience = math.inf, SILENCE
            while True:
                opcode, payload = await read_frame(member)
                if opcode == PING:
                    await member.send(frame(PONG, payload))
                elif opcode == TEXT:
                    event = json.loads(payload)
                    after = event.get("id", after)
                    if event["type"] == "message":
                        said.append((time.monotonic(), event["text"]))
                        if event["text"] == LAST:
                            return

    await patiently(connect)


async def speak(server):
    """Somebody whose network is always there."""
    protocol = {"Sec-WebSocket-Protocol": ROOM_PROTOCOL}
    async with raw_member(f"{server.http}/room?name=Speaker", protocol) as speaker:
        for text in [*MESSAGES, LAST]:
            await speaker.send(frame(TEXT, json.dumps({"text": text}).encode()))
            await trio.sleep(0.5)


# ------------------------------------------------------------------------------- pages


@contextmanager
def browsers(machines, folder):
    """A Chromium on each of these machines."""
    path = need("chromium chromium-browser google-chrome", "apt-get install chromium")
    api = need_module("playwright.sync_api", "pip install playwright")
    with api.sync_playwright() as playwright, ExitStack() as stack:
        started = []
        for machine in machines:
            script = folder / machine.name
            start = " ".join(machine.command(path))
            script.write_text(f'#!/bin/sh\nexec {start} "$@"\n')
            script.chmod(0o700)
            browser = playwright.chromium.launch(executable_path=script, args=CHROMIUM_FLAGS)
            stack.callback(browser.close)
            started.append(browser)
        yield started


def open_pages(browser, server, prompt):
    """The chat, asked, and the room, joined."""
    context = browser.new_context(locale="en-US", ignore_https_errors=True)
    chat, room = context.new_page(), context.new_page()
    room.goto(f"{server.http}/#room")
    room.fill("#name", "Page")
    room.keyboard.press("Enter")
    chat.goto(f"{server.http}/#chat")
    chat.fill("#question", prompt)
    chat.keyboard.press("Enter")
    return {"chat": chat, "room": room}


def shown(pages):
    """The words that each page shows, in their order."""
    log = {"chat": "#log", "room": "#talk"}
    return {
        kind: re.findall(r"\b(?:word|message)\d+", page.inner_text(log[kind]))
        for kind, page in pages.items()
    }


# ------------------------------------------------------------------------ the whole run


class UpstreamThere(Upstream):
    """The model's server on this machine: the server's own, or one with an address."""

    def __init__(self, machine, host="127.0.0.1"):
        super().__init__()
        self.machine, self.host = machine, host

    async def _run(self, ready):
        self.machine.enter()
        await super()._run(ready)


class Run:
    """All outages, from before they begin until everybody has all of it."""

    def __init__(self, network, server, upstream, chromiums):
        self.network, self.server = network, server
        self.outages = {length: Outage(length) for length in LENGTHS}
        paced = [step for word in WORDS for step in (word, 0.25)]
        self.prompt = upstream.script(*answer(*paced))
        self.pages = [open_pages(one, server, self.prompt) for one in chromiums]
        with ExitStack() as stack:
            running = list(self._start(stack))
            self._wait(lambda: all(o.words and o.said for o in self._all()))
            self._wait(lambda: all(all(shown(p).values()) for p in self.pages))
            self._lose_and_restore()
            for outage, future in running:
                if error := future.exception(timeout=120):
                    outage.problems.append(error)
        self._wait(self._pages_are_whole)
        self.asked = len(upstream.asked(self.prompt))

    def _all(self):
        return self.outages.values()

    def _wait(self, condition, seconds=30):
        """In vain, too: then the tests say what is missing."""
        with suppress(AssertionError):
            wait_until(condition, seconds)

    def _start(self, stack):
        """Each client's outage, and what runs on its machine."""
        url, question = self.server.http + CHAT, asking(self.prompt)
        speaker = stack.enter_context(self.network.server.threads(1))
        speaker.submit(trio.run, speak, self.server)
        for client, outage in zip(self.network.clients, self._all(), strict=True):
            threads = stack.enter_context(client.threads(2))
            read = (read_answer, url, question, outage.words)
            yield outage, threads.submit(trio.run, *read)
            talk = (be_in_the_room, self.server.http, outage.said)
            yield outage, threads.submit(trio.run, *talk)

    def _lose_and_restore(self):
        """All lose their network at once, and each gets it back in its time."""
        for client in self.network.clients:
            self.network.lose(client)
        began = time.monotonic()
        deadline = began + LENGTHS[-1] + BACK + 1
        while time.monotonic() < deadline and not self._all_pages_are_back():
            for outage, client, pages in zip(
                self._all(), self.network.clients, self.pages, strict=True
            ):
                if outage.over < math.inf:
                    outage.look_at(shown(pages))
                elif time.monotonic() >= began + outage.length:
                    outage.page = shown(pages)
                    self.network.restore(client)
                    outage.over = time.monotonic()
            time.sleep(0.1)

    def _all_pages_are_back(self):
        return all(len(outage.page_back) == 2 for outage in self._all())

    def _pages_are_whole(self):
        for outage, pages in zip(self._all(), self.pages, strict=True):
            outage.page = shown(pages)
        return all(outage.page == WHOLE for outage in self._all())


@pytest.fixture(scope="module", params=["http", *(["https"] if FULL else [])])
def run(request, tmp_path_factory):
    """With a certificate the pages speak HTTP/2: all their requests are one connection."""
    folder = tmp_path_factory.mktemp("browsers")
    with ExitStack() as stack:
        network = stack.enter_context(Network(len(LENGTHS)))
        upstream = stack.enter_context(UpstreamThere(network.server))
        program = network.server.command(*command("--host", network.server.address))
        flags = ["--upstream", upstream.url, "--model", "m"]
        flags += make_certificate(folder) if request.param == "https" else []
        start = stack.enter_context(servers(request.config))
        server = start(*flags, program=program)
        chromiums = stack.enter_context(browsers(network.clients, folder))
        yield Run(network, server, upstream, chromiums)


@pytest.fixture(params=LENGTHS)
def outage(request, run):
    outage = run.outages[request.param]
    assert outage.problems == []
    return outage


def test_a_reader_loses_no_word_and_hears_none_twice(outage):
    assert [word for _, word in outage.words] == WORDS
    assert outage.back(outage.words) < BACK


def test_a_member_misses_no_message_and_hears_none_twice(outage):
    assert [text for _, text in outage.said] == [*MESSAGES, LAST]
    assert outage.back(outage.said) < BACK


@pytest.mark.parametrize("kind", WHOLE)
def test_a_page_goes_on_and_shows_it_all_once(outage, kind):
    assert outage.page[kind] == WHOLE[kind]
    assert outage.page_back.get(kind, math.inf) < BACK


def test_each_question_was_asked_once(run):
    assert run.asked == 2 * len(LENGTHS)


# ---------------------------------------------------------------------- the model's host


def test_a_host_that_is_gone_is_noticed_also_when_it_was_just_asked(request):
    """On a connection that was kept: nobody acknowledges the question."""

    async def ask():
        async with connect(server.http) as client:
            client.patience = 40
            question = asking(upstream.script(whole_answer("Hello")))
            response = await client.request("POST", OPENAI, None, question)
            return response.status, (await response.read()).error["code"]

    with Network(clients=2) as network, servers(request.config) as start:
        host, client = network.clients
        program = network.server.command(*command("--host", network.server.address))
        with UpstreamThere(host, host.address) as upstream, client.threads(1) as thread:
            url = f"http://{host.address}:{upstream.port}/v1"
            server = start("--upstream", url, "--model", "m", program=program)
            assert thread.submit(fetch_whole, server, upstream).result() == 200
            network.lose(host)
            assert thread.submit(trio.run, ask).result() == (504, "timeout")


def fetch_whole(server, upstream):
    question = asking(upstream.script(whole_answer("Hello")))
    return trio.run(fetch, "POST", server.http + OPENAI, None, question).status
