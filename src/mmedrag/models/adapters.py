"""A PEFT adapter onto a model: of this naming or another, with what was trained beside it.

An adapter's tensors are named by where they sat in the model it was trained in, and that has
changed: transformers before 4.52 had ``language_model.model.layers`` where ``model.language_model
.layers`` stands now, the original LLaVA has ``model.layers``; a model wrapped twice says
``base_model.model.`` twice, a raw state dict ``lora_A.default.weight``. Such names are translated;
the projector that LLaVA's scripts keep in ``non_lora_trainables.bin`` becomes part of the adapter.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from mmedrag.models.checkpoints import Shard, read_object, shard_paths
from mmedrag.records import UserError

log = logging.getLogger(__name__)
# PEFT asks a model's old property whenever an adapter is put into it
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# kinds of adapters that are their tensors alone; others name models or tokenizers to be loaded
KINDS = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "VERA", "OFT", "BOFT")
BESIDE = "non_lora_trainables.bin"
WRAP = "base_model.model."
LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(?P<name>\.(?!weight$|bias$)[^.]+)?(?P<rest>\.weight|\.bias)?$"
)
RENAMES = (  # where a module is called otherwise, tried in turn until the model has the name
    (rf"^{re.escape(WRAP)}", ""),
    (r"^(?:module|_orig_mod|model\.base_model)\.", ""),
    (r"\.modules_to_save\.[^.]+", ""),
    (r"\.(?:base_layer|original_module)$", ""),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head$", "lm_head"),
    (r"^model\.language_model\.lm_head$", "lm_head"),
    (r"^model\.(?=(?:layers|embed_tokens|norm)\b)", "model.language_model."),
    (r"^(?=(?:vision_tower|vision_model|visual|multi_modal_projector|connector)\b)", "model."),
    (r"\bvision_tower\.vision_tower\.", "vision_tower."),
    (r"\bvision_tower\.vision_model\.", "vision_tower."),
    (r"\bmm_projector\.0$", "multi_modal_projector.linear_1"),
    (r"\bmm_projector\.2$", "multi_modal_projector.linear_2"),
    (r"\bmm_projector$", "multi_modal_projector.linear_1"),
)


def attach(
    model: Any,
    adapter: str | Path,
    name: str = "default",
    peft: Any = None,
    trainable: bool = False,
    **options: Any,
) -> Any:
    """A PEFT adapter injected into ``model`` (or added to the ``peft`` model around it).

    PEFT only warns when an adapter's tensors find no place, and answers as if there were none
    (A1 of docs/differences.md); here that is an error.

    Args:
        trainable: whether training goes on from it. options: passed on to PEFT.

    Raises:
        UserError: no adapter there, or one that does not fit the model in every tensor.
    """
    from peft import get_peft_model_state_dict

    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter here, expected adapter_config.json in a folder")
    settings = read_object(folder / "adapter_config.json")
    kind = settings.get("peft_type")
    if settings.get("megatron_config"):
        raise UserError(f"{folder}/adapter_config.json: megatron_config names code to import")
    if kind not in KINDS:
        raise UserError(
            f"{folder}/adapter_config.json: peft_type {kind!r} is not supported, expected one of "
            f"{', '.join(KINDS)}"
        )
    shards = [Shard(path) for path in shard_paths(folder)]
    stored = {key: shard for shard in shards for key in shard.specs}
    parameters, modules = _own(peft.get_base_model() if peft is not None else model)
    names = {key: translated(key, modules) for key in stored}
    lost = sorted(key for key, name_here in names.items() if name_here is None and LORA.match(key))
    if lost:
        raise UserError(
            f"{folder}: the adapter does not fit the model: {len(lost)} of its {len(stored)} "
            f"tensors name a module that the model does not have, the first is {lost[0]}"
        )
    broken = [k for k, shard in stored.items() if not bool(torch.isfinite(shard[k]).all())]
    if broken:
        raise UserError(f"{folder}: tensor {broken[0]} of the adapter holds NaN or infinity")
    beside, around = folder / BESIDE, peft is not None
    try:
        if beside.exists() or any(names[key] not in (None, key) for key in stored):
            tensors = {names[key] or key: shard[key] for key, shard in stored.items()}
            if len(tensors) < len(stored):
                raise UserError(f"{folder}: the adapter gives a tensor twice, under two names")
            extra = _beside(beside, modules) if beside.exists() else {}
            whole = _whole(extra, parameters)
            config = _config(
                folder, trainable, tensors if set(tensors) != set(stored) else {}, whole
            )
            peft = _inject(model, config, name, peft, tensors | extra, options)
            expected = set(tensors) | set(extra)
        else:
            peft = _load(model, folder, name, peft, trainable, options)
            expected, whole = set(stored), set()
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the adapter does not fit the model: {reason}") from error
    # or PEFT asks the hub about the model it was trained on
    peft.peft_config[name].base_model_name_or_path = None
    held = set(get_peft_model_state_dict(peft, adapter_name=name))
    # a module that is kept whole holds the base model's values where the file gives none
    kept = tuple(f"{WRAP}{module}." for module in whole)
    _fits(folder, expected | {key for key in held if key.startswith(kept)}, held)
    return peft if trainable or around else peft.eval().requires_grad_(False)


def _fits(folder: Path, stored: set[str], held: set[str]) -> None:
    """Raises UserError unless every tensor found its place, and every place a tensor."""
    odd = sorted(held ^ stored)
    if not odd:
        return
    lost, empty = sorted(stored - held), sorted(held - stored)
    told = [f"{len(lost)} of it have no place there ({lost[0]})"] if lost else []
    told += [f"{len(empty)} places of the model get none ({empty[0]})"] if empty else []
    raise UserError(
        f"{folder}: the adapter does not fit the model: {len(odd)} tensors differ, the first is "
        f"{odd[0]}: {', '.join(told)}"
    )


def _load(
    model: Any, folder: Path, name: str, peft: Any, trainable: bool, options: dict[str, Any]
) -> Any:
    from peft import PeftModel

    how = {"adapter_name": name, "is_trainable": trainable, "local_files_only": True, **options}
    if peft is None:
        return PeftModel.from_pretrained(model, str(folder), **how)
    peft.load_adapter(str(folder), **how)
    return peft


def _config(folder: Path, trainable: bool, renamed: Collection[str], whole: set[str]) -> Any:
    """The adapter's configuration, for this model's names."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(folder), local_files_only=True)
    config.inference_mode = not trainable
    if renamed:  # the targets are those that have tensors: the file's may name other modules now
        config.target_modules = sorted(_modules(renamed))
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        log.warning("%s: tensor names of another version, translated to this model's", folder)
    if whole:
        config.modules_to_save = sorted({*(config.modules_to_save or []), *whole})
        log.warning("%s: %s is used too: %s", folder, BESIDE, ", ".join(sorted(whole)[:3]))
    return config


def _inject(
    model: Any,
    config: Any,
    name: str,
    peft: Any,
    tensors: dict[str, torch.Tensor],
    options: dict[str, Any],
) -> Any:
    """What PEFT's own loading does, from tensors under the model's names."""
    from peft import PeftModel, set_peft_model_state_dict

    if peft is None:
        peft = PeftModel(model, config, adapter_name=name, **options)
    else:
        peft.add_adapter(name, config)
        peft.train(not config.inference_mode)
    set_peft_model_state_dict(peft, tensors, adapter_name=name)
    return peft


def _own(model: Any) -> tuple[set[str], set[str]]:
    """(parameters, modules) of a model by name, without what adapters put around and into it."""

    def bare(names: Iterator[str]) -> set[str]:
        kept = (n for n in names if ".modules_to_save." not in n and ".lora_" not in n)
        return {re.sub(r"\.(?:base_layer|original_module)\b", "", n) for n in kept}

    parameters = bare(name for name, _ in model.named_parameters())
    return parameters, bare(name for name, _ in model.named_modules())


def _modules(tensors: Collection[str]) -> set[str]:
    """The modules that LoRA tensors belong to."""
    found = (LORA.fullmatch(key) for key in tensors)
    return {match["module"].removeprefix(WRAP) for match in found if match}


def _whole(tensors: Collection[str], parameters: Collection[str]) -> set[str]:
    """The modules to keep apart for these tensors: the largest that they fill."""
    given = {key.removeprefix(WRAP) for key in tensors}
    found: set[str] = set()
    for key in given:
        module = key.rpartition(".")[0]
        while "." in module:
            outer = module.rpartition(".")[0]
            if not given.issuperset(p for p in parameters if p.startswith(f"{outer}.")):
                break
            module = outer
        found.add(module)
    return {m for m in found if not any(m.startswith(f"{other}.") for other in found)}


def translated(key: str, modules: Collection[str]) -> str | None:
    """An adapter tensor's name in this model, as PEFT stores it; None: no place is known."""
    lora = LORA.fullmatch(key)
    if lora:
        module = place(lora["module"], modules)
        part = f"{lora['part']}{lora['rest'] or ''}"
    else:
        path, _, part = key.rpartition(".")
        module = place(path, modules)
    return f"{WRAP}{module}.{part}" if module else None


def place(path: str, modules: Collection[str]) -> str | None:
    """What this model calls the module that another version calls ``path``; None: nothing."""
    tried = [path]
    for candidate in tried:  # grows while it is walked
        if candidate in modules:
            return candidate
        for pattern, new in RENAMES:
            other = re.sub(pattern, new, candidate, count=1)
            if other not in tried:
                tried.append(other)
    return None


def _beside(path: Path, modules: Collection[str]) -> dict[str, torch.Tensor]:
    """What LLaVA's LoRA scripts trained besides, under the names of this model's adapters."""
    shard = Shard(path)
    found: dict[str, torch.Tensor] = {}
    for key in shard.specs:
        if key.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
            continue  # the model computes these
        name = translated(key, modules)
        if name is None:
            raise UserError(f"{path}: tensor {key!r} has no place in this model")
        found[name] = shard[key]
    return found
