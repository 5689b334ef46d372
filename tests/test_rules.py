"""Rules without I/O, as tables of pairs: what is asked, and what the answer is."""

import json

import pytest

from chatstream import (
    CHAT,
    COMPLETIONS,
    AccessPolicy,
    Problem,
    Request,
    Settings,
    check_handshake,
    check_json,
    check_question,
    clean_name,
)


def request_with(headers, method="GET", version="1.1"):
    """A request with these headers, on no connection."""
    pairs = [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]
    return Request(None, method.encode(), b"/room", pairs, "http", version)


# ---------------------------------------------------------------------- who may do what


def allowed(check, headers, **settings):
    """The status of the refusal, or 200."""
    policy = AccessPolicy(Settings(**settings), {4001, 8888})
    try:
        getattr(policy, check)(request_with(headers))
    except Problem as problem:
        return problem.status
    return 200


SITE = ("https://my.site",)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:4001", 200),
        ("LOCALHOST:1", 200),
        ("localhost.", 200),
        ("127.0.0.1:4001", 200),
        ("127.1.2.3", 200),
        ("[::1]:4001", 200),
        ("my.site", 200),
        ("my.site:443", 200),
        (None, 200),  # HTTP/1.0
        ("evil.example", 421),
        ("evil.example:4001", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.example@localhost", 421),
        ("localhost/../evil", 421),
        ("[::ffff:127.0.0.1", 421),
        ("192.168.0.1", 200),  # no name server can make an address ours
        ("", 421),
    ],
)
def test_a_host_on_loopback(host, status):
    headers = {} if host is None else {"host": host}
    assert allowed("check_host", headers, allow_origin=SITE) == status


@pytest.mark.parametrize("host", ["evil.example", "chat.my.site", "10.0.0.7:4001"])
def test_any_host_where_the_network_is_served(host):
    assert allowed("check_host", {"host": host}, host="0.0.0.0") == 200


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        (None, "localhost:4001", 200),  # curl, an SDK
        ("http://localhost:4001", "localhost:4001", 200),
        ("http://localhost:4001", "localhost:8888", 200),  # our page, our other port
        ("http://127.0.0.1:4001", "localhost:8888", 200),
        ("http://[::1]:4001", "127.0.0.1:8888", 200),
        ("https://chat.net", "chat.net", 200),  # behind a proxy that keeps the Host
        ("https://chat.net:8443", "chat.net:8443", 200),
        ("https://my.site", "localhost:4001", 200),
        ("null", "localhost:4001", 200),
        ("http://localhost:3000", "localhost:4001", 403),  # another program's page
        ("http://localhost", "localhost:4001", 403),
        ("http://my.site", "localhost:4001", 403),  # another scheme
        ("https://my.site.evil.example", "localhost:4001", 403),
        ("https://evil.example", "localhost:4001", 403),
        ("https://evil.example", "chat.net", 403),
        ("http://evil.example:4001", "localhost:4001", 403),
        ("http://localhost:4001@evil.example", "localhost:4001", 403),
        ("http://[", "localhost:4001", 403),
        ("", "", 403),
        ("file://", "localhost:4001", 403),
    ],
)
def test_an_origin(origin, host, status):
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    assert allowed("check_origin", headers, allow_origin=SITE) == status


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("http://10.0.0.7:4001", "10.0.0.7:4001", 200),
        ("http://localhost:4001", "localhost:4001", 200),
        ("https://my.site", "chat.my.site", 200),
        ("https://chat.net", "chat.net", 403),  # anybody can point a name at us
        ("http://10.0.0.8:4001", "10.0.0.7:4001", 403),
        (None, "chat.net", 200),
    ],
)
def test_an_origin_where_the_network_is_served(origin, host, status):
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    settings = {"host": "0.0.0.0", "allow_origin": SITE}
    assert allowed("check_origin", headers, **settings) == status


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, 200),
        ({"upstream": "http://model/v1"}, 403),
        ({"upstream": "http://model/v1", "allow_origin": ("null",)}, 200),
    ],
)
def test_a_page_from_disk_may_spend_no_money(settings, status):
    assert allowed("check_origin", {"origin": "null"}, **settings) == status


# ------------------------------------------------------------------------- handshakes

HANDSHAKE = {
    "host": "localhost:8888",
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def handshake(method="GET", version="1.1", **changes):
    """The status that the refusal of such a handshake has, or 101."""
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    headers = {k: v for k, v in (HANDSHAKE | changes).items() if v is not None}
    try:
        check_handshake(request_with(headers, method, version))
    except Problem as problem:
        return problem.status
    return 101


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 101),
        ({"connection": "keep-alive, Upgrade"}, 101),  # Firefox
        ({"connection": "upgrade"}, 101),
        ({"sec_websocket_protocol": "chatstream.v1, other"}, 101),
        ({"sec_websocket_extensions": "permessage-deflate"}, 101),
        ({"method": "POST"}, 400),
        ({"version": "1.0"}, 400),
        ({"connection": "close"}, 400),
        ({"connection": None}, 400),
        ({"connection": "Upgrade\xe9"}, 400),
        ({"sec_websocket_version": "8"}, 426),
        ({"sec_websocket_version": None}, 426),
        ({"sec_websocket_key": None}, 400),
        ({"sec_websocket_key": "short=="}, 400),
        ({"sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ"}, 400),
        ({"sec_websocket_protocol": "caf\xe9"}, 400),
        ({"sec_websocket_extensions": "caf\xe9"}, 400),
        ({"host": "caf\xe9"}, 400),
        ({"host": "xn--\x7f"}, 400),
    ],
)
def test_a_handshake(changes, status):
    assert handshake(**changes) == status


def test_a_wrong_version_is_told_the_right_one():
    headers = HANDSHAKE | {"sec-websocket-version": "8"}
    with pytest.raises(Problem) as refused:
        check_handshake(request_with(headers))
    assert refused.value.headers["sec-websocket-version"] == "13"


# ------------------------------------------------------------------ names and messages


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("An", "An"),
        ("  An  ", "An"),
        ("李雷", "李雷"),
        ("x" * 33, "x" * 32),
        ("A\u202en\x00\n", "An"),  # no turning round of text, no control character
        ("\uff21\uff4e", "An"),  # NFKC
        ("A\u00ad\u3164n\ufe0f", "An"),  # nothing invisible
        ("x" + "\u0336" * 9, "x" + "\u0336" * 2),  # no tower of marks
    ],
)
def test_a_name(name, shown):
    assert clean_name(name) == shown


@pytest.mark.parametrize("name", ["", "   ", "\x00", "\u200b"])
def test_a_guest_has_a_number(name):
    assert clean_name(name).startswith("guest-")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "fine"),
        ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, "fine"),
        ([], None),
        ("Hi", None),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        # The upstream judges these: it may know more than we do.
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "fine"),
        ({"messages": [{"role": "tool", "content": None}]}, "fine"),
        ({"messages": [{"role": "tool"}]}, "fine"),
        ({"messages": [{"role": "user", "content": "Hi"}], "stream": 1}, "stream"),
        ({"messages": [{"role": "user", "content": "Hi"}], "model": 1}, "model"),
    ],
)
def test_a_question(body, param):
    """Whatever is wrong is named."""
    assert wrong_in(body) == param


def test_only_some_protocols_need_messages():
    assert wrong_in({"prompt": "Once"}, COMPLETIONS) == "fine"
    assert wrong_in({"prompt": "Once", "stream": "yes"}, COMPLETIONS) == "stream"


def wrong_in(body, api=CHAT):
    try:
        check_question(check_json(json.dumps(body).encode()).fields, api)
    except Problem as problem:
        return problem.error["param"]
    return "fine"
