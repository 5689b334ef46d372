"""Questions, and what an answer to them says."""

import pytest

from .client import CHAT, OPENAI, asking, stream

FORMATS = pytest.mark.parametrize("path", [CHAT, OPENAI])


def ask(prompt, **fields):
    """A body that both paths take; the first ignores that it shall stream."""
    return asking(prompt, stream=True, **fields)


def text_of(events):
    """What an answer says, in either wire format."""
    return "".join(content_of(event.json) for event in events if event.data != "[DONE]")


def content_of(payload):
    choices = payload.get("choices") or []
    said = [payload, *(choice["delta"] for choice in choices)]
    return "".join(part.get("content") or "" for part in said)


def error_of(events):
    """The error that the last event tells, after making sure that it is the last word:
    no [DONE], and no finish_reason that nobody gave."""
    *others, last = events
    assert all(event.data != "[DONE]" for event in events)
    for event in others:
        for choice in event.json.get("choices", []):
            assert choice["finish_reason"] is None
    assert last.type == "error"
    return last.json["error"]


def asked(server, prompt):
    """An answer under way."""
    return stream("POST", server.http + OPENAI, None, asking(prompt, stream=True))


def at(server, response):
    """Where this server has somebody's answer."""
    return f"{server.http}/answers/{response.headers['x-answer-id']}"
