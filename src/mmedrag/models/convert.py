"""Model folders: LLaVA and LLaVA-Med layouts → Hugging Face, adapters merged, facts shown.

Place in the picture: before everything; what ``answering/generators/hf`` loads. The official
layouts put a CLIP vision tower and an ``mm_projector`` beside a LLaMA or Mistral; transformers'
``LlavaForConditionalGeneration`` computes the same thing from other names:

    logits = LM([embed(text), projector(CLIP(image)[layer -2, patches]), embed(text)])

``convert`` renames tensors shard by shard (``llava_tensors``) and writes the configuration,
tokenizer and processor that go with them (``llava_layout``).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mmedrag.models import llava_layout as source_of
from mmedrag.models.checkpoints import NAMES, Shard, read_object, shard_paths
from mmedrag.models.llava_tensors import Conversion, Report
from mmedrag.records import UserError
from mmedrag.runtime import new_folder, torchvision_shim, write_json

log = logging.getLogger(__name__)


def convert_checkpoint(
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
    source = Path(source)
    torchvision_shim.ready()
    with new_folder(Path(out)) as part:
        settings = source_of.read_config(source)
        tower = source_of.find_tower(source, settings, vision_tower, local_files_only)
        files = shard_paths(source) + [p for p in [source / "mm_projector.bin"] if p.exists()]
        tokenizer = source_of.load_tokenizer(source)
        vocabulary = source_of.padded(max(settings["vocab_size"], len(tokenizer)))
        config = source_of.llava_config(settings, tower, tokenizer, vocabulary)
        report = Report(settings["model_type"], tower.name)
        Conversion(config, settings, vocabulary, part, report).run(files, tower)
        config.save_pretrained(part)
        source_of.processor(settings, tower, tokenizer, config, chat).save_pretrained(part)
        filling = range(settings["vocab_size"], vocabulary)
        source_of.generation_config(tokenizer, filling).save_pretrained(part)
        write_json(part / "conversion.json", vars(report), indent=2)
    return report


def merge_adapter(
    model: str | Path, adapter: str | Path, out: str | Path, dtype: str = "keep"
) -> dict[str, Any]:
    """The model with the adapter (and the projector it may have trained) folded in: W + BA·α/r.

    Args:
        dtype: number type of the merge and of the result; "keep" is the model's own.

    Raises:
        UserError: no such model or adapter, an adapter that does not fit it, ``out`` exists.
    """
    from mmedrag.models.adapters import attach
    from mmedrag.models.load import DTYPES, load_model

    adapter = Path(adapter)
    if dtype != "keep" and dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not known, expected keep, {', '.join(DTYPES)}")
    torchvision_shim.ready()
    with new_folder(Path(out)) as part:
        own = model_info(model).get("dtype") if dtype == "keep" else dtype
        loaded = load_model(model, device="cpu", dtype=own if own in DTYPES else "float32")
        merged = attach(loaded.model, adapter).merge_and_unload(safe_merge=True)
        merged.save_pretrained(part)
        loaded.processor.save_pretrained(part)
        facts = {"base": Path(str(model)).name, "adapter": adapter.name, "dtype": own}
        write_json(part / "merge.json", facts, indent=2)
    return facts


def model_info(model: str | Path) -> dict[str, Any]:
    """What a model or adapter folder is, from its small files and the headers of its weights."""
    folder = Path(model)
    if (folder / "adapter_config.json").exists():
        return _adapter_info(folder)
    settings = read_object(folder / "config.json")
    facts: dict[str, Any] = {"model_type": settings.get("model_type")}
    if "text_config" not in settings and facts["model_type"] in source_of.LAYOUTS:
        facts["layout"] = "official LLaVA, to be converted with `mmedrag model convert`"
    facts.update(_weights(folder))
    text, eye = settings.get("text_config") or settings, settings.get("vision_config") or {}
    facts["language_model"] = text.get("model_type")
    facts["context"] = text.get("max_position_embeddings")
    facts["vocabulary"] = text.get("vocab_size")
    facts["image_size"] = eye.get("image_size")
    facts["vision_feature_layer"] = settings.get("vision_feature_layer")
    facts["chat_template"] = (folder / "chat_template.jinja").exists()
    for extra in ("conversion.json", "merge.json"):
        if (folder / extra).exists():
            facts[extra.removesuffix(".json")] = read_object(folder / extra)
    return facts


def _adapter_info(folder: Path) -> dict[str, Any]:
    settings = read_object(folder / "adapter_config.json")
    keys = "peft_type r lora_alpha target_modules modules_to_save base_model_name_or_path".split()
    return {"adapter": True, **{k: settings.get(k) for k in keys}, **_weights(folder)}


def _weights(folder: Path) -> dict[str, Any]:
    """Parameters, bytes and number types, without reading a single weight of safetensors."""
    parameters = size = 0
    types: dict[str, int] = {}
    for path in shard_paths(folder):
        for spec in Shard(path).specs.values():
            count = spec.bytes // spec.dtype.itemsize
            parameters, size = parameters + count, size + spec.bytes
            name = str(spec.dtype).removeprefix("torch.")
            types[name] = types.get(name, 0) + count
            if spec.dtype not in NAMES:
                raise UserError(f"{path}: number type {spec.dtype} is not supported")
    main = max(types, key=lambda name: types[name]) if types else None
    return {"parameters": parameters, "bytes": size, "dtype": main}
