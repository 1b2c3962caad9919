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
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmedrag.answering.generators.decoding import NO, YES, Decoding
from mmedrag.answering.generators.vision import view_key
from mmedrag.images import apply_noise, load_image, png_bytes
from mmedrag.records import Answer, Prompt, Request, UserError

log = logging.getLogger(__name__)
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
        self.concurrency, self.extra = max(1, concurrency), dict(extra or {})
        self.decoding = Decoding(temperature, top_p, 1, seed)
        self.offers_logprobs = True  # until the server says otherwise
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

    # --- one call -------------------------------------------------------------------------------

    def _answer(self, request: Request) -> Answer:
        import openai

        key = _key(request)
        if key in self._kept:
            return self._kept[key].model_copy()
        body = self._body(request)
        try:
            try:
                reply = self._client.chat.completions.create(**body)
            except openai.BadRequestError as error:
                if "logprobs" not in body or "logprob" not in str(error).lower():
                    raise
                log.warning("%s: the server offers no log-probabilities", self.name)
                self.offers_logprobs = False
                reply = self._client.chat.completions.create(**self._body(request))
        except openai.APIStatusError as error:
            reason = " ".join(str(error.message).split())[:200]
            raise UserError(f"{self.name}: the server says {error.status_code}: {reason}") from None
        except openai.APIError as error:
            raise UserError(f"{self.name}: the server cannot be reached: {error}") from None
        answer = self._read(reply, request)
        self._kept[key] = answer
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return answer.model_copy()

    def _body(self, request: Request) -> dict[str, Any]:
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
            "max_tokens": request.max_new_tokens,
            "temperature": self.decoding.temperature,
            "top_p": self.decoding.top_p,
            "seed": self.decoding.seed,
        }
        if request.closed and self.offers_logprobs:
            body |= {"logprobs": True, "top_logprobs": 20}
        return {**body, "extra_body": self.extra} if self.extra else body

    def _data_url(self, path: Path, request: Request) -> str:
        picture = load_image(path)
        if request.noise:
            picture = apply_noise(picture, request.noise, self.image_size)
        elif max(picture.size) > self.max_side:
            picture.thumbnail((self.max_side, self.max_side))
        return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()

    def _read(self, reply: Any, request: Request) -> Answer:
        if not reply.choices:
            raise UserError(f"{self.name}: the server's reply has no choices")
        choice = reply.choices[0]
        answer = Answer(text=(choice.message.content or "").strip(), model=self.name)
        tokens = choice.logprobs.content if request.closed and choice.logprobs else None
        if tokens:
            answer.p_yes, answer.other_mass = first_token(tokens[0])
        return answer


def first_token(token: Any) -> tuple[float | None, float | None]:
    """(p_yes, other_mass) from the listed alternatives of the first answer token."""
    listed = {entry.token: entry.logprob for entry in token.top_logprobs or [token]}
    yes = sum(math.exp(p) for t, p in listed.items() if t.strip(" ▁Ġ") in YES)
    no = sum(math.exp(p) for t, p in listed.items() if t.strip(" ▁Ġ") in NO)
    if yes + no <= 0:
        return None, None
    return round(yes / (yes + no), 6), round(max(0.0, 1 - yes - no), 6)


def _key(request: Request) -> str:
    views = [view_key((Path(path), request.noise)) for path in request.images]
    return f"{request.prompt.text}|{views}|{request.max_new_tokens}|{request.closed}"


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
