"""RFC 6455, case by case, in the groups that Autobahn's test suite has (1 to 7).

The room in plain mode, without a tail and with one member, is an echo for text. A case
is what a client sends, and what it then hears: frames, or the code of the close frame.
"""

import random
import struct

import pytest
import trio
from kit import BINARY, CLOSE, PING, PONG, TEXT, Cut, raw_member, read_frame, unharmed

MORE = 0  # the opcode of a continuation


@pytest.fixture(scope="module")
def echo(shared):
    return shared("--room-suffix", "", "--room-rate", "0")


def frame(opcode, payload=b"", fin=1, rsv=0, mask=b"\x37\xfa\x21\x3d", size=None):
    """A client's frame; `size` is how many bytes its length takes, however short."""
    data = payload if isinstance(payload, bytes) else payload.encode()
    first = fin << 7 | rsv << 4 | opcode
    shortest = 1 if len(data) < 126 else 3 if len(data) < 65536 else 9
    head = {
        1: lambda: bytes([first, 0x80 | len(data)]),
        3: lambda: struct.pack("!BBH", first, 0xFE, len(data)),
        9: lambda: struct.pack("!BBQ", first, 0xFF, len(data)),
    }[size or shortest]()
    masked = bytes(byte ^ mask[n % 4] for n, byte in enumerate(data))
    return head + mask + masked


def pieces(text, *cuts):
    """A text message in fragments, cut at these bytes."""
    data = text if isinstance(text, bytes) else text.encode()
    ends = [*cuts, len(data)]
    parts = [data[a:b] for a, b in zip([0, *cuts], ends, strict=True)]
    last = len(parts) - 1
    return [frame(MORE if n else TEXT, p, fin=n == last) for n, p in enumerate(parts)]


def close(code=None, reason=b""):
    return frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason)


HELLO = "Hello-µ@ßöäüàá-UTF-8!!"
STARS, MATH = "*" * 125, "κόσμε"

# What is heard: text comes as str, a pong as bytes, a close as its code.
FRAMING = {
    f"{size} characters": ([frame(TEXT, "*" * size)], ["*" * size])
    for size in (0, 1, 125, 126, 127, 128, 4095, 4096)
} | {
    "4096 of three bytes": ([frame(TEXT, "你" * 4096)], ["你" * 4096]),
    "4096 of four bytes": ([frame(TEXT, "🙂" * 4096)], ["🙂" * 4096]),
    "one of 4097": ([frame(TEXT, "*" * 4097)], [1009]),
    "one of 65535": ([frame(TEXT, "*" * 65535)], [1009]),
    "one of 65536": ([frame(TEXT, "*" * 65536)], [1009]),
    "one of a megabyte": ([frame(TEXT, "*" * (1 << 20))], [1009]),
    "binary": ([frame(BINARY, b"\xfe" * 125)], [1003]),
    "empty binary": ([frame(BINARY)], [1003]),
    "three in one": ([frame(TEXT, "a"), frame(TEXT, "b"), frame(TEXT)], ["a", "b", ""]),
    "zero mask": ([frame(TEXT, "hello", mask=bytes(4))], ["hello"]),
    "not masked": ([b"\x81\x05hello"], [1002]),
    "a length of 64 bits": ([b"\x81\xff" + b"\xff" * 8], [1002]),
    "the largest length": ([b"\x81\xff\x7f" + b"\xff" * 7 + bytes(4) + b"x" * 60_000], [1009]),
}
PINGS = {
    "empty": ([frame(PING)], [b""]),
    "with text": ([frame(PING, "Hello, world!")], [b"Hello, world!"]),
    "with bytes": ([frame(PING, b"\x00\xff\xfe\xfd")], [b"\x00\xff\xfe\xfd"]),
    "of 125 bytes": ([frame(PING, b"\xfe" * 125)], [b"\xfe" * 125]),
    "of 126 bytes": ([frame(PING, b"\xfe" * 126)], [1002]),
    "of 126 bytes in 64 bits": ([frame(PING, b"\xfe" * 126, size=9)], [1002]),
    "an unasked pong": ([frame(PONG)], []),
    "an unasked pong with text": ([frame(PONG, "unasked")], []),
    "pong, then ping": ([frame(PONG, "unasked"), frame(PING, "asked")], [b"asked"]),
    "ten": ([frame(PING, f"{n}") for n in range(10)], [b"%d" % n for n in range(10)]),
    "a long pong": ([frame(PONG, b"x" * 126)], [1002]),
}
RESERVED = {
    f"rsv {rsv} on {kind}": ([frame(opcode, b"", rsv=rsv)], [1002])
    for rsv in range(1, 8)
    for kind, opcode in (("text", TEXT), ("ping", PING), ("close", CLOSE))
} | {
    "after a good one": ([frame(TEXT, HELLO), frame(TEXT, HELLO, rsv=4)], [HELLO, 1002]),
    "before a ping": ([frame(TEXT, HELLO), frame(TEXT, HELLO, rsv=3), frame(PING)], [HELLO, 1002]),
}
OPCODES = {
    f"opcode {n}{more}": (
        [frame(TEXT, HELLO)] * bool(more) + [frame(n, b"x" * len(more)), frame(PING)],
        [HELLO] * bool(more) + [1002],
    )
    for n in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    for more in ("", " after text")
}
FRAGMENTS = {
    "text in two": (pieces("fragment1fragment2", 9), ["fragment1fragment2"]),
    "text in single bytes": (pieces(HELLO, *range(1, len(HELLO.encode()))), [HELLO]),
    "empty ones at both ends": (
        [frame(TEXT, fin=0), frame(MORE, "text", fin=0), frame(MORE)],
        ["text"],
    ),
    "all empty": ([frame(TEXT, fin=0), frame(MORE, fin=0), frame(MORE)], [""]),
    "a ping between": (
        [frame(TEXT, "one", fin=0), frame(PING, "p"), frame(MORE, "two")],
        [b"p", "onetwo"],
    ),
    "many pings between": (
        [frame(TEXT, "0", fin=0)]
        + [frame(PING, "p"), frame(MORE, "1", fin=0)] * 5
        + [frame(MORE, "2")],
        [b"p"] * 5 + ["0111112"],
    ),
    "a ping in two": ([frame(PING, "one", fin=0), frame(MORE, "two")], [1002]),
    "a pong in two": ([frame(PONG, "one", fin=0), frame(MORE, "two")], [1002]),
    "a close in two": ([frame(CLOSE, b"\x03", fin=0), frame(MORE, b"\xe8")], [1002]),
    "no beginning, the end": ([frame(MORE, "no"), frame(TEXT, HELLO)], [1002]),
    "no beginning, the middle": ([frame(MORE, "no", fin=0), frame(TEXT, HELLO)], [1002]),
    "no beginning, after text": ([frame(TEXT, "yes"), frame(MORE, "no")], ["yes", 1002]),
    "text within text": ([frame(TEXT, "one", fin=0), frame(TEXT, "two")], [1002]),
    "binary within text": ([frame(TEXT, "one", fin=0), frame(BINARY, "two")], [1002]),
    "after a ping too": ([frame(TEXT, "one", fin=0), frame(PING), frame(TEXT, "two")], [b"", 1002]),
    "too much in pieces": (pieces("*" * 4097, 4000), [1009]),
    "too much in bytes": (pieces("*" * 5000, *range(1, 5000)), [1009]),
    "another one after it": ([*pieces(HELLO, 4, 9), frame(TEXT, "b")], [HELLO, "b"]),
}

VALID = {
    "greek": MATH,
    "first of two bytes": "\x80",
    "last of one byte": "\x7f",
    "nul": "\0",
    "last of two bytes": "\u07ff",
    "first of three bytes": "\u0800",
    "before the surrogates": "\ud7ff",
    "after the surrogates": "\ue000",
    "replacement character": "\ufffd",
    "no character": "\ufffe\uffff",
    "first of four bytes": "\U00010000",
    "last of all": "\U0010ffff",
    "no characters of planes": "".join(chr(n << 16 | 0xFFFE) for n in range(1, 17)),
    "byte order mark": "\ufeffx",
    "combined": "👩‍👩‍👧‍👦 e\u0301",
}
INVALID = {
    "a lone continuation": b"\x80",
    "the last continuation": b"\xbf",
    "many continuations": bytes(range(0x80, 0xC0)),
    "a lead and a space": b"\xc0 \xc1 \xdf ",
    "two bytes, one missing": b"\xdf",
    "three bytes, one missing": b"\xe2\x82",
    "four bytes, one missing": b"\xf0\x9f\x99",
    "an overlong slash of two": b"\xc0\xaf",
    "an overlong slash of three": b"\xe0\x80\xaf",
    "an overlong slash of four": b"\xf0\x80\x80\xaf",
    "five bytes": b"\xf8\x88\x80\x80\x80",
    "six bytes": b"\xfc\x84\x80\x80\x80\x80",
    "overlong nul": b"\xc0\x80",
    "first surrogate": b"\xed\xa0\x80",
    "last surrogate": b"\xed\xbf\xbf",
    "a pair of surrogates": b"\xed\xa0\x80\xed\xb0\x80",
    "beyond the last": b"\xf4\x90\x80\x80",
    "fe": b"\xfe",
    "ff": b"\xff",
    "good, then bad": "κόσμε".encode() + b"\xed\xa0\x80edited",
}
TEXTS = (
    {f"good: {k}": ([frame(TEXT, v)], [v]) for k, v in VALID.items()}
    | {
        f"good in bytes: {k}": (pieces(v, *range(1, len(v.encode()))), [v])
        for k, v in VALID.items()
    }
    | {f"bad: {k}": ([frame(TEXT, v)], [1007]) for k, v in INVALID.items()}
    | {f"bad in bytes: {k}": (pieces(v, *range(1, len(v))), [1007]) for k, v in INVALID.items()}
    | {
        "bad, its end never comes": ([frame(TEXT, b"\xff\xff", fin=0)], [1007]),
        "bad, after a good one": ([frame(TEXT, MATH), frame(TEXT, b"\xce")], [MATH, 1007]),
        "bad across pieces": ([frame(TEXT, b"\xce", fin=0), frame(MORE, b"\xce")], [1007]),
        "good across a ping": (
            [frame(TEXT, b"\xce", fin=0), frame(PING), frame(MORE, b"\xba")],
            [b"", "κ"],
        ),
    }
)

GOOD_CODES = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4999)
BAD_CODES = (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
CLOSES = (
    {f"code {code}": ([close(code)], [code]) for code in GOOD_CODES}
    | {f"code {code} is none": ([close(code)], [1002]) for code in BAD_CODES}
    | {
        "without a code": ([close()], [None]),
        "half a code": ([frame(CLOSE, b"\x03")], [1002]),
        "with a reason": ([close(1000, b"Hello World!")], [1000]),
        "the longest reason": ([close(1000, b"*" * 123)], [1000]),
        "a reason too long": ([close(1000, b"*" * 124)], [1002]),
        "a reason that is no text": ([close(1000, b"\xce\xba\xed\xa0\x80")], [1007]),
        "after text": ([frame(TEXT, "x"), close(1000)], ["x", 1000]),
        "text after it": ([close(1000), frame(TEXT, "too late")], [1000]),
        "a ping after it": ([close(1000), frame(PING)], [1000]),
        "twice": ([close(1000), close(1000)], [1000]),
        "in the middle of a message": (
            [frame(TEXT, "fragment1", fin=0), close(1000), frame(MORE, "fragment2")],
            [1000],
        ),
        "behind 256 KiB of text": (
            [frame(TEXT, "B" * 4096)] * 64 + [close(1000)],
            ["B" * 4096] * 64 + [1000],
        ),
    }
)

GROUPS = {
    "framing": FRAMING,
    "pings": PINGS,
    "reserved bits": RESERVED,
    "opcodes": OPCODES,
    "fragmentation": FRAGMENTS,
    "utf-8": TEXTS,
    "close": CLOSES,
}
WAYS = {
    "at once": lambda data: [data],
    "cut anywhere": lambda data: cut(data, random.Random(len(data))),
    "byte by byte": lambda data: [data[n : n + 1] for n in range(len(data))],
}


def cut(data, dice):
    """At up to twenty places."""
    at = sorted(dice.randrange(len(data) + 1) for _ in range(min(20, len(data))))
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


async def hear(member, count):
    """So many frames, or all to the close frame: text, pong's bytes, or close code."""
    heard = []
    while len(heard) < count:
        opcode, payload = await read_frame(member)
        if opcode == CLOSE:
            return [*heard, int.from_bytes(payload[:2]) if payload else None]
        heard.append(payload.decode() if opcode == TEXT else payload)
    return heard


async def play(echo, frames, way):
    """Send the frames; what is heard, to the last of them, and how it then ends."""
    async with raw_member(echo.ws) as member:
        ends = b"".join([*frames, frame(TEXT, "the end")])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, member, WAYS[way](ends))
            heard = await hear_to_the_end(member)
            nursery.cancel_scope.cancel()
        return heard


async def send(member, parts):
    try:
        for part in parts:
            await member.send(part)
    except trio.BrokenResourceError:
        pass  # refused while we were still talking


async def hear_to_the_end(member):
    heard = []
    while True:
        (one,) = await hear(member, 1)
        if one == "the end":
            return heard
        heard.append(one)
        if one is None or isinstance(one, int):
            await nothing_more(member)
            return heard


async def nothing_more(member):
    """The server ends the connection, and says nothing behind its close frame."""
    with pytest.raises(Cut):
        assert await member.exactly(1) == b""


@pytest.mark.parametrize("way", ["at once", "cut anywhere"])
@pytest.mark.parametrize("group", GROUPS)
async def test_each_case_is_answered_as_the_standard_says(echo, group, way):
    async with unharmed(echo):
        for name, (frames, expected) in GROUPS[group].items():
            heard = await play(echo, frames, way)
            assert heard == expected, f"{group}: {name}: {heard}"[:400]


@pytest.mark.parametrize("group", ["pings", "fragmentation", "close"])
async def test_byte_by_byte_is_no_different(echo, group):
    for name, (frames, expected) in GROUPS[group].items():
        if len(b"".join(frames)) < 2000:
            heard = await play(echo, frames, "byte by byte")
            assert heard == expected, f"{group}: {name}: {heard}"[:400]


async def test_a_length_may_be_written_longer_than_it_must(echo):
    """RFC 6455 5.2 forbids it to senders; whoever accepts it must read it right."""
    for size in (3, 9):
        heard = await play(echo, [frame(TEXT, "short", size=size)], "at once")
        assert heard in (["short"], [1002])
