"""Clinical metrics of reports through RadEval, where the user has it and its weights.

Place in the picture: an optional part of report scoring (``eval --clinical``). RadGraph F1,
CheXbert and RaTEScore need model weights that nobody can ship here; without them each is listed
as not computed with what it needs, and everything else goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

from mmedrag.metrics import average
from mmedrag.metrics_stats import AnyStat

log = logging.getLogger(__name__)
NAMES = {"radgraph": "RadGraph F1", "f1chexbert": "F1CheXbert", "ratescore": "RaTEScore"}
NEEDS_PACKAGE = "needs RadEval: pip install 'mmedrag[clinical]'"


@lru_cache(maxsize=8)
def _scorer(name: str) -> Any:
    # its models come from the hub's cache; the network is not asked unless the user says so
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return import_module("radeval").RadEval(metrics=[name], per_sample=True, show_progress=False)


def clinical(
    texts: Sequence[str], targets: Sequence[str]
) -> tuple[dict[str, AnyStat], dict[str, str]]:
    """RadEval's per-report scores as means: (metrics, name -> why not computed).

    Several scores of one metric (CheXbert's five and all classes) keep RadEval's own names.
    """
    found: dict[str, AnyStat] = {}
    missing: dict[str, str] = {}
    for name, title in NAMES.items():
        try:
            scores = _scorer(name)(refs=list(targets), hyps=list(texts))
        except ModuleNotFoundError as error:
            needs = NEEDS_PACKAGE if error.name == "radeval" else f"needs the package {error.name}"
            missing[name] = f"{title} {needs}"
        except Exception as error:  # whatever a third-party model raises is its reason
            log.info("%s failed", title, exc_info=True)
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            missing[name] = f"{title} needs its weights in the Hugging Face cache ({reason})"
        else:
            found |= {key: average(row) for key, row in scores.items() if len(row) == len(texts)}
    return found, missing
