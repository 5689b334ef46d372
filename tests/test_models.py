"""Which models may be asked, and the short requests that are passed through."""

import pytest
import trio
from kit import (
    BOOK,
    CHAT,
    FIN,
    MESSAGES,
    PROTOCOLS,
    Gate,
    Upstream,
    asking,
    fetch,
    fetch_events,
    need_module,
    openai_client,
    plain,
    told,
    until,
)

NAMES = ["large", "org/small:free"]


def model(name):
    return {"id": name, "object": "model", "created": 1, "owned_by": "test"}


def catalogue(heard):
    """An upstream's list of models, and each of them."""
    _, _, name = heard.target.partition("/v1/models/")
    name = name.replace("%2F", "/").replace("%3A", ":")
    if name in NAMES:
        return [plain(200, model(name))]
    if name:
        return [plain(404, {"error": {"message": f"No model {name} here."}})]
    return [plain(200, {"object": "list", "data": [model(name) for name in NAMES]})]


@pytest.fixture(scope="module")
def library():
    """An upstream that has two models."""
    with Upstream() as upstream:
        upstream.other = catalogue
        yield upstream


@pytest.fixture(scope="module")
def free(shared, library):
    """A relay whose clients may ask for any model."""
    return shared("--upstream", library.url)


@pytest.fixture(scope="module")
def pinned(shared, library):
    """A relay for two models, one of which the upstream lists."""
    return shared("--upstream", library.url, "--model", "mine", "--model", "large")


def question(name, prompt, model=None):
    """(path, body) of a question in this protocol; the chat page names no model."""
    if name == "page":
        return CHAT, asking(prompt)
    body = PROTOCOLS[name].ask(prompt) | {"model": model, "stream": True}
    return PROTOCOLS[name].path, {k: v for k, v in body.items() if v is not None}


def script(upstream, name):
    stream = PROTOCOLS["chat" if name == "page" else name].stream()
    return upstream.script(*told(BOOK._replace(done=True), stream))


ALL = pytest.mark.parametrize("name", PROTOCOLS)

# -------------------------------------------------------------------------- --model


@ALL
async def test_a_model_that_is_not_pinned_cannot_be_asked(pinned, library, name):
    prompt = script(library, name)
    path, body = question(name, prompt, "org/small:free")
    response = await fetch("POST", pinned.http + path, None, body)
    assert response.status == 404
    assert response.error["code"] == "model_not_found"
    assert "org/small:free" in response.error["message"]
    assert not library.asked(prompt)


@ALL
async def test_each_pinned_model_can_be_asked(pinned, library, name):
    for model in ("mine", "large"):
        prompt = script(library, name)
        path, body = question(name, prompt, model)
        await fetch_events("POST", pinned.http + path, None, body)
        assert library.asked(prompt)[0].json["model"] == model


@pytest.mark.parametrize("name", ["page", *PROTOCOLS])
async def test_who_names_no_model_gets_the_first_pinned_one(pinned, library, name):
    prompt = script(library, name)
    path, body = question(name, prompt)
    await fetch_events("POST", pinned.http + path, None, body)
    assert library.asked(prompt)[0].json["model"] == "mine"


@pytest.mark.parametrize("name", ["page", *PROTOCOLS])
async def test_without_pins_the_upstreams_first_model_is_asked(free, library, name):
    prompt = script(library, name)
    path, body = question(name, prompt)
    await fetch_events("POST", free.http + path, None, body)
    assert library.asked(prompt)[0].json["model"] == "large"


@ALL
async def test_without_pins_any_model_may_be_asked(free, library, name):
    """The upstream need not list it: that is its own to judge."""
    prompt = script(library, name)
    path, body = question(name, prompt, "a/new-one")
    await fetch_events("POST", free.http + path, None, body)
    assert library.asked(prompt)[0].json["model"] == "a/new-one"


async def test_the_pinned_models_are_the_list(pinned):
    listed = (await fetch("GET", pinned.http + "/v1/models")).json
    assert [model["id"] for model in listed["data"]] == ["mine", "large"]
    assert {model["object"] for model in listed["data"]} == {"model"}
    health = (await fetch("GET", pinned.http + "/healthz")).json
    assert health["model"] == "mine"


@pytest.mark.parametrize("variable", ["CHATSTREAM_MODEL", "OPENAI_MODEL"])
async def test_models_can_be_pinned_by_the_environment(serve, library, variable):
    env = {"OPENAI_BASE_URL": library.url, variable: "large"}
    many = {**env, "CHATSTREAM_MODEL": "mine,large"}
    for environment, names in ((env, ["large"]), (many, ["mine", "large"])):
        server = serve(env=environment)
        listed = (await fetch("GET", server.http + "/v1/models")).json
        assert [model["id"] for model in listed["data"]] == names


def test_an_sdk_is_told_that_there_is_no_such_model(pinned, library):
    openai = need_module("openai", "pip install openai")
    with openai_client(pinned.http) as client:
        talk = asking("Hello")["messages"]
        with pytest.raises(openai.NotFoundError) as raised:
            client.chat.completions.create(model="other", messages=talk)
        assert raised.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError) as raised:
            client.models.retrieve("other")
        assert raised.value.code == "model_not_found"
        assert client.models.retrieve("mine").id == "mine"


# ------------------------------------------------------------------ /v1/models/{name}


@pytest.mark.parametrize("path", ["large", "org/small:free", "org%2Fsmall%3Afree"])
async def test_one_model_is_shown(free, path):
    response = await fetch("GET", f"{free.http}/v1/models/{path}")
    assert response.status == 200
    assert response.json["id"] == path.replace("%2F", "/").replace("%3A", ":")


def test_sdks_show_a_model_whose_name_has_a_slash(free):
    anthropic = need_module("anthropic", "pip install anthropic")
    with openai_client(free.http) as client:
        assert client.models.retrieve("org/small:free").id == "org/small:free"
        assert [model.id for model in client.models.list()] == NAMES
    with anthropic.Anthropic(base_url=free.http, api_key="none") as client:
        assert client.models.retrieve("org/small:free").id == "org/small:free"
        assert [model.id for model in client.models.list()] == NAMES


async def test_a_model_that_is_not_there_is_told_in_the_upstreams_words(free):
    response = await fetch("GET", free.http + "/v1/models/none")
    assert response.status == 404
    assert response.error["message"] == "No model none here."


@pytest.mark.parametrize("path", ["../files", "..%2f..%2fadmin", "a/%2e%2e/../files"])
async def test_the_name_of_a_model_leads_nowhere_else(free, library, path):
    """The server's key goes with it."""
    response = await fetch("GET", f"{free.http}/v1/models/{path}")
    assert response.status == 404
    assert not [heard for heard in library.heard if ".." in heard.target]


async def test_the_demo_shows_its_model(demo):
    assert (await fetch("GET", demo.http + "/v1/models/demo")).json["id"] == "demo"
    response = await fetch("GET", demo.http + "/v1/models/other")
    assert response.status == 404
    assert response.error["message"]


async def test_the_list_is_asked_for_once_by_all_with_the_same_key(serve):
    """Also by those who come while it is on its way."""
    gate = Gate()
    with Upstream() as upstream:
        upstream.other = lambda heard: [gate, *catalogue(heard)]
        server = serve("--upstream", upstream.url)
        listed = []

        async def look(key):
            head = {"Authorization": f"Bearer {key}"}
            response = await fetch("GET", server.http + "/v1/models", head)
            listed.append([model["id"] for model in response.json["data"]])

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(look, "first-key-0123")
            await until(lambda: upstream.heard)
            gate.open()
        await look("first-key-0123")
        assert len(upstream.heard) == 1
        await look("another-key-0123")
        assert len(upstream.heard) == 2
        assert listed == [NAMES] * 7


@pytest.mark.parametrize("query", ["", "?api-version=1"])
def test_a_list_with_pages_is_read_to_its_end(serve, query):
    """An SDK asks on while there is more: the same page again, and it would never end."""
    anthropic = need_module("anthropic", "pip install anthropic")

    def page(heard):
        n = len(heard.target.partition("after_id=")[2].partition("&")[0])
        assert heard.target.endswith(query.lstrip("?"))
        name = "a" * (n + 1)
        listed = [{"id": name, "type": "model", "display_name": "", "created_at": "2026-01-01"}]
        return [plain(200, {"data": listed, "has_more": n < 3, "first_id": name, "last_id": name})]

    with Upstream() as upstream:
        upstream.other = page
        server = serve("--upstream", upstream.url + query)
        with anthropic.Anthropic(base_url=server.http, api_key="none") as client:
            listed = zip(client.models.list(limit=1), range(9), strict=False)
            assert [model.id for model, _ in listed] == ["a", "aa", "aaa", "aaaa"]
        assert len(upstream.heard) == 4


async def test_a_refusal_is_told_to_all_who_wait_and_to_nobody_later(serve):
    gate = Gate()
    with Upstream() as upstream:
        upstream.other = lambda heard: [gate, plain(429, {"error": {"message": "Later."}})]
        server = serve("--upstream", upstream.url)
        told = []

        async def look():
            told.append((await fetch("GET", server.http + "/v1/models")).status)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(look)
            await until(lambda: upstream.heard)
            await trio.sleep(0.2)  # until all of them wait
            gate.open()
        assert (told, len(upstream.heard)) == ([429] * 5, 1)
        upstream.other = catalogue
        assert (await fetch("GET", server.http + "/v1/models")).status == 200


async def test_the_list_comes_though_the_first_to_ask_has_left(serve):
    gate = Gate()
    with Upstream() as upstream:
        upstream.other = lambda heard: [gate, *catalogue(heard)]
        server = serve("--upstream", upstream.url)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, "GET", server.http + "/v1/models")
            await until(lambda: upstream.heard)
            nursery.cancel_scope.cancel()
        gate.open()
        response = await fetch("GET", server.http + "/v1/models")
        assert [model["id"] for model in response.json["data"]] == NAMES


# ------------------------------------------------------------ what is passed through

VECTORS = {
    "object": "list",
    "model": "e",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.25, -1.5]}],
    "usage": {"prompt_tokens": 2, "total_tokens": 2},
}


@pytest.mark.parametrize("server", ["free", "pinned"])
def test_an_sdk_gets_embeddings(request, library, server):
    """By any model: a model that chats is not the one that embeds."""
    prompt = library.script(plain(200, VECTORS))
    url = request.getfixturevalue(server).http
    with openai_client(url) as client:
        got = client.embeddings.create(model="e", input=prompt)
    assert got.data[0].embedding == [0.25, -1.5]
    (heard,) = library.asked(prompt)
    assert heard.target == "/v1/embeddings"
    assert heard.json["model"] == "e"


def test_an_sdk_gets_a_count_of_tokens(free, library):
    anthropic = need_module("anthropic", "pip install anthropic")
    prompt = library.script(plain(200, {"input_tokens": 12}))
    with anthropic.Anthropic(base_url=free.http, api_key="none") as client:
        talk = asking(prompt)["messages"]
        assert client.messages.count_tokens(model="m", messages=talk).input_tokens == 12
    (heard,) = library.asked(prompt)
    assert heard.target == "/v1/messages/count_tokens"
    assert heard.headers["anthropic-version"]


SHORT = {
    "/v1/embeddings": {"model": "e", "input": None},
    "/v1/messages/count_tokens": {"model": "m", "messages": None},
}


def short(path, prompt):
    talk = prompt if path == "/v1/embeddings" else asking(prompt)["messages"]
    return {key: value or talk for key, value in SHORT[path].items()}


@pytest.mark.parametrize("path", SHORT)
async def test_a_short_request_and_its_answer_pass_as_they_are(free, library, path):
    answer = {"odd": [1.5, None, {"x": "\u4f60"}], "big": 10**30}
    prompt = library.script(plain(200, answer, "x-request-id: req_1"))
    body = short(path, prompt) | {"more": [1, {"y": None}]}
    response = await fetch("POST", free.http + path, None, body)
    assert response.json == answer
    assert response.headers["x-request-id"] == "req_1"
    assert library.asked(prompt)[0].json == body


@pytest.mark.parametrize("path", SHORT)
async def test_a_short_request_fails_like_any_other(free, library, path):
    refused = library.script(plain(429, {"detail": "Slower."}, "Retry-After: 7"))
    response = await fetch("POST", free.http + path, None, short(path, refused))
    assert response.status == 429
    assert response.error["message"] == "Slower."
    assert response.headers["retry-after"] == "7"
    cut = library.script(plain(200, VECTORS)[:-10], FIN)
    response = await fetch("POST", free.http + path, None, short(path, cut))
    assert response.status == 502
    assert response.error["message"]


@pytest.mark.parametrize("path", [*SHORT, MESSAGES, "/v1/completions"])
async def test_the_demo_says_what_it_cannot_do(demo, path):
    body = asking("Hello", model="demo", input="Hello") | {"prompt": "Hello"}
    response = await fetch("POST", demo.http + path, None, body)
    assert 400 <= response.status < 500
    assert "demo" in response.error["message"].lower()


# --------------------------------------------------------------------- the same paths


@pytest.mark.parametrize("form", ["{}", "/v1{}/", "//v1/{}", "{}/"])
@ALL
async def test_a_path_may_be_written_in_other_ways(free, library, name, form):
    """A base URL without /v1, or one with a slash at its end."""
    prompt = script(library, name)
    path, body = question(name, prompt, "large")
    path = form.format(path.removeprefix("/v1"))
    response = await fetch("POST", free.http + path, None, body)
    assert response.status == 200
    assert library.asked(prompt)[0].target == PROTOCOLS[name].path


async def test_so_may_that_of_the_models(free):
    for path in ("/models", "/v1/models/", "//v1//models"):
        response = await fetch("GET", free.http + path)
        assert [model["id"] for model in response.json["data"]] == NAMES
    for path in ("/models/large", "//v1/models/large/"):
        assert (await fetch("GET", free.http + path)).json["id"] == "large"
