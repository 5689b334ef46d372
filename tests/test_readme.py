"""README.md: each session is run, each figure counted, each name looked up."""

import ast
import contextlib
import io
import re
import shlex
import subprocess

import pytest
from kit import ROOT, clean_environment, need, need_module

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
]


def pattern(line):
    """This line, or what another run shows in its place."""
    parts = re.split(f"({'|'.join(VARIES)})", line)
    for n, part in enumerate(parts):
        parts[n] = "|".join(VARIES) if n % 2 else re.escape(part)
    return "".join(f"(?:{part})" for part in parts)


def as_expected(lines):
    """A pattern for a whole output, in which a line with … stands for any lines."""
    return re.compile(
        "\n".join(".*" if li == "…" else pattern(li) for li in lines), re.S
    )


def test_a_pattern_takes_another_time_but_no_other_text():
    tick = "data: The server time is: 2026-11-24 09:30:01 +0000"
    assert as_expected([tick]).fullmatch(tick.replace("09:30", "23:59"))
    assert not as_expected([tick]).fullmatch(tick.replace("server", "client"))


@pytest.mark.parametrize(
    "session", blocks("console"), ids=lambda text: steps(text)[-1][0][:40]
)
def test_a_session_goes_as_written(session, demo, tmp_path):
    need("curl", "apt-get install curl")
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


def test_the_sdk_streams_as_written(demo):
    need_module("openai", "pip install openai")
    (program,) = blocks("python")
    ast.parse(program)
    program = program.replace("localhost:4001", f"localhost:{demo.port}")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(program, {})
    assert said.getvalue().startswith("This is chatstream's demo model")


def shell_lines():
    return [line for text in blocks("sh") for line in text.splitlines()]


@pytest.mark.parametrize(
    "line", [line for line in shell_lines() if "bin/chatstream" in line]
)
def test_every_model_is_asked_where_the_command_says(line):
    words = shlex.split(line, comments=True)
    program = words.index(".venv/bin/chatstream")
    environ = dict(word.split("=", 1) for word in words[:program])
    settings = chatstream.parse_flags(words[program + 1 :], environ)
    assert settings.upstream.endswith("/v1")
    assert settings.upstream in line
    assert not settings.model or settings.model in line


def test_the_service_starts_with_flags_that_exist():
    (unit,) = blocks("ini")
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.M)
    settings = chatstream.parse_flags(shlex.split(command)[1:], {})
    assert settings.allow_origin == ("https://chat.example.com",)
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)
    assert int(stop) > settings.grace + 3, "or systemd kills what stops gracefully"


def test_each_command_of_the_first_page_is_in_chinese_too():
    english, _, chinese = README.partition("\n## 中文\n")
    tour = english[: english.index("```python")]
    for command in re.findall(r"^(?:\$ |\.venv|python3).*$", tour, re.M):
        same = command.replace("Hello", "你好")
        assert command in chinese or same in chinese, command


# --------------------------------------------------------------------- figures, names


def row(title):
    """The cells of a table's row."""
    (found,) = re.findall(rf"^\| {re.escape(title)} \|(.*)\|$", README, re.M)
    return [cell.strip() for cell in found.split("|")]


async def test_a_tick_costs_the_bytes_that_the_table_says(demo):
    import trio

    tick = chatstream.Event(1795512601, "The server time is: 2026-11-24 09:30:01 +0000")
    asked = b"GET /time HTTP/1.1\r\nHost: localhost:4001\r\n\r\n"
    stream = await trio.open_tcp_stream("127.0.0.1", demo.port)
    async with stream:
        await stream.send_all(asked)
        answered = b""
        while not answered.endswith(b"}\n"):
            answered += await stream.receive_some()
    sse = chatstream.chunk(chatstream.frame_sse("clock", tick))
    frame = chatstream.frame_ws_json("clock", tick)
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
    _, _, text = README.partition("## Three listings")
    text, _, _ = text.partition("## 中文")
    for name in set(re.findall(r"`([A-Za-z_.]+)(?:\(\))?`", text)):
        owner, _, method = name.rpartition(".")
        if owner and hasattr(chatstream, owner):
            assert hasattr(getattr(chatstream, owner), method), name


def test_the_sections_are_those_of_the_source_in_order():
    _, _, text = README.partition("## Reading the source")
    text, _, _ = text.partition("\n## ")
    listed = re.findall(r"^\d+\. \*\*(.*?)\*\*", text, re.M)
    found = re.findall(r"^# ─── (.*?)(?::.*)? ─+$", SOURCE, re.M)
    assert listed == found[1:], "all but the settings"


@pytest.mark.parametrize("path", re.findall(r"`(tests/[\w./]+)`", README))
def test_the_named_files_exist(path):
    assert (ROOT / path).exists()


def test_links_inside_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {
        re.sub(r"[^\w\- ]", "", t).strip().lower().replace(" ", "-") for t in titles
    }
    for anchor in re.findall(r"\]\(#(.*?)\)", README):
        assert anchor in anchors
    for path in re.findall(r"\]\((?!http|#)(.*?)\)", README):
        assert (ROOT / path).exists(), path


def test_the_limits_are_those_of_the_source():
    """Numbers in the running text that the module could outgrow."""
    assert chatstream.SSE_KEEP_ALIVE == 15
    assert "15 seconds of our keep-alive" in " ".join(README.split())
    assert chatstream.ROOM_EVENTS == 1000
    assert chatstream.ANSWER_KEPT == 60
    assert (chatstream.FIRST_TOKEN_TIMEOUT, chatstream.NEXT_TOKEN_TIMEOUT) == (120, 60)


def test_the_shell_knows_each_command():
    for text in [*blocks("sh"), *blocks("console")]:
        lines = "\n".join(re.sub(r"^\$ ", "", line) for line in text.splitlines())
        if text in blocks("console"):
            lines = "\n".join(command for command, _ in steps(text))
        subprocess.run(
            ["bash", "-n"], input=lines, text=True, check=True, env=clean_environment()
        )
