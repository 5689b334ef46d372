"""The package: built, installed elsewhere, started; and how large its module is."""

import ast
import builtins
import dis
import subprocess
import sys
import tarfile
import types
import venv
import zipfile

import pytest
from kit import REBUILD, ROOT, fetch, missing

SOURCE = (ROOT / "chatstream.py").read_text()
PAGES = {path.name for path in (ROOT / "www").iterdir()}


def run(*command, cwd):
    done = subprocess.run(
        command, check=False, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def clone(folder):
    """What a clone has, the changes that are not committed yet included."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        missing("the git repository", "test a clone")
    for name in done.stdout.splitlines():
        if name.startswith(("www/", "chatstream.py", "pyproject", "README", "LICENSE")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def make_venv(folder):
    """The python of an environment with nothing in it."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("package")
    source, out = folder / "source", folder / "dist"
    source.mkdir()
    clone(source)
    python = make_venv(folder / "venv")
    run(python, "-m", "pip", "install", "-q", "build", cwd=folder)
    run(python, "-m", "build", "-o", out, source, cwd=folder)
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The python of an environment with the wheel and its dependencies, no more."""
    folder = tmp_path_factory.mktemp("installed")
    python = make_venv(folder / "venv")
    (wheel,) = built.glob("*.whl")
    run(python, "-m", "pip", "install", "-q", wheel, cwd=folder)
    return python


def test_the_wheel_has_the_module_and_the_pages(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"chatstream_www/{page}" for page in PAGES} <= names
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "chatstream.py",
        "chatstream_www",
    }


def test_the_sdist_has_all_to_build_from(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"chatstream.py", "pyproject.toml", "README.md", "LICENSE"}
    assert wanted | {f"www/{page}" for page in PAGES} <= names


def test_a_wheel_from_the_sdist_has_the_pages_too(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path]
    run(*pip, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert "chatstream_www/index.html" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize("way", ["command", "module"])
async def test_it_starts_from_anywhere_and_finds_its_pages(installed, serve, way):
    command = installed.parent / "chatstream"
    program = [command] if way == "command" else [installed, "-m", "chatstream"]
    server = serve(program=[str(part) for part in program])
    page = await fetch("GET", server.http + "/")
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name in PAGES:
        assert (await fetch("GET", f"{server.http}/{name}")).status == 200
    server.signal()
    assert await server.exit_code(10) == 0


def test_nothing_optional_is_needed(installed, tmp_path):
    """Redis, the SDK and the browser are for those who want them."""
    program = "import chatstream, sys; print(sorted(sys.modules))"
    loaded = run(installed, "-c", program, cwd=tmp_path)
    for name in ("coredis", "openai", "playwright", "httpx2"):
        assert f"'{name}'" not in loaded
    listed = run(installed, "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    assert "coredis" not in listed


def test_what_is_imported_later_is_there(installed, tmp_path):
    """HTTP/2 is loaded when it is needed."""
    run(installed, "-c", "import hypercorn.protocol.h2, h2", cwd=tmp_path)


def test_it_brings_no_more_than_it_says(installed, tmp_path):
    """Trio, trio-websocket, Hypercorn and what these need."""
    listed = run(installed, "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    names = {line.partition("==")[0].lower() for line in listed.splitlines()}
    assert not names & {"httpx2", "httpcore2", "httpx", "requests", "aiohttp"}


# --------------------------------------------------------------- it can still be read

# What goes over a ceiling takes the place of something else. Longer lines, or two
# statements in one, are no way to pass.


@REBUILD
def test_the_module_has_at_most_3800_lines():
    assert len(SOURCE.splitlines()) <= 3800


def test_no_function_has_more_than_40_lines():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        f"{node.name}, line {node.lineno}"
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, functions) and node.end_lineno - node.lineno >= 40
    ]
    assert long == []


def test_the_pages_have_at_most_3000_lines():
    assert sum(len((ROOT / "www" / page).read_text().splitlines()) for page in PAGES) <= 3000


IDEA, _, _ = SOURCE.partition("# That is the idea.")


def test_the_idea_takes_at_most_800_lines():
    """The log, framing, delivery, writers."""
    assert len(IDEA.splitlines()) < 800 < len(SOURCE.splitlines())


def test_the_idea_needs_nothing_of_what_follows(monkeypatch):
    """Each name that its functions use is its own, imported or built in."""
    code, names = compile(IDEA, "idea", "exec"), dict(vars(builtins), __name__="idea")
    monkeypatch.setitem(sys.modules, "idea", types.ModuleType("idea"))  # for dataclasses
    exec(code, names)
    used, codes = set(), [code]
    for part in codes:
        codes += [const for const in part.co_consts if isinstance(const, types.CodeType)]
        loads = [i for i in dis.get_instructions(part) if i.opname == "LOAD_GLOBAL"]
        used |= {instruction.argval for instruction in loads}
    assert used <= names.keys()
