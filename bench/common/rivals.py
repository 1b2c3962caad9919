"""What several benchmarks measure against, and how they count what a model computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def bare(generator: Any, requests: Sequence[Any], size: int | None = None) -> list[str]:
    """Processor and ``model.generate``, batches sorted by length; nothing shared, nothing kept."""
    import torch

    from mmedrag.answering.generators import open_view

    inputs, size = generator.inputs, size or generator.batch_size
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.text))
    kinds = sorted({requests[i].max_new_tokens for i in order})
    said: dict[int, str] = {}
    for limit in kinds:
        rows = [i for i in order if requests[i].max_new_tokens == limit]
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            chosen = [requests[i] for i in part]
            pictures = [open_view((r.images[0], r.noise), generator.image_size) for r in chosen]
            texts = [inputs.text(r.prompt, 1) for r in chosen]
            batch = inputs.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
            batch = batch.to(generator.device, generator.dtype)
            with torch.inference_mode():
                out = generator.model.generate(
                    **batch, max_new_tokens=limit, do_sample=False, pad_token_id=inputs.pad_id
                )
            new = out[:, batch["input_ids"].shape[1] :]
            texts = generator.tokenizer.batch_decode(new, skip_special_tokens=True)
            said.update(zip(part, (text.strip() for text in texts), strict=True))
    return [said[i] for i in range(len(requests))]


class Work:
    """Counts what a LLaVA computes: images through the tower, tokens through the decoder (apart:
    those with gradients), positions through the head. Multiplications alone, attention's
    quadratic part and adapters not counted."""

    def __init__(self, model: Any) -> None:
        self.clear()
        tower, text = model.model.vision_tower, model.model.language_model
        self.hooks = [
            tower.register_forward_pre_hook(self._look, with_kwargs=True),
            text.register_forward_pre_hook(self._read, with_kwargs=True),
            model.lm_head.register_forward_pre_hook(self._say, with_kwargs=True),
        ]
        patches = tower.config.image_size // tower.config.patch_size
        self.per_image = 2 * patches**2 * sum(p.numel() for p in tower.parameters())
        self.per_token = 2 * sum(p.numel() for p in text.layers.parameters())
        self.per_logits = 2 * model.lm_head.weight.numel()

    def clear(self) -> None:
        self.images, self.tokens, self.logits = 0, [0, 0], [0, 0]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _look(self, _module: Any, args: Any, kwargs: Any) -> None:
        self.images += len(args[0] if args else kwargs["pixel_values"])

    def _read(self, _module: Any, _args: Any, kwargs: Any) -> None:
        self._count(self.tokens, kwargs["inputs_embeds"])

    def _say(self, _module: Any, args: Any, _kwargs: Any) -> None:
        self._count(self.logits, args[0])

    def _count(self, into: list[int], states: Any) -> None:
        import torch

        into[torch.is_grad_enabled()] += states.numel() // states.shape[-1]

    def take(self, with_gradient: int = 2) -> dict[str, float]:
        """The counts so far, and GFLOP: a token with gradients costs ``with_gradient`` passes."""
        flop = self.images * self.per_image
        for each, (plain, trained) in (
            (self.per_token, self.tokens),
            (self.per_logits, self.logits),
        ):
            flop += each * (plain + with_gradient * trained)
        found = {
            "images": self.images,
            "tokens": sum(self.tokens),
            "logits": sum(self.logits),
            "tokens_with_gradient": self.tokens[1],
            "gflop": flop / 1e9,
            "vision_share": self.images * self.per_image / max(flop, 1),
        }
        self.clear()
        return found
