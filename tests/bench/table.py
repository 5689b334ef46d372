"""The README's table, made of what the benchmark wrote: table.py [RESULTS.json]"""

import json
import sys
from pathlib import Path

MEASURED = Path(__file__).parent / "measured" / "results.json"
FIGURES = {
    "per_s": lambda value: digits(value, 3),
    "cpu_us": lambda value: f"{digits(value, 3)} µs",
    "p50_ms": lambda value: f"{digits(value, 2)} ms",
    "p99_ms": lambda value: f"{digits(value, 2)} ms",
    "kb": lambda value: f"{value:.1f} KB",
    "start_s": lambda value: f"{value:.2f} s",
}
# work, what it is called, figures, beside whom
ROWS = [
    (
        "room",
        "room, 200 members, 256 messages under way: deliveries a second, median delay",
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
        "fan50",
        "one answer, 300 readers, 50 events/s: CPU a delivery, median delay",
        ("cpu_us", "p50_ms"),
        ("Node single loop", "Starlette", "C send() loop"),
    ),
    (
        "fan400",
        "the same, 400 events/s: deliveries a second, the slowest hundredth",
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
        "idle-reader",
        "idle SSE reader",
        ("kb",),
        ("aiohttp-sse", "Node single loop", "Starlette"),
    ),
    ("idle-member", "idle room member", ("kb",), ("ws", "websockets", "picows")),
    (
        "accept",
        "SSE connections accepted a second",
        ("per_s",),
        ("Starlette", "aiohttp-sse", "Node single loop"),
    ),
    ("start", "start, until it listens", ("start_s",), ()),
]


def lines(report):
    """Table rows, then the sentence on where they come from."""
    works = report["works"]
    for key, title, figures, others in ROWS:
        beside = "; ".join(f"{o} {cell(works[key][o], figures)}" for o in others)
        yield f"| {title} | {cell(works[key]['chatstream'], figures)} | {beside} |"


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


if __name__ == "__main__":
    read = Path(sys.argv[1]) if sys.argv[1:] else MEASURED
    measured = json.loads(read.read_text())
    print(*lines(measured), "", where(measured), sep="\n")
