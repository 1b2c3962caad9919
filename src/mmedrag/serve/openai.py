"""The chat-completions schema of the OpenAI API, as far as the pipeline has a meaning for it.

The last user message is the question, its image parts (else those of the last message that has
any) are the study's views, as ``data:`` URLs only. What is given but has no meaning here
(earlier turns, system messages, sampling settings) is listed in ``mmedrag.ignored`` of the
answer, never silently dropped. The field ``mmedrag`` of a request may hold ``task``,
``references``, ``noise``, ``answer_type`` and ``patient``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmedrag.serve.errors import Refused, bad
from mmedrag.serve.uploads import Upload, data_url

EXTRA = "mmedrag"
MEANT = ("model", "messages", "stream", "stream_options", "n", EXTRA)
MESSAGES = 64


@dataclass(frozen=True)
class Chat:
    """A checked request."""

    question: str
    images: tuple[Upload, ...]
    extra: Mapping[str, Any]
    stream: bool
    usage: bool
    ignored: tuple[str, ...]


def read(body: Mapping[str, Any], model: str) -> Chat:
    """Check a request body.

    Raises:
        Refused: 400 with the field at fault; 404 another model than ``model``.
    """
    check_model(body.get("model"), model)
    if body.get("n") not in (None, 1):
        raise bad("n: one answer is given, expected 1")
    for name in ("tools", "functions"):
        if body.get(name):
            raise bad(f"{name}: not supported")
    messages = body.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= MESSAGES:
        raise bad(f"messages: expected a list of 1 to {MESSAGES}")
    turns = [_message(message, i) for i, message in enumerate(messages)]
    last = max((i for i, turn in enumerate(turns) if turn[0] == "user"), default=None)
    if last is None:
        raise bad("messages: none has the role 'user'")
    shown = [i for i, turn in enumerate(turns[: last + 1]) if turn[2] and turn[0] == "user"]
    if not shown:
        raise bad("messages: no image, expected a part of type image_url with a data: URL")
    extra = body.get(EXTRA) or {}
    if not isinstance(extra, dict):
        raise bad(f"{EXTRA}: expected an object")
    ignored = [f"messages[{i}]" for i in range(len(turns)) if i not in (last, shown[-1])]
    if shown[-1] != last:
        ignored.append(f"messages[{shown[-1]}]: its text")
    ignored += sorted(name for name in body if name not in MEANT and body[name] is not None)
    options = body.get("stream_options") or {}
    usage = isinstance(options, dict) and bool(options.get("include_usage"))
    return Chat(
        question=turns[last][1].strip(),
        images=turns[shown[-1]][2],
        extra=extra,
        stream=bool(body.get("stream")),
        usage=usage,
        ignored=tuple(i[:80] for i in ignored),
    )


def _message(message: Any, at: int) -> tuple[str, str, tuple[Upload, ...]]:
    """(role, text, images) of one message."""
    where = f"messages[{at}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise bad(f"{where}: expected an object with role and content")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message["role"], content or "", ()
    if not isinstance(content, list):
        raise bad(f"{where}.content: expected text or a list of parts")
    texts, images = [], []
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            images.append(data_url(url.get("url") if isinstance(url, dict) else url, place))
        else:
            raise bad(f"{place}: expected a part of type text or image_url")
    return message["role"], "\n".join(texts), tuple(images)


def completion(body: Mapping[str, Any], chat: Chat, model: str, created: int) -> dict[str, Any]:
    """The response object; the evidence stands in its field ``mmedrag``."""
    return {
        "id": f"chatcmpl-{body['id']}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer_text(body), "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": body["usage"],
        EXTRA: evidence(body, chat),
    }


def chunks(body: Mapping[str, Any], chat: Chat, model: str, created: int) -> Iterator[bytes]:
    """The same as server-sent events: the answer in one piece, as it becomes known at once."""

    def event(choices: Sequence[dict[str, Any]], **more: Any) -> bytes:
        made = {
            "id": f"chatcmpl-{body['id']}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "choices": choices,
            **more,
        }
        return b"data: " + json.dumps(made, ensure_ascii=False).encode() + b"\n\n"

    delta = {"role": "assistant", "content": answer_text(body)}
    yield event([{"index": 0, "delta": delta, "finish_reason": None}])
    yield event(
        [{"index": 0, "delta": {}, "finish_reason": "stop"}], **{EXTRA: evidence(body, chat)}
    )
    if chat.usage:
        yield event([], usage=body["usage"])
    yield b"data: [DONE]\n\n"


def answer_text(body: Mapping[str, Any]) -> str:
    """The answer's text; an abstention says so first, since a chat shows nothing else."""
    text = str((body["answer"] or {}).get("text", ""))
    if body["abstained"]:
        return f"No answer: {body['abstain_reason']}. (The model said: {text})"
    return text


def evidence(body: Mapping[str, Any], chat: Chat) -> dict[str, Any]:
    return {**{k: v for k, v in body.items() if k != "usage"}, "ignored": list(chat.ignored)}


def check_model(asked: Any, model: str) -> None:
    """Refuse (404) another model than ``model``, which also answers to the name mmedrag."""
    if asked not in (None, "", model, "mmedrag"):
        raise Refused(404, "model_not_found", f"model: this service answers with {model!r}")


def models(model: str) -> dict[str, Any]:
    row = {"id": model, "object": "model", "created": 0, "owned_by": "mmedrag"}
    return {"object": "list", "data": [row]}
