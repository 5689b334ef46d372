"""Is it your proxy? Say what becomes of an event stream on its way to a client.

    python check_stream.py https://chat.example.com/clock
    python check_stream.py https://chat.example.com/chatgptApi/chatgpt_qa_stream \\
        --data '{"messages": [{"role": "user", "content": "Hello"}]}'

It listens for some seconds, cuts the connection after several events, goes on with
`Last-Event-ID` and compares. Run it once past the proxy and once through it: what only
the second run finds, the proxy does. It speaks HTTP/1.1 and needs no packages.

Exit code 0: nothing is wrong. 1: something is. 2: the stream could not be tried.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import re
import socket
import ssl
import statistics
import struct
import sys
import time
import zlib
from collections import namedtuple
from urllib.parse import urlsplit

TOGETHER = 0.005  # s: events that are no further apart came together
HELD = 0.5  # s of silence before three events together: somebody held them back
PATIENT, IMPATIENT = 15, 5.5  # s of silence that most clients bear, and that httpx does
CUTS = 3  # of a connection on which events are still coming
ENDS = {"done", "end", "close", "complete", "completed", "error", "message_stop"}
ENDS |= {"response.completed", "response.incomplete", "response.failed"}

Event = namedtuple("Event", "type data id at")


class CannotTry(Exception):
    """There is no stream to look at."""


class Wrong(Exception):
    """What came after a cut is not what should have come."""


# ------------------------------------------------------------------------- a connection


class Stream:
    """One request, and the events of its response."""

    def __init__(self, asked, last_id=""):
        self.ended, self.whole = False, True  # has it ended, and as HTTP wants it?
        self.comments, self.times = 0, [time.monotonic()]  # when something came
        self._id, self._type, self._data, self._rest = last_id, "message", [], b""
        connection = connect(asked)
        self.sock = connection.sock
        url = urlsplit(asked.url)
        path = (url.path or "/") + ("?" + url.query if url.query else "")
        headers = {"Host": url.netloc, "Accept": "text/event-stream"}
        headers |= {"Accept-Encoding": "gzip, deflate"} | asked.headers  # as browsers do
        headers |= {"Last-Event-ID": last_id} if last_id else {}
        connection.request(asked.method, path, asked.data, headers)
        self.response = connection.getresponse()
        self.times.append(time.monotonic())
        self.status, self.headers = self.response.status, self.response.headers
        self.coding = self.headers.get("Content-Encoding", "")
        self._unzip = zlib.decompressobj(wbits=47)  # gzip or deflate: it sees which

    def events(self, seconds):
        """The events that come within this time."""
        deadline = time.monotonic() + seconds
        try:
            while (left := deadline - time.monotonic()) > 0:
                self.sock.settimeout(left)
                data = self.response.read1(65536)
                if not data:
                    self.ended = True
                    return
                self.times.append(time.monotonic())
                yield from self._feed(self._unzip.decompress(data) if self.coding else data)
        except TimeoutError:
            pass
        except (OSError, http.client.HTTPException):
            self.ended, self.whole = True, False

    def _feed(self, data):
        """Events out of bytes, by section 9.2.6 of the HTML standard."""
        lines = re.split(rb"\r\n|\n|\r(?=.)", self._rest + data, flags=re.S)
        self._rest = lines.pop()
        for line in lines:
            name, _, value = line.decode("utf-8", "replace").partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                self._data.append(value)
            elif name == "event":
                self._type = value
            elif name == "id":
                self._id = value
            elif line:
                self.comments += not name
            else:
                if self._data:
                    text = "\n".join(self._data)
                    yield Event(self._type, text, self._id, time.monotonic())
                self._type, self._data = "message", []

    def cut(self):
        """Break the connection by a reset: it says no goodbye."""
        no_linger = struct.pack("ii", 1, 0)
        with contextlib.suppress(OSError):  # it has ended by itself
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        self.response.close()
        self.sock.close()


def connect(asked):
    url = urlsplit(asked.url)
    secure = url.scheme == "https"
    port = url.port or (443 if secure else 80)
    connection = http.client.HTTPConnection(url.hostname, port, asked.seconds)
    connection.connect()
    if secure:
        name = asked.headers.get("Host", url.hostname).partition(":")[0]
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(connection.sock, server_hostname=name)
    return connection


# --------------------------------------------------------------- what one look can tell


def finding(name, says, fault=False, note=False, **measured):
    result = "fault" if fault else "note" if note else "ok"
    return {"name": name, "result": result, "says": says, "measured": measured}


def check_type(stream):
    kind = stream.headers.get("Content-Type", "none")
    bad = not re.match(r"text/event-stream\s*(;|$)", kind, re.I)
    says = f"{kind}: no event stream" if bad else kind
    return finding("content type", says, fault=bad, type=kind)


def check_start(stream, events):
    began, head = stream.times[:2]
    times = {"head": head - began}
    says = f"the response began after {head - began:.3f} s"
    if not events:
        says += ", no event came: held back, or nothing happened"
        return finding("first event", says, fault=True, **times)
    times["event"] = events[0].at - began
    says += f", its first event after {times['event']:.3f} s"
    return finding("first event", says, note=head - began > IMPATIENT, **times)


def check_pieces(stream, events):
    """A buffer shows as silence and then several events at once, again and again."""
    groups, end = [], stream.times[0]
    for event in events:
        if not groups or event.at - end > TOGETHER:
            groups.append([])
        groups[-1].append(event.at - end)  # how long after the one before
        end = event.at
    held = sum(len(group) for group in groups if len(group) > 2 and group[0] > HELD)
    alone, most = sum(len(group) == 1 for group in groups) / len(events), max(map(len, groups))
    says = f"{len(events)} events, {alone:.0%} in pieces of their own, {most} at once"
    says += f", compressed by {stream.coding}" if stream.coding else ""
    fault = held > 0.3 * len(events)
    says += ": held back by a buffer or a compressor" if fault else ""
    note, measured = stream.coding or alone < 0.9, {"alone": alone, "most": most}
    return finding("in pieces", says, fault, note, coding=stream.coding, **measured)


def check_no_transform(stream):
    value = stream.headers.get("Cache-Control", "none")
    bad = "no-transform" not in value.lower()
    says = f"{value}, so a proxy may compress and hold back" if bad else value
    return finding("no-transform", says, note=bad, cache_control=value)


def check_keep_alive(stream):
    times = stream.times + ([] if stream.ended else [time.monotonic()])
    silence = max(b - a for a, b in itertools.pairwise(times))
    says = f"longest silence {silence:.1f} s, {stream.comments} comments"
    says += ": clients and proxies give up earlier" if silence > PATIENT else ""
    fault, note = silence > PATIENT, silence > IMPATIENT
    return finding("keep-alive", says, fault, note, silence=silence)


def check_ids(events):
    ids = [event.id for event in events if event.id]
    used = len(ids) - len(set(ids))
    grow = all(numbers(a) < numbers(b) for a, b in itertools.pairwise(ids))
    says = f"{len(ids)} of {len(events)} events have one"
    says += ", and they grow" if grow else ", and they do not grow"
    if used:
        says = f"{used} of {len(events)} events have an id that was used before"
    if not ids:
        says = "none: after a cut nobody knows where to go on"
    fault = bool(used) or not ids
    return finding("ids", says, fault, not grow, ids=len(ids), used=used, grow=grow)


def numbers(event_id):
    return tuple(map(int, re.findall(r"\d+", event_id)))


# ----------------------------------------------------------------------- cut and resume


class Record:
    """All events in their order: what each later reading must agree with."""

    def __init__(self, asked, stream, events):
        self.asked, self.events = asked, {event.id: event for event in events}
        self.cuts = self.gaps = 0
        self.stream = stream  # the latest connection, or the first one that has ended

    def resume(self, spot, more):
        """Go on after the event at this place, read what is known and more; cut."""
        ids = list(self.events)
        after, place = ids[spot], spot + 1
        stream = Stream(self.asked, after)
        stream.ended = stream.status == 204
        if stream.status not in (200, 204):
            raise Wrong(f"going on after {after} is answered {stream.status}")
        gap = False
        for event in stream.events(self.asked.seconds):
            if event.type == "gap":
                self.gaps, gap = self.gaps + 1, True
            else:
                place = 1 + self.place_of(event, place, after, gap)
            if place >= len(ids) + more:
                break
        stream.cut()
        self.cuts += 1
        if not self.stream.ended:
            self.stream = stream
        if place < len(ids):
            raise Wrong(f"after {after}, {len(ids) - place} events are missing")

    def place_of(self, event, place, after, gap):
        """Where this event stands in the record, which should be at `place`."""
        ids = list(self.events)
        found = ids.index(event.id) if event.id in self.events else len(ids)
        if found < place:
            raise Wrong(f"after {after} comes {event.id} once more: repeated")
        if found > place and not gap:
            known = f"{event.id} and not {ids[place]}: Last-Event-ID is ignored"
            raise Wrong(f"after {after} comes {known}, or events are lost")
        if event.data != self.events.setdefault(event.id, event).data:
            raise Wrong(f"{event.id} has other data the second time")
        return found


def check_resuming(record):
    """Resume in the midst of what is known; cut a running stream; compare it all."""
    events = list(record.events.values())
    apart = [b.at - a.at for a, b in itertools.pairwise(events)]
    pause = min(2, 1.5 * statistics.median(apart or [0]))  # something happens meanwhile
    try:
        for spot in sorted({0, len(events) // 2, len(events) - 1}):
            record.resume(spot, 0)
        for _ in range(CUTS):
            time.sleep(pause)
            record.resume(len(record.events) - 1, 2)
        record.resume(0, 0)
        fault, says = False, f"{record.cuts} cuts: nothing twice, nothing lost"
        says += f", a gap told {record.gaps} times" if record.gaps else ""
    except (Wrong, OSError, http.client.HTTPException) as error:
        fault, says = True, str(error) or type(error).__name__
    return finding("resuming", says, fault, cuts=record.cuts, gaps=record.gaps)


def check_end(asked, stream, last):
    """A client must be able to tell the end from a cut."""
    if asked.data and last.id and not stream.ended:
        stream = Stream(asked, last.id)
        last = ([last, *stream.events(asked.seconds)])[-1]
    if not stream.ended:
        return finding("end", f"none within {asked.seconds:g} s")
    if is_end(last):
        return finding("end", "told by an event", event=last.data[:200])
    with contextlib.suppress(OSError, http.client.HTTPException):
        if last.id and Stream(asked, last.id).status == 204:
            return finding("end", "told by 204 to the next request")
    says = "it ended" if stream.whole else "it broke off"
    return finding("end", f"{says}, and nothing says that this is all", fault=True)


def is_end(event):
    try:
        inner = json.loads(event.data)
    except ValueError:
        inner = event.data.strip()
    kind = inner.get("type") if isinstance(inner, dict) else None
    return inner == "[DONE]" or not ENDS.isdisjoint({event.type, kind})


# --------------------------------------------------------------------------------- main


def check(asked):
    """Each finding as it is found."""
    try:
        stream = Stream(asked)
    except TimeoutError:
        connect(asked).close()  # raises if that is what takes so long
        says = f"nothing within {asked.seconds:g} s: held back, or not answered"
        return (yield finding("first event", says, fault=True))
    if stream.status != 200:
        reason = stream.response.read(300).decode("utf-8", "replace")
        raise CannotTry(f"the response is {stream.status} and not 200: {reason}")
    yield (kind := check_type(stream))
    if kind["result"] == "fault":
        return None
    events = list(stream.events(asked.seconds))
    yield check_start(stream, events)
    yield check_no_transform(stream)
    yield check_keep_alive(stream)
    stream.cut()
    if not events:
        return None
    yield check_pieces(stream, events)
    yield (ids := check_ids(events))
    last = events[-1]
    if ids["result"] != "fault":
        record = Record(asked, stream, [event for event in events if event.id])
        yield check_resuming(record)
        stream, last = record.stream, list(record.events.values())[-1]
    yield check_end(asked, stream, last)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--data", type=str.encode, help="POST this JSON")
    parser.add_argument("--header", action="append", default=[], help="'Name: value'")
    parser.add_argument("--seconds", type=float, default=10, help="for each look")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    pairs = [header.partition(":") for header in asked.header]
    asked.headers = {"Content-Type": "application/json"} if asked.data else {}
    asked.headers |= {name.strip().title(): value.strip() for name, _, value in pairs}
    asked.method = "POST" if asked.data else "GET"
    return asked


def main():
    asked, found, why = arguments(), [], None
    try:
        for one in check(asked):
            found.append(one)
            if not asked.json:
                print(f"{one['result']:5}  {one['name']:12}  {one['says']}", flush=True)
    except (CannotTry, OSError, ValueError, http.client.HTTPException) as error:
        why = str(error) or type(error).__name__
    faults = [one["name"] for one in found if one["result"] == "fault"]
    if asked.json:
        report = {"url": asked.url, "faults": faults, "cannot_try": why}
        print(json.dumps(report | {"findings": found}, indent=2))
    else:
        wrong = f"wrong: {', '.join(faults)}" if faults else "nothing is wrong"
        print(f"cannot be tried: {why}" if why else wrong)
    return 2 if why else int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
