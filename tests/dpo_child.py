"""A tuning in a process of its own: ``python dpo_child.py HOME NAME '{"settings": ...}'``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if __name__ == "__main__":
    home, name, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    from dpo_tools import make_pairs, quick
    from mmedrag.preference.dpo.train import train_dpo
    from mmedrag.runtime import training

    if kill := options.get("kill_at"):  # [step, "before_mark" or "after"]: as kill -9 would
        step, when = kill
        original = training.Checkpoints.on_save

        def on_save(self, args, state, control, **kwargs):
            if when == "before_mark" and state.global_step >= step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, args, state, control, **kwargs)

        def on_step_end(self, args, state, control, **kwargs):
            if when == "after" and state.global_step >= step:
                os.kill(os.getpid(), signal.SIGKILL)

        training.Checkpoints.on_save = on_save
        training.Checkpoints.on_step_end = on_step_end
    train_dpo(
        make_pairs(home / "data", options.get("count", 12)),
        home / "model",
        home / name,
        quick(**options.get("settings", {})),
        cache=home / options.get("cache", "cache"),
    )
