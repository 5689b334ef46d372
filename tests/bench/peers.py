"""Who is measured: how each server is started, and what it needs to be there."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
CHATSTREAM = str(HERE.parent.parent / "chatstream.py")
BUILD = Path(tempfile.gettempdir()) / f"chatstream-bench-{os.getuid()}"
CERTIFICATE, KEY = str(BUILD / "certificate.pem"), str(BUILD / "key.pem")
NPM_PACKAGES = ["ws", "nodejs-websocket"]


@dataclass(frozen=True)
class Peer:
    """`file` is started as `file PORT ARGUMENT [CERTIFICATE KEY]`.

    `needs` are packages. Where `ours` is true, `file` is a version of chatstream.
    """

    file: str
    needs: tuple[str, ...] = ()
    tls: bool = False
    ours: bool = False


# A second module is measured in the same rounds: CHATSTREAM=NEW,OLD.
OURS = {
    name: Peer(file, ours=True)
    for name, file in zip(
        ("chatstream", "chatstream before"),
        os.environ.get("CHATSTREAM", CHATSTREAM).split(","),
        strict=False,
    )
}
OVER_TLS = {
    f"{name} over TLS": replace(peer, tls=True)
    for name, peer in OURS.items()
    if name == "chatstream"
}
STREAMS = {
    "C send() loop": Peer("limit.c"),
    "Node single loop": Peer("node_loop.js"),
    "Node timer each": Peer("article_sse.js"),
    "Node http2": Peer("node_http2.js"),
    "Starlette": Peer("starlette_sse.py", ("uvicorn", "starlette")),
    "sse-starlette": Peer("sse_starlette_server.py", ("uvicorn", "sse-starlette")),
    "aiohttp-sse": Peer("aiohttp_sse_server.py", ("aiohttp", "aiohttp-sse")),
}
ROOMS = {
    "picows": Peer("picows_room.py", ("picows", "uvloop")),
    "ws": Peer("ws_room.js", ("ws",)),
    "websockets": Peer("websockets_room.py", ("websockets",)),
    "nodejs-websocket": Peer("article_room.js", ("nodejs-websocket",)),
}
RELAYS = {
    "Node pipe": Peer("node_pipe.js"),
    "FastAPI + httpx2": Peer("fastapi_relay.py", ("fastapi", "uvicorn", "httpx2")),
}
ALL = OURS | OVER_TLS | STREAMS | ROOMS | RELAYS


def prepare():
    """Compile the C programs, make a certificate, fetch the npm packages by name."""
    BUILD.mkdir(exist_ok=True)
    for source in [*HERE.glob("*.c"), *HERE.glob("peers/*.c")]:
        compile_c(source)
    if not missing_for_tls() and not Path(KEY).exists():
        make_certificate()
    if shutil.which("npm") and not all(map(npm_version, NPM_PACKAGES)):
        command = ["npm", "install", "--no-save", "--no-package-lock", "--silent"]
        subprocess.run([*command, *NPM_PACKAGES], cwd=BUILD, check=False)


def compiler():
    return shutil.which("cc") or "gcc"


def compile_c(source):
    command = [compiler(), "-O2", "-D_GNU_SOURCE", str(source)]
    tls = [] if missing_for_tls() else ["-DTLS", "-lssl", "-lcrypto"]
    subprocess.run([*command, "-o", str(BUILD / source.stem), *tls], check=True)


def make_certificate():
    command = ["openssl", "req", "-x509", "-nodes", "-days", "3650"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    who = ["-subj", "/CN=localhost", "-addext", names]
    files = ["-out", CERTIFICATE, "-keyout", KEY]
    subprocess.run([*command, *curve, *who, *files], check=True, capture_output=True)


@functools.cache
def missing_for_tls():
    """What the load and the upstream lack to speak TLS."""
    includes = [compiler(), "-E", "-include", "openssl/ssl.h", "-x", "c", "/dev/null"]
    found = subprocess.run(includes, capture_output=True).returncode == 0
    lacking = [] if found else ["libssl-dev"]
    return lacking if shutil.which("openssl") else [*lacking, "openssl"]


def npm_version(name):
    package = BUILD / "node_modules" / name / "package.json"
    return json.loads(package.read_text())["version"] if package.exists() else None


def version_of(name):
    try:
        return npm_version(name) or version(name)
    except PackageNotFoundError:
        return None


def missing(peer):
    """What must be installed before this peer can run; empty if it can."""
    lacking = [name for name in peer.needs if not version_of(name)]
    if peer.file.endswith(".js") and not shutil.which("node"):
        lacking.append("node")
    return lacking + (missing_for_tls() if peer.tls else [])


def command(peer, port, argument, other_port):
    """The command line; `argument` is events a second, or the upstream's URL."""
    if peer.ours:
        flags = ["--port", str(port), "--room-port", str(other_port)]
        flags += ["--room-rate", "0", "--log-level", "warning"]
        tls = ["--certfile", CERTIFICATE, "--keyfile", KEY] if peer.tls else []
        return [sys.executable, peer.file, *flags, *tls]
    file = HERE / "peers" / peer.file
    arguments = [str(port), str(argument), *([CERTIFICATE, KEY] if peer.tls else [])]
    if file.suffix == ".c":
        return [str(BUILD / file.stem), *arguments]
    runner = "node" if file.suffix == ".js" else sys.executable
    return [runner, str(file), *arguments]
