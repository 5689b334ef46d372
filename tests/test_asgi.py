"""What takes minutes: timeouts, silence and forgetting, on a clock that the test turns.

The service is driven in memory, as the ASGI application it is (HTTP/2 reaches it like
that); the upstream is a real server on a real socket. Trio's mock clock nearly stands
still until a test lets time pass, so little depends on how busy the machine is.
"""

import json
from contextlib import asynccontextmanager

import pytest
import trio
from kit import CHAT, DONE, HOLD, OPENAI, Gate, asking, delta, plain, sse
from trio.testing import wait_all_tasks_blocked

import chatstream
from chatstream import Service, Settings, SSEParser

MORNING = 1_700_000_000.5  # half past a second
FORMATS = pytest.mark.parametrize("path", [CHAT, OPENAI])


class Asked:
    """One request: what a server does around an application, without the network."""

    def __init__(self, service, method, path, body=None, headers=None, more_body=False):
        target, _, query = path.partition("?")
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.scope = {
            "type": "http",
            "http_version": "2",
            "method": method,
            "scheme": "https",
            "path": target,
            "query_string": query.encode(),
            "headers": [
                (k.encode(), v.encode()) for k, v in (headers or {}).items()
            ],
            "extensions": {},
        }  # fmt: skip
        self.service = service
        self.status, self.headers, self.body = None, {}, b""
        self.ended = False
        self.left = trio.Event()
        piece = {"type": "http.request", "body": body, "more_body": more_body}
        self._incoming = [piece]
        self._news = trio.Event()

    async def run(self):
        try:
            await self.service(self.scope, self.receive, self.send)
        except* chatstream.QUIET_ENDS:
            self.left.set()
        self.ended = True
        self._news.set()

    async def receive(self):
        if self._incoming:
            return self._incoming.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        self.body += message.get("body", b"")
        self._news.set()

    async def until(self, condition):
        """Wait for what comes over a real connection; the clock hardly moves."""
        while not condition():
            await self._news.wait()
            self._news = trio.Event()

    async def end(self):
        await self.until(lambda: self.ended)
        return self

    async def events(self, count):
        await self.until(lambda: len(self.told) >= count)
        return self.told

    @property
    def told(self):
        return SSEParser().feed(self.body)

    @property
    def error(self):
        """The error it ended with, as a body or as the last event."""
        event = self.told and self.told[-1]
        if event:
            assert event.type == "error"
        return json.loads(event.data if event else self.body)["error"]


@asynccontextmanager
async def serving(**settings):
    """A service whose tasks run; ask(method, path, ...) sends it a request."""
    service = Service(Settings(**settings))
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run_writers)
        await wait_all_tasks_blocked()

        def ask(*request, **more):
            asked = Asked(service, *request, **more)
            nursery.start_soon(asked.run)
            return asked

        yield service, ask
        nursery.cancel_scope.cancel()


@pytest.fixture
def passes(mock_clock, monkeypatch):
    """`await passes(3)`: three seconds go by, for Trio and for the wall clock."""
    started = mock_clock.current_time()

    def wall_clock():
        return MORNING + mock_clock.current_time() - started

    async def passes(seconds):
        await wait_all_tasks_blocked(0.02)
        for _ in range(int(seconds)):
            mock_clock.jump(1)
            await wait_all_tasks_blocked()
        mock_clock.jump(seconds - int(seconds))
        await wait_all_tasks_blocked(0.02)

    monkeypatch.setattr(chatstream.time, "time", wall_clock)
    mock_clock.rate = 0.01  # the pump's rests are microseconds, but they must pass
    return passes


def asked_for(prompt, **fields):
    return asking(prompt, stream=True, **fields)


# ------------------------------------------------------------------------- the clock


async def test_the_log_is_full_from_the_start_and_grows_on_each_second(
    passes, mock_clock
):
    async with serving() as (service, _):
        now = int(MORNING)
        assert (service.clock.start, service.clock.end) == (now - 59, now + 1)
        for second in range(1, 4):
            await passes(1)
            assert service.clock.end == now + 1 + second
        assert len(service.clock) == 60


async def test_a_new_reader_starts_with_the_next_tick(passes, mock_clock):
    async with serving() as (_, ask):
        clock = ask("GET", "/clock")
        await passes(0.4)
        assert clock.told == []
        assert clock.body, "but something is there at once"
        await passes(2)
        assert ids(clock) == [1, 2]


def ids(asked):
    """The events' seconds since MORNING."""
    return [
        int(event.last_event_id.removeprefix("clock-")) - int(MORNING)
        for event in asked.told
    ]


async def test_seconds_that_a_suspended_machine_missed_are_made_up_for(
    passes, mock_clock
):
    async with serving() as (_, ask):
        clock = ask("GET", "/clock")
        await passes(1)
        mock_clock.jump(30)
        await passes(1)
        assert ids(clock) == list(range(1, 33))


async def test_a_night_of_sleep_is_a_gap(passes, mock_clock):
    async with serving() as (_, ask):
        clock = ask("GET", "/clock")
        await passes(1)
        mock_clock.jump(28_800)
        await wait_all_tasks_blocked()
        _, gap, *rest = clock.told
        assert gap.type == "gap"
        assert json.loads(gap.data) == {"missed": 28_800 - 60}
        assert ids(clock)[2:] == list(range(28_801 - 59, 28_802))
        assert len(rest) == 60


# ------------------------------------------------------------------------- silence


@FORMATS
async def test_silence_is_broken_every_15_seconds(upstream, path, passes, mock_clock):
    gate = Gate()
    prompt = upstream.script(*sse(delta("Hm. "), gate, delta("Yes."), DONE))
    async with serving(upstream=upstream.url, model="m") as (_, ask):
        asked = ask("POST", path, asked_for(prompt))
        await asked.events(1)
        await passes(14)
        assert asked.body.count(b": keep-alive\n") == 0
        await passes(2)
        assert asked.body.count(b": keep-alive\n") == 1
        await passes(15)
        assert asked.body.count(b": keep-alive\n") == 2
        gate.open()
        await asked.end()
        assert [event.type for event in asked.told] == ["message"] * 3


async def test_a_clock_needs_no_keep_alive(passes, mock_clock):
    async with serving() as (_, ask):
        clock = ask("GET", "/clock")
        await passes(60)
        assert b"keep-alive" not in clock.body


# ------------------------------------------------------------- an upstream that waits


@FORMATS
async def test_after_10_seconds_without_a_head_the_stream_starts_anyway(
    upstream, path, passes, mock_clock
):
    gate = Gate()
    prompt = upstream.script(gate, *sse(delta("At last."), DONE))
    async with serving(upstream=upstream.url, model="m") as (_, ask):
        asked = ask("POST", path, asked_for(prompt))
        await passes(9.9)
        assert asked.status is None
        await passes(0.2)
        assert asked.status == 200
        assert asked.told == []
        await passes(20)
        assert asked.body.count(b": keep-alive\n") == 1
        gate.open()
        await asked.end()
        assert asked.told[-1].data == "[DONE]"


async def test_a_refusal_that_comes_late_is_an_error_event(
    upstream, passes, mock_clock
):
    gate = Gate()
    prompt = upstream.script(gate, plain(429, {"error": {"message": "slow down"}}))
    async with serving(upstream=upstream.url, model="m") as (_, ask):
        asked = ask("POST", OPENAI, asked_for(prompt))
        await passes(11)
        gate.open()
        await asked.end()
        assert asked.status == 200
        assert asked.error["message"] == "slow down"


async def test_a_short_connection_waits_for_the_refusal_and_has_its_status(
    upstream, passes, mock_clock
):
    gate = Gate()
    prompt = upstream.script(gate, plain(429, {"error": {"message": "slow down"}}))
    async with serving(upstream=upstream.url, model="m") as (_, ask):
        asked = ask("POST", OPENAI, asking(prompt))
        await passes(60)
        assert asked.status is None
        gate.open()
        await asked.end()
        assert asked.status == 429


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("said", [[], [chatstream.chunk(b": thinking\n\n")]])
async def test_the_first_token_may_take_two_minutes_and_no_longer(
    upstream, said, stream, passes, mock_clock
):
    head = [next(sse(DONE))] if said else []
    prompt = upstream.script(*head, *said, HOLD)
    async with serving(upstream=upstream.url, model="m") as (service, ask):
        asked = ask("POST", OPENAI, asking(prompt, stream=stream))
        await passes(119)
        assert not asked.ended
        await passes(2)
        await asked.end()
        assert asked.status == (200 if stream else 504)
        assert asked.error["code"] == "timeout"
        assert service.answers.running == 0


@FORMATS
async def test_between_two_tokens_a_minute_may_pass_and_no_more(
    upstream, path, passes, mock_clock
):
    gate = Gate()
    prompt = upstream.script(*sse(delta("One, "), gate, delta("two, "), HOLD))
    async with serving(upstream=upstream.url, model="m") as (_, ask):
        asked = ask("POST", path, asked_for(prompt))
        await asked.events(1)
        await passes(59)
        gate.open()
        await asked.events(2)
        await passes(59)
        assert not asked.ended
        await passes(2)
        await asked.end()
        assert asked.error["type"] == "upstream_error"
        assert asked.error["code"] == "timeout"
        assert b"[DONE]" not in asked.body


async def test_an_upstream_that_refuses_connections_is_tried_three_times(
    passes, mock_clock, monkeypatch
):
    async with serving(upstream="http://127.0.0.1:9/v1", model="m") as (_, ask):
        asked = ask("POST", OPENAI, asked_for("Is anybody there?"))
        await passes(0.3)
        assert asked.status is None, "it gave up at the first attempt"
        await passes(0.3)
        await asked.end()
        assert asked.status == 502


async def test_a_list_of_models_may_take_10_seconds(passes, mock_clock):
    (silent,) = await trio.open_tcp_listeners(0, host="127.0.0.1")  # and never accept
    async with silent:
        url = f"http://127.0.0.1:{silent.socket.getsockname()[1]}/v1"
        async with serving(upstream=url) as (_, ask):
            asked = ask("GET", "/v1/models")
            await passes(9.9)
            assert not asked.ended
            await passes(0.2)
            await asked.end()
            assert asked.status == 504


# ------------------------------------------------- answers that nobody needs any more


async def ended_answer(upstream, ask):
    prompt = upstream.script(*sse(delta("Short."), DONE))
    asked = await ask("POST", OPENAI, asked_for(prompt)).end()
    return asked.headers["x-answer-id"], asked.told[-1].last_event_id


async def test_an_ended_answer_is_kept_for_a_minute(upstream, passes, mock_clock):
    async with serving(upstream=upstream.url, model="m") as (service, ask):
        name, last = await ended_answer(upstream, ask)
        again = {"last-event-id": last}
        await passes(59)
        assert (await ask("GET", f"/answers/{name}").end()).status == 200
        assert (await ask("GET", f"/answers/{name}", headers=again).end()).status == 204
        await passes(2)
        assert (await ask("GET", f"/answers/{name}").end()).status == 404
        assert (await ask("POST", OPENAI, headers=again).end()).status == 404
        assert (await ask("DELETE", f"/answers/{name}").end()).status == 404
        assert (service.answers.held, len(service.answers.by_id)) == (0, 0)


@pytest.mark.parametrize("first", [[], [delta("One, ")]])
async def test_an_answer_outlives_its_last_reader_by_the_linger_time(
    upstream, first, passes, mock_clock
):
    prompt = upstream.script(*sse(*first, HOLD))
    async with serving(upstream=upstream.url, model="m") as (service, ask):
        asked = ask("POST", OPENAI, asked_for(prompt))
        await asked.until(lambda: asked.status)
        asked.left.set()
        await passes(9.9)
        assert service.answers.running == 1
        await passes(0.2)
        assert service.answers.running == 0
        name = asked.headers["x-answer-id"]
        late = await ask("GET", f"/answers/{name}").end()
        assert late.error["type"] == "stopped"


async def test_who_is_back_within_the_linger_time_keeps_it_alive(
    upstream, passes, mock_clock
):
    prompt = upstream.script(*sse(delta("One, "), HOLD))
    async with serving(upstream=upstream.url, model="m") as (service, ask):
        asked = ask("POST", OPENAI, asked_for(prompt))
        await asked.events(1)
        asked.left.set()
        await passes(9)
        again = ask("GET", f"/answers/{asked.headers['x-answer-id']}")
        await passes(20)
        assert service.answers.running == 1
        assert again.told == asked.told
        again.left.set()
        await passes(11)
        assert service.answers.running == 0


# ---------------------------------------------------------------------------- limits


@FORMATS
async def test_one_answer_too_many_is_refused_until_one_ends(
    upstream, path, passes, mock_clock, monkeypatch
):
    monkeypatch.setattr(chatstream, "ANSWERS_RUNNING", 2)
    gate = Gate()
    prompt = upstream.script(*sse(gate, DONE))
    async with serving(upstream=upstream.url, model="m") as (service, ask):
        some = [ask("POST", path, asked_for(prompt)) for _ in range(2)]
        for asked in some:
            await asked.until(lambda asked=asked: asked.status)
        third = await ask("POST", path, asked_for(prompt)).end()
        assert third.status == 503
        assert int(third.headers["retry-after"]) > 0
        assert third.error["type"] == "server_busy"
        gate.open()
        for asked in some:
            await asked.end()
        while service.answers.running:  # its upstream is let go of a moment later
            await trio.lowlevel.checkpoint()
        assert (await ask("POST", path, asked_for(prompt)).end()).status == 200


LONG = delta(
    "x" * 700
)  # an answer of one of these, [DONE] included, is 850 bytes or so


async def test_ended_answers_are_forgotten_first_the_oldest_first(
    upstream, passes, mock_clock, monkeypatch
):
    monkeypatch.setattr(chatstream, "ANSWERS_BYTES", 2000)
    prompt = upstream.script(*sse(LONG, DONE))
    async with serving(upstream=upstream.url, model="m") as (service, ask):
        names = []
        for _ in range(4):
            asked = await ask("POST", OPENAI, asked_for(prompt)).end()
            assert asked.told[-1].data == "[DONE]"
            names.append(asked.headers["x-answer-id"])
            assert service.answers.held < 2100
        known = [(await ask("GET", f"/answers/{name}").end()).status for name in names]
        assert known == [404, 404, 200, 200]


async def test_with_all_memory_in_running_answers_a_new_one_is_refused(
    upstream, passes, mock_clock, monkeypatch
):
    monkeypatch.setattr(chatstream, "ANSWERS_BYTES", 2000)
    gate = Gate()
    prompt = upstream.script(*sse(LONG, LONG, gate, LONG, DONE))
    async with serving(upstream=upstream.url, model="m") as (service, ask):
        asked = ask("POST", OPENAI, asked_for(prompt))
        await asked.events(2)
        monkeypatch.setattr(chatstream, "ANSWERS_BYTES", service.answers.held)
        refused = await ask("POST", OPENAI, asked_for(prompt)).end()
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) > 0
        gate.open()
        await asked.end()
        assert asked.error["code"] == "too_large"
        await passes(61)
        assert service.answers.held == 0


async def test_an_answer_over_its_limit_is_an_error(
    upstream, passes, mock_clock, monkeypatch
):
    monkeypatch.setattr(chatstream, "ANSWER_BYTES", 2000)
    prompt = upstream.script(*sse(LONG, LONG, LONG, DONE))
    async with serving(upstream=upstream.url, model="m") as (_, ask):
        asked = await ask("POST", OPENAI, asked_for(prompt)).end()
        assert len(asked.told) == 3
        assert asked.error["code"] == "too_large"


# ------------------------------------------------------------------- clients at fault


async def test_a_body_must_be_there_within_30_seconds(passes, mock_clock):
    async with serving() as (_, ask):
        asked = ask("POST", OPENAI, b'{"messages": ', more_body=True)
        await passes(29)
        assert not asked.ended
        await passes(2)
        await asked.end()
        assert asked.status == 408


# --------------------------------------------------------------------------- the end


async def test_a_stop_lets_answers_finish_then_ends_every_stream(
    upstream, passes, mock_clock
):
    gate = Gate()
    finished = upstream.script(*sse(delta("One, "), gate, delta("two."), DONE))
    endless = upstream.script(*sse(delta("One, "), HOLD))
    async with serving(upstream=upstream.url, model="m") as (service, ask):
        answers = [ask("POST", CHAT, asked_for(p)) for p in (finished, endless)]
        clock = ask("GET", "/clock")
        for asked in answers:
            await asked.events(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.end)
            await passes(1)
            health = await ask("GET", "/healthz").end()
            assert (health.status, json.loads(health.body)["status"]) == (
                503,
                "stopping",
            )
            assert (await ask("POST", CHAT, asked_for(finished)).end()).status == 503
            gate.open()
            await answers[0].end()
            await passes(5)
        assert answers[0].told[-1].data == "[DONE]"
        assert answers[1].error["type"] == "server_stopping"
        assert clock.ended
        assert 1000 <= int(clock.body.rpartition(b"retry: ")[2]) <= 5000
