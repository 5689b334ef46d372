"""Who is measured: how each server is started, and what it needs to be there."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
CHATSTREAM = str(HERE.parent.parent / "chatstream.py")
BUILD = Path(tempfile.gettempdir()) / f"chatstream-bench-{os.getuid()}"
NPM_PACKAGES = ["ws", "nodejs-websocket"]


@dataclass(frozen=True)
class Peer:
    """`file` is started as `file PORT ARGUMENT`; `needs` are packages' names."""

    file: str
    needs: tuple[str, ...] = ()


STREAMS = {
    "chatstream": Peer("chatstream"),
    "C send() loop": Peer("limit.c"),
    "Node single loop": Peer("node_loop.js"),
    "Node timer each": Peer("article_sse.js"),
    "Starlette": Peer("starlette_sse.py", ("uvicorn", "starlette")),
    "sse-starlette": Peer("sse_starlette_server.py", ("uvicorn", "sse-starlette")),
    "aiohttp-sse": Peer("aiohttp_sse_server.py", ("aiohttp", "aiohttp-sse")),
}
ROOMS = {
    "chatstream": Peer("chatstream"),
    "picows": Peer("picows_room.py", ("picows", "uvloop")),
    "ws": Peer("ws_room.js", ("ws",)),
    "websockets": Peer("websockets_room.py", ("websockets",)),
    "nodejs-websocket": Peer("article_room.js", ("nodejs-websocket",)),
}
RELAYS = {
    "chatstream": Peer("chatstream"),
    "Node pipe": Peer("node_pipe.js"),
    "FastAPI + httpx2": Peer("fastapi_relay.py", ("fastapi", "uvicorn", "httpx2")),
}


def prepare():
    """Compile the C programs, and fetch the npm packages once, by their names."""
    BUILD.mkdir(exist_ok=True)
    for source in [*HERE.glob("*.c"), *HERE.glob("peers/*.c")]:
        compile_c(source)
    if shutil.which("npm") and not all(map(npm_version, NPM_PACKAGES)):
        command = ["npm", "install", "--no-save", "--no-package-lock", "--silent"]
        subprocess.run([*command, *NPM_PACKAGES], cwd=BUILD, check=False)


def compile_c(source):
    command = [shutil.which("cc") or "gcc", "-O2", "-D_GNU_SOURCE", str(source)]
    subprocess.run([*command, "-o", str(BUILD / source.stem)], check=True)


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
    return lacking


def command(peer, port, argument, other_port):
    """The command line; `argument` is events a second, or the upstream's port."""
    file = HERE / "peers" / peer.file
    if peer.file == "chatstream":
        ports = ["--port", str(port), "--room-port", str(other_port)]
        quiet = ["--room-rate", "0", "--log-level", "warning"]
        return [
            sys.executable,
            os.environ.get("CHATSTREAM", CHATSTREAM),
            *ports,
            *quiet,
        ]
    if file.suffix == ".c":
        return [str(BUILD / file.stem), str(port), str(argument)]
    runner = "node" if file.suffix == ".js" else sys.executable
    return [runner, str(file), str(port), str(argument)]
