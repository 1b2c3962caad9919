"""Model folders: LLaVA and LLaVA-Med layouts → Hugging Face, adapters merged, facts shown.

Place in the picture: before everything; what ``generators/hf`` loads. The official layouts put a
CLIP vision tower and an ``mm_projector`` beside a LLaMA or Mistral; transformers'
``LlavaForConditionalGeneration`` computes the same thing from other names:

    logits = LM([embed(text), projector(CLIP(image)[layer -2, patches]), embed(text)])

``convert`` renames tensors shard by shard. Every tensor is used exactly once, or the conversion
fails; what the original recomputes (rotary frequencies, position ids) is compared and dropped.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmedrag.checkpoints import SafetensorsWriter, Shard, Spec, shard_paths, shards
from mmedrag.encoders import torchvision_shim
from mmedrag.types import UserError

log = logging.getLogger(__name__)
LAYOUTS = {"llava_mistral": "mistral", "llava_llama": "llama", "llava": "llama"}
CLIP_L = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    patch_size=14, projection_dim=768, hidden_act="quick_gelu",
)  # fmt: skip
TOWERS = {  # vision towers that checkpoints name without carrying their configuration
    "openai/clip-vit-large-patch14-336": {**CLIP_L, "image_size": 336},
    "openai/clip-vit-large-patch14": {**CLIP_L, "image_size": 224},
}
MISTRAL_INSTRUCT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% else %} {% for c in m['content'] %}{{ c['text'] }}{% endfor %} </s>{% endif %}{% endfor %}"
)
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATS = {"mistral_instruct": MISTRAL_INSTRUCT, "vicuna_v1": VICUNA_V1}


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


def convert(
    source: str | Path,
    out: str | Path,
    vision_tower: str | Path | None = None,
    chat: str | None = None,
    local_files_only: bool = True,
) -> Report:
    """A LLaVA-Med-1.5, LLaVA-1.5 or LLaVA-Med-1.0 folder as a Hugging Face folder.

    Args:
        vision_tower: folder or hub id of the CLIP tower, where ``source`` only names one.
        chat: "mistral_instruct" or "vicuna_v1"; None: by the language model.

    Raises:
        UserError: unknown layout; a tensor unknown, missing, doubled or of a wrong shape; ``out``
            exists. Nothing is left at ``out`` then.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already, expected a new folder")
    settings = read_config(source)
    tower = find_tower(source, settings, vision_tower, local_files_only)
    files = shard_paths(source) + [p for p in [source / "mm_projector.bin"] if p.exists()]
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        tokenizer = load_tokenizer(source)
        vocabulary = _padded(max(settings["vocab_size"], len(tokenizer)))
        config = llava_config(settings, tower, tokenizer, vocabulary)
        report = Report(settings["model_type"], str(tower.name))
        writer = _Conversion(config, settings, vocabulary, part, report)
        writer.run(files, tower)
        config.save_pretrained(part)
        _save_processor(part, settings, tower, tokenizer, config, chat)
        _save_generation(part, tokenizer, range(settings["vocab_size"], vocabulary))
        (part / "conversion.json").write_text(json.dumps(vars(report), indent=2) + "\n")
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return report


# --- what the source says ----------------------------------------------------------------------


def read_config(source: Path) -> dict[str, Any]:
    """The source's ``config.json``, checked to be one of the official layouts."""
    path = source / "config.json"
    if (source / "adapter_config.json").exists():
        raise UserError(f"{source}: a LoRA adapter, expected full weights (see `model merge`)")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if "text_config" in settings:
        raise UserError(f"{source}: already a Hugging Face folder, nothing to convert")
    if settings.get("model_type") not in LAYOUTS:
        raise UserError(
            f"{path}: model_type {settings.get('model_type')!r}, expected {', '.join(LAYOUTS)}"
        )
    if "vocab_size" not in settings or "hidden_size" not in settings:
        raise UserError(f"{path}: vocab_size or hidden_size is missing")
    projector = settings.get("mm_projector_type", "linear")
    if projector not in ("linear", "mlp2x_gelu"):
        raise UserError(f"{path}: mm_projector_type {projector!r}, expected linear or mlp2x_gelu")
    feature = settings.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise UserError(f"{path}: mm_vision_select_feature {feature!r}, expected patch, cls_patch")
    return settings


@dataclass
class Tower:
    """The CLIP vision tower: its settings, and its folder when it has one here."""

    name: str
    settings: dict[str, Any]
    folder: Path | None
    preprocessor: dict[str, Any]


def find_tower(
    source: Path, settings: Mapping[str, Any], given: str | Path | None, local_files_only: bool
) -> Tower:
    """The vision tower that ``source`` carries or names.

    Looked for: ``given``, a folder of that name (also inside ``source``), the local hub cache.
    """
    name = str(given or settings.get("mm_vision_tower") or settings.get("vision_tower") or "")
    if not name:
        raise UserError(f"{source}/config.json: mm_vision_tower is missing")
    folder = next((p for p in (Path(name), source / name) if (p / "config.json").exists()), None)
    if folder is None:
        folder = _cached(name, local_files_only)
    if folder is None:
        if name not in TOWERS:
            raise UserError(
                f"vision tower {name!r}: not a folder and not in the local cache; name its folder "
                "with --vision-tower"
            )
        return Tower(name, TOWERS[name], None, {})
    config = json.loads((folder / "config.json").read_text())
    preprocessor = folder / "preprocessor_config.json"
    found = json.loads(preprocessor.read_text()) if preprocessor.exists() else {}
    return Tower(name, config.get("vision_config", config), folder, found)


def _cached(name: str, local_files_only: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=local_files_only))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    except OSError as error:
        raise UserError(f"vision tower {name!r}: cannot be downloaded: {error}") from None


def load_tokenizer(source: Path) -> Any:
    """The source's tokenizer with an ``<image>`` token, splitting text at it as LLaVA does.

    LLaVA adds the start token, and tokenises the pieces around ``<image>`` as texts of their
    own, so each begins with sentencepiece's dummy space (``legacy``). Rewrapped as a plain fast
    tokenizer, because the LLaMA class forgets ``legacy`` on loading.
    """
    torchvision_shim.ready()
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    if not any((source / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{source}: no tokenizer.json or tokenizer.model")
    try:
        llama = LlamaTokenizer.from_pretrained(
            source, local_files_only=True, legacy=True, add_bos_token=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{source}: tokenizer cannot be loaded: {error}") from None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llama.backend_tokenizer,
        bos_token=llama.bos_token,
        eos_token=llama.eos_token,
        unk_token=llama.unk_token,
        pad_token=llama.pad_token or llama.unk_token or llama.eos_token,
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def image_place(settings: Mapping[str, Any]) -> str:
    if settings.get("mm_use_im_start_end"):
        return "<im_start><image><im_end>"
    return "<image>"


# --- what the target is ------------------------------------------------------------------------


def llava_config(settings: Mapping[str, Any], tower: Tower, tokenizer: Any, vocabulary: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

    kind = LAYOUTS[settings["model_type"]]
    text_class = MistralConfig if kind == "mistral" else LlamaConfig
    known = set(text_class().to_dict()) | {"rope_theta", "rope_scaling"}
    text = {k: v for k, v in settings.items() if k in known and not k.startswith("_")}
    for unwanted in ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype"):
        text.pop(unwanted, None)
    text["vocab_size"] = vocabulary
    vision = {k: v for k, v in tower.settings.items() if k in CLIPVisionConfig().to_dict()}
    for unwanted in ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype"):
        vision.pop(unwanted, None)
    linear = settings.get("mm_projector_type", "linear") == "linear"
    whole = settings.get("mm_vision_select_feature") == "cls_patch"
    return LlavaConfig(  # type: ignore[call-arg]  # unknown fields are kept
        text_config=text_class(**text),
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_act="linear" if linear else "gelu",
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if whole else "default",
        image_place=image_place(settings),
        architectures=["LlavaForConditionalGeneration"],
        tie_word_embeddings=bool(settings.get("tie_word_embeddings", False)),
    )


def _padded(rows: int) -> int:
    """A multiple of 64, which matrix units like; the added tokens are never generated."""
    return -(-rows // 64) * 64


def _save_processor(
    part: Path, settings: Mapping[str, Any], tower: Tower, tokenizer: Any, config: Any,
    chat: str | None,
) -> None:  # fmt: skip
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    side = config.vision_config.image_size
    kept = ("image_mean", "image_std", "resample", "rescale_factor")
    images = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_pad=settings.get("image_aspect_ratio") == "pad",  # to a square, CLIP mean colour
        **{k: tower.preprocessor[k] for k in kept if k in tower.preprocessor},
    )
    mistral = LAYOUTS[settings["model_type"]] == "mistral"
    template = chat or ("mistral_instruct" if mistral else "vicuna_v1")
    if template not in CHATS:
        raise UserError(f"chat: {template!r} is not known, expected {', '.join(CHATS)}")
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHATS[template].replace("IMAGE", image_place(settings)),
    ).save_pretrained(part)


def _save_generation(part: Path, tokenizer: Any, never: range) -> None:
    from transformers import GenerationConfig

    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=list(never) or None,  # rows that only fill up the vocabulary
    ).save_pretrained(part)


# --- tensors -----------------------------------------------------------------------------------


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


class _Conversion:
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
        (self.part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

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
        self, number: int, total: int, specs: Mapping[str, Spec],
        tensors: Iterator[tuple[str, torch.Tensor]],
    ) -> None:  # fmt: skip
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
