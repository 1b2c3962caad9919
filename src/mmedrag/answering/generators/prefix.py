"""Keys and values of how prompts begin, computed once for all prompts that begin so.

A prompt begins with the picture (some template tokens, then hundreds of image tokens), goes on
with the references, and ends in the question. Questions about one picture share the first part,
with the same references also the second, and a decoder's keys and values do not depend on what
follows. For LLaVA-Med's 576 image tokens, three references and a question of 40 tokens that is
nine tenths of the prefill.

Layout of a batch: [padding | beginning | padding | rest]. Padding is masked and positions are
counted over the mask, so every row computes what it would compute alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Ids = tuple[int, ...]
Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys, values: [heads, tokens, width] each
GAIN = 16  # tokens beyond the picture from which two prompts' common text is kept
WORTH = 0.75  # of the tokens of whole prompts: kept beginnings must save at least a quarter


def supported(model: Any) -> bool:
    """Whether the language model attends to everything before, with ordinary keys and values."""
    text = model.config.text_config
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    plain = getattr(text, "model_type", "") in ("llama", "mistral", "qwen2", "qwen3")
    return plain and kinds == {"full_attention"} and getattr(text, "sliding_window", None) is None


@dataclass(frozen=True)
class PrefixSplit:
    """How one prompt is divided: ``ids[:picture]``, ``ids[picture:common]``, the rest.

    ``view`` names the picture; ``ids`` hold one image token, the last of ``ids[:picture]``.
    """

    view: str
    ids: Ids
    picture: int
    common: int

    @property
    def first(self) -> Hashable:
        return self.view, self.ids[: self.picture]

    @property
    def whole(self) -> Hashable:
        return self.view, self.ids[: self.common]


def common_length(a: Ids, b: Ids) -> int:
    """How many tokens two sequences have in common from the start."""
    return bisect_left(range(min(len(a), len(b))), True, key=lambda i: a[: i + 1] != b[: i + 1])


def split_prefixes(prompts: Sequence[tuple[str, Ids, int]]) -> list[PrefixSplit]:
    """Where each prompt (view, ids, end of its picture) is best divided.

    Prompts of one picture are sorted; neighbours that have at least ``GAIN`` tokens of text in
    common form a run, until what they have in common falls to half. A run's prompts are divided
    where the run's common beginning ends, all others behind the picture. One token at least is
    left for the rest, which the answer's first logits come from.
    """
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i][0], prompts[i][1]))
    common = [picture for _, _, picture in prompts]
    run: list[int] = []
    shared = 0

    def close() -> None:
        if len(run) > 1:
            for i in run:
                common[i] = min(shared, len(prompts[i][1]) - 1)
        run.clear()

    for i in order:
        view, ids, picture = prompts[i]
        if run:
            last_view, last_ids, _ = prompts[run[-1]]
            both = common_length(last_ids, ids) if last_view == view else 0
            if both >= picture + GAIN and (len(run) == 1 or 2 * both >= shared):
                shared = both if len(run) == 1 else min(shared, both)
            else:
                close()
        run.append(i)
    close()
    return [PrefixSplit(v, ids, p, c) for (v, ids, p), c in zip(prompts, common, strict=True)]


def worth_caching(splits: Sequence[PrefixSplit], image_tokens: int) -> bool:
    """Whether keeping the beginnings costs clearly less than computing whole prompts."""
    plain = sum(len(one.ids) + image_tokens for one in splits)
    kept = sum(len(one.ids) - one.common for one in splits)
    kept += sum(one.picture + image_tokens for one in {b.first: b for b in splits}.values())
    kept += sum(one.common - one.picture for one in {b.whole: b for b in splits}.values())
    return kept <= WORTH * plain


class PrefixCache:
    """Keys and values by beginning, least recently used first out beyond ``max_bytes``."""

    def __init__(self, model: Any, max_bytes: int) -> None:
        self.model, self.max_bytes = model, max_bytes
        self.computed = self.reused = 0
        self._kept: OrderedDict[Hashable, Layers] = OrderedDict()
        self._tokens = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    @property
    def room(self) -> int:
        """How many tokens may be held."""
        text = self.model.config.text_config
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        each = 2 * text.num_hidden_layers * heads * width * self.model.dtype.itemsize
        return max(1, self.max_bytes // each)

    def add(self, keys: Sequence[Hashable], embeds: torch.Tensor) -> None:
        """Compute beginnings ``embeds`` [n, tokens, width], all of one length, from nothing."""
        out = self.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        for row, key in enumerate(keys):
            self._keep(
                key, [(one.keys[row], one.values[row]) for one in out.past_key_values.layers]
            )

    def extend(
        self,
        keys: Sequence[Hashable],
        parents: Sequence[Hashable],
        embeds: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        """Compute what follows ``parents``: ``embeds`` [n, tokens, width], padded left."""
        cache, before = self.gather(parents)
        whole = torch.cat([before, mask], dim=1)
        positions = (whole.cumsum(-1) - 1).clamp(min=0)[:, -mask.shape[1] :]
        out = self.model(
            inputs_embeds=embeds,
            attention_mask=whole,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for row, key in enumerate(keys):
            own = whole[row].bool()
            self._keep(
                key,
                [
                    (one.keys[row][:, own], one.values[row][:, own])
                    for one in out.past_key_values.layers
                ],
            )

    def gather(self, keys: Sequence[Hashable]) -> tuple[Any, torch.Tensor]:
        """A cache for a batch whose rows begin so, padded left, and its mask [rows, tokens]."""
        from transformers import DynamicCache

        rows = [self._kept[key] for key in keys]
        lengths = [row[0][0].shape[1] for row in rows]
        longest = max(lengths)
        cache = DynamicCache()
        for layer in range(len(rows[0])):
            key_states, value_states = (
                _stacked([row[layer][k] for row in rows], longest) for k in (0, 1)
            )
            cache.update(key_states, value_states, layer)
        mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
        self.reused += len(keys)
        for key in dict.fromkeys(keys):
            self._kept.move_to_end(key)
        return cache, mask.to(rows[0][0][0].device)

    def shrink(self) -> None:
        """Let go of the oldest until what is kept fits."""
        while self._tokens > self.room and len(self._kept) > 1:
            _, layers = self._kept.popitem(last=False)
            self._tokens -= layers[0][0].shape[1]

    def clear(self) -> None:
        self._kept.clear()
        self._tokens = 0

    def _keep(self, key: Hashable, layers: Layers) -> None:
        # a view into a batch would hold the whole batch in memory
        self._kept[key] = [(k.clone(), v.clone()) for k, v in layers]
        self._tokens += layers[0][0].shape[1]
        self.computed += 1


def _stacked(tensors: Sequence[torch.Tensor], longest: int) -> torch.Tensor:
    """[rows, heads, longest, width]; shorter ones have zeros on the left."""
    if all(tensor.shape[1] == longest for tensor in tensors):
        return torch.stack(list(tensors))
    first = tensors[0]
    out = first.new_empty(len(tensors), first.shape[0], longest, first.shape[2])
    for row, tensor in enumerate(tensors):
        out[row, :, : longest - tensor.shape[1]] = 0
        out[row, :, longest - tensor.shape[1] :] = tensor
    return out
