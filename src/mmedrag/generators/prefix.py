"""Keys and values of the prompt's beginning, computed once per picture.

A prompt begins with the picture: some template tokens, then hundreds of image tokens, then the
question. All questions about one picture, with and without references, share that beginning, and
in a decoder its keys and values do not depend on what follows. For LLaVA-Med's 576 image tokens
and a question of 40 tokens that is nine tenths of the prefill.

Layout of a batch: [prefix | padding | rest]. The padding is masked and positions are counted
over the mask, so every row computes what it would compute alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys, values: [heads, tokens, width] each


def supported(model: Any) -> bool:
    """Whether the language model attends to everything before, with ordinary keys and values."""
    text = model.config.text_config
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    plain = getattr(text, "model_type", "") in ("llama", "mistral", "qwen2", "qwen3")
    return plain and kinds == {"full_attention"} and getattr(text, "sliding_window", None) is None


class PrefixCache:
    """Keys and values by prefix, least recently used first out beyond ``max_bytes``."""

    def __init__(self, model: Any, max_bytes: int) -> None:
        self.model, self.max_bytes = model, max_bytes
        self.computed = self.reused = 0
        self._kept: OrderedDict[str, Layers] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def fits(self, tokens: int) -> int:
        """How many prefixes of this length may be held."""
        text = self.model.config.text_config
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        each = 2 * text.num_hidden_layers * heads * width * tokens * self.model.dtype.itemsize
        return max(1, self.max_bytes // each)

    def add(self, keys: Sequence[str], embeds: torch.Tensor) -> None:
        """Compute the prefixes ``embeds`` [n, tokens, width], all of one length."""
        out = self.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        layers = out.past_key_values.layers
        for row, key in enumerate(keys):
            self._kept[key] = [(one.keys[row].clone(), one.values[row].clone()) for one in layers]
        self.computed += len(keys)

    def gather(self, keys: Sequence[str]) -> Any:
        """A cache for a batch whose rows begin with these prefixes."""
        from transformers import DynamicCache

        rows = [self._kept[key] for key in keys]
        cache = DynamicCache()
        for layer in range(len(rows[0])):
            found = [row[layer] for row in rows]
            cache.update(
                torch.stack([k for k, _ in found]), torch.stack([v for _, v in found]), layer
            )
        self.reused += len(keys)
        for key in dict.fromkeys(keys):
            self._kept.move_to_end(key)
        self._shrink()
        return cache

    def _shrink(self) -> None:
        while len(self._kept) > 1:
            keys, values = next(iter(self._kept.values()))[0]
            each = (keys.numel() + values.numel()) * keys.element_size()
            each *= self.model.config.text_config.num_hidden_layers
            if len(self._kept) * each <= self.max_bytes:
                return
            self._kept.popitem(last=False)

    def clear(self) -> None:
        self._kept.clear()
