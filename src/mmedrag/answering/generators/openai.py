"""Any OpenAI-compatible server (vLLM, SGLang, llama.cpp, a hosted service), images included.

Off unless configured: there is no default server, because questions and images (patient data)
leave this machine. The key comes from the environment only. Images are sent as data URLs of
re-encoded pixels, so that no metadata of the file travels.
"""

from __future__ import annotations

import base64
import ipaddress
import logging
import math
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from mmedrag.answering.generators.decoding import NO, YES, Decoding
from mmedrag.answering.generators.vision import view_key
from mmedrag.images import apply_noise, load_image, png_bytes
from mmedrag.records import Answer, Prompt, Request, UserError, answer_span, separate

log = logging.getLogger(__name__)
TEXTS = ("text", "output_text")  # parts of a message that are text
REFUSABLE = {  # settings a server may refuse, and how its message names them
    **{n: rf"(?<![a-z_]){n}(?![a-z_])" for n in ("max_tokens", "temperature", "top_p", "seed")},
    "logprobs": r"log_?prob",
}
KEPT = 4096  # answers remembered, so that a chunk asked again after one bad row costs nothing


class OpenAIGenerator:
    """A served model.

    Args:
        model: the name under which the server knows it.
        base_url: the server, such as ``http://127.0.0.1:8000/v1``; required.
        key_variable: environment variable that holds the key; unset means no key.
        concurrency: requests under way at once. retries: for refused or failed calls, with the
            client's exponential back-off; timeout: seconds per call.
        image_size: side at which noise is drawn; max_side: larger pictures are scaled down.
        context, image_tokens: what the served model takes; used to budget references.
        reasoning_tokens: what is granted besides the answer's own tokens where a reply was cut off
            while the model reasoned: it is asked again then.
        extra: further fields of the request body, as the server documents them.
    """

    def __init__(
        self,
        model: str | Path | None,
        adapter: str | Path | None = None,
        *,
        base_url: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        retries: int = 4,
        timeout: float = 120.0,
        image_size: int = 336,
        max_side: int = 1344,
        max_images: int = 8,
        context: int = 8192,
        image_tokens: int = 1024,
        reasoning_tokens: int = 4096,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if not model or not base_url:
            raise UserError("generator openai: model and base_url are required, neither is guessed")
        if adapter is not None:
            raise UserError("generator openai: an adapter is loaded by the server, not here")
        if urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).hostname:
            raise UserError(f"generator openai: base_url {base_url!r}, expected http(s)://host/...")
        try:
            from openai import OpenAI
        except ModuleNotFoundError:
            raise UserError(
                "generator openai needs the package 'openai'; "
                "install it with: pip install 'mmedrag[openai]'"
            ) from None

        self.name, self.image_size, self.context = str(model), image_size, context
        self.max_side, self.max_images, self.image_tokens = max_side, max_images, image_tokens
        self.reasoning_room = reasoning_tokens
        self.concurrency, self.extra = max(1, concurrency), dict(extra or {})
        self.decoding = Decoding(temperature, top_p, 1, seed)
        self.top_logprobs = 20  # until the server says otherwise, as are the refused settings:
        self.replaced: dict[str, str | None] = {}
        self._lock, self._warned = Lock(), False
        self._kept: OrderedDict[str, Answer] = OrderedDict()
        self._client = OpenAI(
            base_url=base_url,
            api_key=os.environ.get(key_variable) or "none",
            max_retries=retries,
            timeout=timeout,
        )
        host = urlsplit(base_url).hostname or ""
        if not _loopback(host):
            log.warning("images and questions are sent to %s", host)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request, in order; several calls at once.

        Raises:
            UserError: the first call that failed for good. Answers that did arrive are kept for
                the next call.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = [pool.submit(self._answer, request) for request in requests]
            try:
                return [one.result() for one in waiting]
            except BaseException:
                pool.shutdown(cancel_futures=True)  # those under way finish and are kept
                raise

    def logprobs(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        if not requests and not texts:
            return []
        raise UserError(
            f"{self.name}: chat servers do not score given texts; use a local model for that"
        )

    def count_tokens(self, prompt: Prompt, images: int = 1) -> int:
        """An upper estimate (the server's tokenizer is not known): three bytes a token."""
        text = math.ceil(len(prompt.text.encode()) / 3) + 16
        return text + min(images, self.max_images) * self.image_tokens

    def facts(self) -> dict[str, Any]:
        return {"model": self.name, "device": "server", "logprobs": self.offers_logprobs}

    @property
    def offers_logprobs(self) -> bool:
        return self.top_logprobs > 0

    # --- one call -------------------------------------------------------------------------------

    def _answer(self, request: Request) -> Answer:
        import openai

        key = _key(request)
        if key in self._kept:
            return self._kept[key].model_copy()
        try:
            answer = self._read(self._call(request), request)
            if _cut_off(answer) and self.reasoning_room:
                answer = self._read(self._call(request, self.reasoning_room), request)
        except openai.APIStatusError as error:
            reason = " ".join(str(error.message).split())[:200]
            raise UserError(f"{self.name}: the server says {error.status_code}: {reason}") from None
        except openai.APIError as error:
            raise UserError(f"{self.name}: the server cannot be reached: {error}") from None
        if _cut_off(answer) and not self._warned:
            log.warning(
                "%s: cut off while reasoning, so an answer is unclear; raise reasoning_tokens: "
                "--set generator.reasoning_tokens=%d",
                self.name,
                2 * (self.reasoning_room or 2048),
            )
            self._warned = True
        self._kept[key] = answer
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return answer.model_copy()

    def _call(self, request: Request, more: int = 0) -> Any:
        """The reply; a setting that the server refuses is replaced or left out from then on."""
        import openai

        while True:
            body = self._body(request, more)
            try:
                return self._client.chat.completions.create(**body)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if not self._adapt(body, error):
                    raise
            except ValueError as error:  # a body that says JSON and is none
                raise UserError(
                    f"{self.name}: the server's reply is not JSON, is base_url right? {error}"
                ) from None

    def _adapt(self, body: Mapping[str, Any], error: Any) -> bool:
        """Whether ``error`` refuses a setting of ``body`` that can be done without."""
        refused = _refused(error, body)
        if refused is None:
            return False
        with self._lock:  # another call may have found out meanwhile
            if refused == "logprobs":
                if self.top_logprobs == body["top_logprobs"]:
                    self.top_logprobs = _fewer(self.top_logprobs, str(error.message))
                    offered = self.top_logprobs or "no"
                    log.warning("%s: the server offers %s log-probabilities", self.name, offered)
            elif refused not in self.replaced:
                instead = "max_completion_tokens" if refused == "max_tokens" else None
                self.replaced[refused] = instead
                done = f"sent as {instead}" if instead else "left out, its default applies"
                log.warning("%s: the server refuses %s: %s", self.name, refused, done)
        return True

    def _body(self, request: Request, more: int = 0) -> dict[str, Any]:
        if request.prompt.style != "chat":
            raise UserError(
                f"{self.name}: {request.prompt.template} writes the whole conversation, which a "
                "chat server does itself; use the prompt set default"
            )
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": self._data_url(path, request)}}
            for path in request.images[: self.max_images]
        ]
        content.append({"type": "text", "text": request.prompt.text})
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": request.max_new_tokens + more,
            "temperature": self.decoding.temperature,
            "top_p": self.decoding.top_p,
            "seed": self.decoding.seed,
        }
        for refused, instead in self.replaced.items():
            value = body.pop(refused, None)
            if instead and value is not None:
                body[instead] = value
        if request.closed and self.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {**body, "extra_body": self.extra} if self.extra else body

    def _data_url(self, path: Path, request: Request) -> str:
        picture = load_image(path)
        if request.noise:
            picture = apply_noise(picture, request.noise, self.image_size)
        elif max(picture.size) > self.max_side:
            picture.thumbnail((self.max_side, self.max_side))
        return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()

    def _read(self, reply: Any, request: Request) -> Answer:
        """The answer in a reply, whatever stands around it."""
        choices = getattr(reply, "choices", None)
        if not isinstance(reply, BaseModel) or not choices:
            found = getattr(reply, "error", None) or reply
            text = " ".join(str("no choices" if isinstance(found, BaseModel) else found).split())
            raise UserError(
                f"{self.name}: the server's reply is no chat completion, is base_url right "
                f"(it mostly ends in /v1)? It begins: {text[:80]}"
            )
        choice = choices[0]
        message = vars(choice.message) | (choice.message.model_extra or {})
        answer = separate(Answer(text=_plain(message.get("content")).strip(), model=self.name))
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        refusal, finish = message.get("refusal"), choice.finish_reason
        for name, value in (
            *(("reasoning", reasoning), ("refusal", refusal)),
            ("finish_reason", finish),
        ):
            if value:
                setattr(answer, name, _plain(value))
        tokens = choice.logprobs.content if request.closed and choice.logprobs else None
        if tokens:
            at: int | None = 0
            if answer.raw is not None or answer.reasoning is not None:
                at = answer_token([token.token for token in tokens], answer.text)
            if at is not None:
                answer.p_yes, answer.other_mass = first_token(tokens[at])
        return answer


def _cut_off(answer: Answer) -> bool:
    """Whether the tokens ran out before the answer began."""
    return answer.finish_reason == "length" and not answer.text


def _plain(content: Any) -> str:
    """The text of a message: a string, or parts of which those of text count."""
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else vars(part) for part in content]
        return "".join(str(p.get("text", "")) for p in parts if p.get("type") in TEXTS)
    return str(content or "")


def answer_token(tokens: Sequence[str], answer: str) -> int | None:
    """Which of the tokens of a reply its answer begins with; None if they do not hold it."""
    text = "".join(tokens)
    start, end = answer_span(text)
    if (start, end) == (0, len(text)):  # reasoning sent apart: its tokens may still come first
        end = len(text.rstrip())
        start = max(0, end - len(answer))
    if not answer or text[start:end] != answer:
        return None
    ends = list(accumulate(len(token) for token in tokens))
    return bisect_right(ends, start)


def first_token(token: Any) -> tuple[float | None, float | None]:
    """(p_yes, other_mass) from the listed alternatives of the first answer token."""
    listed = {entry.token: entry.logprob for entry in token.top_logprobs or [token]}
    yes = sum(math.exp(p) for t, p in listed.items() if t.strip(" ▁Ġ") in YES)
    no = sum(math.exp(p) for t, p in listed.items() if t.strip(" ▁Ġ") in NO)
    if yes + no <= 0:
        return None, None
    return round(yes / (yes + no), 6), round(max(0.0, 1 - yes - no), 6)


def _refused(error: Any, body: Mapping[str, Any]) -> str | None:
    """Which setting of ``body`` an error message will not have."""
    if getattr(error, "param", None) in REFUSABLE and error.param in body:
        return str(error.param)
    said = str(error.message).lower()
    if re.search(r"context length|too (?:large|long)", said):
        return None  # the setting is known, its value does not fit this prompt
    return next((n for n in REFUSABLE if n in body and re.search(REFUSABLE[n], said)), None)


def _fewer(asked: int, said: str) -> int:
    """How many log-probabilities to ask for next: the limit that is named, else none."""
    limits = [int(n) for n in re.findall(r"(?<![\w.-])\d+(?!\.?\w)", said)]
    return max((n for n in limits if 0 < n < asked), default=0)


def _key(request: Request) -> str:
    views = [view_key((Path(path), request.noise)) for path in request.images]
    return f"{request.prompt.text}|{views}|{request.max_new_tokens}|{request.closed}"


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
