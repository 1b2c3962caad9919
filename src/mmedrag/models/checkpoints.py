"""Reading model weights shard by shard, and writing safetensors as a stream.

A 7B checkpoint is 14 GB; converting one must not need 14 GB of memory. Tensors are read one at a
time (files are memory-mapped; ``weights_only``: no code in a pickle is ever run) and written one at
a time behind a header that is known beforehand; the safetensors package writes whole shards only.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the raw tensors (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmedrag.records import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LFS = b"version https://git-lfs.github.com/spec/"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize


class Shard:
    """One weight file: ``specs`` by name, tensors on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, torch.Tensor] | None = None
        _no_pointer(path)
        if path.suffix != ".safetensors":
            self._tensors = _torch_load(path)
            self.specs = {k: Spec(t.dtype, tuple(t.shape)) for k, t in self._tensors.items()}
            return
        try:
            self._file = safe_open(path, "pt")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}
            self.specs = {
                name: Spec(DTYPES[part.get_dtype()], tuple(part.get_shape()))
                for name, part in slices.items()
            }
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{path}: not a sound safetensors file, cut or damaged "
                f"({path.stat().st_size if path.exists() else 0} bytes): {error}"
            ) from None

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._file.get_tensor(name) if self._tensors is None else self._tensors[name]
        return found  # type: ignore[no-any-return]


def no_pointers(folder: str | Path) -> None:
    """Raises UserError for a file of a model folder that Git LFS left as a pointer."""
    for path in sorted(Path(folder).glob("*")):
        if path.is_file():
            _no_pointer(path)


def _no_pointer(path: Path) -> None:
    if path.is_file() and path.stat().st_size < 1024:
        with open(path, "rb") as handle:
            if handle.read(len(LFS)) == LFS:
                raise UserError(
                    f"{path}: a Git LFS pointer in place of the file; fetch it with `git lfs pull`"
                )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in one of a model folder's small files.

    Raises:
        UserError: unreadable, or something else than an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object")
    return found


def _torch_load(path: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files older than torch 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes make the unpickler raise nearly anything
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: weights cannot be loaded (only tensors are): {reason}") from None
    if not isinstance(loaded, dict) or not all(torch.is_tensor(t) for t in loaded.values()):
        raise UserError(f"{path}: expected a dictionary of tensors")
    return loaded


def shard_paths(folder: Path) -> list[Path]:
    """The weight files of a folder: those its index names, else every one, safetensors first.

    Raises:
        UserError: none, or one that the index names is missing.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        path = folder / index
        if path.exists():
            try:
                names = sorted(set(read_object(path)["weight_map"].values()))
            except (KeyError, AttributeError) as error:
                raise UserError(f"{path}: index cannot be read: {error}") from None
            for name in names:
                if Path(name).name != name:
                    raise UserError(f"{path}: {name!r} is not a file name")
                if not (folder / name).is_file():
                    raise UserError(f"{folder / name}: missing, named by {index}")
            return [folder / name for name in names]
    patterns = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise UserError(f"{folder}: no weights here, expected *.safetensors or pytorch_model*.bin")


def shards(paths: list[Path]) -> Iterator[Shard]:
    """Shards one after another; the last one is let go before the next is opened."""
    for path in paths:
        yield Shard(path)


class SafetensorsWriter:
    """Writes tensors to ``path`` in the order of ``specs``, one at a time."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, spec in specs.items():
            header[name] = {
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.bytes],
            }
            at += spec.bytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._left = list(specs.items())
        self._handle = open(path, "wb")
        self._handle.write(len(raw).to_bytes(8, "little") + raw)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        expected, spec = self._left.pop(0)
        if name != expected or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)}: expected {expected} {spec.shape}")
        flat = tensor.detach().to(spec.dtype).contiguous().flatten()
        if flat.numel():
            self._handle.write(flat.view(torch.uint8).numpy().data)

    def close(self) -> None:
        self._handle.close()
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were not written")
