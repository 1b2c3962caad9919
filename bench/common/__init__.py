"""What the benchmarks share: facts of the machine, the model that is measured, the table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Claim:
    """A measured figure beside what it should reach and what the saved work implies.

    ``target`` starts with ``>=`` or ``<=``; ``bound``: the ratio that would be reached if only
    the work that is left took time (None: no such bound).
    """

    what: str
    measured: float
    target: str | None = None
    bound: float | None = None

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        wanted = float(self.target[2:])
        return self.measured >= wanted if self.target[:2] == ">=" else self.measured <= wanted


def machine() -> dict[str, Any]:
    """Processor, cores, load, GPU and versions, as they were before the measurement."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def trained(shape: str) -> Path | None:
    """The embedded model's folder where that is what is measured and it is there."""
    from mmedrag import embedded

    there = shape == "embedded" and "vlm" in embedded.available()
    return embedded.path("vlm") if there else None


def save(out: Path, name: str, found: dict[str, Any], complete: bool = False) -> Path:
    """Write ``out/name.json`` atomically: called after every part, so that a stop loses one."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({**found, "complete": complete}, indent=2) + "\n")
    os.replace(part, path)
    return path


def finish(out: Path, name: str, found: dict[str, Any], claims: Sequence[Claim]) -> None:
    """Write ``out/name.json`` and print the claims as a table."""
    found["claims"] = [{**asdict(claim), "met": claim.met} for claim in claims]
    path = save(out, name, found, complete=True)
    print(f"{'':58}{'measured':>10}{'target':>9}{'bound':>8}")
    for claim in claims:
        bound = f"{claim.bound:.2f}" if claim.bound is not None else ""
        verdict = {True: "", False: "  missed", None: ""}[claim.met]
        print(f"{claim.what:58}{claim.measured:10.2f}{claim.target or '':>9}{bound:>8}{verdict}")
    print(f"{found['machine']['cpu']}, {found['machine']['cores']} cores; everything in {path}")
