"""Measure chatstream beside what one would pick instead: python tests/bench/run.py

The server has one core, the load and the upstream have the other. Rounds are
interleaved over the peers, so that a disturbance hits all of them, and every figure is
the median of its rounds. The load is C, one epoll loop (load.c); its share of its core
stands in each row: far below 100 % means that it is not the bottleneck. `waited` is the
share of time in which the server was ready while other work had its core: a row with
much of it is doubtful. CHATSTREAM=FILE measures another version of the module.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import peers
from plot import draw

SERVER_CORE, LOAD_CORE = 0, min(1, os.cpu_count() - 1)
SEED = "/chatgptApi/chatgpt_qa_stream"
OPENAI = "/v1/chat/completions"
QUESTION = {"stream": True, "messages": [{"role": "user", "content": "Go on."}]}


@dataclass(frozen=True)
class Work:
    title: str
    kind: str  # sse, room, relay, idle-sse, idle-room, accept, start
    n: int = 0  # connections
    rate: float = 0  # events a second; of a room: messages under way

    @property
    def peers(self):
        if self.kind.endswith("room"):
            return peers.ROOMS
        if self.kind == "relay":
            return peers.RELAYS
        return peers.STREAMS if self.kind != "start" else peers.STREAMS | peers.ROOMS


WORKS = {
    "room": Work("room: 200 members, 256 messages under way", "room", 200, 256),
    "alone": Work("room: 200 members, one message at a time", "room", 200, 1),
    "fan50": Work("one answer, 300 readers, 50 events/s", "sse", 300, 50),
    "fan400": Work("one answer, 300 readers, 400 events/s", "sse", 300, 400),
    "fan2000": Work("one answer, 2,000 readers, 2 events/s", "sse", 2000, 2),
    "relay": Work("relay: 100 answers, 50 tokens/s each", "relay", 100, 50),
    "idle-reader": Work("idle SSE readers", "idle-sse", 1000),
    "idle-member": Work("idle room members", "idle-room", 1000),
    "accept": Work("SSE connections accepted, 32 at a time", "accept", 32),
    "start": Work("start, until it accepts", "start"),
    "ceiling": Work("the load's own ceiling: all that comes", "sse", 300, 2000),
}
GROWTH = {
    "readers": [Work(f"{n} readers", "sse", n, 5) for n in (10, 100, 1000, 10_000)],
    "events": [Work(f"{r} events/s", "sse", 100, r) for r in (1, 10, 100, 1000)],
}
GROWTH_PEERS = ("chatstream", "Node single loop", "C send() loop")

# work, figure, peer, at most (at least, where negative) this many times the peer's;
# a peer of None: an absolute figure.
GOALS = [
    ("room", "per_s", "picows", -10),
    ("room", "per_s", "ws", -20),
    ("room", "per_s", "websockets", -20),
    ("room", "p50_ms", "picows", 0.1),
    ("room", "p50_ms", "ws", 0.1),
    ("room", "p50_ms", "websockets", 0.1),
    ("alone", "p50_ms", "ws", 1),
    ("alone", "p50_ms", "websockets", 1),
    ("fan50", "cpu_us", "Node single loop", 1),
    ("fan50", "cpu_us", "Starlette", 0.5),
    ("fan50", "cpu_us", "C send() loop", 2),
    ("fan50", "p50_ms", "Node single loop", 1),
    ("fan50", "p50_ms", "Starlette", 1),
    ("fan400", "per_s", None, -118_800),
    ("fan400", "p99_ms", None, 50),
    ("fan2000", "p50_ms", "Node single loop", 1),
    ("fan2000", "cpu_us", "Node single loop", 1),
    ("relay", "cpu_us", "FastAPI + httpx2", 0.5),
    ("relay", "cpu_us", "Node pipe", 1.5),
    ("relay", "p50_ms", None, 5),
    ("idle-reader", "kb", None, 15),
    ("idle-member", "kb", None, 15),
    *(("idle-reader", "kb", name, 1) for name in list(peers.STREAMS)[2:]),
    *(("idle-member", "kb", name, 1) for name in list(peers.ROOMS)[1:]),
    ("accept", "per_s", "Starlette", -1),
    ("start", "start_s", None, 0.7),
]
FIGURES = {
    "per_s": "{:,.0f}/s",
    "p50_ms": "p50 {:.2f} ms",
    "p99_ms": "p99 {:.2f} ms",
    "cpu_us": "{:.2f} us CPU each",
    "kb": "{:.1f} KB each",
    "start_s": "{:.2f} s",
    "load_cpu": "load {:.0%}",
    "waited": "waited {:.0%}",
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pin(core):
    def before_exec():
        os.sched_setaffinity(0, {core})
        with contextlib.suppress(OSError):  # above the machine's other work, if it may
            os.setpriority(os.PRIO_PROCESS, 0, -15)
            os.setsid()  # Linux weighs whole sessions first (sched_autogroup)
            Path("/proc/self/autogroup").write_text("-15")

    return before_exec


@contextlib.contextmanager
def process(command, core, port=None, **options):
    child = subprocess.Popen(command, preexec_fn=pin(core), text=True, **options)
    try:
        if port:
            wait_until_it_accepts(child, port)
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_until_it_accepts(child, port):
    deadline = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port)).close()
        time.sleep(0.002)
    raise RuntimeError(f"{child.args} does not accept on port {port}")


@contextlib.contextmanager
def server(work, peer):
    """The peer's server, and for a relay the upstream: its pid and the port to load."""
    port, other, upstream = free_port(), free_port(), free_port()
    ours, argument = peer.file == "chatstream", work.rate
    with contextlib.ExitStack() as stack:
        if work.kind == "relay" or (ours and work.kind == "sse"):
            simulator = [str(peers.BUILD / "upstream"), str(upstream), str(work.rate)]
            stack.enter_context(process(simulator, LOAD_CORE, upstream))
            argument = upstream
        command = peers.command(peer, port, argument, other)
        if ours and argument == upstream:
            command += [
                "--upstream",
                f"http://127.0.0.1:{upstream}/v1",
                "--model",
                "bench",
            ]
        environment = os.environ | {"NODE_PATH": str(peers.BUILD / "node_modules")}
        quiet = {"stdout": subprocess.DEVNULL}
        if not ours:  # some log each client that leaves
            quiet["stderr"] = subprocess.DEVNULL
        child = process(command, SERVER_CORE, port, env=environment, **quiet)
        pid = stack.enter_context(child).pid
        yield pid, (other if ours and work.kind.endswith("room") else port)


def load_arguments(work, peer, port, warm, seconds):
    ours, common = peer.file == "chatstream", [str(warm), str(seconds)]
    mode = {"room": "ws", "idle-room": "ws", "accept": "accept"}.get(work.kind, "sse")
    path, extra = "/", []
    if work.kind == "room":
        extra = [str(work.rate)]
    elif work.kind == "relay":
        path, extra = OPENAI, [json.dumps(QUESTION)]
    elif ours and work.kind == "sse":
        path, extra = SEED, [json.dumps(QUESTION), "follow"]
    elif ours and work.kind in ("accept", "idle-sse"):
        path = "/clock"
    load = str(peers.BUILD / "load")
    return [load, mode, str(port), path, str(work.n), *common, *extra]


def run_and_wait_ns(pid):
    """CPU time of all threads, and the time they were ready but had to wait for it."""
    ran = waited = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "schedstat").read_text().split()
        ran, waited = ran + int(fields[0]), waited + int(fields[1])
    return ran, waited


def memory_kb(pid):
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1])


def measure_load(work, peer, warm, seconds):
    with server(work, peer) as (pid, port):
        command = load_arguments(work, peer, port, warm, seconds)
        with process(command, LOAD_CORE, stdout=subprocess.PIPE) as load:
            before = after = None
            for line in load.stdout:
                if line == "begin\n":
                    before = run_and_wait_ns(pid)
                elif line == "end\n":
                    after = run_and_wait_ns(pid)
                else:
                    return figures(json.loads(line), before, after)
    raise RuntimeError(f"the load ended early: {command}")


def figures(seen, before, after):
    ran, waited = (b - a for a, b in zip(before, after, strict=True))
    latency = {key: seen[key] for key in ("p50_ms", "p99_ms") if seen[key]}
    return {
        "per_s": seen["delivered"] / seen["seconds"],
        **latency,
        "cpu_us": ran / 1000 / max(1, seen["delivered"]),
        "load_cpu": seen["load_cpu"],
        "waited": waited / 1e9 / seen["seconds"],
    }


def measure_idle(work, peer, warm, seconds):
    """What each of N connections adds, after the first hundred have paid the set-up."""
    with server(work, peer) as (pid, port), contextlib.ExitStack() as stack:
        sizes = []
        for n in (100, work.n):
            hold = load_arguments(Work("", work.kind, n), peer, port, 0, 0)
            load = stack.enter_context(process(hold, LOAD_CORE, stdout=subprocess.PIPE))
            load.stdout.readline()
            time.sleep(0.5)
            sizes.append(memory_kb(pid))
        return {"kb": (sizes[1] - sizes[0]) / work.n}


def measure_start(work, peer, warm, seconds):
    start = time.monotonic()
    with server(work, peer):
        return {"start_s": time.monotonic() - start}


def measure(work, peer, warm, seconds):
    by_kind = {"idle-sse": measure_idle, "idle-room": measure_idle}
    run = by_kind.get(
        work.kind, measure_start if work.kind == "start" else measure_load
    )
    try:
        return run(work, peer, warm, seconds)
    except RuntimeError as error:
        print(f"  {error}")
        return None


def run_work(work, names, options):
    """The medians of each peer: {name: {figure: value}}."""
    seen = {name: [] for name in names if not peers.missing(work.peers[name])}
    for _ in range(options.rounds):
        for name, samples in seen.items():
            sample = measure(work, work.peers[name], options.warm, options.seconds)
            samples += [sample] if sample else []
    return {name: medians(samples) for name, samples in seen.items() if samples}


def medians(samples):
    return {figure: median(s[figure] for s in samples) for figure in samples[0]}


def print_work(key, rows):
    print(f"\n{WORKS[key].title}")
    for name, row in rows.items():
        shown = (FIGURES[figure].format(value) for figure, value in row.items())
        print(f"  {name:18} " + "  ".join(f"{text:>18}" for text in shown), flush=True)


def print_goals(results):
    print("\nGoals")
    for key, figure, peer, factor in GOALS:
        rows = results.get(key, {})
        if "chatstream" not in rows or (peer and peer not in rows):
            continue
        ours = rows["chatstream"][figure]
        ratio = ours / rows[peer][figure] if peer else ours
        reached = ratio >= -factor if factor < 0 else ratio <= factor
        limit = f"{'at least' if factor < 0 else 'at most'} {abs(factor):,}"
        against = f"x {peer}" if peer else "(absolute)"
        verdict = "ok  " if reached else "MISS"
        print(f"  {verdict} {key:12} {figure:8} {ratio:10,.2f}  {limit} {against}")


def machine():
    """What the figures were measured on, and with."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    everyone = peers.STREAMS | peers.ROOMS | peers.RELAYS
    names = sorted({name for peer in everyone.values() for name in peer.needs})
    versions = {name: peers.version_of(name) for name in ["trio", "hypercorn", *names]}
    if shutil.which("node"):
        node = subprocess.run(["node", "--version"], capture_output=True, text=True)
        versions["node"] = node.stdout.strip()
    return {
        "date": date.today().isoformat(),
        "cpu": f"{os.cpu_count()} x {model[1] if model else platform.machine()}",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        **{name: value for name, value in versions.items() if value},
    }


def print_skipped():
    for name, peer in (peers.STREAMS | peers.ROOMS | peers.RELAYS).items():
        if lacking := peers.missing(peer):
            print(f"skipped: {name} (not installed: {', '.join(lacking)})")


def measure_growth(options):
    names = [name for name in GROWTH_PEERS if not peers.missing(peers.STREAMS[name])]
    names = ["chatstream"] if options.quick else names
    growth = {}
    for axis, works in GROWTH.items():
        growth[axis] = {name: [] for name in names}
        for work in works:
            for name, row in run_work(work, names, options).items():
                x = work.n if axis == "readers" else work.rate
                growth[axis][name].append((x, row["cpu_us"], row["p50_ms"]))
    return growth


def print_growth(growth):
    for axis, lines in growth.items():
        print(f"\nGrowth over {axis}: CPU us per delivery (p50 ms)")
        for name, points in lines.items():
            shown = (f"{x:,}: {cpu:.1f} ({p50:.1f})" for x, cpu, p50 in points)
            print(f"  {name:18} " + "   ".join(shown))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, in 3 minutes")
    parser.add_argument("--only", default="", help=f"of: {','.join(WORKS)},growth")
    parser.add_argument("--peers", default="", help="of the names in the table")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0, help="of one measurement")
    parser.add_argument("--out", type=Path, default=peers.HERE / "results")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.seconds = options.seconds or (1 if options.quick else 3)
    options.warm = 0.5 if options.quick else 1.5
    return options


def main():
    options = parse_arguments()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.sched_setaffinity(0, {LOAD_CORE})
    peers.prepare()
    report = {"machine": {**machine(), "rounds": options.rounds}, "works": {}}
    print("  ".join(f"{name} {value}" for name, value in report["machine"].items()))
    print_skipped()
    wanted = [w for w in options.only.split(",") if w] or [*WORKS, "growth"]
    for key in (key for key in wanted if key in WORKS):
        only = [name for name in options.peers.split(",") if name]
        only = only or (GROWTH_PEERS if key == "ceiling" else [])
        names = [n for n in WORKS[key].peers if not only or n in only]
        report["works"][key] = run_work(WORKS[key], names, options)
        print_work(key, report["works"][key])
    if "growth" in wanted:
        report["growth"] = measure_growth(options)
        print_growth(report["growth"])
    print_goals(report["works"])
    options.out.mkdir(exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    if "growth" in wanted:
        (options.out / "growth.svg").write_text(draw(report["growth"]))


if __name__ == "__main__":
    main()
