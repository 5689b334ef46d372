"""The README's table, made of what the benchmark wrote: table.py [RESULTS.json]

With --write it goes into the README, in the place of the one that is there.
"""

import argparse
import json
import re
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
MEASURED = HERE / "measured" / "results.json"
README = HERE.parent.parent / "README.md"
FIGURES = {
    "per_s": lambda value: digits(value, 3),
    "cpu_us": lambda value: f"{digits(value, 3)} µs",
    "p50_ms": lambda value: f"{digits(value, 2)} ms",
    "p99_ms": lambda value: f"{digits(value, 2)} ms",
    "kb": lambda value: f"{value:.1f} KB",
    "messages_s": lambda value: digits(value, 3),
    "until_s": lambda value: f"{value:.2f} s",
    "core": lambda value: f"{value:.1%}",
    "bytes": lambda value: f"{value:.0f} bytes",
    "start_s": lambda value: f"{value:.2f} s",
}
# work, what it is called, figures, beside whom
ROWS = [
    (
        "room",
        "room, 200 members, 256 messages under way, many in each write:"
        " deliveries a second, median delay",
        ("per_s", "p50_ms"),
        ("picows", "ws", "websockets"),
    ),
    (
        "alone",
        "room, one message at a time: CPU a delivery, median delay",
        ("cpu_us", "p50_ms"),
        ("picows", "ws", "websockets"),
    ),
    (
        "redis",
        "room shared over Redis, 200 members, 256 under way: messages a second",
        ("messages_s",),
        (),
    ),
    (
        "fan50",
        "one answer, 300 readers, 50 events/s: CPU a delivery, median delay",
        ("cpu_us", "p50_ms"),
        ("Node single loop", "Starlette", "C send() loop"),
    ),
    ("fan-tls", "the same over TLS", ("cpu_us", "p50_ms"), ("Node single loop", "Starlette")),
    (
        "fan-h2",
        "the same over HTTP/2, 100 readers in each connection",
        ("cpu_us", "p50_ms"),
        ("Node http2",),
    ),
    (
        "fan400",
        "300 readers, 400 events/s: deliveries a second, the slowest hundredth",
        ("per_s", "p99_ms"),
        ("Node single loop", "Starlette", "aiohttp-sse"),
    ),
    (
        "fan2000",
        "2,000 readers, 2 events/s: CPU a delivery, median delay",
        ("cpu_us", "p50_ms"),
        ("Node single loop", "Starlette"),
    ),
    (
        "relay",
        "relay, 100 answers, 50 tokens/s: CPU a token, median added delay",
        ("cpu_us", "p50_ms"),
        ("Node pipe", "FastAPI + httpx2"),
    ),
    (
        "relay-tls",
        "the same from an upstream over TLS",
        ("cpu_us", "p50_ms"),
        ("Node pipe", "FastAPI + httpx2"),
    ),
    (
        "relay10",
        "10 answers, 50 tokens/s: median added delay",
        ("p50_ms",),
        ("Node pipe", "FastAPI + httpx2"),
    ),
    (
        "relay1",
        "1 answer, 50 tokens/s: median added delay",
        ("p50_ms",),
        ("Node pipe", "FastAPI + httpx2"),
    ),
    ("event", "a token of 150 bytes, kept in its log", ("bytes",), ()),
    ("idle-reader", "idle SSE reader", ("kb",), ("aiohttp-sse", "Node single loop", "Starlette")),
    ("idle-reader-tls", "the same over TLS", ("kb",), ("Node single loop", "Starlette")),
    ("idle-member", "idle room member", ("kb",), ("ws", "websockets", "picows")),
    ("idle-member-tls", "idle room member over TLS", ("kb",), ("ws", "websockets")),
    (
        "idle-cpu",
        "10,000 idle readers, a keep-alive every 4 s: share of a core",
        ("core",),
        ("Node single loop", "C send() loop"),
    ),
    (
        "accept",
        "SSE connections accepted a second",
        ("per_s",),
        ("Starlette", "aiohttp-sse", "Node single loop"),
    ),
    (
        "restart",
        "5,000 readers come back at once: until each has its next event",
        ("until_s",),
        ("Starlette", "Node single loop"),
    ),
    ("start", "start, until it listens", ("start_s",), ()),
]


def lines(report):
    """The table's rows, of all that was measured."""
    for key, title, figures, others in ROWS:
        if rows := report["works"].get(key):
            beside = (f"{o} {cell(rows[o], figures)}" for o in others if o in rows)
            ours = cell(rows["chatstream"], figures)
            yield f"| {title} | {ours} | {'; '.join(beside)} |"


def digits(value, count):
    """So many digits that count, and no more than are known."""
    rounded = float(f"{value:.{count}g}")
    return f"{rounded:,.0f}" if rounded >= 10 ** (count - 1) else f"{rounded:g}"


def cell(row, figures):
    return ", ".join(FIGURES[figure](row[figure]) for figure in figures)


def where(report):
    """The machine, the versions and the date, in words."""
    on = report["machine"]
    count, _, model = on["cpu"].partition(" x ")
    return (
        f"medians of {on['rounds']} rounds on {count} cores ({model}), {on['system']},"
        f" Python {on['python']}, Node {on['node'].lstrip('v')}, Trio {on['trio']},"
        f" {on['date']}"
    )


def write(report, readme):
    """The README's text with this table, and with the machine that it is from."""
    head = "| work | chatstream | beside it |\n|---|---|---|\n"
    before, _, after = readme.partition(head)
    after = re.sub(r"\A(\|.*\n)*", lambda _: "\n".join([*lines(report), ""]), after)
    *others, paragraph = before.rstrip("\n").split("\n\n")
    place = re.compile(r"medians of .*? \d{4}-\d\d-\d\d", re.S)
    paragraph = place.sub(lambda _: where(report), " ".join(paragraph.split()))
    filled = textwrap.fill(paragraph, 120, break_on_hyphens=False)
    return "\n\n".join([*others, filled, head]) + after


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=MEASURED)
    parser.add_argument("--write", action="store_true", help="into the README")
    options = parser.parse_args()
    report = json.loads(options.results.read_text())
    if options.write:
        README.write_text(write(report, README.read_text()))
    else:
        print(*lines(report), "", where(report), sep="\n")


if __name__ == "__main__":
    main()
