"""Any Hugging Face image-text-to-text model, LLaVA-Med included.

Place in the picture: ``prompts.render`` → **HFGenerator.generate** → Answer. The model comes
with its own processor and chat template; a PEFT adapter may lie on top. Requests are sorted by
length, batched with left padding, and put back in order. For LLaVA-shaped models the vision
features of each distinct (image, noise) are computed once and put among the token embeddings;
other architectures get pixel values.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmedrag.generators import vision
from mmedrag.generators.decoding import Decoding, SeededSampler, Verbalizers
from mmedrag.generators.loading import load
from mmedrag.protocols import Request
from mmedrag.types import Answer, Prompt, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
Ids = tuple[int, ...]


class HFGenerator:
    """A model that answers.

    Args:
        model: folder or hub id. adapter: PEFT folder, injected, not merged.
        batch_size: at most this many requests at once; None: 32, or 8 from a billion parameters.
        max_images: how many views the model was trained to take; further views are left out.
        decoding options: temperature, top_p, num_beams, seed (see :class:`Decoding`).
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
        loaded = load(model, device, dtype, local_files_only)
        self.model, self.processor = loaded.model, loaded.processor
        self.device, self.dtype, self.parameters = loaded.device, loaded.dtype, loaded.parameters
        self.tokenizer = self.processor.tokenizer
        self.name = name or Path(str(model)).name
        self.batch_size = batch_size or (8 if loaded.parameters >= 1_000_000_000 else 32)
        self.max_images, self.cache_bytes = max_images, cache_bytes
        self.backoffs: list[dict[str, int]] = []
        self.verbalizers = Verbalizers.of(self.tokenizer)
        config = self.model.config
        self.image_size = vision.image_size(self.processor, config)
        text = getattr(config, "text_config", config)
        self.context = int(getattr(text, "max_position_embeddings", None) or 4096)
        self.image_token_id = getattr(config, "image_token_id", None)
        self._peft: list[Any] = []  # shared by the copies that with_adapter makes
        self._adapter: str | None = None
        self._features = self._vision() if config.model_type == "llava" else None
        self._ids = lru_cache(4096)(self._tokenise)
        self._image_tokens = lru_cache(1)(self._measure_image_tokens)
        if adapter is not None:
            self._use(adapter)

    # --- the protocol -------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request, in order.

        Raises:
            UserError: an unreadable image, or a prompt longer than the context; nothing is
                answered then, so a caller that wants the others asks one by one.
        """
        for request in requests:
            self._check(request)
        answers: list[Answer | None] = [None] * len(requests)
        with self._active():
            for rows in self._batches(requests):
                found = self._backed_off(
                    rows, lambda part: self._answer([requests[i] for i in part])
                )
                for i, answer in zip(rows, found, strict=True):
                    answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def logprobs(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        """Σ log p of each text's tokens and of the end token, given its request."""
        pairs = list(zip(requests, texts, strict=True))
        for request in requests:
            self._check(request)
        order = sorted(range(len(pairs)), key=lambda i: (self._length(requests[i]), i))
        sums = [0.0] * len(pairs)
        with self._active():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                found = self._backed_off(rows, lambda part: self._score([pairs[i] for i in part]))
                for i, value in zip(rows, found, strict=True):
                    sums[i] = value
        return sums

    def count_tokens(self, prompt: Prompt, images: int = 1) -> int:
        """Length of the model's input: text, and the tokens each image takes."""
        views = min(images, self.max_images)
        return len(self._ids(prompt.text, prompt.style, views)) + views * (self._image_tokens() - 1)

    # --- adapters -----------------------------------------------------------------------------

    def with_adapter(self, adapter: str | Path) -> HFGenerator:
        """The same weights with another adapter on top; the base is shared, not copied."""
        other = copy.copy(self)
        other.backoffs = []
        if self._features is not None:
            other._features = other._vision()  # an adapter may bring its own projector
        other._use(adapter)
        return other

    def _use(self, adapter: str | Path) -> None:
        from peft import PeftModel

        if not (Path(adapter) / "adapter_config.json").is_file():
            raise UserError(
                f"{adapter}: no adapter here, expected a folder with adapter_config.json"
            )
        name = f"adapter{len(self._peft[0].peft_config) if self._peft else 0}"
        if self._peft:
            self._peft[0].load_adapter(str(adapter), adapter_name=name)
        else:
            self._peft.append(
                PeftModel.from_pretrained(self.model, str(adapter), adapter_name=name)
            )
        self._peft[0].to(self.device).eval()
        self._adapter = name
        self.name = f"{self.name}+{Path(adapter).name}"

    @contextmanager
    def _active(self) -> Iterator[None]:
        with torch.inference_mode():
            if not self._peft:
                yield
            elif self._adapter is None:
                with self._peft[0].disable_adapter():
                    yield
            else:
                if self._peft[0].active_adapter != self._adapter:
                    self._peft[0].set_adapter(self._adapter)
                yield

    # --- from requests to tensors ---------------------------------------------------------------

    def _views(self, request: Request) -> list[vision.View]:
        return [(Path(path), request.noise) for path in request.images[: self.max_images]]

    def text(self, prompt: Prompt, images: int) -> str:
        """The exact string that is tokenised, with one image token for each image."""
        if prompt.style == "raw":
            places = f"{self.processor.image_token}\n" * images
            return prompt.text.replace("<image>\n", places, 1)
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt.text}]
        try:
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        except ValueError as error:
            raise UserError(
                f"{self.name}: no chat template; use the prompt set llava_med or released ({error})"
            ) from None

    def _tokenise(self, text: str, style: str, images: int) -> Ids:
        whole = self.text(Prompt(template="", text=text, style=style), images)  # type: ignore[arg-type]
        bos = self.tokenizer.bos_token
        special = not (bos and whole.startswith(bos))
        ids = tuple(self.tokenizer(whole, add_special_tokens=special)["input_ids"])
        if self.image_token_id is not None and ids.count(self.image_token_id) != images:
            raise UserError(
                f"prompt has {ids.count(self.image_token_id)} image places, expected {images}"
            )
        return ids

    def _request_ids(self, request: Request) -> Ids:
        return self._ids(request.prompt.text, request.prompt.style, len(self._views(request)))

    def _length(self, request: Request) -> int:
        return self.count_tokens(request.prompt, len(request.images))

    def _check(self, request: Request) -> None:
        length = self._length(request)
        if length + request.max_new_tokens > self.context:
            raise UserError(
                f"prompt of {length} tokens and an answer of {request.max_new_tokens} do not fit "
                f"the context of {self.context}"
            )

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Row numbers, requests of one kind together, shortest first."""
        kinds: dict[tuple[bool, int], list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault((request.closed, request.max_new_tokens), []).append(i)
        for kind in sorted(kinds):
            rows = sorted(kinds[kind], key=lambda i: (self._length(requests[i]), i))
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def _inputs(self, requests: Sequence[Request], tails: Sequence[Ids] = ()) -> dict[str, Any]:
        """Left-padded model inputs; ``tails`` are answer tokens to be scored."""
        if self._features is None:
            return self._plain_inputs(requests, tails)
        views = [self._views(request) for request in requests]
        features = self._features([view for row in views for view in row])
        rows, at = [], 0
        for request, own in zip(requests, views, strict=True):
            counts = [len(f) for f in features[at : at + len(own)]]
            rows.append(expand(self._request_ids(request), self.image_token_id, counts))
            at += len(own)
        for i, tail in enumerate(tails):
            rows[i] = rows[i] + tail
        ids, mask = pad_left(rows, self._pad_id(), self.device)
        places = ids == self.image_token_id
        embeds = self.model.get_input_embeddings()(torch.where(places, self._pad_id(), ids))
        if features:
            embeds[places] = torch.cat(features).to(embeds)
        return {"inputs_embeds": embeds, "attention_mask": mask}

    def _plain_inputs(self, requests: Sequence[Request], tails: Sequence[Ids]) -> dict[str, Any]:
        """The processor's own inputs, for architectures whose image features are more than a
        projection."""
        texts = [self.text(r.prompt, len(self._views(r))) for r in requests]
        pictures = [
            [vision.open_view(view, self.image_size) for view in self._views(r)] for r in requests
        ]
        bos = self.tokenizer.bos_token
        batch = self.processor(
            text=texts,
            images=pictures if any(pictures) else None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
        )
        if tails:
            rows = [
                (*ids[mask.bool()].tolist(), *tail)
                for ids, mask, tail in zip(
                    batch["input_ids"], batch["attention_mask"], tails, strict=True
                )
            ]
            batch["input_ids"], batch["attention_mask"] = pad_left(rows, self._pad_id(), "cpu")
            batch.pop("mm_token_type_ids", None)
            batch.pop("token_type_ids", None)
        return {
            key: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for key, value in batch.items()
        }

    # --- from tensors to answers ----------------------------------------------------------------

    def _answer(self, requests: Sequence[Request]) -> list[Answer]:
        inputs = self._inputs(requests)
        closed = requests[0].closed
        sampled = self.decoding.temperature > 0
        keys = [f"{r.prompt.text}|{[vision.view_key(v) for v in self._views(r)]}" for r in requests]
        out = self.model.generate(
            **inputs,
            max_new_tokens=requests[0].max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=self.decoding.num_beams,
            logits_processor=[SeededSampler(self.decoding, keys)] if sampled else None,
            output_logits=closed,
            return_dict_in_generate=True,
            pad_token_id=self._pad_id(),
        )
        skip = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        texts = self.tokenizer.batch_decode(out.sequences[:, skip:], skip_special_tokens=True)
        first: list[tuple[float, float] | None] = [None] * len(requests)
        if closed:
            first = self.verbalizers.read(out.logits[0][:: self.decoding.num_beams])
        return [
            Answer(
                text=text.strip(),
                model=self.name,
                p_yes=mass[0] if mass else None,
                other_mass=mass[1] if mass else None,
            )
            for text, mass in zip(texts, first, strict=True)
        ]

    def _score(self, pairs: Sequence[tuple[Request, str]]) -> list[float]:
        end = (self.tokenizer.eos_token_id,) if self.tokenizer.eos_token_id is not None else ()
        tails = [
            (*self.tokenizer(text, add_special_tokens=False)["input_ids"], *end)
            for _, text in pairs
        ]
        inputs = self._inputs([request for request, _ in pairs], tails)
        longest = max(len(tail) for tail in tails)
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        extra = {"position_ids": positions} if self._features is not None else {}
        # logits of the answers alone: prompts need none
        logits = self.model(**inputs, **extra, use_cache=False, logits_to_keep=longest + 1).logits
        sums = []
        for row, tail in zip(logits, tails, strict=True):
            logp = torch.log_softmax(row[-len(tail) - 1 : -1].float(), dim=-1)
            wanted = torch.tensor(tail, device=logp.device)
            sums.append(float(logp.gather(-1, wanted[:, None]).double().sum()))
        return sums

    def _backed_off(self, rows: list[int], work: Callable[[list[int]], list[T]]) -> list[T]:
        """``work`` over rows, in halves when memory runs out (recorded in ``backoffs``)."""
        size = len(rows)
        while True:
            try:
                found: list[T] = []
                for start in range(0, len(rows), size):
                    found += work(rows[start : start + size])
                return found
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if size == 1:
                    raise UserError(f"{self.name}: out of memory with a single request") from error
            smaller = (size + 1) // 2
            log.warning("out of memory with %d requests at once, going on with %d", size, smaller)
            self.backoffs.append({"from": size, "to": smaller})
            size = self.batch_size = smaller
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    # --- pieces ---------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What a run's record should say about this generator."""
        return {
            "model": self.name,
            "parameters": self.parameters,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "backoffs": self.backoffs,
            "vision_encoded": self._features.encoded if self._features else None,
            "vision_reused": self._features.reused if self._features else None,
        }

    def _vision(self) -> vision.VisionFeatures:
        def pixels(pictures: list[Any]) -> torch.Tensor:
            return self.processor.image_processor(images=pictures, return_tensors="pt")[
                "pixel_values"
            ]

        def encode(values: torch.Tensor) -> Sequence[torch.Tensor]:
            out = self.model.get_image_features(values.to(self.device, self.dtype))
            return getattr(out, "pooler_output", out)

        return vision.VisionFeatures(pixels, encode, self.image_size, self.cache_bytes)

    def _measure_image_tokens(self) -> int:
        """How many tokens one image takes, asked of the processor once."""
        from PIL import Image

        blank = Image.new("RGB", (self.image_size, self.image_size))
        text = (
            self.text(Prompt(template="", text="a"), 1)
            if self._templated()
            else (self.processor.image_token)
        )
        ids = self.processor(images=[blank], text=[text], return_tensors="pt")["input_ids"][0]
        token = self.image_token_id
        if token is not None:
            return int((ids == token).sum())
        return len(ids) - len(self.tokenizer(text)["input_ids"]) + 1

    def _templated(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None))

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id or 0


def expand(ids: Ids, image_token: int | None, counts: Sequence[int]) -> Ids:
    """``ids`` with the i-th image token repeated ``counts[i]`` times, as the processor does."""
    out: list[int] = []
    left = iter(counts)
    for token in ids:
        out += [token] * next(left) if token == image_token else [token]
    return tuple(out)


def pad_left(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both int64 [rows, longest]."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return "out of memory" in said or "can't allocate memory" in said
