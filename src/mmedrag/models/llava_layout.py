"""What an official LLaVA folder says, and the configuration and processor that follow from it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedrag.models.checkpoints import read_object
from mmedrag.records import UserError
from mmedrag.runtime import torchvision_shim

LAYOUTS = {"llava_mistral": "mistral", "llava_llama": "llama", "llava": "llama"}
CLIP_L = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768, "patch_size": 14},
    **{"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_act": "quick_gelu"},
}
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


def read_config(source: Path) -> dict[str, Any]:
    """The source's ``config.json``, checked to be one of the official layouts."""
    path = source / "config.json"
    if (source / "adapter_config.json").exists():
        raise UserError(f"{source}: a LoRA adapter, expected full weights (see `model merge`)")
    settings = read_object(path)
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
    config = read_object(folder / "config.json")
    preprocessor = folder / "preprocessor_config.json"
    found = read_object(preprocessor) if preprocessor.exists() else {}
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


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def load_tokenizer(source: Path) -> Any:
    """The source's tokenizer with an ``<image>`` token, splitting text at it as LLaVA does.

    LLaVA adds the start token, and tokenises the pieces around ``<image>`` as texts of their
    own, so each begins with sentencepiece's dummy space (``legacy``). Rewrapped as a plain fast
    tokenizer, because the LLaMA class forgets ``legacy`` on loading.
    """
    torchvision_shim.ready()
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    if not (source / "tokenizer.json").exists():
        if not (source / "tokenizer.model").exists():
            raise UserError(f"{source}: no tokenizer.json or tokenizer.model")
        missing = [p for p in ("sentencepiece", "google.protobuf") if not _installed(p)]
        if missing:
            raise UserError(
                f"{source}/tokenizer.model: reading it needs {' and '.join(missing)}; install "
                "with: pip install sentencepiece protobuf"
            )
    try:
        llama = LlamaTokenizer.from_pretrained(
            source, local_files_only=True, trust_remote_code=False, legacy=True, add_bos_token=True
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


def llava_config(settings: Mapping[str, Any], tower: Tower, tokenizer: Any, vocabulary: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

    kind = LAYOUTS[settings["model_type"]]
    text_class = MistralConfig if kind == "mistral" else LlamaConfig
    known = set(text_class().to_dict()) | {"rope_theta", "rope_scaling"}
    unwanted = {"model_type", "architectures", "transformers_version", "torch_dtype", "dtype"}
    text = {k: v for k, v in settings.items() if k in known - unwanted and not k.startswith("_")}
    text["vocab_size"] = vocabulary
    seen = set(CLIPVisionConfig().to_dict()) - unwanted
    vision = {k: v for k, v in tower.settings.items() if k in seen}
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


def padded(rows: int) -> int:
    """A multiple of 64, which matrix units like; the added tokens are never generated."""
    return -(-rows // 64) * 64


def processor(
    settings: Mapping[str, Any], tower: Tower, tokenizer: Any, config: Any, chat: str | None = None
) -> Any:
    """CLIP's preprocessing, padded to a square where the model was trained so; chat template."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    side = config.vision_config.image_size
    kept = ("image_mean", "image_std", "resample", "rescale_factor")
    images = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_pad=settings.get("image_aspect_ratio") == "pad",  # with the CLIP mean colour
        **{k: tower.preprocessor[k] for k in kept if k in tower.preprocessor},
    )
    mistral = LAYOUTS[settings["model_type"]] == "mistral"
    template = chat or ("mistral_instruct" if mistral else "vicuna_v1")
    if template not in CHATS:
        raise UserError(f"chat: {template!r} is not known, expected {', '.join(CHATS)}")
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHATS[template].replace("IMAGE", image_place(settings)),
    )


def generation_config(tokenizer: Any, never: range) -> Any:
    """``never``: rows that only fill up the vocabulary and must not be said."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=list(never) or None,
    )
