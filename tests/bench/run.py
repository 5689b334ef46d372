"""Measure chatstream beside what one would pick instead: python tests/bench/run.py

The server has one core, the load and the upstream have the other. Rounds are
interleaved over the peers, so that a disturbance hits all of them, and every figure is
the median of its rounds. The load is C, one epoll loop (load.c); its share of its core
stands in each row: far below 100 % means that it is not the bottleneck. `waited` is the
share of time in which the server was ready while other work had its core: a row with
much of it is doubtful.

Each row is written to OUT/results.json when it is done. `--only ROW,...` measures these
rows and keeps the others; `--resume` measures what is not there yet; `--goals` measures
nothing. CHATSTREAM=FILE measures another version of the module, CHATSTREAM=NEW,OLD two
of them in the same rounds.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from math import inf
from pathlib import Path
from statistics import median

import peers
import table
from plot import draw
from works import GOALS, GROWTH, ROWS, WORKS

SERVER_CORE, LOAD_CORE = 0, min(1, os.cpu_count() - 1)
SEED = "/chatgptApi/chatgpt_qa_stream"
OPENAI = "/v1/chat/completions"
QUESTION = {"stream": True, "messages": [{"role": "user", "content": "Go on."}]}


FIGURES = {
    "messages_s": "{:,.0f} messages/s",
    "per_s": "{:,.0f}/s",
    "until_s": "{:.2f} s until all have",
    "p50_ms": "p50 {:.2f} ms",
    "p99_ms": "p99 {:.2f} ms",
    "cpu_us": "{:.2f} us CPU each",
    "core": "{:.1%} of a core",
    "bytes": "{:.0f} bytes each",
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
    with contextlib.ExitStack() as stack:
        command = peers.command(peer, port, work.rate, other)
        if work.kind == "relay" or (peer.ours and work.kind in UPSTREAM_RATE):
            url = stack.enter_context(simulator(work, upstream))
            command = peers.command(peer, port, url, other)
            if peer.ours:
                command += ["--upstream", url, "--model", "bench"]
        if work.redis:
            command += ["--redis", stack.enter_context(redis(free_port()))]
        trusted = {"SSL_CERT_FILE": peers.CERTIFICATE}
        trusted["NODE_EXTRA_CA_CERTS"] = peers.CERTIFICATE
        paths = {"NODE_PATH": str(peers.BUILD / "node_modules")}
        environment = os.environ | paths | (trusted if work.tls else {})
        quiet = {"stdout": subprocess.DEVNULL}
        if not peer.ours:  # some log each client that leaves
            quiet["stderr"] = subprocess.DEVNULL
        child = process(command, SERVER_CORE, port, env=environment, **quiet)
        pid = stack.enter_context(child).pid
        yield pid, (other if peer.ours and work.kind.endswith("room") else port)


# Where the events come from an upstream: how many a second.
UPSTREAM_RATE = {
    "relay": lambda work: work.rate,
    "sse": lambda work: work.rate,
    "event": lambda work: work.rate,
    "keep-alive": lambda work: 0,  # one token, and then silence
}


@contextlib.contextmanager
def simulator(work, port):
    """The upstream (upstream.c): its URL."""
    over_tls = work.tls and work.kind == "relay"
    rate = UPSTREAM_RATE[work.kind](work)
    command = [str(peers.BUILD / "upstream"), str(port), str(rate)]
    command += [peers.CERTIFICATE, peers.KEY] if over_tls else []
    with process(command, LOAD_CORE, port):
        yield f"http{'s' if over_tls else ''}://127.0.0.1:{port}/v1"


@contextlib.contextmanager
def redis(port):
    """An empty Redis that keeps nothing: its URL."""
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--save", "", "--appendonly", "no", "--loglevel", "warning"]
    with process(command, LOAD_CORE, port, stdout=subprocess.DEVNULL):
        yield f"redis://127.0.0.1:{port}"


def load_arguments(work, peer, port, warm, seconds):
    common = [str(warm), str(seconds)]
    modes = {"room": "ws", "idle-room": "ws", "accept": "accept", "restart": "restart"}
    path, extra = "/", []
    if work.kind == "room":
        extra = [str(work.rate)]
    elif work.kind in ("relay", "event"):
        path, extra = OPENAI, [json.dumps(QUESTION)]
    elif peer.ours and work.kind in ("sse", "keep-alive"):
        path, extra = SEED, [json.dumps(QUESTION), "follow"]
    elif peer.ours and work.kind in ("accept", "idle-sse", "restart"):
        path = "/clock"
    flags = ["-s"] if peer.tls else []
    flags = ["-2", str(work.http2)] if work.http2 else flags
    place = [modes.get(work.kind, "sse"), str(port), path, str(work.n)]
    return [str(peers.BUILD / "load"), *flags, *place, *common, *extra]


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


def observe(work, peer, warm, seconds, probe=run_and_wait_ns):
    """What the load saw, and what `probe` found at both ends of its window."""
    with server(work, peer) as (pid, port):
        command = load_arguments(work, peer, port, warm, seconds)
        with process(command, LOAD_CORE, stdout=subprocess.PIPE) as load:
            before = after = None
            for line in load.stdout:
                if line == "begin\n":
                    before = probe(pid)
                elif line == "end\n":
                    after = probe(pid)
                else:
                    return json.loads(line), before, after
    raise RuntimeError(f"the load ended early: {command}")


def measure_load(work, peer, warm, seconds):
    seen, before, after = observe(work, peer, warm, seconds)
    ran, waited = (b - a for a, b in zip(before, after, strict=True))
    rate = seen["delivered"] / seen["seconds"]
    messages = {"messages_s": rate / work.n} if work.kind == "room" else {}
    delays = {key: seen[key] for key in ("p50_ms", "p99_ms") if seen[key]}
    return {
        **messages,
        "per_s": rate,
        **delays,
        "cpu_us": ran / 1000 / max(1, seen["delivered"]),
        "load_cpu": seen["load_cpu"],
        "waited": waited / 1e9 / seen["seconds"],
    }


def measure_restart(work, peer, warm, seconds):
    """How long it takes until all have their event; the servers have had one before."""
    row = measure_load(work, peer, 1.5 / work.rate, seconds)
    return {"until_s": work.n / row.pop("per_s"), **row}


def measure_keep_alive(work, peer, warm, seconds):
    """Over two whole periods: a part of one would count too many or too few."""
    seen, before, after = observe(work, peer, warm, 8)
    return {
        "core": (after[0] - before[0]) / 1e9 / seen["seconds"],
        "waited": (after[1] - before[1]) / 1e9 / seen["seconds"],
    }


def measure_event(work, peer, warm, seconds):
    seen, before, after = observe(work, peer, warm, seconds, probe=memory_kb)
    return {
        "bytes": (after - before) * 1024 / max(1, seen["delivered"]),
        "per_s": seen["delivered"] / seen["seconds"],
    }


def measure_idle(work, peer, warm, seconds):
    """What each of N connections adds, after the first hundred have paid the set-up."""
    with server(work, peer) as (pid, port), contextlib.ExitStack() as stack:
        sizes = []
        for n in (100, work.n):
            hold = load_arguments(replace(work, n=n), peer, port, 0, 0)
            load = stack.enter_context(process(hold, LOAD_CORE, stdout=subprocess.PIPE))
            load.stdout.readline()
            time.sleep(0.5)
            sizes.append(memory_kb(pid))
        return {"kb": (sizes[1] - sizes[0]) / work.n}


def measure_start(work, peer, warm, seconds):
    start = time.monotonic()
    with server(work, peer):
        return {"start_s": time.monotonic() - start}


MEASURES = {
    "sse": measure_load,
    "room": measure_load,
    "relay": measure_load,
    "accept": measure_load,
    "restart": measure_restart,
    "keep-alive": measure_keep_alive,
    "event": measure_event,
    "idle-sse": measure_idle,
    "idle-room": measure_idle,
    "start": measure_start,
}


def measure(work, peer, warm, seconds):
    try:
        return MEASURES[work.kind](work, peer, warm, seconds)
    except RuntimeError as error:
        print(f"  {error}")
        return None


def run_work(work, names, rounds, options):
    """The medians of each peer: {name: {figure: value}}."""
    if work.missing():
        return {}
    names = [name for name in names if not peers.missing(work.peers[name])]
    seen = {name: [] for name in names}
    for _ in range(rounds):
        for name in list(names):
            sample = measure(work, work.peers[name], options.warm, options.seconds)
            if sample:
                seen[name].append(sample)
            else:  # it would fail again, and may take a minute for it
                names.remove(name)
    return {name: medians(samples) for name, samples in seen.items() if samples}


def medians(samples):
    return {figure: median(s[figure] for s in samples) for figure in samples[0]}


def print_work(key, rows):
    print(f"\n{key}: {WORKS[key].title}")
    if lacking := WORKS[key].missing():
        print(f"  skipped (not installed: {', '.join(lacking)})")
    for name, row in rows.items():
        shown = (FIGURES[figure].format(value) for figure, value in row.items())
        print(f"  {name:18} " + "  ".join(f"{text:>18}" for text in shown), flush=True)


def print_goals(results, keys):
    print("\nGoals")
    for key, figure, peer, factor in GOALS:
        name, _, elsewhere = (peer or "chatstream").partition(" @ ")
        rows, others = results.get(key, {}), results.get(elsewhere or key, {})
        if key not in keys or "chatstream" not in rows or name not in others:
            continue
        ours = rows["chatstream"][figure]
        ratio = ours / others[name][figure] if peer else ours
        reached = ratio >= -factor if factor < 0 else ratio <= factor
        limit = f"{'at least' if factor < 0 else 'at most'} {abs(factor):,}"
        against = f"x {peer}" if peer else "(absolute)"
        verdict = "ok  " if reached else "MISS"
        print(f"  {verdict} {key:15} {figure:10} {ratio:10,.2f}  {limit} {against}")


GROWS = ("per_s", "messages_s")  # the more, the better
MUCH_WORSE = 1.2


def print_before(results, keys):
    """The new module beside the old one, in the figures that the README shows."""
    print("\nBeside the module before: times worse (below 1: better)")
    for key, _, figures, _ in table.ROWS:
        rows = results.get(key, {})
        if key not in keys or not {"chatstream", "chatstream before"} <= rows.keys():
            continue
        new, old = rows["chatstream"], rows["chatstream before"]
        times = [
            old[figure] / new[figure] if figure in GROWS else new[figure] / old[figure]
            for figure in figures
        ]
        verdict = "MISS" if max(times) > MUCH_WORSE else "ok  "
        shown = (f"{f} {ratio:.2f}" for f, ratio in zip(figures, times, strict=True))
        print(f"  {verdict} {key:15} " + "  ".join(shown))


def machine():
    """What the figures were measured on, and with."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    names = sorted({name for peer in peers.ALL.values() for name in peer.needs})
    versions = {name: peers.version_of(name) for name in ["trio", "hypercorn", *names]}
    for program, flag in (("node", "--version"), ("openssl", "version")):
        if shutil.which(program):
            asked = subprocess.run([program, flag], capture_output=True, text=True)
            versions[program] = asked.stdout.partition(" (")[0].strip()
    return {
        "date": date.today().isoformat(),
        "cpu": f"{os.cpu_count()} x {model[1] if model else platform.machine()}",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        **{name: value for name, value in versions.items() if value},
    }


def print_skipped():
    for name, peer in peers.ALL.items():
        if lacking := peers.missing(peer):
            print(f"skipped: {name} (not installed: {', '.join(lacking)})")


def measure_growth(axis, rounds, options):
    points = {}
    for work in GROWTH[axis]:
        names = ["chatstream"] if options.quick else list(work.peers)
        for name, row in run_work(work, names, rounds, options).items():
            x = work.n if axis == "readers" else work.rate
            points.setdefault(name, []).append((x, row["cpu_us"], row["p50_ms"]))
    return points


def print_growth(axis, lines):
    print(f"\nGrowth over {axis}: CPU us per delivery (p50 ms)")
    for name, points in lines.items():
        shown = (f"{x:,}: {cpu:.1f} ({p50:.1f})" for x, cpu, p50 in points)
        print(f"  {name:20} " + "   ".join(shown), flush=True)


class Report:
    """What was measured, in a file: it is written after each row."""

    def __init__(self, folder, keep):
        self.path = folder / "results.json"
        self.report = {"machine": machine(), "rounds": {}, "works": {}, "growth": {}}
        if keep and self.path.exists():
            self.report |= json.loads(self.path.read_text())

    @property
    def works(self):
        return self.report["works"]

    def has(self, key, rounds):
        return self.report["rounds"].get(key, 0) >= rounds

    def store(self, key, rows, rounds):
        axis = key.removeprefix("growth-")
        if axis in GROWTH:
            self.report["growth"][axis] = rows
        else:
            self.works[key] = rows
        self.report["rounds"][key] = rounds
        self.report["machine"] = machine() | {"rounds": self._span()}
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.report, indent=1) + "\n")
        if self.report["growth"].keys() == GROWTH.keys():
            drawn = draw({axis: self.report["growth"][axis] for axis in GROWTH})
            self.path.with_name("growth.svg").write_text(drawn)

    def _span(self):
        least, most = (f(self.report["rounds"].values()) for f in (min, max))
        return least if least == most else f"{least} to {most}"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    parser.add_argument("--only", default=[], action="append", help=", ".join(ROWS))
    parser.add_argument("--peers", default="", help="of the names in the table")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0, help="of one measurement")
    parser.add_argument("--resume", action="store_true", help="leave out what is there")
    parser.add_argument("--goals", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=peers.HERE / "results")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.seconds = options.seconds or (1 if options.quick else 3)
    options.warm = 0.5 if options.quick else 1.5
    options.only = [key for keys in options.only for key in keys.split(",") if key]
    if unknown := {*options.only} - {*ROWS}:
        parser.error(f"no such row: {', '.join(unknown)}")
    return options


def measure_row(key, rounds, options):
    if key.startswith("growth-"):
        axis = key.removeprefix("growth-")
        lines = measure_growth(axis, rounds, options)
        print_growth(axis, lines)
        return lines
    only = {name for name in options.peers.split(",") if name}
    names = [name for name in WORKS[key].peers if not only or name in only]
    rows = run_work(WORKS[key], names, rounds, options)
    print_work(key, rows)
    return rows


def main():
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what was started
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    keep = options.only or options.resume or options.goals
    report = Report(options.out, keep)
    wanted = options.only or ROWS
    if not options.goals:
        os.sched_setaffinity(0, {LOAD_CORE})
        peers.prepare()
        print("  ".join(f"{name} {value}" for name, value in machine().items()))
        print_skipped()
    for key in [] if options.goals else wanted:
        rounds = min(options.rounds, 3 if key.startswith("growth-") else inf)
        if options.resume and report.has(key, rounds):
            print(f"\n{key}: measured before")
        elif rows := measure_row(key, rounds, options):
            report.store(key, rows, rounds)
    print_goals(report.works, wanted)
    if len(peers.OURS) > 1:
        print_before(report.works, wanted)


if __name__ == "__main__":
    main()
