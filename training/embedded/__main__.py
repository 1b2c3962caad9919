"""``python -m training.embedded [STAGE ...]``: build the embedded models from seed, on CPU.

Stages in order: vision, look, mix, spell, read, encoders, domain, adapter, card. Each resumes
where it was interrupted and is skipped when its result stands; work lies in ``build/tiny``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path

import torch

from mmedrag import embedded
from training.embedded import stages

log = logging.getLogger("training.embedded")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.embedded", allow_abbrev=False)
    parser.add_argument("stage", nargs="*", choices=[[], *stages.STAGES], default=[])
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--out", type=Path, default=Path(embedded.__path__[0]))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    times = options.work / "times.json"
    for name in options.stage or list(stages.STAGES):
        began = time.time()
        log.info("stage %s", name)
        stages.STAGES[name](options.work, options.out)
        spent = json.loads(times.read_text()) if times.exists() else {}
        spent[name] = round(time.time() - began)
        times.write_text(json.dumps(spent, indent=1) + "\n")
        log.info("stage %s done in %.0f s", name, time.time() - began)


if __name__ == "__main__":
    main()
