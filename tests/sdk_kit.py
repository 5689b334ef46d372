"""What four protocols say on the wire, each in several manners, and the SDKs for Node.

PROTOCOLS    chat, completions, responses, messages: path, stream, whole answer
MANNERS      how upstreams differ: names, numbers, [DONE], comments
told()       the script of a stream in one of these manners
CALLS        every way in which an SDK asks, which PythonSdks and NodeSdks do
EventProxy   a connection that breaks after the event that the test says
"""

import asyncio
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kit import DONE, Proxy, delta, missing, need, need_module, reset, sse

RESPONSES, MESSAGES, COMPLETIONS = "/v1/responses", "/v1/messages", "/v1/completions"
WORDS = ["Long ", "connections ", "are ", "\u4f60\u597d ", "fun."]
TEXT = "".join(WORDS)

# --------------------------------------------------------------------- the protocols


def chat_stream(words=WORDS):
    return [*map(delta, words), delta(finish="stop")]


def chat_whole(words=WORDS):
    message = {"role": "assistant", "content": "".join(words)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return delta() | {"object": "chat.completion", "choices": [choice]}


def completion(text, finish=None):
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
    return delta() | {"object": "text_completion", "choices": [choice]}


def completion_stream(words=WORDS):
    return [*map(completion, words), completion("", "stop")]


def completion_whole(words=WORDS):
    return completion("".join(words), "stop")


def response(status, output=(), **fields):
    """A response as it stands; its usage is there once it is complete."""
    usage = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
    usage |= {"input_tokens_details": {"cached_tokens": 0}}
    usage |= {"output_tokens_details": {"reasoning_tokens": 0}}
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1700000000,
        "model": "scripted",
        "status": status,
        "error": None,
        "incomplete_details": None,
        "output": list(output),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage if status == "completed" else None,
    } | fields


def output_text(text):
    return {"type": "output_text", "text": text, "annotations": []}


def item(status, *content):
    said = {"id": "msg_1", "type": "message", "role": "assistant"}
    return said | {"status": status, "content": list(content)}


def response_stream(words=WORDS):
    text = "".join(words)
    at = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    said = item("completed", output_text(text))
    begun = {"output_index": 0, "item": item("in_progress")}
    ended = {"output_index": 0, "item": said}
    return [
        {"type": "response.created", "response": response("in_progress")},
        {"type": "response.in_progress", "response": response("in_progress")},
        {"type": "response.output_item.added"} | begun,
        {"type": "response.content_part.added", "part": output_text("")} | at,
        *[text_delta(word) for word in words],
        {"type": "response.output_text.done", "text": text, "logprobs": []} | at,
        {"type": "response.content_part.done", "part": output_text(text)} | at,
        {"type": "response.output_item.done"} | ended,
        {"type": "response.completed", "response": response("completed", [said])},
    ]


def text_delta(word):
    at = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    return {"type": "response.output_text.delta", "delta": word, "logprobs": []} | at


def response_whole(words=WORDS):
    return response("completed", [item("completed", output_text("".join(words)))])


def message(content=(), stop_reason=None):
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "scripted",
        "content": list(content),
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 5},
    }


def message_stream(words=WORDS):
    block = {"type": "text", "text": ""}
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    return [
        {"type": "message_start", "message": message()},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "ping"},
        *map(block_delta, words),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": end, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    ]


def block_delta(word):
    change = {"type": "text_delta", "text": word}
    return {"type": "content_block_delta", "index": 0, "delta": change}


def message_whole(words=WORDS):
    return message([{"type": "text", "text": "".join(words)}], "end_turn")


class Protocol(NamedTuple):
    """One of the four ways to ask a model."""

    path: str
    stream: Callable  # (words): the payloads of its events
    whole: Callable  # (words): the answer that is not streamed
    ask: Callable  # (prompt): the fields of a question


def by_message(prompt):
    talk = [{"role": "user", "content": prompt}]
    return {"model": "scripted", "messages": talk, "max_tokens": 100}


PROTOCOLS = {
    "chat": Protocol("/v1/chat/completions", chat_stream, chat_whole, by_message),
    "completions": Protocol(
        COMPLETIONS,
        completion_stream,
        completion_whole,
        lambda prompt: {"model": "scripted", "prompt": prompt},
    ),
    "responses": Protocol(
        RESPONSES,
        response_stream,
        response_whole,
        lambda prompt: {"model": "scripted", "input": prompt},
    ),
    "messages": Protocol(MESSAGES, message_stream, message_whole, by_message),
}


# ------------------------------------------------------------------------ the manners


class Manner(NamedTuple):
    """How an upstream tells it."""

    named: bool  # `event:` lines
    numbered: bool  # `sequence_number`
    done: bool  # [DONE] after the last event
    comments: bool  # between events and inside them


MANNERS = {
    "by the book": Manner(named=True, numbered=True, done=False, comments=False),
    "data alone": Manner(named=False, numbered=False, done=True, comments=False),
    "names, comments": Manner(named=True, numbered=False, done=True, comments=True),
    "numbers, comments": Manner(named=False, numbered=True, done=False, comments=True),
}
BOOK = MANNERS["by the book"]


def framed(manner, payload, n):
    """The bytes of one event. Only responses are numbered; chat knows no names."""
    kind = payload.get("type")
    if manner.numbered and str(kind).startswith("response."):
        payload = payload | {"sequence_number": n}
    before = [": ping", ""] if manner.comments else []
    name = [f"event: {kind}"] if manner.named and kind else []
    inside = [": a comment"] if manner.comments else []
    lines = [*before, *name, *inside, f"data: {json.dumps(payload)}", "", ""]
    return "\n".join(lines).encode()


def told(manner, steps):
    """The script of a stream: payloads become events, other steps stay as they are."""
    script, n = [], 0
    for step in steps:
        script.append(framed(manner, step, n) if isinstance(step, dict) else step)
        n += isinstance(step, dict)
    if manner.done and isinstance(steps[-1], dict):
        script.append(DONE)
    return sse(*script)


# --------------------------------------------------------------------- SDKs for Python


class PythonSdks:
    """What the SDKs for Python make of an answer, told as NodeSdks tells it."""

    def ask(self, call, url, prompt=None, stream=True, key="none"):
        said = {"text": "", "ids": [], "numbers": [], "types": []}
        try:
            getattr(self, f"_{call.replace(' ', '_')}")(said, url, prompt, stream, key)
        except Exception as error:
            status = getattr(error, "status_code", None)
            what = {"name": type(error).__name__, "status": status}
            said["error"] = what | {"message": str(error)}
        return said

    def _openai_chat(self, said, url, prompt, stream, key):
        talk = [{"role": "user", "content": prompt}]
        with openai_client(url, key) as client:
            create = client.chat.completions.create
            got = create(model="scripted", messages=talk, stream=stream)
            if not stream:
                said["text"] = got.choices[0].message.content
                return
            for chunk in got:
                said["text"] += "".join(c.delta.content or "" for c in chunk.choices)

    def _openai_completions(self, said, url, prompt, stream, key):
        with openai_client(url, key) as client:
            create = client.completions.create
            got = create(model="scripted", prompt=prompt, stream=stream)
            for chunk in got if stream else [got]:
                said["text"] += "".join(choice.text for choice in chunk.choices)

    def _openai_responses(self, said, url, prompt, stream, key):
        with openai_client(url, key) as client:
            create = client.responses.create
            got = create(model="scripted", input=prompt, stream=stream)
            if stream:
                return note(got, said)
            said["text"], said["ids"] = got.output_text, [got.id]

    def _openai_helper(self, said, url, prompt, stream, key):
        """The SDK puts the response together by itself, and is strict about ids."""
        with (
            openai_client(url, key) as client,
            client.responses.stream(model="scripted", input=prompt) as got,
        ):
            note(got, said)
            assert got.get_final_response().output_text == said["text"]

    def _anthropic_messages(self, said, url, prompt, stream, key):
        anthropic = need_module("anthropic", "pip install anthropic")
        body = {"model": "scripted", "max_tokens": 100}
        body["messages"] = [{"role": "user", "content": prompt}]
        with anthropic.Anthropic(base_url=url, api_key=key, max_retries=0) as client:
            if not stream:
                said["text"] = client.messages.create(**body).content[0].text
                return
            with client.messages.stream(**body) as got:
                for text in got.text_stream:
                    said["text"] += text
                assert got.get_final_text() == said["text"]

    def _agents_chat(self, *asked):
        self._agents("OpenAIChatCompletionsModel", *asked)

    def _agents_responses(self, *asked):
        self._agents("OpenAIResponsesModel", *asked)

    def _agents(self, kind, said, url, prompt, stream, key):
        agents = need_module("agents", "pip install openai-agents")
        agents.set_tracing_disabled(True)
        asyncio.run(run_agent(agents, kind, said, url, prompt, stream, key))


def openai_client(url, key="none", **options):
    openai = need_module("openai", "pip install openai")
    options = {"max_retries": 0} | options
    return openai.OpenAI(base_url=url + "/v1", api_key=key, **options)


def note(events, said):
    """Read a response as it streams; one that says that it failed is an error."""
    for event in events:
        said["types"].append(event.type)
        said["numbers"].append(event.sequence_number)
        if hasattr(event, "response"):
            said["ids"].append(event.response.id)
        if event.type == "response.output_text.delta":
            said["text"] += event.delta
        if event.type == "response.failed":
            raise RuntimeError(event.response.error.message)


async def run_agent(agents, kind, said, url, prompt, stream, key):
    openai = need_module("openai", "pip install openai")
    url += "/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
        model = getattr(agents, kind)(model="scripted", openai_client=client)
        agent = agents.Agent(name="One", model=model)
        if not stream:
            said["text"] = (await agents.Runner.run(agent, prompt)).final_output
            return
        async for event in agents.Runner.run_streamed(agent, prompt).stream_events():
            data = getattr(event, "data", None)
            if getattr(data, "type", None) == "response.output_text.delta":
                said["text"] += data.delta


# ----------------------------------------------------------------------- SDKs for Node

PACKAGES = ["openai", "ai", "@ai-sdk/openai", "@ai-sdk/anthropic"]


def npm_packages():
    """A folder with these packages, kept from one run to the next."""
    npm = need("npm", "apt-get install nodejs npm")
    need("node", "apt-get install nodejs")
    cache = Path(tempfile.gettempdir()) / f"chatstream-test-sdks-{os.getuid()}"
    if not cache.exists():
        folder = Path(tempfile.mkdtemp())
        install = [npm, "install", "--no-audit", "--no-fund", "--silent", *PACKAGES]
        try:
            subprocess.run(install, cwd=folder, check=True, timeout=120)
        except (OSError, subprocess.SubprocessError):
            missing("the AI SDK", f"npm install {' '.join(PACKAGES)}")
        folder.rename(cache)  # at once whole, for other runs that look for it
    return cache


# Reads a question a line, answers a line: {text, ids, numbers, error: {name, ...}}.
NODE = r"""
import { createInterface } from 'node:readline';
import OpenAI from 'openai';
import { generateText, streamText } from 'ai';
import { createOpenAI } from '@ai-sdk/openai';
import { createAnthropic } from '@ai-sdk/anthropic';

globalThis.AI_SDK_LOG_WARNINGS = false; // on stdout, which is ours

const openai = (ask) =>
  new OpenAI({ baseURL: ask.url + '/v1', apiKey: ask.key, maxRetries: 0 });
const messages = (ask) => [{ role: 'user', content: ask.prompt }];

async function follow(stream, said) {
  for await (const event of stream) {
    said.types.push(event.type);
    said.numbers.push(event.sequence_number);
    if (event.response) said.ids.push(event.response.id);
    if (event.type === 'response.output_text.delta') said.text += event.delta;
    if (event.type === 'response.failed')
      throw Object.assign(new Error(event.response.error.message), event.response);
  }
}

async function ai(ask, said, model) {
  const options = { model, prompt: ask.prompt, maxRetries: 0 };
  if (!ask.stream) {
    said.text = (await generateText(options)).text;
    return;
  }
  const result = streamText({ ...options, onError() {} });
  for await (const part of result.fullStream) {
    if (part.type === 'text-delta') said.text += part.text;
    if (part.type === 'error') throw part.error;
    if (part.type === 'finish') said.finish = part.finishReason;
  }
}

const calls = {
  async 'openai chat'(ask, said) {
    const { stream } = ask;
    const body = { model: 'scripted', messages: messages(ask), stream };
    const got = await openai(ask).chat.completions.create(body);
    if (!stream) said.text = got.choices[0].message.content;
    else
      for await (const { choices } of got)
        said.text += choices[0]?.delta?.content ?? '';
  },
  async 'openai responses'(ask, said) {
    const { prompt, stream } = ask;
    const body = { model: 'scripted', input: prompt, stream };
    const got = await openai(ask).responses.create(body);
    if (stream) return follow(got, said);
    said.text = got.output_text;
    said.ids = [got.id];
  },
  async 'openai retrieve'(ask, said) {
    const query = { stream: true, starting_after: ask.after };
    await follow(await openai(ask).responses.retrieve(ask.id, query), said);
  },
  'ai chat': (ask, said) => ai(ask, said, provider(createOpenAI, ask).chat('scripted')),
  'ai responses': (ask, said) =>
    ai(ask, said, provider(createOpenAI, ask).responses('scripted')),
  'ai messages': (ask, said) =>
    ai(ask, said, provider(createAnthropic, ask)('scripted')),
};

function provider(create, ask) {
  return create({ baseURL: ask.url + '/v1', apiKey: ask.key });
}

for await (const line of createInterface({ input: process.stdin })) {
  const ask = JSON.parse(line);
  const said = { text: '', ids: [], numbers: [], types: [] };
  try {
    await calls[ask.call](ask, said);
  } catch (error) {
    const { status, statusCode, message } = error;
    const name = error.name === 'Error' ? error.constructor.name : error.name;
    said.error = { name, status: status ?? statusCode, message: message ?? `${error}` };
  }
  console.log(JSON.stringify(said));
}
"""


class NodeSdks:
    """One Node process for all questions: starting one takes longer than asking."""

    def __init__(self, folder):
        (folder / "node_modules").symlink_to(npm_packages() / "node_modules")
        (folder / "ask.mjs").write_text(NODE)
        self.errors = folder / "stderr"
        with self.errors.open("wb") as errors:
            self._process = subprocess.Popen(
                ["node", str(folder / "ask.mjs")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, call, url, prompt=None, stream=True, key="none", **more):
        """What the SDK makes of it."""
        ask = {"call": call, "url": url, "prompt": prompt, "stream": stream, "key": key}
        self._process.stdin.write(json.dumps(ask | more) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self.errors.read_text()
        return json.loads(line)

    def stop(self):
        self._process.kill()
        self._process.communicate()


# what is asked with, by the names that PythonSdks and NodeSdks have for it
CALLS = [
    "python: openai chat",
    "python: openai completions",
    "python: openai responses",
    "python: openai helper",
    "python: anthropic messages",
    "python: agents chat",
    "python: agents responses",
    "node: openai chat",
    "node: openai responses",
    "node: ai chat",
    "node: ai responses",
    "node: ai messages",
]


def protocol_of(call):
    """The protocol that this call speaks."""
    name = call.split()[-1]
    return PROTOCOLS["responses" if name == "helper" else name]


# ------------------------------------------------------- a line that breaks at an event


class EventProxy(Proxy):
    """Passes bytes on, and resets one connection after so many events."""

    def __init__(self, port):
        super().__init__(port)
        self._after = None

    def cut_after(self, count):
        self._after = count

    async def _down(self, server, client):
        seen = b""
        async for piece in server:
            seen += piece
            if self._after is not None and seen.count(b"\n\n") >= self._after:
                place = len(b"\n\n".join(seen.split(b"\n\n")[: self._after])) + 2
                self._after, self.cuts = None, self.cuts + 1
                await client.send_all(piece[: place - (len(seen) - len(piece))])
                return reset(client)
            await client.send_all(piece)
