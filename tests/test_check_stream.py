"""The checker finds what servers and proxies do to a stream, and nothing wrong with us.

Each bad server below is a function of a request's `Last-Event-ID` that yields the bytes
of its response. All are checked at once, and each test looks at one report."""

import json
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, islice

import pytest
from kit import CHAT, CHECKER, Report, asking, free_port

PACE = 0.05  # s between events; event n happens n paces after the start
START = time.monotonic()


# ------------------------------------------------------------------------ small servers


def happening(first):
    """The numbers of the events from this one on, each when it happens."""
    for n in count(first):
        time.sleep(max(0, START + n * PACE - time.monotonic()))
        yield n


def next_number(last_id):
    """A new reader begins with what happens now."""
    return int(last_id) + 1 if last_id else int((time.monotonic() - START) / PACE)


def event(n):
    return f"data: tick {n}\nid: {n}\n\n".encode()


def good(last_id):
    return map(event, happening(next_number(last_id)))


def buffers(last_id, size=12):
    events = good(last_id)
    while True:
        yield b"".join(islice(events, size))


def compresses(last_id, size=12):
    gzip = zlib.compressobj(wbits=31)
    yield "Content-Encoding: gzip"
    for piece in buffers(last_id, size):
        yield gzip.compress(piece) + gzip.flush(zlib.Z_SYNC_FLUSH)


def compresses_at_once(last_id):
    return compresses(last_id, size=1)


def ignores_last_event_id(last_id):
    return good(None)


def repeats(last_id):
    return good(str(int(last_id) - 1) if last_id else None)


def skips(last_id):
    return good(str(int(last_id) + 2) if last_id else None)


def says_other_words(last_id):
    later = b"later " if last_id else b""
    return (b"data: " + later + piece[6:] for piece in good(last_id))


def forgets(last_id):
    """It keeps four events, and tells nobody what it has forgotten."""
    now = next_number(None)
    return map(event, happening(max(next_number(last_id), now - 4)))


def forgets_and_says_so(last_id):
    asked, now = next_number(last_id), next_number(None)
    if missed := max(now - 4 - asked, 0):
        yield b'event: gap\ndata: {"missed": %d}\n\n' % missed
    yield from map(event, happening(asked + missed))


def has_no_ids(last_id):
    return (piece.partition(b"id")[0] + b"\n" for piece in good(last_id))


def has_one_id(last_id):
    return (piece.partition(b"id")[0] + b"id: 1\n\n" for piece in good(last_id))


def is_no_event_stream(last_id):
    yield "Content-Type: application/json"
    yield b"{}"


def says_nothing(last_id):
    yield b": hello\n\n"
    time.sleep(3)


def answer(last_id):
    """Ten events, whenever they are asked for, and nothing at their end."""
    for n in range(int(last_id or -1) + 1, 10):
        time.sleep(PACE)
        yield event(n)


def breaks_off(last_id):
    yield from answer(last_id)
    raise ConnectionResetError


def ends_with_done(last_id):
    yield from answer(last_id)
    if last_id != "10":
        yield b"data: [DONE]\nid: 10\n\n"


def ends_with_204(last_id):
    if last_id == "9":
        yield 204
    yield from answer(last_id)


def is_not_there(last_id):
    yield 404


@contextmanager
def served(function):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.close_connection = True
            with suppress(OSError):
                self.answer(function(self.headers["Last-Event-ID"]))

        do_POST = do_GET

        def answer(self, pieces):
            """An int is a status and a str a header; what is first begun ends these."""
            status, headers = 200, {"Content-Type": "text/event-stream"}
            for piece in pieces:
                if isinstance(piece, int):
                    return self.send_error(piece) if piece > 299 else self.head(piece)
                if isinstance(piece, str):
                    name, _, value = piece.partition(": ")
                    headers[name] = value
                    continue
                self.head(status, **headers)
                headers = {}
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.head(status, **headers)
            self.wfile.write(b"0\r\n\r\n")

        def head(self, status, **headers):
            """Once."""
            if not hasattr(self, "begun"):
                self.begun = True
                self.send_response(status)
                self.send_header("Transfer-Encoding", "chunked")
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.02,)).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------ what it finds

FAULTS = {
    buffers: ("in pieces", "held back"),
    compresses: ("in pieces", "compressed by gzip: held back"),
    ignores_last_event_id: ("resuming", "ignored"),
    repeats: ("resuming", "repeated"),
    skips: ("resuming", "lost"),
    says_other_words: ("resuming", "other data"),
    forgets: ("resuming", "lost"),
    has_no_ids: ("ids", "none"),
    has_one_id: ("ids", "used before"),
    is_no_event_stream: ("content type", "no event stream"),
    says_nothing: ("first event", "no event came"),
    answer: ("end", "nothing says that this is all"),
    breaks_off: ("end", "broke off"),
}
SOUND = [good, compresses_at_once, forgets_and_says_so, ends_with_done, ends_with_204]


@pytest.fixture(scope="module")
def reports():
    """What the checker finds with each of the small servers."""
    functions = [*FAULTS, *SOUND, is_not_there]
    with ExitStack() as stack, ThreadPoolExecutor(6) as pool:
        urls = [stack.enter_context(served(function)) for function in functions]
        return dict(zip(functions, pool.map(Report, urls), strict=True))


@pytest.mark.parametrize("server", FAULTS, ids=lambda server: server.__name__)
def test_it_finds_what_a_server_does_wrong(reports, server):
    name, words = FAULTS[server]
    assert reports[server].code == 1
    assert reports[server].result(name) == "fault"
    assert words in reports[server].says(name)


@pytest.mark.parametrize("server", SOUND, ids=lambda server: server.__name__)
def test_it_finds_nothing_wrong_with_a_sound_server(reports, server):
    assert reports[server].code == 0, reports[server]


def test_a_gap_that_is_told_is_no_fault(reports):
    assert "a gap told" in reports[forgets_and_says_so].says("resuming")


def test_what_is_not_there_cannot_be_tried(reports):
    assert reports[is_not_there].code == 2
    assert "404" in reports[is_not_there].json["cannot_try"]
    nobody = Report(f"http://127.0.0.1:{free_port()}/")
    assert nobody.code == 2
    assert "refused" in nobody.json["cannot_try"]


# --------------------------------------------------------------------------- ourselves

QUESTION = ("--data", json.dumps(asking("Hello")))


def test_nothing_is_wrong_with_our_clock_and_our_answers(demo, quick_demo):
    with ThreadPoolExecutor(2) as pool:
        clock = pool.submit(Report, demo.http + "/clock", "--seconds", "3")
        said = pool.submit(Report, demo.http + CHAT, *QUESTION)
    for report in (clock.result(), said.result()):
        assert report.code == 0, report
        assert report.result("resuming") == "ok"
    whole = Report(quick_demo.http + CHAT, *QUESTION)
    assert whole.code == 0, whole
    assert "told by an event" in whole.says("end")


def test_it_speaks_plain_words(quick_demo):
    command = [*CHECKER, quick_demo.http + CHAT, *QUESTION]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "nothing twice, nothing lost" in said
    assert said.endswith("nothing is wrong\n")
