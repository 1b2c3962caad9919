"""Clinical metrics of reports through RadEval, where the user has it and its weights.

Place in the picture: an optional part of report scoring (``eval --clinical``). RadGraph F1,
CheXbert and RaTEScore need model weights that nobody can ship here; without them, or where the
library does not load, each is listed as not computed with the reason in one line, and everything
else goes on.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from importlib import import_module
from typing import Any

from mmedrag.evaluation.metrics.questions import average
from mmedrag.evaluation.metrics.statistics import AnyStat

log = logging.getLogger(__name__)
NAMES = {"radgraph": "RadGraph F1", "f1chexbert": "F1CheXbert", "ratescore": "RaTEScore"}
NEEDS_PACKAGE = "needs RadEval: pip install 'mmedrag[clinical]'"
# RadEval's medspacy takes a spaCy before 3.8 below Python 3.12, and that is built for numpy 1
OLD_SPACY = "; its spaCy is built for numpy 1 below Python 3.12"


@lru_cache(maxsize=8)
def _scorer(name: str) -> Any:
    # its models come from the hub's cache; the network is not asked unless the user says so
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    library = import_module("radeval")
    # RadEval 2.2.1 calls itself by its old name, which no case-sensitive file system finds
    sys.modules.setdefault("RadEval", library)
    return library.RadEval(metrics=[name], per_sample=True, show_progress=False)


def clinical(
    texts: Sequence[str], targets: Sequence[str]
) -> tuple[dict[str, AnyStat], dict[str, str]]:
    """RadEval's per-report scores as means: (metrics, name -> why not computed).

    Several scores of one metric (CheXbert's five and all classes) keep RadEval's own names.
    """
    found: dict[str, AnyStat] = {}
    missing: dict[str, str] = {}
    for name, title in NAMES.items():
        printed = io.StringIO()  # the library prints what it would download
        try:
            with redirect_stdout(printed), redirect_stderr(printed):
                scores = _scorer(name)(refs=list(targets), hyps=list(texts))
        except Exception as error:  # whatever a third-party model raises is its reason
            missing[name] = f"{title} {_lack(error)}"
            log.debug("%s failed: %s", title, printed.getvalue(), exc_info=True)
        else:
            found |= {key: average(row) for key, row in scores.items() if len(row) == len(texts)}
    return found, missing


def _lack(error: Exception) -> str:
    """What a metric that failed needs, in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name == "radeval":
        return NEEDS_PACKAGE
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    old = OLD_SPACY if "binary incompatibility" in reason else ""
    if old or isinstance(error, ImportError):
        return f"cannot be loaded by the installed RadEval ({reason}){old}"
    return f"needs its weights in the Hugging Face cache ({reason})"
