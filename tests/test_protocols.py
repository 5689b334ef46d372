"""Four protocols, one relay: the SDKs as they are, through chatstream.

Each of them streams, resumes, polls and cancels, whatever the manner of the upstream.
"""

import json
import re

import pytest
from kit import (
    BOOK,
    CALLS,
    FIN,
    HOLD,
    MANNERS,
    OPENAI,
    PROTOCOLS,
    RESPONSES,
    RST,
    SECRET,
    SENTENCE,
    WORDS,
    EventProxy,
    Gate,
    NodeSdks,
    PythonSdks,
    chat_whole,
    fetch,
    fetch_events,
    need_module,
    openai_client,
    plain,
    protocol_of,
    response_stream,
    response_whole,
    sse,
    stream,
    told,
    until,
    wait_until,
)

MANNER = pytest.mark.parametrize("manner", MANNERS)
CALL = pytest.mark.parametrize("call", CALLS)
OUR_ID = re.compile(r"resp_1\.[0-9a-f]{32}")


@pytest.fixture(scope="module")
def sdks(tmp_path_factory):
    """sdks(call, server, ...): what this SDK makes of it."""
    started = {"python": PythonSdks()}

    def ask(call, server, *arguments, **options):
        kind, _, name = call.partition(": ")
        if kind not in started:
            started[kind] = NodeSdks(tmp_path_factory.mktemp("node"))
        return started[kind].ask(name, server.http, *arguments, **options)

    yield ask
    if "node" in started:
        started["node"].stop()


@pytest.fixture
def openai():
    return need_module("openai", "pip install openai")


@pytest.fixture
def responses(relay):
    """The OpenAI SDK's calls for responses, through the relay."""
    with openai_client(relay.http) as client:
        yield client.responses


def create(responses, prompt, **options):
    return responses.create(model="scripted", input=prompt, **options)


def read(events):
    """(id, events) of a response that streams."""
    events = list(events)
    return events[0].response.id, events


def spoken(events):
    kind = "response.output_text.delta"
    return "".join(event.delta for event in events if event.type == kind)


# ---------------------------------------------------------------------- whole answers


@MANNER
@CALL
def test_each_sdk_streams_a_whole_answer(sdks, relay, upstream, call, manner):
    steps = told(MANNERS[manner], protocol_of(call).stream())
    said = sdks(call, relay, upstream.script(*steps))
    assert "error" not in said
    assert said["text"] == SENTENCE


@pytest.mark.parametrize("call", [call for call in CALLS if "helper" not in call])
def test_each_sdk_gets_a_whole_answer_at_once(sdks, relay, upstream, call):
    prompt = upstream.script(plain(200, protocol_of(call).whole()))
    said = sdks(call, relay, prompt, stream=False)
    assert "error" not in said
    assert said["text"] == SENTENCE


@CALL
def test_each_sdk_gets_what_came_as_json_for_a_stream(sdks, relay, upstream, call):
    prompt = upstream.script(plain(200, protocol_of(call).whole()))
    said = sdks(call, relay, prompt)
    assert "error" not in said
    assert said["text"] == SENTENCE


@MANNER
@pytest.mark.parametrize("name", PROTOCOLS)
async def test_each_event_is_passed_on_as_it_came(relay, upstream, name, manner):
    """But for the ids of responses, and for the numbers that the upstream left out."""
    protocol = PROTOCOLS[name]
    prompt = upstream.script(*told(MANNERS[manner], protocol.stream()))
    body = protocol.ask(prompt) | {"stream": True}
    events = await fetch_events("POST", relay.http + protocol.path, None, body)
    if name in ("chat", "completions"):
        assert events.pop().data == "[DONE]"
    payloads = [event.json for event in events]
    if name == "responses":
        numbers = [payload.pop("sequence_number") for payload in payloads]
        assert numbers == list(range(len(payloads)))
        for payload in payloads:
            if "response" in payload:
                assert OUR_ID.fullmatch(payload["response"]["id"])
                payload["response"]["id"] = "resp_1"
    assert payloads == protocol.stream()
    if MANNERS[manner].named and name in ("responses", "messages"):
        assert [event.type for event in events] == [p["type"] for p in payloads]


@pytest.mark.parametrize("name", PROTOCOLS)
async def test_an_answer_is_followed_in_its_own_protocol(relay, upstream, name):
    protocol = PROTOCOLS[name]
    prompt = upstream.script(*told(BOOK, protocol.stream()))
    body = protocol.ask(prompt) | {"stream": True}
    async with stream("POST", relay.http + protocol.path, None, body) as response:
        where = f"{relay.http}/answers/{response.headers['x-answer-id']}"
        first = await response.events()
    again = await fetch_events("GET", where)
    assert again == first
    after = {"Last-Event-ID": first[2].id}
    assert await fetch_events("GET", where, after) == first[3:]


@pytest.mark.parametrize("end", ["incomplete", "failed"])
def test_a_response_may_end_in_other_ways(responses, upstream, end):
    """In the upstream's own words, and with no error of ours."""
    last = {"type": f"response.{end}", "response": response_whole()}
    last["response"] |= {"status": end, "error": {"code": "c", "message": "Enough."}}
    prompt = upstream.script(*told(BOOK, [*response_stream()[:6], last]))
    name, events = read(create(responses, prompt, stream=True))
    assert [event.type for event in events].count(f"response.{end}") == 1
    assert events[-1].response.error.message == "Enough."
    assert responses.retrieve(name).status == end


# -------------------------------------------------------------------------- resuming


@MANNER
def test_cut_after_any_event_the_rest_is_exactly_the_rest(openai, relay, upstream, manner):
    count = len(response_stream())
    with EventProxy(relay.port) as proxy, openai_client(proxy.url) as client:
        for after in range(1, count):
            prompt = upstream.script(*told(MANNERS[manner], response_stream()))
            proxy.cut_after(after)
            seen = until_it_breaks(openai, create(client.responses, prompt, stream=True))
            assert len(seen) == after
            name = seen[0].response.id
            last = seen[-1].sequence_number
            rest = client.responses.retrieve(name, stream=True, starting_after=last)
            whole = list(client.responses.retrieve(name, stream=True))
            assert seen + list(rest) == whole
            assert spoken(whole) == SENTENCE
            assert len(upstream.asked(prompt)) == 1
        assert proxy.cuts == count - 1


def until_it_breaks(openai, events):
    seen = []
    with pytest.raises(openai.APIConnectionError):  # noqa: PT012 (what it saw before)
        for event in events:
            seen.append(event)
    return seen


def test_node_resumes_after_any_event(sdks, relay, upstream):
    with EventProxy(relay.port) as proxy:
        proxy.http = proxy.url  # what sdks() asks
        for after in range(1, len(response_stream())):
            prompt = upstream.script(*told(BOOK, response_stream()))
            proxy.cut_after(after)
            seen = sdks("node: openai responses", proxy, prompt)
            assert seen["error"]
            where = {"id": seen["ids"][0], "after": seen["numbers"][-1]}
            rest = sdks("node: openai retrieve", relay, **where)
            assert "error" not in rest
            assert seen["text"] + rest["text"] == SENTENCE
            numbers = seen["numbers"] + rest["numbers"]
            assert numbers == list(range(len(response_stream())))


def test_after_the_last_event_there_is_nothing_and_no_error(sdks, relay, upstream):
    """To the SDK for Node, a 204 is one."""
    prompt = upstream.script(*told(BOOK, response_stream()))
    seen = sdks("node: openai responses", relay, prompt)
    where = {"id": seen["ids"][0], "after": seen["numbers"][-1]}
    rest = sdks("node: openai retrieve", relay, **where)
    assert "error" not in rest
    assert rest["numbers"] == []


def test_the_rest_of_an_answer_that_is_not_there_yet(openai, relay, upstream):
    gate, events = Gate(), response_stream()
    prompt = upstream.script(*told(BOOK, [*events[:6], gate, *events[6:]]))
    with EventProxy(relay.port) as proxy, openai_client(proxy.url) as client:
        proxy.cut_after(5)
        seen = until_it_breaks(openai, create(client.responses, prompt, stream=True))
        name, last = seen[0].response.id, seen[-1].sequence_number
        rest = client.responses.retrieve(name, stream=True, starting_after=last)
        assert next(rest).sequence_number == last + 1
        gate.open()
        assert spoken([*seen, *rest]) == "".join([WORDS[0], *WORDS[2:]])


def test_numbers_are_looked_for_where_the_upstream_counts_oddly(responses, upstream):
    """It begins at 7 and leaves some out; 15 was never given."""
    numbered = [
        payload | {"sequence_number": 7 + 3 * n} for n, payload in enumerate(response_stream())
    ]
    prompt = upstream.script(*told(MANNERS["data alone"], numbered))
    name, events = read(create(responses, prompt, stream=True))
    numbers = [event.sequence_number for event in events]
    assert numbers == [payload["sequence_number"] for payload in numbered]
    for after in (-1, 6, 7, 13, 15, numbers[-2]):
        rest = list(responses.retrieve(name, stream=True, starting_after=after))
        assert rest == [event for event in events if event.sequence_number > after]


def test_a_number_in_what_is_said_is_not_that_of_the_event(responses, upstream):
    """It may stand before it, such as in the example of a tool."""
    example = {"type": "function", "name": "f", "parameters": {"sequence_number": 99}}
    events = []
    for n, event in enumerate(response_stream()):
        for name in event.keys() & {"response", "item"}:
            event[name]["tools"] = [example]
        events.append({**event, "sequence_number": n})
    name, events = read(create(responses, upstream.script(*sse(*events)), stream=True))
    for n in range(len(events)):
        assert list(responses.retrieve(name, stream=True, starting_after=n)) == events[n + 1 :]


def test_the_helper_of_the_sdk_resumes(relay, responses, upstream):
    """It asks for all of it and skips by itself."""
    prompt = upstream.script(*told(BOOK, response_stream()))
    name, events = read(create(responses, prompt, stream=True))
    with responses.stream(response_id=name, starting_after=6) as rest:
        assert [event.sequence_number for event in rest] == [
            event.sequence_number for event in events[7:]
        ]
        assert rest.get_final_response().output_text == SENTENCE


def test_two_readers_of_one_response(responses, upstream):
    gate, events = Gate(), response_stream()
    prompt = upstream.script(*told(BOOK, [*events[:6], gate, *events[6:]]))
    first = create(responses, prompt, stream=True)
    seen = [next(first) for _ in range(6)]  # only what somebody has seen can be gone on from
    name = seen[0].response.id
    others = [responses.retrieve(name, stream=True, starting_after=n) for n in (0, 3)]
    assert [next(other).sequence_number for other in others] == [1, 4]
    gate.open()
    seen += first
    assert [list(other) for other in others] == [seen[2:], seen[5:]]
    assert len(upstream.asked(prompt)) == 1


def test_the_demo_resumes_without_any_key(openai, quick_demo):
    with EventProxy(quick_demo.port) as proxy, openai_client(proxy.url) as client:
        ask = {"model": "demo", "input": "SSE or WebSocket?", "stream": True}
        proxy.cut_after(12)
        seen = until_it_breaks(openai, client.responses.create(**ask))
        name, last = seen[0].response.id, seen[-1].sequence_number
        rest = client.responses.retrieve(name, stream=True, starting_after=last)
        whole = [*seen, *rest]
        assert [event.sequence_number for event in whole] == list(range(len(whole)))
        assert whole[-1].response.output_text == spoken(whole)
        assert len(whole) > 50


# ---------------------------------------------------------------------- more processes


@pytest.fixture
def two(serve, redis, upstream):
    """Two processes that share their answers."""
    flags = ("--redis", redis.url, "--upstream", upstream.url, "--model", "scripted")
    return serve(*flags), serve(*flags)


def test_another_process_resumes_polls_and_cancels(two, upstream):
    gate, events = Gate(), response_stream()
    prompt = upstream.script(*told(BOOK, [*events[:6], gate, *events[6:7], HOLD]))
    here, there = two
    with openai_client(here.http) as one, openai_client(there.http) as other:
        first = create(one.responses, prompt, stream=True)
        name = next(first).response.id
        follower = other.responses.retrieve(name, stream=True, starting_after=3)
        assert next(follower).sequence_number == 4
        assert other.responses.retrieve(name).status == "in_progress"
        gate.open()
        assert [next(follower).delta for _ in range(2)] == WORDS[1:3]
        assert other.responses.cancel(name).status == "cancelled"
        wait_until(lambda: upstream.asked(prompt)[0].closed_at, 2)
        assert one.responses.retrieve(name).status == "cancelled"


def test_another_process_knows_a_response_at_once(two, upstream):
    here, there = two
    with openai_client(here.http) as one, openai_client(there.http) as other:
        for _ in range(10):
            prompt = upstream.script(*told(BOOK, [*response_stream()[:2], HOLD]))
            running = create(one.responses, prompt, stream=True)
            name = next(running).response.id
            assert other.responses.retrieve(name).status == "in_progress"
            assert other.responses.cancel(name).status == "cancelled"


# -------------------------------------------------------- polling, cancel, background


def poll(responses, name, status):
    """Retrieve until the response has this status."""
    seen = []

    def found():
        seen.append(responses.retrieve(name))
        return seen[-1].status == status

    wait_until(found)
    return seen[-1]


@MANNER
def test_retrieve_polls_from_in_progress_to_the_end(responses, upstream, manner):
    gate, events = Gate(), response_stream()
    steps = [*events[:6], gate, *events[6:]]
    prompt = upstream.script(*told(MANNERS[manner], steps))
    running = create(responses, prompt, stream=True)
    name = next(running).response.id
    assert responses.retrieve(name).status == "in_progress"
    gate.open()
    done = poll(responses, name, "completed")
    assert (done.id, done.output_text) == (name, SENTENCE)
    assert done.usage.total_tokens == 8
    running.close()


def test_cancel_stops_the_upstream_at_once(responses, upstream):
    """Though somebody reads; and it may be said again."""
    prompt = upstream.script(*told(BOOK, [*response_stream()[:6], HOLD]))
    running = create(responses, prompt, stream=True)
    name = next(running).response.id
    assert responses.cancel(name).status == "cancelled"
    wait_until(lambda: upstream.asked(prompt)[0].closed_at, 1)
    again = responses.cancel(name)
    assert (again.id, again.status) == (name, "cancelled")
    assert responses.retrieve(name).status == "cancelled"
    running.close()


async def test_cancel_tells_the_readers(relay, upstream):
    prompt = upstream.script(*told(BOOK, [*response_stream()[:6], HOLD]))
    body = PROTOCOLS["responses"].ask(prompt) | {"stream": True}
    async with stream("POST", relay.http + RESPONSES, None, body) as response:
        first, *_ = [await response.event() for _ in range(6)]
        name = first.json["response"]["id"]
        await fetch("POST", f"{relay.http}{RESPONSES}/{name}/cancel")
        *_, error, last = await response.events()
    assert error.type == "error"
    assert error.json["error"]["type"] == "stopped"
    assert last.type == "response.failed"
    assert last.json["response"]["status"] == "cancelled"
    assert last.json["response"]["id"] == name
    numbers = [event.json["sequence_number"] for event in (error, last)]
    assert numbers == [6, 7]


def test_what_is_done_can_be_seen_while_the_rest_is_under_way(responses, upstream):
    """A poll shows the items that are whole."""
    *begun, last = response_stream()
    prompt = upstream.script(*told(BOOK, [*begun, HOLD, last]))
    running = create(responses, prompt, stream=True)
    name = next(running).response.id
    for _ in begun[1:]:
        next(running)
    now = responses.retrieve(name)
    assert (now.status, now.output_text) == ("in_progress", SENTENCE)
    running.close()


@pytest.mark.parametrize("output", [[], None])
def test_what_is_done_can_be_seen_though_the_end_does_not_repeat_it(responses, upstream, output):
    """Some upstreams send each item, and then an end without any."""
    *events, end = response_stream()
    end["response"] |= {"output": output}
    begun = create(responses, upstream.script(*told(BOOK, [*events, end])), background=True)
    done = poll(responses, begun.id, "completed")
    assert (done.output_text, done.usage.total_tokens) == (SENTENCE, 8)


def test_cancel_after_the_end_changes_nothing(responses, upstream):
    prompt = upstream.script(*told(BOOK, response_stream()))
    name, _ = read(create(responses, prompt, stream=True))
    assert responses.cancel(name).status == "completed"
    assert responses.retrieve(name).output_text == SENTENCE


@pytest.mark.parametrize("streamed", [False, True])
def test_in_the_background_nobody_has_to_attend(responses, upstream, streamed):
    """The upstream rests for longer than anybody lingers."""
    events = response_stream()
    prompt = upstream.script(*told(BOOK, [*events[:5], 1.0, *events[5:]]))
    begun = create(responses, prompt, background=True, stream=streamed)
    if streamed:
        name = next(begun).response.id
        begun.close()
    else:
        assert begun.status == "in_progress"
        name = begun.id
    done = poll(responses, name, "completed")
    assert done.output_text == SENTENCE
    (heard,) = upstream.asked(prompt)
    assert "background" not in heard.json
    assert heard.json["stream"] is True


def test_the_demo_answers_in_the_background(openai, quick_demo):
    with openai_client(quick_demo.http) as client:
        begun = client.responses.create(model="demo", input="Hello", background=True)
        assert begun.status == "in_progress"
        assert poll(client.responses, begun.id, "completed").output_text


def test_in_the_background_an_id_stays_what_it_was(responses, upstream):
    """Though the upstream takes its time to give its own."""
    events = response_stream()
    prompt = upstream.script(*told(BOOK, [b": soon\n\n", 0.5, *events]))
    begun = create(responses, prompt, background=True)
    assert begun.status == "in_progress"
    assert responses.retrieve(begun.id).id == begun.id
    assert poll(responses, begun.id, "completed").output_text == SENTENCE


def test_in_the_background_of_an_upstream_that_refuses(openai, responses, upstream):
    prompt = upstream.script(plain(400, {"error": {"message": "Too long."}}))
    with pytest.raises(openai.BadRequestError, match=r"Too long\."):
        create(responses, prompt, background=True)


def test_a_response_that_was_not_streamed_can_be_retrieved(responses, upstream):
    prompt = upstream.script(plain(200, response_whole()))
    whole = create(responses, prompt)
    assert OUR_ID.fullmatch(whole.id)
    again = responses.retrieve(whole.id)
    assert again == whole
    assert responses.cancel(whole.id).status == "completed"


# -------------------------------------------------------------------------- failures

IN_BAND = {
    "chat": {"error": {"message": "Overloaded.", "type": "t", "code": 529}},
    "completions": {"error": {"message": "Overloaded.", "type": "t", "code": 529}},
    "responses": {"type": "error", "code": "busy", "message": "Overloaded."},
    "messages": {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded."}},
}


@pytest.mark.parametrize("end", ["an error", "no end", FIN, RST])
@pytest.mark.parametrize("manner", ["by the book", "data alone"])
@CALL
def test_no_sdk_takes_half_an_answer_for_whole(sdks, relay, upstream, call, manner, end):
    protocol = protocol_of(call)
    name = next(name for name, known in PROTOCOLS.items() if known is protocol)
    last = {"an error": [IN_BAND[name]], "no end": []}.get(end, [end])
    steps = [*protocol.stream()[:-1], *last]
    prompt = upstream.script(*told(MANNERS[manner]._replace(done=False), steps))
    said = sdks(call, relay, prompt)
    error = said["error"]["message"]
    assert error
    assert "Overloaded." in error or end != "an error"
    assert not re.search("valid|parse|schema|process", error, re.IGNORECASE)


NESTED = {"type": "error", "error": {"message": "Overloaded.", "code": 529}}
FAILURES = {
    "flat": IN_BAND["responses"],
    "nested, a number for a code": NESTED,
    "as chat has it": IN_BAND["chat"],
    "flat, a number for a code": IN_BAND["responses"] | {"code": 529},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_response_that_failed_says_so_ever_after(
    sdks, openai, relay, responses, upstream, failure
):
    steps = list(told(BOOK, [*response_stream()[:6], FAILURES[failure]]))
    for call in CALLS:
        if protocol_of(call).path == RESPONSES:
            said = sdks(call, relay, upstream.script(*steps))
            assert "Overloaded." in said["error"]["message"]
    stream = create(responses, upstream.script(*steps), stream=True)
    name = next(stream).response.id
    with pytest.raises(openai.APIError, match=r"Overloaded\."):
        list(stream)
    failed = responses.retrieve(name)
    assert (failed.status, failed.error.message) == ("failed", "Overloaded.")
    with pytest.raises(openai.APIError, match=r"Overloaded\."):
        list(responses.retrieve(name, stream=True, starting_after=2))


@CALL
@pytest.mark.parametrize("streamed", [True, False])
def test_a_refusal_reads_as_words(sdks, relay, upstream, call, streamed):
    prompt = upstream.script(plain(429, {"detail": "Slow down, please."}))
    error = sdks(call, relay, prompt, stream=streamed)["error"]
    assert error["status"] == 429
    assert "Slow down, please." in error["message"]


async def test_a_message_that_came_as_json_is_put_together_of_its_deltas(relay, upstream):
    """As clients do it: what a tool is asked, and what the model thinks, too."""
    blocks = [
        {"type": "thinking", "thinking": "Let me see", "signature": "c2lnbmVk"},
        {"type": "text", "text": SENTENCE},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": ["\u4f60", 1.5]}},
        {"type": "redacted_thinking", "data": "cmVkYWN0ZWQ="},
    ]
    path, _, whole, ask = PROTOCOLS["messages"]
    prompt = upstream.script(plain(200, whole() | {"content": blocks, "stop_reason": "tool_use"}))
    events = await fetch_events("POST", relay.http + path, None, ask(prompt) | {"stream": True})
    built = []
    for said in (event.json for event in events):
        if said["type"] == "content_block_start":
            built.append(said["content_block"])
        elif said["type"] == "content_block_delta":
            kind, (_, more) = said["delta"].pop("type"), *said["delta"].items()
            if kind == "input_json_delta":
                assert built[-1]["input"] == {}
                built[-1]["input"] = json.loads(more)
            else:
                built[-1][kind.removesuffix("_delta")] += more
    assert built == blocks
    assert events[-2].json["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize("name", PROTOCOLS)
async def test_json_for_a_stream_is_the_answer_or_an_error(relay, upstream, name):
    """Never a success without a word."""
    protocol = PROTOCOLS[name]
    for whole in (protocol.whole(), {}, [], {"detail": "No."}):
        body = protocol.ask(upstream.script(plain(200, whole))) | {"stream": True}
        response = await fetch("POST", relay.http + protocol.path, None, body)
        said = response.body.decode()
        failed = response.status >= 400 or "event: error" in said
        assert failed or (whole and WORDS[0] in said), whole


@pytest.mark.parametrize("name", PROTOCOLS)
async def test_a_whole_answer_that_is_cut_is_not_paid_for_twice(relay, upstream, name):
    protocol = PROTOCOLS[name]
    half = plain(200, protocol.whole())[:-20]
    prompt = upstream.script(half, FIN)
    response = await fetch("POST", relay.http + protocol.path, None, protocol.ask(prompt))
    assert response.status == 502
    assert response.headers["x-should-retry"] == "false"
    assert response.json["type"] == "error"
    assert len(upstream.asked(prompt)) == 1


# ---------------------------------------------------------------------- ids and secrets


STATES = {
    "begun": ([*response_stream()[:1], HOLD], {}),
    "under way": ([*response_stream()[:6], HOLD], {}),
    "ended": (response_stream(), {}),
    "cut": ([*response_stream()[:6], RST], {}),
    "polled": ([*response_stream()[:6], HOLD], {"background": True, "stream": False}),
}


@pytest.mark.parametrize("state", STATES)
async def test_only_its_own_id_finds_a_response(relay, upstream, state):
    steps, fields = STATES[state]
    prompt = upstream.script(*told(BOOK, steps))
    body, url = (
        PROTOCOLS["responses"].ask(prompt) | {"stream": True} | fields,
        relay.http + RESPONSES,
    )
    async with stream("POST", url, None, body) as response:
        if state == "polled":
            found = (await response.read()).json
        else:
            first = await response.event()
            found = first.json["response"]
        if state in ("ended", "cut"):
            await response.events()
        name, _, secret = found["id"].rpartition(".")
        assert (await fetch("GET", f"{url}/{found['id']}")).json["id"] == found["id"]
        for other in (secret, f"resp_0.{secret}", f"{name}x.{secret}"):
            assert (await fetch("GET", f"{url}/{other}")).status == 404


async def test_an_answer_of_another_protocol_is_no_response(relay, upstream):
    prompt = upstream.script(plain(200, chat_whole()))
    response = await fetch("POST", relay.http + OPENAI, None, PROTOCOLS["chat"].ask(prompt))
    secret = response.headers["x-answer-id"]
    for id in ("chatcmpl-1", "resp_0"):
        assert (await fetch("GET", f"{relay.http}{RESPONSES}/{id}.{secret}")).status == 404


async def test_a_response_is_found_though_redis_has_lost_its_beginning(two, redis, upstream):
    here, there = two
    gate, (created, begun, *rest) = Gate(), response_stream()
    prompt = upstream.script(*told(BOOK, [created, begun, gate, *rest]))
    body = PROTOCOLS["responses"].ask(prompt) | {"stream": True}

    def stored():
        """The ids of its entries that have events."""
        return re.findall(r"(\d+-\d+)\r\n\*8", redis.do(f"XRANGE {key} - +").decode())

    async with stream("POST", here.http + RESPONSES, None, body) as response:
        found = (await response.event()).json["response"]
        key = f"chatstream:2:answer:{response.headers['x-answer-id']}"
        await until(lambda: b"response.in_progress" in redis.do(f"XRANGE {key} - +"))
        lost = stored()
        gate.open()
        await response.events()
    await until(lambda: b"response.completed" in redis.do(f"XRANGE {key} - +"))
    redis.do(" ".join(["XDEL", key, *lost]))
    retrieved = await fetch("GET", f"{there.http}{RESPONSES}/{found['id']}")
    assert (retrieved.status, retrieved.json["status"]) == (200, "completed")


def test_a_guessed_id_is_unknown(openai, responses, upstream):
    prompt = upstream.script(*told(BOOK, response_stream()))
    name, _ = read(create(responses, prompt, stream=True))
    bare, _, secret = name.partition(".")
    guesses = [bare, f"{bare}.{'0' * 32}", f"{bare}.{secret[:-1]}", f"resp_2.{secret}"]
    for guess in guesses:
        for call in (responses.retrieve, responses.cancel):
            with pytest.raises(openai.NotFoundError) as raised:
                call(guess)
            assert secret not in str(raised.value)


@pytest.mark.parametrize("id", ["resp_a/b+c==", "a/cancel", "a b%2F?c#d", "\u4f60", "..", 7])
def test_an_upstream_may_give_any_id(responses, upstream, id):
    """Some gateways' are base64."""
    events = response_stream()
    events = [
        e | ({"response": e["response"] | {"id": id}} if "response" in e else {}) for e in events
    ]
    name, events = read(create(responses, upstream.script(*told(BOOK, events)), stream=True))
    assert name.startswith(f"{id}.")
    assert responses.retrieve(name).output_text == SENTENCE
    assert list(responses.retrieve(name, stream=True, starting_after=5)) == events[6:]
    assert responses.cancel(name).id == name


def test_no_two_responses_share_an_id(responses, upstream):
    """The upstream gives each of them the same."""
    names = {
        read(create(responses, upstream.script(*told(BOOK, response_stream())), stream=True))[0]
        for _ in range(3)
    }
    assert len(names) == 3


@pytest.mark.parametrize("streamed", [True, False])
def test_the_upstream_never_sees_our_part_of_an_id(relay, responses, upstream, streamed):
    first = upstream.script(*told(BOOK, response_stream()))
    name, _ = read(create(responses, first, stream=True))
    forgotten = "resp_9." + "ab" * 16
    for previous, known in ((name, "resp_1"), (forgotten, "resp_9"), ("resp_5",) * 2):
        steps = told(BOOK, response_stream()) if streamed else [plain(200, response_whole())]
        prompt = upstream.script(*steps)
        got = create(responses, prompt, previous_response_id=previous, stream=streamed)
        list(got if streamed else [])
        (heard,) = upstream.asked(prompt)
        assert heard.json["previous_response_id"] == known
        assert previous.partition(".")[2] == "" or previous.partition(".")[2] not in (
            heard.body.decode() + str(heard.headers)
        )


def test_ids_pass_through_two_relays(serve, relay, upstream):
    """Each adds its own secret, and takes it off again."""
    outer = serve("--upstream", relay.http + "/v1", "--model", "scripted")
    with openai_client(outer.http) as client:
        first = upstream.script(*told(BOOK, response_stream()))
        name, events = read(create(client.responses, first, stream=True))
        assert re.fullmatch(r"resp_1(\.[0-9a-f]{32}){2}", name)
        rest = client.responses.retrieve(name, stream=True, starting_after=4)
        assert list(rest) == events[5:]
        prompt = upstream.script(plain(200, response_whole()))
        create(client.responses, prompt, previous_response_id=name)
    assert upstream.asked(prompt)[0].json["previous_response_id"] == "resp_1"


def test_what_the_relay_cannot_do_it_says(openai, relay, responses, upstream):
    prompt = upstream.script(*told(BOOK, response_stream()))
    name, _ = read(create(responses, prompt, stream=True))
    with openai_client(relay.http) as client:
        calls = [
            lambda: list(client.responses.input_items.list(name)),
            lambda: client.responses.delete(name),
            lambda: client.conversations.create(),
        ]
        for call in calls:
            with pytest.raises(openai.APIStatusError) as raised:
                call()
            assert raised.value.status_code in (404, 405)
            assert raised.value.body["message"]


# --------------------------------------------------------------------- keys and tokens

TOKEN = "a-token-of-our-own-51c0"


@pytest.fixture(scope="module")
def guarded(shared, upstream):
    """A relay that asks for a token and has no key."""
    env = {"CHATSTREAM_TOKEN": TOKEN}
    return shared("--upstream", upstream.url, "--model", "scripted", env=env)


@CALL
def test_the_token_is_the_sdks_key(sdks, guarded, upstream, call):
    steps = list(told(BOOK, protocol_of(call).stream()))
    prompt = upstream.script(*steps)
    said = sdks(call, guarded, prompt, key=TOKEN)
    assert said["text"] == SENTENCE
    (heard,) = upstream.asked(prompt)
    assert TOKEN not in str(heard.headers)
    prompt = upstream.script(*steps)
    assert sdks(call, guarded, prompt, key="wrong")["error"]["status"] == 401
    assert not upstream.asked(prompt)


@CALL
def test_the_servers_key_takes_the_place_of_the_sdks(sdks, relay, upstream, call):
    protocol = protocol_of(call)
    prompt = upstream.script(*told(BOOK, protocol.stream()))
    sdks(call, relay, prompt, key="the-clients-own")
    sent = upstream.asked(prompt)[0].headers
    assert sent["authorization"] == f"Bearer {SECRET}"
    assert sent.get("x-api-key") == (SECRET if protocol.path == "/v1/messages" else None)
    assert "the-clients-own" not in str(sent)


def test_what_anthropics_sdk_says_of_itself_is_passed_on(relay, upstream):
    anthropic = need_module("anthropic", "pip install anthropic")
    prompt = upstream.script(plain(200, PROTOCOLS["messages"].whole()))
    head = {"anthropic-beta": "one-2026,two-2026"}
    with anthropic.Anthropic(base_url=relay.http, api_key="none") as client:
        body = PROTOCOLS["messages"].ask(prompt)
        client.messages.create(**body, extra_headers=head)
    sent = upstream.asked(prompt)[0].headers
    assert sent["anthropic-beta"] == head["anthropic-beta"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", sent["anthropic-version"])
