"""The policy: log-probabilities of the answers of a batch of pairs, and nothing else.

Place in the picture: the forward pass of ``train``, for LLaVA-shaped models (vision tower,
projector, language model). What a plain forward does and this one does not: vision features of an
image twice, logits of prompt tokens, and what several answers follow (picture, references,
question) once for each of them.

The function is bound to the model as its ``forward``, so that PEFT, DDP, ZeRO and FSDP wrap it as
they wrap any model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mmedrag.preference.dpo.loss import token_logps
from mmedrag.records import UserError

REFERENCE = "reference"  # adapter name of a frozen first stage


def install(model: Any) -> None:
    """Make ``model(**batch)`` return answer log-probabilities (see :func:`answer_logps`)."""
    inner = getattr(model, "model", None)
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    if not all(hasattr(inner, part) for part in parts) or not hasattr(model, "lm_head"):
        raise UserError(
            f"train dpo: {type(model).__name__} is not a LLaVA-shaped model (vision tower, "
            "projector, language model); `model convert` makes one of LLaVA-Med checkpoints"
        )
    model.forward = MethodType(answer_logps, model)


def answer_logps(
    self: Any,
    input_ids: Tensor,
    image: Tensor,
    predictor: Tensor,
    target: Tensor,
    side: Tensor,
    sides: int,
    features: Tensor | None = None,
    pixel_values: Tensor | None = None,
    position_ids: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """Σ log p of the answer tokens of each side, float32 [sides].

    Args:
        self: LlavaForConditionalGeneration.
        input_ids: int64 [rows, length], padded on the right (causal attention then needs no mask).
        image: int64 [rows], which image of the batch a row shows.
        predictor: int64 [tokens, 2], (row, position) whose next token is predicted.
        target: int64 [tokens], the tokens themselves; side: int64 [tokens], whose they are.
        features: [images, patches, width] before the projector; ``pixel_values`` [images, 3, s, s]
            of those without (encoded here, once each, and placed after them).
        position_ids, ends: int64 [rows, length] where a row is a tree of sequences: how deep a
            token stands, and the last place that it is a beginning of (:func:`tree_mask`).
    """
    found = [] if features is None else [features]
    if pixel_values is not None:
        found.append(vision_features(self, pixel_values))
    projected = self.model.multi_modal_projector(torch.cat(found))
    places = input_ids == self.config.image_token_id
    embeds = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
    shown = projected[image].to(embeds.dtype)
    embeds = embeds.masked_scatter(places[..., None], shown)
    mask = None if ends is None else tree_mask(ends, embeds.dtype)
    hidden = self.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    logps = token_logps(hidden[predictor[:, 0], predictor[:, 1]], self.lm_head, target)
    return logps.new_zeros(sides).index_add(0, side, logps)


def tree_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [rows, 1, length, length]: a token sees those that it follows.

    Sequences that begin alike are laid out as a tree, depth first, so whatever follows token j
    stands in the places j..ends[j].
    """
    place = torch.arange(ends.shape[1], device=ends.device)
    follows = (place[:, None] >= place) & (place[:, None] <= ends[:, None, :])
    mask = torch.zeros(follows.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill(~follows, torch.finfo(dtype).min)[:, None]


@torch.no_grad()
def vision_features(model: Any, pixel_values: Tensor) -> Tensor:
    """Frozen features [images, patches, width] that the projector takes (LLaVA, §4.1)."""
    config, tower = model.config, model.model.vision_tower
    out = tower(pixel_values.to(tower.dtype), output_hidden_states=True)
    layers = config.vision_feature_layer
    chosen = [layers] if isinstance(layers, int) else layers
    states = [out.hidden_states[layer] for layer in chosen]
    if config.vision_feature_select_strategy == "default":
        states = [state[:, 1:] for state in states]  # without the class token
    return torch.cat(states, dim=-1)


def linear_targets(model: Any, only: Sequence[str] = ()) -> str:
    """PEFT target pattern: the linear layers of the language model, or those named in ``only``.

    ``lm_head`` lies outside the language model, so it is never among them.

    Raises:
        UserError: a name that no linear layer has.
    """
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    if unknown := sorted(set(only) - found):
        listed = ", ".join(sorted(found))
        raise UserError(
            f"train dpo: lora_targets: no linear layer {unknown[0]!r}, there are {listed}"
        )
    names = set(only) or found
    return rf".*language_model\..*\.({'|'.join(sorted(names))})"


def switch_off_dropout(model: nn.Module) -> None:
    """Policy and reference must agree on the same input (the released trainer does this too)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@contextmanager
def as_reference(policy: Any) -> Iterator[None]:
    """The frozen reference inside the policy: adapters off, or the first stage's adapter.

    A trained projector lives in the adapter too, so switching the adapter restores the original.
    """
    if REFERENCE not in policy.peft_config:
        with policy.disable_adapter():
            yield
        return
    policy.set_adapter(REFERENCE)
    try:
        yield
    finally:
        policy.set_adapter("default")
