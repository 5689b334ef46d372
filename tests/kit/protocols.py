"""What four protocols say on the wire, each in several manners.

    PROTOCOLS   chat, completions, responses, messages: path, stream, whole answer
    MANNERS     how upstreams differ: names, numbers, [DONE], comments
    told()      the script of a stream in one of these manners

The SDKs that hear it are in sdks.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

from .client import OPENAI
from .upstream import DONE, delta, sse

__all__ = [
    "BOOK",
    "COMPLETIONS",
    "MANNERS",
    "MESSAGES",
    "PROTOCOLS",
    "RESPONSES",
    "SENTENCE",
    "WORDS",
    "chat_stream",
    "chat_whole",
    "framed",
    "message_stream",
    "message_whole",
    "response_stream",
    "response_whole",
    "told",
]

RESPONSES, MESSAGES, COMPLETIONS = "/v1/responses", "/v1/messages", "/v1/completions"
WORDS = ["Long ", "connections ", "are ", "\u4f60\u597d ", "fun."]
SENTENCE = "".join(WORDS)

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
    "chat": Protocol(OPENAI, chat_stream, chat_whole, by_message),
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
