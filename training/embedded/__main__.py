"""``python -m training.embedded [STAGE ...]``: build the embedded models from seed, on CPU.

Each stage resumes where it was interrupted and is skipped when its result stands; work lies in
``build/embedded``. ``--rehearse`` runs the same stages on a few studies for a few steps, in a
folder of its own: it shows in a minute that all of them work, and its models know nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

import torch

from mmedrag.runtime import read_json, write_json
from training.embedded import stages

log = logging.getLogger("training.embedded")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.embedded", allow_abbrev=False)
    parser.add_argument("stage", nargs="*", choices=[[], *stages.STAGES], default=[])
    parser.add_argument("--work", type=Path, help="default: build/embedded, or build/rehearsal")
    parser.add_argument("--out", type=Path, help="default: the package, or WORK/models")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rehearse", action="store_true", help="every stage, a few steps each")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(options.threads)
    rehearse = options.rehearse
    work = options.work or Path("build/rehearsal" if rehearse else "build/embedded")
    out = options.out or (work / "models" if rehearse else stages.SHIPPED)
    build = stages.Build(work, out, stages.REHEARSAL if rehearse else stages.FULL)
    if rehearse and build.ships:
        parser.error("--rehearse: --out is the package, expected another folder")
    work.mkdir(parents=True, exist_ok=True)
    times = work / "times.json"
    for name in options.stage or list(stages.STAGES):
        began = time.time()
        log.info("stage %s", name)
        stages.STAGES[name](build)
        spent = read_json(times) if times.exists() else {}
        spent[name] = round(time.time() - began)
        write_json(times, spent)
        log.info("stage %s done in %.0f s", name, time.time() - began)


if __name__ == "__main__":
    main()
