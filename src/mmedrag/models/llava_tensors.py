"""Official LLaVA tensors → Hugging Face names, streamed, each used exactly once.

What the original recomputes (rotary frequencies, position ids) is compared and dropped.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmedrag.models.checkpoints import SafetensorsWriter, Shard, Spec, shard_paths, shards
from mmedrag.models.llava_layout import Tower
from mmedrag.records import UserError
from mmedrag.runtime import torchvision_shim, write_json

log = logging.getLogger(__name__)


@dataclass
class Report:
    """What a conversion did; printed by ``model convert`` and kept as ``conversion.json``."""

    layout: str
    vision_tower: str
    tensors: int = 0
    bytes: int = 0
    checked: list[str] = field(default_factory=list)  # recomputed by the model, so compared
    added: list[str] = field(default_factory=list)  # not in the source
    notes: list[str] = field(default_factory=list)


def rename(key: str) -> str | None:
    """The Hugging Face name of an official tensor; None for one that the model recomputes."""
    if key.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
        return None
    vision = re.match(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(vision_model\..+)", key)
    if vision:
        return f"vision_tower.{vision[1]}"
    projector = re.match(r"(?:model\.)?mm_projector\.(?:(0|2)\.)?(weight|bias)$", key)
    if projector:
        return f"multi_modal_projector.linear_{2 if projector[1] == '2' else 1}.{projector[2]}"
    if re.match(r"model\.(?:embed_tokens|layers|norm)\.", key) or key == "lm_head.weight":
        return f"language_model.{key}"
    raise UserError(f"tensor {key!r} is not part of a known LLaVA layout")


class Conversion:
    """Writes the tensors; knows which are still to come."""

    def __init__(
        self, config: Any, settings: Mapping[str, Any], vocabulary: int, part: Path, report: Report
    ) -> None:
        self.config, self.settings, self.vocabulary = config, settings, vocabulary
        self.part, self.report = part, report
        self.missing = expected_tensors(config)
        self.seen: dict[str, str] = {}
        self.weight_map: dict[str, str] = {}

    def run(self, files: list[Path], tower: Tower) -> None:
        total = len(files) + 2
        dtype = torch.float32
        for number, shard in enumerate(shards(files), 1):
            names = {key: rename(key) for key in shard.specs}
            for key, name in names.items():
                if name is None:
                    self._check(key, shard[key])
            dtype = next((s.dtype for s in shard.specs.values()), dtype)
            self._write(number, total, shard, {k: n for k, n in names.items() if n})
        if any(name.startswith("vision_tower.") for name in self.missing):
            self._tower(total - 1, total, tower)
        self._projector(total, total, dtype)
        if self.missing:
            listed = ", ".join(sorted(self.missing)[:5])
            raise UserError(f"{len(self.missing)} tensors are missing from the source: {listed}")
        index = {"metadata": {"total_size": self.report.bytes}, "weight_map": self.weight_map}
        write_json(self.part / "model.safetensors.index.json", index, indent=2)

    def _take(self, name: str, shape: tuple[int, ...], origin: str) -> None:
        if name in self.seen:
            raise UserError(f"{origin}: gives {name}, which {self.seen[name]} gave already")
        wanted = self.missing.pop(name, None)
        if wanted is None:
            raise UserError(f"{origin}: gives {name}, which this model does not have")
        if tuple(shape) != wanted:
            raise UserError(f"{origin}: shape {tuple(shape)}, expected {wanted}")
        self.seen[name] = origin

    def _write(self, number: int, total: int, shard: Shard, names: Mapping[str, str]) -> None:
        """One source file → one target file, tensor by tensor."""
        specs = {}
        for key, name in sorted(names.items(), key=lambda pair: pair[1]):
            spec = shard.specs[key]
            if _is_vocabulary(name) and spec.shape[0] == self.settings["vocab_size"]:
                spec = Spec(spec.dtype, (self.vocabulary, *spec.shape[1:]))
            self._take(name, spec.shape, f"{shard.path.name}: {key}")
            specs[name] = spec
        keys = {name: key for key, name in names.items()}
        self._stream(number, total, specs, ((n, self._grown(n, shard[keys[n]])) for n in specs))

    def _stream(
        self,
        number: int,
        total: int,
        specs: Mapping[str, Spec],
        tensors: Iterator[tuple[str, torch.Tensor]],
    ) -> None:
        if not specs:
            return
        file = f"model-{number:05d}-of-{total:05d}.safetensors"
        writer = SafetensorsWriter(self.part / file, specs)
        for name, tensor in tensors:
            writer.write(name, tensor)
        writer.close()
        self.weight_map.update(dict.fromkeys(specs, file))
        self.report.tensors += len(specs)
        self.report.bytes += sum(spec.bytes for spec in specs.values())
        log.info("%s: %d tensors", file, len(specs))

    def _grown(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Embedding and output rows for the added tokens: copies of row 0 (``<unk>``)."""
        extra = self.vocabulary - len(tensor) if _is_vocabulary(name) else 0
        if extra <= 0:
            return tensor
        self.report.added.append(f"{name}: {extra} rows, copies of row 0")
        return torch.cat([tensor, tensor[:1].expand(extra, -1)])

    def _tower(self, number: int, total: int, tower: Tower) -> None:
        """Vision weights from the named tower, when the checkpoint does not carry them."""
        if tower.folder is None:
            raise UserError(
                f"the checkpoint has no vision weights; name the folder of {tower.name!r} "
                "with --vision-tower"
            )
        for shard in shards(shard_paths(tower.folder)):
            names = {
                key: f"vision_tower.{key}"
                for key in shard.specs
                if key.startswith("vision_model.") and not key.endswith("position_ids")
            }
            self._write(number, total, shard, names)
            self.report.notes.append(f"vision weights from {tower.name}")

    def _projector(self, number: int, total: int, dtype: torch.dtype) -> None:
        """A linear projector as two layers: W x + b, then the identity."""
        width = self.config.text_config.hidden_size
        weight, bias = (f"multi_modal_projector.linear_2.{part}" for part in ("weight", "bias"))
        if self.config.projector_hidden_act != "linear" or weight not in self.missing:
            return
        specs = {bias: Spec(dtype, (width,)), weight: Spec(dtype, (width, width))}
        for name, spec in specs.items():
            self._take(name, spec.shape, "identity")
        self.report.added.append("multi_modal_projector.linear_2: the identity")
        values = iter([(bias, torch.zeros(width)), (weight, torch.eye(width))])
        self._stream(number, total, specs, values)

    def _check(self, key: str, tensor: torch.Tensor) -> None:
        """A buffer that the model recomputes must be what it recomputes."""
        if key.endswith("position_ids"):
            wanted = torch.arange(tensor.numel()).reshape(tensor.shape)
        else:
            text = self.config.text_config
            theta = float(self.settings.get("rope_theta", 10000.0))
            width = 2 * tensor.numel()
            wanted = theta ** -(torch.arange(0, width, 2).float() / width)
            if width != getattr(text, "head_dim", text.hidden_size // text.num_attention_heads):
                raise UserError(f"{key}: {tensor.numel()} frequencies, which do not fit the heads")
        if not torch.allclose(tensor.float(), wanted.float(), rtol=1e-2, atol=1e-6):
            raise UserError(f"{key}: is not what the model computes, so it cannot be dropped")
        self.report.checked.append(key)


def _is_vocabulary(name: str) -> bool:
    return name in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")


def expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight of the target, under the names of llava-hf checkpoints."""
    torchvision_shim.ready()
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    found = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.")
        name = re.sub(r"^language_model\.(?!model\.|lm_head)", "language_model.model.", name)
        name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
        name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
        found[name] = tuple(tensor.shape)
    if config.tie_word_embeddings:
        found.pop("language_model.lm_head.weight", None)
    return found
