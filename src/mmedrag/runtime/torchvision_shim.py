"""Makes ``import torchvision`` work beside a CPU-only torch; lives here and nowhere else.

torchvision's PyPI wheel links CUDA libraries. Beside a CPU build of torch they are absent, its
operators are never registered, and the import fails on ``torchvision::nms`` - and with it every
import of ``transformers`` that looks for torchvision. Neither is needed for encoding, so the
two operators that are checked at import are declared, without an implementation.

Call :func:`ready` before the first import of transformers, open_clip, timm or torchvision.
"""

from __future__ import annotations

import importlib.util
import sys

_DONE = False


def ready() -> None:
    """Import torchvision once if it is installed, declaring its operators where needed."""
    global _DONE
    if _DONE or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # the half-imported package
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", schema)
        import torchvision  # noqa: F401
    _DONE = True
