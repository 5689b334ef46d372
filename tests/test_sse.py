"""Events on the wire: framed by us, read by the standards' rules and by wsproto."""

import json
import re
from collections import deque

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameProtocol

from chatstream import (
    SSE,
    Event,
    EventLog,
    SSEParser,
    frame_close,
    frame_sse,
    frame_ws,
    frame_ws_json,
    frame_ws_plain,
    gap,
    http_chunk,
)

# Nothing here is judged by the clock, so that a busy machine breaks no test.
calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def parsed(*pieces):
    """(data, type) of each event in these pieces of a stream."""
    parser = SSEParser()
    return [event[:2] for piece in pieces for event in parser.feed(piece)]


def message(data):
    return (data, "message")


IDS = re.compile("^id: (.*)$", re.MULTILINE)


def ids(stream):
    """The ids of our own stream, which the parser has no use for."""
    return IDS.findall(stream.decode())


# ------------------------------------------------------------------------ the parser

# The first five are the examples of the HTML standard, section 9.2.6.
STREAMS = {
    "several lines of data": (
        b"data: YHOO\ndata: +2\ndata: 10\n\n",
        [message("YHOO\n+2\n10")],
    ),
    "comment, id, empty id, and an end without its blank line": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n"
        b"data:  third event",
        [message("first event"), message("second event")],
    ),
    "lines that are only a name": (
        b"data\n\ndata\ndata\n\ndata:",
        [message(""), message("\n")],
    ),
    "the space after the colon": (
        b"data:test\n\ndata: test\n\n",
        [message("test")] * 2,
    ),
    "types": (
        b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\ndata: 113411\n\n",
        [("73857293", "add"), ("2153", "remove"), message("113411")],
    ),
    "nothing": (b"", []),
    "blank lines": (b"\n\n\n", []),
    "CR": (b"data: a\rdata: b\r\r", [message("a\nb")]),
    "CR LF": (b"data: a\r\ndata: b\r\n\r\n", [message("a\nb")]),
    "all three mixed": (b"data: a\r\ndata: b\rdata: c\n\r\n", [message("a\nb\nc")]),
    "LF CR is two line ends": (b"data: a\n\rdata: b\n\r", [message("a"), message("b")]),
    "CR CR LF is two line ends": (b"data: a\r\r\ndata: b\r\r\n",
                                  [message("a"), message("b")]),
    "a byte order mark": (b"\xef\xbb\xbfdata: a\n\n", [message("a")]),
    "only one byte order mark": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\ndata: b\n\n",
                                 [message("b")]),
    "a byte order mark later": (b"\n\xef\xbb\xbfdata: a\n\n", []),
    "a byte order mark inside data": (b"data: \xef\xbb\xbfa\n\n",
                                      [message("\ufeffa")]),
    "only one space goes": (b"data:   a\n\n", [message("  a")]),
    "a tab stays": (b"data:\ta\n\n", [message("\ta")]),
    "a colon in the value": (b"data: a: b\n\n", [message("a: b")]),
    "a space before the name": (b" data: a\n\n", []),
    "a space before the colon": (b"data : a\n\n", []),
    "names are lower case": (b"DATA: a\nData: b\n\n", []),
    "a name we do not know": (b"datum: x\ndata: a\nfoo\n\n", [message("a")]),
    "a comment inside an event": (b"data: a\n:data: x\ndata: b\n\n", [message("a\nb")]),
    "a type without data is forgotten": (b"event: a\n\ndata: b\n\n", [message("b")]),
    "the last type wins": (b"event: a\nevent: b\ndata: x\n\n", [("x", "b")]),
    "an empty type is none": (b"event: a\nevent\ndata: x\n\n", [message("x")]),
    "ids and times are not for a relay": (b"id: 1\ndata: a\nretry: 5\n\nid\n\n",
                                          [message("a")]),
    "bytes that are no UTF-8": (b"data: \xff\xc3\ndata: b\n\n",
                                [message("\ufffd\ufffd\nb")]),
    "other line ends are text": ("data: a\u2028b\u2029c\x85d\ve\ff\n\n".encode(),
                                 [message("a\u2028b\u2029c\x85d\ve\ff")]),
    "NUL is text": (b"data: a\0b\n\n", [message("a\0b")]),
}  # fmt: skip


@pytest.mark.parametrize(("stream", "events"), STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_a_stream_is_read_by_the_rules_however_it_was_cut(stream, events, size):
    pieces = [stream[n : n + size] for n in range(0, len(stream), size)]
    assert parsed(*pieces) == events


@pytest.mark.parametrize("size", [1, 1000])
def test_a_last_event_without_its_blank_line_can_be_asked_for(size):
    """Some upstreams end so: `data: [DONE]`, and nothing behind it."""
    for end in (b"", b"\n", b"\r\n"):
        stream = b"data: a\n\ndata: [DONE]" + end
        parser = SSEParser()
        pieces = [stream[n : n + size] for n in range(0, len(stream), size)]
        assert [event[:2] for piece in pieces for event in parser.feed(piece)] == [message("a")]
        assert [event[:2] for event in parser.unfinished()] == [message("[DONE]")]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_last_event_without_its_blank_line_is_an_end_or_nothing(end):
    for event in (b"data: [DONE", b"data: b", b'data: {"content": "error"}', b"event: a\ndata: b"):
        assert unfinished(event + end) == []
    failed = [('{"error": "b"}', "message"), ("b", "error")]
    assert unfinished(b'data: {"error": "b"}' + end) == failed[:1]
    assert unfinished(b'{"error": "b"}' + end) == failed[:1]
    assert unfinished(b"event: error\ndata: b" + end) == failed[1:]


def unfinished(stream):
    parser = SSEParser()
    assert [event[:2] for event in parser.feed(b"data: a\n\n" + stream)] == [message("a")]
    return [event[:2] for event in parser.unfinished()]


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"x" * 200,
        b":" + b"x" * 200,
        b"data: 12345\n" * 9,
        b"data\n" * 21,
        b"event: x\n" * 12,
    ],
)
def test_an_event_without_end_is_refused(stream):
    """A hostile stream, in one piece or in drops, cannot fill the memory."""
    for size in (1, 7, 1000):
        parser = SSEParser(max_bytes=100)
        pieces = [stream[n : n + size] for n in range(0, len(stream), size)]
        with pytest.raises(ValueError, match=r"an event of more than 9\.54e-05 MiB"):
            deque(map(parser.feed, pieces))


def test_many_events_of_a_fair_size_are_not_refused():
    parser = SSEParser(max_bytes=100)
    block = b"data: " + b"x" * 80 + b"\n\n"
    stream = block * 100
    for n in range(0, len(stream), 64):
        parser.feed(stream[n : n + 64])
    assert SSEParser(max_bytes=100).feed(block)


def test_a_large_event_is_no_more_work_than_its_bytes():
    """Not asserted by the clock: quadratic work would take minutes here."""
    parser = SSEParser()
    for _ in range(200_000):
        assert parser.feed(b"data: x\n") == []
    for _ in range(200_000):
        assert parser.feed(b"x") == []
    (event,) = parser.feed(b"\n\n")
    assert len(event.data) == 2 * 200_000 - 1


# ----------------------------------------------------------------------- our framing


@pytest.mark.parametrize(
    ("place", "event", "frame"),
    [
        (7, Event("hello"), "data: hello\nid: log-7\n\n"),
        (0, Event(""), "data: \nid: log-0\n\n"),
        (1, Event(" a"), "data:  a\nid: log-1\n\n"),
        (2, Event("a\nb"), "data: a\ndata: b\nid: log-2\n\n"),
        (3, Event("a\r\nb\rc\n"), "data: a\ndata: b\ndata: c\ndata: \nid: log-3\n\n"),
        (4, Event("{}", "error"), "event: error\ndata: {}\nid: log-4\n\n"),
        (5, Event("你好 🚀\u2028"), "data: 你好 🚀\u2028\nid: log-5\n\n"),
        (6, Event("half \ud83d"), "data: half ?\nid: log-6\n\n"),
    ],
)
def test_an_event_as_sse(place, event, frame):
    """`id:` after `data:`, and a blank line only where an event ends."""
    assert frame_sse("log", place, event) == frame.encode()


def test_a_gap_is_an_event_without_an_id():
    block = frame_sse("log", None, gap(17))
    assert parsed(block) == [('{"missed": 17}', "gap")]
    assert ids(block) == []


def test_a_keep_alive_is_one_comment_line():
    """A blank line after it would end a block, and some clients dispatch that."""
    assert SSE.keep_alive == b": keep-alive\n"
    between = frame_sse("log", 1, Event("a"))
    assert parsed(between + SSE.keep_alive + between) == parsed(between * 2)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1)


@st.composite
def logs(draw):
    log = EventLog("log")
    for _ in range(draw(st.integers(0, 8))):
        log.append(draw(TEXT), draw(NAMES))
    return log


def one_line_end(text):
    """What SSE keeps of a text: that a line ends, not how."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@calm
@given(logs(), st.data())
def test_any_event_survives_however_its_bytes_are_split(log, data):
    stream, place = log.frames(SSE, 0)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10).map(sorted))
    ends = [*cuts, len(stream)]
    pieces = [stream[a:b] for a, b in zip([0, *cuts], ends, strict=True)]
    assert place == log.end
    assert parsed(*pieces) == [(one_line_end(log[n].data), log[n].type) for n in range(log.end)]
    assert ids(stream) == [f"log-{n}" for n in range(log.end)]


@calm
@given(logs())
def test_resuming_after_each_id_gives_exactly_the_rest(log):
    stream, _ = log.frames(SSE, 0)
    every = parsed(stream)
    for n, last_event_id in enumerate(ids(stream)):
        rest, _ = log.frames(SSE, log.place_after(last_event_id))
        assert parsed(rest) == every[n + 1 :]


@calm
@given(st.binary())
@example(b"\xef\xbb")
@example(b"\r")
def test_no_bytes_whatever_break_the_parser(stream):
    whole = parsed(stream)
    assert parsed(*(bytes([byte]) for byte in stream)) == whole


@calm
@given(logs(), st.integers(0, 10_000))
def test_a_cut_stream_never_gives_half_an_event(log, cut):
    stream, _ = log.frames(SSE, 0)
    every = parsed(stream)
    some = parsed(stream[:cut])
    assert some == every[: len(some)]


@pytest.mark.parametrize(
    ("data", "body"), [(b"x", b"1\r\nx\r\n"), (b"x" * 255, b"ff\r\n" + b"x" * 255 + b"\r\n")]
)
def test_a_chunk_of_a_body(data, body):
    assert http_chunk(data) == body


# ------------------------------------------------------------------------- WebSocket


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 200_000])
@pytest.mark.parametrize("letter", ["x", "é", "你"])
def test_a_text_frame_is_what_wsproto_would_send(size, letter):
    text = (letter * size)[:size]
    theirs = FrameProtocol(client=False, extensions=[]).send_data(text)
    assert frame_ws(text.encode()) == theirs


@pytest.mark.parametrize("payload", [b"", b"ping", b"x" * 125])
def test_a_ping_is_what_wsproto_would_send(payload):
    theirs = FrameProtocol(client=False, extensions=[]).ping(payload)
    assert frame_ws(payload, 0x9) == theirs


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1009, 3000, 4999])
@pytest.mark.parametrize("reason", ["", "the server is stopping", "x" * 123, "x" * 200])
def test_a_close_is_what_wsproto_would_send(code, reason):
    theirs = FrameProtocol(client=False, extensions=[]).close(code, reason)
    assert frame_close(code, reason) == theirs


def payload_of(frame):
    """What a client of wsproto reads in this frame."""
    client = FrameProtocol(client=True, extensions=[])
    client.receive_bytes(frame)
    return "".join(frame.payload for frame in client.received_frames())


@pytest.mark.parametrize(
    ("name", "place", "event", "fields"),
    [
        (
            "room-ab12",
            4,
            Event("hi", "message", {"name": "An", "at": 5}),
            {"id": "room-ab12-4", "type": "message", "name": "An", "at": 5,
             "text": "hi"},
        ),
        (
            "room-ab12",
            5,
            Event("", "joined", {"name": "An", "at": 5, "members": 2}),
            {"id": "room-ab12-5", "type": "joined", "name": "An", "at": 5,
             "members": 2},
        ),
        ("clock", 9, Event("noon"), {"id": "clock-9", "data": "noon"}),
        (
            "room-ab12",
            6,
            Event("half \ud83d", "message", {"name": "\udc80", "at": 5}),
            {"id": "room-ab12-6", "type": "message", "name": "\udc80", "at": 5,
             "text": "half \ud83d"},
        ),
    ],
)  # fmt: skip
def test_an_event_as_json(name, place, event, fields):
    assert json.loads(payload_of(frame_ws_json(name, place, event))) == fields


@pytest.mark.parametrize(
    ("event", "frame"),
    [
        (Event("hi"), frame_ws("hi--返回数据".encode())),
        (Event(""), frame_ws("--返回数据".encode())),
        (Event("half \ud83d"), frame_ws("half ?--返回数据".encode())),
        (Event("", "joined"), b""),
        (Event("", "left"), b""),
    ],
)
def test_an_event_for_a_plain_member(event, frame):
    assert frame_ws_plain("--返回数据", "room-ab12", 4, event) == frame


@pytest.mark.parametrize("name", ["room-ab12", "clock"])
def test_a_gap_over_a_websocket_is_a_message_without_an_id(name):
    frame = frame_ws_json(name, None, gap(17))
    assert json.loads(payload_of(frame)) == {"type": "gap", "missed": 17}
