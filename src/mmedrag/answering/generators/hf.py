"""Any Hugging Face image-text-to-text model, LLaVA-Med included.

Place in the picture: ``prompts.render`` → **HFGenerator.generate** → Answer. The model comes
with its own processor and chat template; a PEFT adapter may lie on top. Requests are sorted by
length, batched with left padding, and put back in order; each distinct (image, noise) is
encoded once (``inputs.py``, ``vision.py``).
"""

from __future__ import annotations

import copy
import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmedrag.answering.generators.decoding import (
    Decoding,
    ReasoningBudget,
    SeededSampler,
    Verbalizers,
)
from mmedrag.answering.generators.inputs import Inputs
from mmedrag.answering.generators.prefix import PrefixSplit
from mmedrag.models import attach, load_model
from mmedrag.records import Answer, Prompt, Request, UserError, answer_span, separate
from mmedrag.runtime import memory

log = logging.getLogger(__name__)
T = TypeVar("T")
REASONING = 2048  # tokens, of a model that knows the marks of reasoning


class HFGenerator:
    """A model that answers.

    Args:
        model: folder or hub id. adapter: PEFT folder, injected, not merged.
        batch_size: at most this many requests at once; None: 64, or 8 from a billion parameters.
        max_images: how many views the model was trained to take; further views are left out.
        temperature, top_p, num_beams, seed: see :class:`Decoding`; greedy by default.
        reasoning_tokens: what a model may think before it answers, besides the answer's own
            tokens; None: 2,048 where its chat template or tokenizer knows ``<think>`` or its like,
            else 0. References leave it room, up to half of the context.
        cache_bytes: how much memory vision features may keep between calls.
    """

    def __init__(
        self,
        model: str | Path | None,
        adapter: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | None = None,
        max_images: int = 1,
        reasoning_tokens: int | None = None,
        cache_bytes: int = 1 << 30,
        local_files_only: bool = True,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_beams: int = 1,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        if not model:
            raise UserError("generator hf: no model given, expected a folder or a hub id")
        self.decoding = Decoding(temperature, top_p, num_beams, seed)
        loaded = load_model(model, device, dtype, local_files_only)
        self.model, self.tokenizer = loaded.model, loaded.processor.tokenizer
        self.device, self.dtype, self.parameters = loaded.device, loaded.dtype, loaded.parameters
        self.inputs = Inputs(loaded.model, loaded.processor, max_images, cache_bytes)
        self.name = name or Path(str(model)).name
        self.image_size = self.inputs.image_size
        text = getattr(self.model.config, "text_config", self.model.config)
        self.context = int(getattr(text, "max_position_embeddings", None) or 4096)
        self.batch_size = batch_size or (8 if loaded.parameters >= 1_000_000_000 else 64)
        self.backoffs: list[dict[str, int]] = []
        self.verbalizers = Verbalizers.of(self.tokenizer)
        if reasoning_tokens is None:
            reasoning_tokens = REASONING if self.inputs.reasons else 0
        self.reasoning_tokens = reasoning_tokens
        if reasoning_tokens:
            log.info(
                "%s: may reason before it answers, in up to %d tokens (reasoning_tokens)",
                self.name,
                reasoning_tokens,
            )
        self._warned = False  # that reasoning is cut off
        self._peft: list[Any] = []  # shared by the copies that with_adapter makes
        self._adapter: str | None = None
        if adapter is not None:
            self._use(adapter)

    # --- the protocol ---------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request, in order.

        Raises:
            UserError: an unreadable image, or a prompt longer than the context; nothing is
                answered then, so a caller that wants the others asks one by one.
        """
        for request in requests:
            self._check(request)
        splits = self.inputs.splits(requests) if self.decoding.num_beams == 1 else None
        found: dict[int, Answer] = {}

        def answer(part: Sequence[Request], rows: Sequence[int]) -> list[Answer]:
            return self._answer(part, [splits[i] for i in rows] if splits else None)

        for group in self._groups(requests, splits):
            kinds: dict[Any, list[int]] = {}
            for i in group:
                kinds.setdefault((requests[i].closed, requests[i].max_new_tokens), []).append(i)
            for _, rows in sorted(kinds.items()):
                found.update(zip(rows, self._in_batches(rows, requests, answer), strict=True))
        return [found[i] for i in range(len(requests))]

    def logprobs(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        """Σ log p of each text's tokens and of the end token, given its request."""
        pairs = list(zip(requests, texts, strict=True))
        for request in requests:
            self._check(request)

        def score(part: Sequence[Request], rows: Sequence[int]) -> list[float]:
            return self._score(part, [pairs[i][1] for i in rows])

        return self._in_batches(list(range(len(pairs))), requests, score)

    def count_tokens(self, prompt: Prompt, images: int = 1) -> int:
        """Length of the whole model input, with images of the model's own size."""
        return self.inputs.count(prompt, images)

    def count_request(self, request: Request) -> int:
        """Length of the whole model input, with this request's pictures as they are."""
        return self.inputs.count_request(request)

    def facts(self) -> dict[str, Any]:
        """What a run's record should say about this generator."""
        features, prefixes = self.inputs.features, self.inputs.prefixes
        return {
            "model": self.name,
            "parameters": self.parameters,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "backoffs": self.backoffs,
            "vision_encoded": features.encoded if features else None,
            "vision_reused": features.reused if features else None,
            "prefixes_computed": prefixes.computed if prefixes else None,
            "prefixes_reused": prefixes.reused if prefixes else None,
        }

    # --- adapters -------------------------------------------------------------------------------

    def with_adapter(self, adapter: str | Path) -> HFGenerator:
        """The same weights with another adapter on top; the base is shared, not copied."""
        other = copy.copy(self)
        other.backoffs = []
        other.inputs = self.inputs.fresh()  # an adapter may bring its own projector
        other._use(adapter)
        return other

    def _use(self, adapter: str | Path) -> None:
        name = f"adapter{len(self._peft[0].peft_config) if self._peft else 0}"
        found = attach(self.model, adapter, name, self._peft[0] if self._peft else None)
        self._peft[:] = [found.to(self.device)]
        self._adapter = name
        self.name = f"{self.name}+{Path(adapter).name}"

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The model with this generator's adapter (or none) switched on, without gradients."""
        with torch.inference_mode():
            if not self._peft:
                yield self.model
            elif self._adapter is None:
                with self._peft[0].disable_adapter():
                    yield self.model
            else:
                if self._peft[0].active_adapter != self._adapter:
                    self._peft[0].set_adapter(self._adapter)
                yield self.model

    # --- batches --------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        length = self.inputs.count_request(request)
        if length + request.max_new_tokens > self.context:
            raise UserError(
                f"prompt of {length} tokens and an answer of {request.max_new_tokens} do not fit "
                f"the context of {self.context}"
            )

    def _groups(
        self, requests: Sequence[Request], splits: Sequence[PrefixSplit] | None
    ) -> list[list[int]]:
        """Rows to be answered together: all of a picture, as many pictures as can be kept."""
        if splits is None or self.inputs.prefixes is None:
            return [list(range(len(requests)))]
        pictures: dict[str, list[int]] = {}
        for i, one in enumerate(splits):
            pictures.setdefault(one.view, []).append(i)
        image = self.inputs.tokens_per_image
        groups: list[list[int]] = [[]]
        held = 0
        for rows in pictures.values():
            kept = {splits[i].first: splits[i].picture + image for i in rows}
            kept |= {splits[i].whole: splits[i].common + image for i in rows}
            if groups[-1] and held + sum(kept.values()) > self.inputs.prefixes.room:
                groups.append([])
                held = 0
            groups[-1] += rows
            held += sum(kept.values())
        return groups

    def _in_batches(
        self,
        rows: list[int],
        requests: Sequence[Request],
        work: Callable[[Sequence[Request], Sequence[int]], list[T]],
    ) -> list[T]:
        """``work`` over ``rows`` of ``requests``, shortest first; results in the order of rows.

        Batches are of one size, give or take one: a small last one costs as many steps as a full
        one. When memory runs out the batch is halved, for good, and that is recorded.
        """

        def length(i: int) -> tuple[int, int]:
            return self.inputs.count_request(requests[i]), i

        order, at = sorted(rows, key=length), 0
        found: dict[int, T] = {}
        with self.active():
            while at < len(order):
                left = len(order) - at
                part = order[at : at + math.ceil(left / math.ceil(left / self.batch_size))]
                try:
                    done = work([requests[i] for i in part], part)
                except (MemoryError, RuntimeError) as error:  # torch's own are the latter
                    if not memory.ran_out(error):
                        raise
                    self._back_off(len(part), error)
                    continue
                found.update(zip(part, done, strict=True))
                at += len(part)
        return [found[i] for i in rows]

    def _back_off(self, size: int, error: BaseException) -> None:
        if size == 1:
            raise UserError(f"{self.name}: out of memory with a single request") from error
        self.batch_size = (size + 1) // 2
        self.backoffs.append({"from": size, "to": self.batch_size})
        log.warning("out of memory with %d requests at once, now %d", size, self.batch_size)
        for kept in (self.inputs.features, self.inputs.prefixes):
            if kept is not None:
                kept.clear()
        memory.empty_cache()

    def _answer(
        self, requests: Sequence[Request], splits: Sequence[PrefixSplit] | None
    ) -> list[Answer]:
        inputs = self.inputs.continued(requests, splits) if splits else self.inputs(requests)
        closed, said = requests[0].closed, requests[0].max_new_tokens
        sampler = SeededSampler(self.decoding, [self._key(r) for r in requests])
        skip = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        budget = self._budget(requests, skip) if self.reasoning_tokens else None
        out = self.model.generate(
            **inputs,
            max_new_tokens=said + (max(budget.room) if budget else 0),
            do_sample=False,  # sampling is greedy search over seeded noise, row by row
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=self.decoding.num_beams,
            logits_processor=[sampler] if self.decoding.temperature > 0 else None,
            stopping_criteria=[budget] if budget else None,
            output_logits=closed and not budget,  # of all steps: too much for long reasoning
            return_dict_in_generate=True,
            pad_token_id=self.inputs.pad_id,
        )
        rows = out.sequences[:, skip:]
        answers = [self._read(*pair) for pair in zip(requests, rows, strict=True)]
        if not closed:
            return answers
        # the prefill's logits, which generation needed anyway, unless the answer came later
        first = None if budget else out.logits[0][:: self.decoding.num_beams]
        masses = dict(enumerate([] if first is None else self.verbalizers.read(first)))
        late = {
            i: self._before(requests[i], ids, answer)
            for i, (ids, answer) in enumerate(zip(rows, answers, strict=True))
            if answer.text and (budget or answer.raw is not None)
        }
        if late:
            logits = self._logits([requests[i] for i in late], list(late.values()), 1)
            masses |= zip(late, self.verbalizers.read(logits[:, -1]), strict=True)
        for i, answer in enumerate(answers):
            if answer.text or answer.raw is None:
                answer.p_yes, answer.other_mass = masses.get(i) or (None, None)
        return answers

    def _budget(self, requests: Sequence[Request], skip: int) -> ReasoningBudget:
        """What each row may think: the setting, or what the context leaves."""
        said = requests[0].max_new_tokens
        free = [self.context - said - self.inputs.count_request(r) for r in requests]
        return ReasoningBudget(
            self.inputs.decode,
            skip,
            said,
            [bool(self.inputs.opened(r)) for r in requests],
            [min(self.reasoning_tokens, room) for room in free],
        )

    def _read(self, request: Request, ids: torch.Tensor) -> Answer:
        """The answer in generated tokens; one that was cut off before it came is empty."""
        text = self.inputs.opened(request) + self.inputs.decode(ids).strip()
        answer = separate(Answer(text=text, model=self.name))
        if answer.raw is not None and not answer.text and not self._ends(ids):
            answer.finish_reason = "length"
            if not self._warned:
                log.warning(
                    "%s: an answer ended while the model was still reasoning, so it is unclear; "
                    "raise reasoning_tokens: --set generator.reasoning_tokens=%d",
                    self.name,
                    2 * (self.reasoning_tokens or REASONING // 2),
                )
            self._warned = True
        return answer

    def _ends(self, ids: torch.Tensor) -> bool:
        """Whether the model ended its reply itself."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends, self.tokenizer.eos_token_id]
        return not set(ids.tolist()).isdisjoint(ends)

    def _before(self, request: Request, ids: torch.Tensor, answer: Answer) -> tuple[int, ...]:
        """The generated tokens in front of the answer's first."""
        if answer.raw is None:
            return ()
        opened = self.inputs.opened(request)
        start = answer_span(opened + self.inputs.decode(ids))[0] - len(opened)
        steps = range(len(ids))
        at = bisect_right(steps, start, key=lambda k: len(self.inputs.decode(ids[: k + 1])))
        return tuple(ids[:at].tolist())

    def _key(self, request: Request) -> str:
        """Names a draw: the same on another machine and in another batch."""
        names = [Path(path).name for path in request.images]
        noise = request.noise.to_json() if request.noise else ""
        return f"{request.prompt.text}|{names}|{noise}"

    def _score(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        end = self.tokenizer.eos_token_id
        tails = [
            (*self.tokenizer(text, add_special_tokens=False)["input_ids"], *([end] if end else []))
            for text in texts
        ]
        # logits at the answers alone: the prompts need none
        logits = self._logits(requests, tails, max(len(tail) for tail in tails) + 1)
        sums = []
        for row, tail in zip(logits, tails, strict=True):
            logp = torch.log_softmax(row[-len(tail) - 1 : -1].float(), dim=-1)
            wanted = torch.tensor(tail, device=logp.device)
            sums.append(float(logp.gather(-1, wanted[:, None]).double().sum()))
        return sums

    def _logits(
        self, requests: Sequence[Request], tails: Sequence[tuple[int, ...]], keep: int
    ) -> torch.Tensor:
        """Logits [rows, keep, vocabulary] at the last positions of prompts with their tails."""
        inputs = self.inputs(requests, tails)
        if "inputs_embeds" in inputs:
            mask = inputs["attention_mask"]
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return self.model(**inputs, use_cache=False, logits_to_keep=keep).logits
