"""/metrics, read by the rules of Prometheus' text format 0.0.4, after known traffic."""

import re
from collections import Counter

import pytest
import trio
from kit import (
    CHAT,
    HOLD,
    OPENAI,
    ROOM_PROTOCOL,
    RST,
    TEXT,
    Gate,
    answer,
    asking,
    connect,
    delta,
    fetch,
    fetch_events,
    frame,
    health,
    narrow,
    program,
    raw_member,
    read_frame,
    sse,
    stream,
    whole_answer,
)

TYPE = re.compile(r"# TYPE ([a-z_]+) (counter|gauge|histogram)")
SAMPLE = re.compile(
    r'([a-z_]+)(?:\{([a-z_]+)="((?:[^"\\]|\\[\\"n])*)"\})? (\d+(?:\.\d+)?(?:e[-+]\d+)?)'
)
BOUNDS = ["0.1", "0.25", "0.5", "1", "2.5", "5", "10", "30", "60", "120", "+Inf"]


def parse(text):
    """Each sample by its name, `name{value of its label}`; the rules are checked."""
    assert text.endswith("\n")
    found, kinds, family = Counter(), {}, ""
    for line in text.splitlines():
        if typed := TYPE.fullmatch(line):
            family, kind = typed.groups()
            assert family not in kinds, f"{family} in two places"
            kinds[family] = kind
            continue
        name, label, value, number = SAMPLE.fullmatch(line).groups()
        parts = {"histogram": ["_bucket", "_sum", "_count"]}
        endings = parts.get(kinds[family], [""])
        assert name in [family + ending for ending in endings], line
        assert (label == "le") == name.endswith("_bucket"), line
        key = name if label is None else f"{name}{{{value}}}"
        assert key not in found, f"{key} twice"
        found[key] = float(number)
    for name, kind in kinds.items():
        assert (kind == "counter") == name.endswith("_total"), name
    return found


async def scrape(server):
    await trio.sleep(1.1)  # the text is kept for a second
    response = await fetch("GET", server.http + "/metrics")
    assert response.status == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4"
    found = parse(response.body.decode())
    return Counter({k.removeprefix("chatstream_"): v for k, v in found.items()})


def endings(found):
    return {
        key.removeprefix("answers_total"): value
        for key, value in found.items()
        if key.startswith("answers_total")
    }


@pytest.fixture
def counted(serve, upstream):
    """A server whose whole traffic the test knows."""
    return serve("--linger", "0.1", env={"OPENAI_BASE_URL": upstream.url})


async def test_a_new_server_has_nothing_to_tell_but_who_asks(counted):
    found = await scrape(counted)
    assert +found == {"connections": 1}


async def test_what_is_here_now_is_a_gauge(counted, upstream):
    prompt = upstream.script(*sse(delta("Hel"), HOLD))
    async with (
        stream("GET", counted.http + "/clock"),
        raw_member(counted.ws),
        stream("POST", counted.http + CHAT, None, asking(prompt)) as asked,
    ):
        await asked.event()
        found = await scrape(counted)
        said = await health(counted)
    for name, value in {"readers": 2, "answers": 1, "members": 1}.items():
        assert found[name] == said[name] == value
    assert found["connections"] == 4


async def test_each_answer_is_counted_by_its_ending(counted, upstream):
    url = counted.http + OPENAI
    for steps, stream_it in ((answer("Hello"), True), ([whole_answer("Hello")], False)):
        done = asking(upstream.script(*steps), stream=stream_it)
        assert (await fetch("POST", url, None, done)).status == 200
    broken = asking(upstream.script(*sse(delta("Hel"), RST)), stream=True)
    assert (await fetch_events("POST", url, None, broken))[-1].type == "error"
    held = asking(upstream.script(*sse(delta("Hel"), HOLD)), stream=True)
    for delete_it in (True, False):
        async with stream("POST", url, None, held) as response:
            await response.event()
            name = response.headers["x-answer-id"]
            if delete_it:
                await fetch("DELETE", f"{counted.http}/answers/{name}")
                await response.events()
    await until_sample(counted, "answers", 0)  # nobody reads the last one
    ended = {"{done}": 2, "{upstream_error}": 1, "{stopped}": 1, "{abandoned}": 1}
    assert endings(await scrape(counted)) == ended


async def test_an_event_is_counted_once_for_each_that_reads_it(counted, upstream):
    """Also while they read; two words, one chunk with the finish, and [DONE]."""
    gate = Gate()
    body = asking(upstream.script(*answer("Hel", gate, "lo")), stream=True)
    async with stream("POST", counted.http + OPENAI, None, body) as first:
        await first.event()
        assert (await scrape(counted))["events_delivered_total"] == 1
        url = f"{counted.http}/answers/{first.headers['x-answer-id']}"
        async with stream("GET", url) as second:
            await second.event()
            assert (await scrape(counted))["events_delivered_total"] == 2
            gate.open()
            assert len(await first.events() + await second.events()) == 6
    assert (await scrape(counted))["events_delivered_total"] == 8


async def test_a_member_is_a_reader_too(counted):
    """What was delivered is still counted when it has left. `joined` is an event."""
    protocol = {"Sec-WebSocket-Protocol": ROOM_PROTOCOL}
    async with raw_member(counted.ws, protocol) as member:
        await member.send(frame(TEXT, b'{"text": "Hello"}'))
        await read_frame(member)
        await read_frame(member)
        assert (await scrape(counted))["events_delivered_total"] == 2
    await until_sample(counted, "connections", 1)  # the one that asks
    assert (await scrape(counted))["events_delivered_total"] == 2


async def until_sample(server, name, wanted):
    with trio.fail_after(60):
        while (await scrape(server))[name] != wanted:  # noqa: ASYNC110
            await trio.sleep(0.05)


async def test_a_gap_is_counted(counted):
    await fetch("GET", counted.http + "/time")
    async with stream("GET", counted.http + "/clock", {"Last-Event-ID": "clock-1"}) as clock:
        assert (await clock.event()).type == "gap"
        assert (await scrape(counted))["gaps_total"] == 1
    await until_sample(counted, "connections", 1)  # the one that asks
    assert (await scrape(counted))["gaps_total"] == 1


async def test_who_is_dropped_is_counted_by_the_cause(serve, upstream):
    """One member answers no ping, one reader takes nothing of a long answer."""
    limits = program(PING_EVERY=1, STUCK_TIMEOUT=1.5)
    server = serve(program=limits, env={"OPENAI_BASE_URL": upstream.url})
    prompt = upstream.script(*answer("x" * 900_000, *["y" * 900_000] * 9))
    dropped = "readers_dropped_total"
    async with raw_member(server.ws):
        await until_sample(server, f"{dropped}{{silent}}", 1)
    async with narrow(server.http) as deaf:
        await deaf.request("POST", CHAT, None, asking(prompt))
        await until_sample(server, f"{dropped}{{stuck}}", 1)


async def test_the_first_token_is_counted_by_how_long_it_took(counted, upstream):
    """Each bucket holds all that took no longer; nobody knows how busy this machine is,
    so that a token has taken longer than we waited is all that is sure."""
    for wait in (0, 0.3):
        prompt = upstream.script(*sse(wait, delta("Hel"), delta("lo")))
        await fetch("POST", counted.http + CHAT, None, asking(prompt))
    found = await scrape(counted)
    name = "first_token_seconds"
    # All of them, also those with nothing in them, in the order of their bounds.
    assert [key for key in found if "bucket" in key] == [
        f"{name}_bucket{{{bound}}}" for bound in BOUNDS
    ]
    buckets = [found[f"{name}_bucket{{{bound}}}"] for bound in BOUNDS]
    assert buckets == sorted(buckets)
    assert buckets[1] <= 1
    assert buckets[-1] == found[f"{name}_count"] == 2
    assert 0.3 <= found[f"{name}_sum"] < 10


async def test_each_byte_on_the_wire_is_counted(counted):
    """Between two scrapes of one connection lies exactly the first one's answer."""
    totals, sizes = [], []
    async with connect(counted.http) as connection:
        received = connection.receive

        async def count_bytes():
            data = await received()
            sizes[-1] += len(data)
            return data

        connection.receive = count_bytes
        for _ in range(2):
            sizes.append(0)
            await trio.sleep(1.1)  # the text is kept for a second
            response = await connection.request("GET", "/metrics")
            found = parse((await response.read()).body.decode())
            totals.append(found["chatstream_sent_bytes_total"])
    assert totals == [0, sizes[0]]
