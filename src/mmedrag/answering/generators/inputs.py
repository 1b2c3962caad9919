"""From requests to model inputs: text with image places, token ids, left-padded tensors.

For LLaVA-shaped models the projected vision features are put among the token embeddings, so one
encode serves every prompt about the same picture. Other architectures get the processor's own
inputs (pixel values and whatever else they take).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmedrag.answering.generators import prefix, vision
from mmedrag.images import load_image
from mmedrag.records import Prompt, Request, UserError, answer_span, left_open, opens_reasoning

Ids = tuple[int, ...]


class Inputs:
    """Builds the inputs of one model.

    Args:
        model, processor: as loaded. max_images: views beyond are left out. cache_bytes: memory
            that vision features may keep between calls.
    """

    def __init__(self, model: Any, processor: Any, max_images: int, cache_bytes: int) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.max_images, self.cache_bytes = max_images, cache_bytes
        config = model.config
        self.image_size = vision.image_size(processor, config)
        self.image_token = getattr(processor, "image_token", None) or "<image>"
        # how a converted model wants an image written in raw text (LLaVA-Med-1.0: between tags)
        self.image_place = getattr(config, "image_place", None) or self.image_token
        self.image_token_id: Any = getattr(config, "image_token_id", None)
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self.pad_id: int = pad if pad is not None else end or 0
        self.features = self._vision() if config.model_type == "llava" else None
        self.prefixes = None
        if self.features is not None and prefix.supported(model):
            self.prefixes = prefix.PrefixCache(model, cache_bytes)
        self._opened: str | None = None
        self._sizes: dict[str, tuple[int, int]] = {}
        self.picture_tokens = lru_cache(4096)(self._measure)
        self.prompt_ids = lru_cache(4096)(self._tokenise)  # asked for by budget, sort and batch

    def fresh(self) -> Inputs:
        """The same, with an empty store of vision features (for another adapter)."""
        return Inputs(self.model, self.processor, self.max_images, self.cache_bytes)

    # --- text and tokens ------------------------------------------------------------------------

    def views(self, request: Request) -> list[vision.View]:
        return [(Path(path), request.noise) for path in request.images[: self.max_images]]

    def text(self, prompt: Prompt, images: int) -> str:
        """The exact string that is tokenised, with one image token for each image."""
        if prompt.style == "raw":
            return prompt.text.replace("<image>\n", f"{self.image_place}\n" * images, 1)
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt.text}]
        try:
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        except ValueError as error:
            raise UserError(
                f"the model has no chat template, use the prompt set llava_med or released: {error}"
            ) from None

    def opened(self, request: Request) -> str:
        """The reasoning tag that the prompt's end opens, so that the reply lacks it; else ""."""
        if request.prompt.style == "raw":
            return left_open(request.prompt.text)
        if self._opened is None:  # the chat template's end, the same for every question
            self._opened = left_open(self.text(request.prompt, len(self.views(request))))
        return self._opened

    @property
    def reasons(self) -> bool:
        """Whether chat template or tokenizer know how reasoning begins."""
        templates = [
            getattr(part, "chat_template", None) for part in (self.processor, self.tokenizer)
        ]
        known = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        return opens_reasoning(" ".join([*map(str, templates), *known]))

    def decode(self, ids: torch.Tensor) -> str:
        """Text of generated tokens without special ones, but for the marks of reasoning."""
        left_out = self._unsaid
        kept = [token for token in ids.tolist() if token not in left_out]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))

    @cached_property
    def _unsaid(self) -> set[int]:
        known = self.tokenizer.added_tokens_decoder.items()
        special = {i for i, token in known if token.special}
        marks = {i for i, token in known if answer_span(str(token)) != (0, len(str(token)))}
        return (special | set(self.tokenizer.all_special_ids)) - marks

    def _tokenise(self, text: str, style: Any, images: int) -> Ids:
        whole = self.text(Prompt(template="", text=text, style=style), images)
        ids = tuple(self.tokenizer(whole, add_special_tokens=self._special(whole))["input_ids"])
        if self.image_token_id is not None and ids.count(self.image_token_id) != images:
            found = ids.count(self.image_token_id)
            raise UserError(f"prompt has {found} image places, expected {images}")
        return ids

    def _special(self, text: str) -> bool:
        """Whether the tokenizer adds its start token (some chat templates write it)."""
        start = self.tokenizer.bos_token
        return not (start and text.startswith(start))

    def request_ids(self, request: Request) -> Ids:
        return self.prompt_ids(request.prompt.text, request.prompt.style, len(self.views(request)))

    def count(self, prompt: Prompt, images: int) -> int:
        """Length of the model's input: text, and the tokens each image of the model's own size
        takes."""
        views = min(images, self.max_images)
        ids = self.prompt_ids(prompt.text, prompt.style, views)
        return len(ids) + (views * (self.tokens_per_image - 1) if views else 0)

    def count_request(self, request: Request) -> int:
        """Length of the model's input with these pictures: many models cut a large one into
        tiles, and may not where there are several."""
        views, ids = self.views(request), self.request_ids(request)
        if not views:
            return len(ids)
        if self.features is not None:  # LLaVA: the same for every picture
            return len(ids) + len(views) * (self.tokens_per_image - 1)
        return len(ids) + self.picture_tokens(tuple(self._size(view) for view in views))

    def _size(self, view: vision.View) -> tuple[int, int]:
        """(width, height) of what the processor gets; an unreadable file is named when asked."""
        own = self.image_size, self.image_size
        if view[1] is not None:
            return own
        key = vision.view_key(view)
        if key not in self._sizes:
            try:
                self._sizes[key] = load_image(view[0]).size
            except UserError:
                return own
        return self._sizes[key]

    @property
    def tokens_per_image(self) -> int:
        if not hasattr(self, "_tokens_per_image"):
            size = self.image_size, self.image_size
            self._tokens_per_image = 1 + self.picture_tokens((size,))
        return self._tokens_per_image

    def _measure(self, sizes: tuple[tuple[int, int], ...]) -> int:
        """How many tokens pictures of these sizes add to a prompt with their places: asked of
        the processor, with blank ones."""
        blanks = [Image.new("RGB", size) for size in sizes]
        templated = getattr(self.processor, "chat_template", None)
        prompt = Prompt(template="", text="a")
        text = self.text(prompt, len(sizes)) if templated else self.image_token * len(sizes)
        special = self._special(text)
        made = self.processor(
            images=[blanks], text=[text], return_tensors="pt", add_special_tokens=special
        )
        bare = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return len(made["input_ids"][0]) - len(bare)

    # --- tensors --------------------------------------------------------------------------------

    def __call__(self, requests: Sequence[Request], tails: Sequence[Ids] = ()) -> dict[str, Any]:
        """Left-padded model inputs; ``tails`` are answer tokens that follow each prompt."""
        if self.features is None:
            return self._from_processor(requests, tails)
        views = [self.views(request) for request in requests]
        features = self.features([view for row in views for view in row])
        rows, at = [], 0
        for request, own in zip(requests, views, strict=True):
            counts = [len(f) for f in features[at : at + len(own)]]
            rows.append(expand(self.request_ids(request), self.image_token_id, counts))
            at += len(own)
        for i, tail in enumerate(tails):
            rows[i] = rows[i] + tail
        ids, mask = pad_left(rows, self.pad_id, self.model.device)
        places = torch.eq(ids, self.image_token_id)
        for i, tail in enumerate(tails):  # an answer may hold that id too: it is text there
            places[i, ids.shape[1] - len(tail) :] = False
        bare = ids.masked_fill(places, self.pad_id)
        embeds = self.model.get_input_embeddings()(bare)
        if features:
            embeds[places] = torch.cat(features).to(embeds)
        return {"inputs_embeds": embeds, "attention_mask": mask}

    # --- prompts that begin alike ---------------------------------------------------------------

    def splits(self, requests: Sequence[Request]) -> list[prefix.PrefixSplit] | None:
        """How the prompts are divided so that their common beginnings are computed once; None
        where that is not possible or does not pay."""
        if self.prefixes is None or not requests:
            return None
        prompts = []
        for request in requests:
            views, ids = self.views(request), self.request_ids(request)
            if len(views) != 1:
                return None
            prompts.append((vision.view_key(views[0]), ids, ids.index(self.image_token_id) + 1))
        found = prefix.split_prefixes(prompts)
        return found if prefix.worth_caching(found, self.tokens_per_image - 1) else None

    def continued(
        self, requests: Sequence[Request], splits: Sequence[prefix.PrefixSplit]
    ) -> dict[str, Any]:
        """Inputs whose beginnings come out of a cache; what is not in it yet is computed."""
        assert self.prefixes is not None and self.features is not None
        embed, device = self.model.get_input_embeddings(), self.model.device
        fresh = {
            one.first: (one, self.views(request)[0])
            for one, request in zip(splits, requests, strict=True)
            if one.first not in self.prefixes and one.whole not in self.prefixes
        }
        for length in sorted({one.picture for one, _ in fresh.values()}):
            part = {k: pair for k, pair in fresh.items() if pair[0].picture == length}
            features = self.features([view for _, view in part.values()])
            text = torch.tensor([one.ids[: length - 1] for one, _ in part.values()])
            before = embed(text.long().to(device))
            self.prefixes.add(list(part), torch.cat([before, torch.stack(features).to(before)], 1))
        longer = {b.whole: b for b in splits if b.common > b.picture}
        longer = {key: one for key, one in longer.items() if key not in self.prefixes}
        if longer:
            texts = [one.ids[one.picture : one.common] for one in longer.values()]
            ids, mask = pad_left(texts, self.pad_id, device)
            parents = [one.first for one in longer.values()]
            self.prefixes.extend(list(longer), parents, embed(ids), mask)
        cache, before = self.prefixes.gather([one.whole for one in splits])
        self.prefixes.shrink()
        ids, mask = pad_left([one.ids[one.common :] for one in splits], self.pad_id, device)
        after = embed(ids)
        # generate() wants embeddings of the whole length and cuts off what the cache holds
        unseen = after.new_zeros(*before.shape, after.shape[-1])
        return {
            "inputs_embeds": torch.cat([unseen, after], dim=1),
            "attention_mask": torch.cat([before, mask], dim=1),
            "past_key_values": cache,
        }

    def _from_processor(self, requests: Sequence[Request], tails: Sequence[Ids]) -> dict[str, Any]:
        texts = [self.text(r.prompt, len(self.views(r))) for r in requests]
        pictures = [
            [vision.open_view(view, self.image_size) for view in self.views(r)] for r in requests
        ]
        batch = self.processor(
            text=texts,
            images=pictures if any(pictures) else None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=self._special(texts[0]),
        )
        if tails:
            batch = self._with_tails(dict(batch), tails)
        device, dtype = self.model.device, self.model.dtype
        return {
            key: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for key, value in batch.items()
        }

    def _with_tails(self, batch: dict[str, Any], tails: Sequence[Ids]) -> dict[str, Any]:
        """Answer tokens behind each prompt; token types and the like go on as plain text (0)."""
        shape, mask = batch["input_ids"].shape, batch["attention_mask"].bool()
        for key, value in batch.items():
            if value.shape != shape or key == "attention_mask":
                continue
            plain = key != "input_ids"
            rows = [
                [*row[own].tolist(), *([0] * len(tail) if plain else tail)]
                for row, own, tail in zip(value, mask, tails, strict=True)
            ]
            batch[key], lengths = pad_left(rows, 0 if plain else self.pad_id, "cpu")
        return {**batch, "attention_mask": lengths}

    def _vision(self) -> vision.VisionFeatures:
        def pixels(pictures: list[Image.Image]) -> torch.Tensor:
            batch = self.processor.image_processor(images=pictures, return_tensors="pt")
            return batch["pixel_values"]

        def encode(values: torch.Tensor) -> Sequence[torch.Tensor]:
            out = self.model.get_image_features(values.to(self.model.device, self.model.dtype))
            return getattr(out, "pooler_output", out)

        return vision.VisionFeatures(pixels, encode, self.image_size, self.cache_bytes)


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
