"""The SDKs as they are, and what each of them makes of an answer.

    CALLS        every way in which one of them asks
    PythonSdks   openai, anthropic, openai-agents
    NodeSdks     openai and the AI SDK, in one Node process

Each says {text, ids, numbers, types}, and if it raised
{error: {name, status, message}}, too.
"""

import asyncio
import json
import subprocess

from .common import need_module
from .npm import npm_packages
from .protocols import PROTOCOLS

__all__ = ["CALLS", "NodeSdks", "PythonSdks", "openai_client", "protocol_of"]

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

PACKAGES = ("openai", "ai", "@ai-sdk/openai", "@ai-sdk/anthropic")

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
        (folder / "node_modules").symlink_to(npm_packages(*PACKAGES) / "node_modules")
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
