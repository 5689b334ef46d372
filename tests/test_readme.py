"""README.md: each session is run, each figure counted, each name looked up."""

import contextlib
import dataclasses
import io
import json
import operator
import re
import shlex
import socket
import subprocess
import sys
import textwrap
import tomllib

import pytest
import trio
import trio.testing
from bench.table import MEASURED, lines, where
from kit import ROOT, clean_environment, free_port, need, need_module, refused, wait_until

import chatstream

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
SOURCE = (ROOT / "chatstream.py").read_text()
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))


def blocks(language):
    """The text of each block in this language, once."""
    return list(dict.fromkeys(text for kind, text in BLOCKS if kind == language))


# -------------------------------------------------------------------------- sessions


def steps(session):
    """(command, the lines that should come) for each command of a session."""
    parts = re.split(r"^\$ ", session, flags=re.M)[1:]
    return [(part.partition("\n")[0], part.splitlines()[1:]) for part in parts]


VARIES = [
    r"\d{4}-\d\d-\d\d [\d:]{8} [+-]\d{4}",  # the time
    r"(?<=clock-)\d{10}",
    r"[0-9a-f]{32}",  # the name of an answer
    r"(?<=-)\d{2,3}$",  # how many words it had
    r"(?<=sequence_number\":)\d+",  # how many came before the end
    r"\d+\.\d+(?= s\b)",  # how long something took
    r"\b\d+(?: of \d+)?(?= events)",  # how many came meanwhile
]


def pattern(line):
    """This line, or what another run shows in its place."""
    parts = re.split(f"({'|'.join(VARIES)})", line)
    for n, part in enumerate(parts):
        parts[n] = "|".join(VARIES) if n % 2 else re.escape(part)
    return "".join(f"(?:{part})" for part in parts)


def as_expected(lines):
    """A pattern for a whole output, in which a line with … stands for any lines."""
    return re.compile("\n".join(".*" if li == "…" else pattern(li) for li in lines), re.S)


def test_a_pattern_takes_another_time_but_no_other_text():
    tick = "data: The server time is: 2026-11-24 09:30:01 +0000"
    assert as_expected([tick]).fullmatch(tick.replace("09:30", "23:59"))
    assert not as_expected([tick]).fullmatch(tick.replace("server", "client"))


@pytest.mark.parametrize("session", blocks("console"), ids=lambda text: steps(text)[-1][0][:40])
def test_a_session_goes_as_written(session, demo, tmp_path):
    need("curl", "apt-get install curl")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    mark = "-- end of a command --"
    script = "".join(f"{command}\necho '{mark}'\n" for command, _ in steps(session))
    script = script.replace("localhost:4001", f"localhost:{demo.port}")
    done = subprocess.run(
        ["bash", "-c", script],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    shown = done.stdout.split(f"{mark}\n")[:-1]
    for (command, expected), output in zip(steps(session), shown, strict=True):
        if expected:
            found = as_expected(expected).fullmatch(output.rstrip("\n"))
            assert found, f"$ {command}\n{output}"
        else:
            assert output == "", f"$ {command}\n{output}"


def program(mark):
    """The Python program of the README with this in it."""
    (found,) = [text for text in blocks("python") if mark in text]
    return found


def output(program, port):
    """What it prints, run against the server on this port."""
    program = program.replace("localhost:4001", f"localhost:{port}")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(program, {})
    return said.getvalue()


def test_the_sdk_streams_as_written(quick_demo):
    need_module("openai", "pip install openai")
    said = output(program("chat.completions"), quick_demo.port)
    assert "chatstream" in said
    assert "demo" in said


def test_the_sdk_resumes_and_cancels_as_written(demo):
    openai = need_module("openai", "pip install openai")
    said = output(program("responses.create"), demo.port)
    text, status = said.rstrip("\n").rsplit("\n", 1)
    assert status == "cancelled"
    client = openai.OpenAI(base_url=f"{demo.http}/v1", api_key="none")
    whole = client.responses.create(model="demo", input="SSE or WebSocket?").output_text
    assert len(text) > 100
    assert whole.startswith(text), "nothing twice, nothing lost"


def shell_lines():
    return [line for text in blocks("sh") for line in text.splitlines()]


def test_the_shell_commands_name_files_and_flags_that_exist():
    for line in shell_lines():
        words = shlex.split(line, comments=True)
        for path in (word for word in words if word.startswith("tests/")):
            assert (ROOT / path).exists(), line
        if "tests/bench/run.py" in line:
            assert '"--quick"' in (ROOT / "tests/bench/run.py").read_text()


@pytest.mark.parametrize("line", [line for line in shell_lines() if "bin/chatstream" in line])
def test_every_model_is_asked_where_the_command_says(line):
    words = shlex.split(line, comments=True)
    program = words.index(".venv/bin/chatstream")
    environ = dict(word.split("=", 1) for word in words[:program])
    settings = chatstream.parse_flags(words[program + 1 :], environ)
    assert settings.upstream
    assert settings.upstream in line
    assert all(model in line for model in settings.model)
    if "Azure" not in line:
        assert settings.upstream.endswith("/v1")


def test_each_flag_is_in_the_table_with_its_default():
    flags = [f for f in dataclasses.fields(chatstream.Settings) if f.metadata]
    rows = re.findall(r"^\| `--([a-z-]+)` \| (.*?) \| (.*?) ?\| ", README, re.M)
    assert [name.replace("-", "_") for name, _, _ in rows] == [f.name for f in flags]
    for flag, (_, names, default) in zip(flags, rows, strict=True):
        variables = {f"CHATSTREAM_{flag.name.upper()}", flag.metadata["env"]} - {""}
        assert set(re.findall(r"`(\w+)`", names)) == variables
        assert default.strip("`") == ("" if flag.default == () else str(flag.default))


def test_the_secrets_come_from_the_environment():
    settings = chatstream.parse_flags([], {"OPENAI_API_KEY": "k" * 9, "CHATSTREAM_TOKEN": "t" * 9})
    assert (settings.api_key, settings.token) == ("k" * 9, "t" * 9)
    for name in ("OPENAI_API_KEY", "CHATSTREAM_TOKEN"):
        assert f"| | `{name}` |" in README


def test_the_service_starts_with_flags_that_exist():
    (unit,) = blocks("ini")
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.M)
    settings = chatstream.parse_flags(shlex.split(command)[1:], {})
    assert settings.allow_origin == ("https://chat.example.com",)
    (memory,) = re.findall(r"^MemoryMax=(\d+)G$", unit, re.M)
    held = chatstream.ANSWERS_BYTES + chatstream.BODIES_BYTES
    assert int(memory) * 1024**3 > 2 * held, "what it may hold must not kill it"
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)
    assert int(stop) > settings.grace + 3, "or systemd kills what stops gracefully"


def test_each_command_of_the_first_pages_is_in_chinese_too():
    english, _, chinese = README.partition("\n## 中文\n")
    tour = section("Two commands", english) + section("Five minutes", english)
    for command in re.findall(r"^(?:\$ |python3 -m venv).*$", tour, re.M):
        same = command.replace("Hello", "你好")
        assert command in chinese or same in chinese, command


def section(title, text=README):
    """What stands under this heading."""
    _, found, rest = text.partition(f"\n## {title}\n")
    assert found, title
    return rest.partition("\n## ")[0]


# ---------------------------------------------------------------- the idea in 60 lines


SIXTY = program("trio.run(main)")


@pytest.fixture
def sixty(tmp_path):
    """The port of the program in 60 lines, whose clock is 50 times as fast here."""
    port = free_port()
    text = SIXTY.replace("4002", str(port)).replace("trio.sleep(1)", "trio.sleep(0.02)")
    (tmp_path / "sixty.py").write_text(text)
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "sixty.py"], cwd=tmp_path, stdout=said, stderr=said
        )
    try:
        wait_until(lambda: not refused(port))
        yield port
        assert process.poll() is None, (tmp_path / "said").read_text()
        assert (tmp_path / "said").read_text() == ""
    finally:
        process.kill()
        process.wait()


def listen_to_sixty(port, count, last="", reset=False):
    """So many blocks that follow the id `last`, and then a cut."""
    after = f"Last-Event-ID: {last}\r\n" if last != "" else ""
    with socket.create_connection(("localhost", port), 5) as sock:
        sock.settimeout(5)
        sock.sendall(f"GET / HTTP/1.1\r\nHost: x\r\n{after}\r\n".encode())
        heard = b""
        while heard.count(b"\n\n") < count:
            piece = sock.recv(4096)
            assert piece, heard
            heard += piece
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    head, _, body = heard.partition(b"\r\n\r\n")
    assert b"200 OK" in head
    assert b"text/event-stream" in head
    return body.decode().split("\n\n")[:count]


def ids_of(blocks):
    return [int(block.rpartition("id: ")[2]) for block in blocks]


def test_the_idea_takes_60_lines():
    assert len(SIXTY.splitlines()) <= 60


def test_the_60_lines_lose_nothing_when_cut(sixty):
    seen = ids_of(listen_to_sixty(sixty, 3))
    for n in range(10):  # in turn: with a FIN, and with a reset
        seen += ids_of(listen_to_sixty(sixty, 4, last=seen[-1], reset=n % 2))
    assert seen == list(range(seen[0], seen[0] + 43))


def test_the_60_lines_tell_what_is_missing(sixty):
    first = ids_of(listen_to_sixty(sixty, 1))[0]
    wait_until(lambda: ids_of(listen_to_sixty(sixty, 1))[0] > first + 80)
    gap, then = listen_to_sixty(sixty, 2, last=first)
    missed = re.fullmatch(r"event: gap\ndata: (\d+)", gap)
    assert ids_of([then]) == [first + 1 + int(missed[1])]


def test_a_reader_of_the_60_lines_that_stands_still_delays_nobody(sixty):
    with socket.create_connection(("localhost", sixty)) as frozen:
        frozen.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert len(ids_of(listen_to_sixty(sixty, 5))) == 5


def test_what_the_module_adds_is_in_the_parts_named():
    for name in re.findall(r"\| `([\w.]+)` \|$", section("The whole idea in 60 lines"), re.M):
        operator.attrgetter(name)(chatstream)


# --------------------------------------------------------------------- figures, names


def row(title):
    """The cells of a table's row."""
    (found,) = re.findall(rf"^\| {re.escape(title)} \|(.*)\|$", README, re.M)
    return [cell.strip() for cell in found.split("|")]


SECOND = 1795512601
TICK = chatstream.Event("The server time is: 2026-11-24 09:30:01 +0000")


def sse_chunk(name, place, event):
    return chatstream.http_chunk(chatstream.frame_sse(name, place, event))


async def test_a_tick_costs_the_bytes_that_the_table_says(demo):
    asked = b"GET /time HTTP/1.1\r\nHost: localhost:4001\r\n\r\n"
    stream = await trio.open_tcp_stream("127.0.0.1", demo.port)
    async with stream:
        await stream.send_all(asked)
        answered = b""
        while not answered.endswith(b"}\n"):
            answered += await stream.receive_some()
    sse = sse_chunk("clock", SECOND, TICK)
    frame = chatstream.frame_ws_json("clock", SECOND, TICK)
    assert row("one tick of our clock, bytes on the wire") == [
        str(len(asked + answered)),
        str(len(sse)),
        str(len(frame)),
    ]


def test_the_named_tests_exist():
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) >= 6
    for name in named:
        assert f"def {name}(" in TESTS, name


def test_the_named_functions_exist():
    for title in ("Three listings, and what becomes of them", "Things to try", "Who owns whom"):
        for name in set(re.findall(r"`([A-Z]\w*\.\w+|[a-z_]+(?=\(\)))", section(title))):
            operator.attrgetter(name)(chatstream)


def test_the_sections_are_those_of_the_source_in_order():
    listed = re.findall(r"^\d+\. \*\*(.*?)\*\*( ★)?", section("Reading the source"), re.M)
    found = re.findall(r"^# ─── (.*?)( ★)? ─+$", SOURCE, re.M)
    assert listed == found


@pytest.mark.parametrize("path", re.findall(r"`(tests/[\w./]+)`", README))
def test_the_named_files_exist(path):
    assert (ROOT / path).exists()


def test_links_inside_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", t).strip().lower().replace(" ", "-") for t in titles}
    for anchor in re.findall(r"\]\(#(.*?)\)", README):
        assert anchor in anchors
    for path in re.findall(r"\]\((?!http|#)(.*?)\)", README):
        assert (ROOT / path).exists(), path


def test_the_limits_are_those_of_the_source():
    """Numbers in the running text that the module could outgrow."""
    text = " ".join(README.split())
    for said, value in (
        ("after {} seconds of silence", chatstream.SSE_KEEP_ALIVE),
        ("the {} seconds of our keep-alive", chatstream.SSE_KEEP_ALIVE),
        ("the {} seconds of our pings", chatstream.PING_EVERY),
        ("dropped after {} seconds", chatstream.STUCK_TIMEOUT),
        ("last {:,} events", chatstream.ROOM_EVENTS),
        ("{:,} running answers", chatstream.ANSWERS_RUNNING),
        ("{} MiB of answers", chatstream.ANSWERS_BYTES >> 20),
        ("{} MiB of bodies", chatstream.BODIES_BYTES >> 20),
        ("{} MiB an answer", chatstream.ANSWER_BYTES >> 20),
        ("`--linger` seconds ({:g})", chatstream.Settings.linger),
        ("`--keep` seconds ({:g})", chatstream.Settings.keep),
        ("after {} s, in both", chatstream.HEARTBEAT_EVERY),
        ("after {} s |", chatstream.IDLE_TIMEOUT),
        ("begin with `{}`", chatstream.PREFIX),
    ):
        assert said.format(value) in text, said
    (body,) = re.findall(r"client_max_body_size (\d+)m;", README)
    assert int(body) << 20 == chatstream.BODY_BYTES


def test_what_is_new_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"## What is new in {project['version']}" in README


def test_as_many_events_are_delivered_as_the_first_page_says():
    (said,) = re.findall(r"more than ([\d,]+) events a second", README)
    measured = json.loads(MEASURED.read_text())["works"]["fan400"]["chatstream"]
    assert measured["per_s"] > int(said.replace(",", ""))


def test_the_shell_knows_each_command():
    for text in [*blocks("sh"), *blocks("console")]:
        lines = "\n".join(re.sub(r"^\$ ", "", line) for line in text.splitlines())
        if text in blocks("console"):
            lines = "\n".join(command for command, _ in steps(text))
        subprocess.run(["bash", "-n"], input=lines, text=True, check=True, env=clean_environment())


# ------------------------------------------------------------------ the naive ways


def naive(mark):
    """The listing of README.md that this line is in, as a function."""
    (listing,) = re.findall(rf"^    {mark}.*(?:\n    .*)+", README, re.M)
    names = {"trio": trio, "suppress": contextlib.suppress}
    exec(textwrap.dedent(listing), names)
    return names["broadcast"]


async def test_naive_a_loop_waits_for_the_slowest(autojump_clock):
    broadcast = naive("async def broadcast")
    (slow, _), (quick, reads) = (
        trio.testing.lockstep_stream_pair(),
        trio.testing.memory_stream_pair(),
    )
    with trio.move_on_after(60) as minute:
        await broadcast([slow, quick], b"hello")
    assert minute.cancelled_caught
    with trio.move_on_after(60) as minute:
        await reads.receive_some()
    assert minute.cancelled_caught, "who comes after the slow one heard nothing"


async def test_naive_a_queue_loses_and_tells_nobody():
    broadcast = naive(r"def broadcast\(queues")
    (slow, unread), (quick, reads) = (trio.open_memory_channel(3) for _ in range(2))
    heard = []
    for n in range(10):
        broadcast([slow, quick], n)
        heard.append(reads.receive_nowait())
    assert heard == list(range(10))
    slow.close()
    assert [n async for n in unread] == [0, 1, 2], "and of the others no trace"


# ---------------------------------------------------------------- figures, counted


def test_the_table_is_what_the_benchmark_wrote():
    report = json.loads(MEASURED.read_text())
    assert "\n".join(lines(report)) in README
    assert where(report) in " ".join(README.split())


def test_a_million_readers_add_up():
    _, _, text = README.partition("**A million readers**")
    text, _, _ = text.partition("\n## ")
    text = " ".join(text.split())
    cpu = float(re.match(r"([\d.]+) µs", row(BUSY)[0])[1])
    assert f"costs {cpu} µs of one core" in text
    assert f"{round(cpu)} cores" in text
    processes, readers = re.search(r"(\d+) processes of ([\d,]+) readers", text).groups()
    assert int(processes) * int(readers.replace(",", "")) == 1_000_000
    assert 0.4 < cpu * 1e-6 * int(readers.replace(",", "")) < 0.6, "half busy"
    idle = float(re.match(r"([\d.]+) KB", row("idle SSE reader")[0])[1])
    assert f"takes {idle} KB here: {idle} GB" in text
    tick = len(sse_chunk("clock", SECOND, TICK))
    assert f"A tick is {tick} bytes" in text
    word = chatstream.Event(chatstream.to_json({"content": " long"}))
    token = len(sse_chunk("a" * 32, 42, word))
    for size, rate in ((tick, 1e6), (token, 20e6)):
        gbit = (size + PACKET) * 8 * rate / 1e9
        assert f"{gbit:.2g} Gbit/s" in text


BUSY = "2,000 readers, 2 events/s: CPU a delivery, median delay"
PACKET = 20 + 20 + 12  # the heads of IP and of TCP, with its timestamps
OPEN = """async ([sockets, streams]) => {
    const opened = { sockets: 0, streams: 0 }
    for (let n = 0; n < streams; n++) {
        fetch(`/clock?${n}`).then(() => opened.streams++, () => {})
    }
    const url = location.origin.replace("http", "ws") + "/clock"
    for (let n = 0; n < sockets; n++) {
        new WebSocket(url).onopen = () => opened.sockets++
    }
    for (let last = -1; last !== opened.sockets || !opened.streams;) {
        last = opened.sockets
        await new Promise((done) => setTimeout(done, 1000))
    }
    return opened
}"""


def test_a_browser_opens_as_many_connections_as_the_table_says(page, demo):
    _, streams, sockets = row("limit in a browser")
    page.goto(demo.http + "/icon.svg")
    opened = page.evaluate(OPEN, [260, 10])
    assert streams.startswith(f"{opened['streams']} a host")
    assert sockets.startswith(f"{opened['sockets']} a host in Chromium")
    most = chatstream.HTTP2_STREAMS
    assert f"what the server allows, here {most}" in streams


# ------------------------------------------------------------------------- the source


def picture(text):
    """Who writes which log, of the picture in this text."""
    return re.findall(r"^    (\S.*?) ─+▶ +(\w+)", text, re.M)


def test_the_picture_is_that_of_the_source():
    assert len(picture(chatstream.__doc__)) == 3
    assert picture(README) == picture(chatstream.__doc__)


def test_the_tree_of_tasks_names_functions_that_exist():
    _, _, tree = README.partition("    Server.serve\n")
    tree, _, _ = tree.partition("\n\n")
    names = re.findall(r"── ([A-Z]\w+\.\w+)", tree)
    assert len(names) == 6
    for name in names:
        operator.attrgetter(name)(chatstream)
