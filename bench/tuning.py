"""RAG-PT tuning against stock TRL and against the released step; pair building against one-by-one.

A complete job each, the building of its caches included, start-up (imports, loading) excluded;
every job in a process of its own, the same model, pairs, batch size, epochs and LoRA. Peak memory
is what a job adds to the loaded model (CPU: resident set, sampled; GPU: allocated). Beside the
wall clock stands the processor time, which a shared machine disturbs less.

    python bench/tuning.py [--quick] [--shape embedded|7b] [--random] [--rounds N]
                           [--out bench/results]

Measured is the embedded model, or with ``--random`` (and where it is absent) one of its shape
with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TRL reports its use to a hub unless told not to
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
from common import Claim, finish, machine, trained  # noqa: E402

SCALE = {  # pairs, batch, epochs, LoRA rank
    ("embedded", True): (32, 16, 3, 32),
    ("embedded", False): (160, 16, 3, 32),
    ("7b", True): (32, 4, 3, 128),
    ("7b", False): (128, 4, 3, 128),
}


# --- what is tuned --------------------------------------------------------------------------------


def prepare(work: Path, model: Path | None, shape: str, count: int) -> None:
    """A model, benchmark images, and pairs with real prompts (three references)."""
    from mmedrag.generators.random_model import random_llava
    from mmedrag.pairs import PairSet
    from mmedrag.pairs_io import write_pairs
    from mmedrag.phantom.build import build
    from mmedrag.prompts import TemplateSet
    from mmedrag.types import DataFolder, Domain, Hit, Noise, Pair, Side, Trace

    build(work / "data", studies=count, domains=["radiology"], size=128, workers=1)
    data = DataFolder(work / "data")
    corpus, templates = data.corpus(), TemplateSet()
    examples = [e for e in data.examples(task="vqa") if e.answer_type == "closed"][:count]
    pairs = []
    for i, example in enumerate(examples):
        hits = [
            Hit(id=r.id, text=r.text, score=0.5, rank=k)
            for k, r in enumerate(corpus[(7 * i + k) % len(corpus)] for k in range(1, 4))
        ]
        trace = Trace.of(example)
        trace.domain = Domain(label="radiology")
        prompt = templates.render(trace, hits, None)
        kind = ("cross_modal", "resist", "copy")[i % 3]  # the released balance: a third each
        noise = Noise(kind="gaussian_clip", seed=i) if kind == "cross_modal" else None
        right = str(example.answer)
        wrong = right if noise else "no" if right == "yes" else "yes"
        pairs.append(
            Pair(
                id=f"{kind}:{example.id}", kind=kind,
                chosen=Side(prompt=prompt, image=example.image, text=right),
                rejected=Side(prompt=prompt, image=example.image, noise=noise, text=wrong),
            )
        )  # fmt: skip
    write_pairs(PairSet(pairs, {}), work / "pairs", work / "data", {})
    if model:
        shutil.copytree(model, work / "model")
        return
    texts = [p.chosen.prompt.text for p in pairs]
    random_llava(work / "model", shape, corpus=texts)


# --- measuring ------------------------------------------------------------------------------------


class Meter:
    """Peak memory above a baseline, and the wall clock."""

    def __init__(self) -> None:
        import psutil
        import torch

        self.process, self.gpu = psutil.Process(), torch.cuda.is_available()
        self.peak, self.base, self.stop = 0, 0, threading.Event()

    def start(self) -> None:
        import gc

        import torch

        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            self.base = self.process.memory_info().rss
            threading.Thread(target=self._watch, daemon=True).start()
        self.began, self.worked = time.perf_counter(), time.process_time()

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def finish(self) -> dict[str, float]:
        import torch

        if self.gpu:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        seconds = time.perf_counter() - self.began
        worked = time.process_time() - self.worked
        self.stop.set()
        mib = 2**20
        return {
            "seconds": seconds,
            "cpu_seconds": worked,
            "added_mib": (self.peak - self.base) / mib,
            "peak_mib": self.peak / mib,
        }


@contextmanager
def timed(module: Any, clock: dict[str, float], name: str) -> Iterator[None]:
    """Seconds inside a module's forward, with and without gradients apart."""
    import torch

    started: list[float] = []

    def before(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started.append(time.perf_counter())

    def after(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        key = name if torch.is_grad_enabled() else f"{name}_no_grad"
        clock[key] = clock.get(key, 0.0) + time.perf_counter() - started.pop()

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- the jobs -------------------------------------------------------------------------------------


def settings(options: argparse.Namespace) -> Any:
    from mmedrag.dpo_settings import DpoTraining

    _, batch, epochs, rank = SCALE[options.shape, options.quick]
    return DpoTraining(
        batch_size=batch, epochs=epochs, lora_r=rank, lora_alpha=2 * rank, learning_rate=1e-4,
        gradient_checkpointing=options.checkpointing, log_steps=5,
    )  # fmt: skip


def ours(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """``train_dpo`` as it is, caches cold (or warm, from an earlier run of the same pairs)."""
    from mmedrag import dpo_card, dpo_trainer  # noqa: F401
    from mmedrag import train_dpo as module  # isort: skip
    import peft  # noqa: F401  start-up, like the imports of the other jobs

    from mmedrag.pairs_io import read_pairs

    meter, load = Meter(), module.load

    def loaded(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        meter.start()
        return found

    module.load = loaded
    out = tempfile.mkdtemp(dir=work)
    cache = work / "cache" if options.job == "ours_warm" else Path(out) / "cache"
    result = module.train_dpo(
        read_pairs(work / "pairs"), work / "model", Path(out) / "run", settings(options),
        cache=cache,
    )  # fmt: skip
    return {**meter.finish(), "loss": result["loss"], "steps": result["steps"],
            "cache": result["cache"]}  # fmt: skip


class Common:
    """What the two baselines share: model, LoRA, encoded pairs, pixel values."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        from mmedrag.dpo_encode import Encoder
        from mmedrag.dpo_policy import linear_targets
        from mmedrag.dpo_prepare import image_tokens, pixel_reader
        from mmedrag.generators.inputs import Inputs
        from mmedrag.generators.loading import load
        from mmedrag.pairs_io import read_pairs

        self.settings = settings(options)
        self.loaded = load(work / "model")
        inputs = Inputs(self.loaded.model, self.loaded.processor, 1, 0)
        encoder = Encoder(inputs, image_tokens(self.loaded), self.settings.max_length)
        self.rows = encoder(read_pairs(work / "pairs"))
        self.pixels, self.pad = pixel_reader(inputs), inputs.pad_id
        from peft import LoraConfig

        self.lora = LoraConfig(
            r=self.settings.lora_r, lora_alpha=self.settings.lora_alpha, lora_dropout=0.0,
            target_modules=linear_targets(self.loaded.model),
        )  # fmt: skip

    def batch(self, sides: list[Any]) -> dict[str, Any]:
        import torch

        longest = max(len(s.prompt) + len(s.answer) for s in sides)
        fill = [longest - len(s.prompt) - len(s.answer) for s in sides]
        both = list(zip(sides, fill, strict=True))
        return {
            "input_ids": torch.tensor(
                [[*s.prompt, *s.answer, *[self.pad] * n] for s, n in both]
            ),
            "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in fill]),
            "completion_mask": torch.tensor(
                [[0] * len(s.prompt) + [1] * len(s.answer) + [0] * n for s, n in both]
            ),
            "pixel_values": self.pixels([s.view for s in sides]),
        }  # fmt: skip


def trl(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """TRL's DPOTrainer with a two-sided collator and nothing else changed."""
    common = Common(work, options)
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def collate(items: list[dict[str, int]]) -> dict[str, Any]:
        pairs = [common.rows[item["index"]] for item in items]
        batch = common.batch([p.chosen for p in pairs] + [p.rejected for p in pairs])
        batch["pixel_values"] = batch["pixel_values"].to(common.loaded.dtype)
        return batch

    import torch

    cpu, s = not torch.cuda.is_available(), common.settings
    meter = Meter()
    meter.start()
    trainer = DPOTrainer(
        common.loaded.model,
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(dir=work), beta=s.beta, num_train_epochs=s.epochs,
            per_device_train_batch_size=s.batch_size, learning_rate=s.learning_rate,
            lr_scheduler_type=s.schedule, warmup_steps=s.warmup_ratio, logging_steps=5, report_to="none", use_cpu=cpu,  # noqa: E501
            bf16=not cpu, remove_unused_columns=False, max_length=None, save_strategy="no",
            gradient_checkpointing=options.checkpointing, disable_tqdm=True, seed=s.seed,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list(
            [{"index": i, "image": i} for i in range(len(common.rows))]
        ),
        processing_class=common.loaded.processor,
        peft_config=common.lora,
    )  # fmt: skip
    clock: dict[str, float] = {}
    base = trainer.model.get_base_model()
    with timed(base.model.vision_tower, clock, "vision"), timed(base, clock, "forward"):
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {**meter.finish(), "loss": losses[-1], "steps": trainer.state.global_step,
            "inside": clock}  # fmt: skip


def released(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The released step, re-implemented from its description (SPEC: efficiency): chosen and
    rejected apart, policy and reference live, the image encoded once for the forward and once
    more to rebuild the labels (eight times a pair), log-softmax over all positions in float32."""
    import torch
    from peft import get_peft_model
    from torch.nn import functional as F
    from transformers import get_scheduler

    common = Common(work, options)
    s, device = common.settings, common.loaded.device
    meter = Meter()
    meter.start()
    policy = get_peft_model(common.loaded.model, common.lora)
    policy.train()
    if options.checkpointing:
        policy.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=s.learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(s.seed)
    steps = int(s.epochs) * -(-len(common.rows) // s.batch_size)
    schedule = get_scheduler("cosine", optimizer, int(0.03 * steps), steps)
    model, clock = policy.get_base_model(), {}

    def logps(batch: dict[str, Any]) -> torch.Tensor:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
        logits = policy(**inputs, use_cache=False).logits
        with torch.no_grad():  # the labels' embeddings are prepared, images included, and dropped
            model.get_image_features(batch["pixel_values"])
        wanted = labels[:, 1:].clamp(min=0)
        all_logps = logits[:, :-1].float().log_softmax(-1)
        return (all_logps.gather(2, wanted[..., None])[..., 0] * (labels[:, 1:] != -100)).sum(1)

    with timed(model.model.vision_tower, clock, "vision"):
        for _ in range(int(s.epochs)):
            for part in torch.randperm(len(common.rows), generator=order).split(s.batch_size):
                pairs = [common.rows[i] for i in part.tolist()]
                sides = []
                for mine in ([p.chosen for p in pairs], [p.rejected for p in pairs]):
                    batch = {k: v.to(device) for k, v in common.batch(mine).items()}
                    batch["pixel_values"] = batch["pixel_values"].to(common.loaded.dtype)
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        own = logps(batch)
                        with torch.no_grad(), policy.disable_adapter():
                            frozen = logps(batch)
                    sides.append(own - frozen)
                loss = -F.logsigmoid(s.beta * (sides[0] - sides[1])).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
    return {**meter.finish(), "loss": loss.item(), "steps": steps, "inside": clock}


def pair_building(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Four conditions: all requests in one call, against four passes one by one as released."""
    from mmedrag.generators.hf import HFGenerator
    from mmedrag.pairs_io import read_pairs
    from mmedrag.protocols import Request
    from mmedrag.types import Noise

    pairs = read_pairs(work / "pairs")[: 24 if options.quick else 64]
    conditions = []
    for noisy in (False, True):
        for with_references in (False, True):
            rows = []
            for i, pair in enumerate(pairs):
                prompt = pair.chosen.prompt
                if not with_references:
                    tail = prompt.text[prompt.text.index("Question:") :]
                    prompt = prompt.model_copy(update={"text": tail})
                noise = Noise(kind="gaussian_clip", seed=i) if noisy else None
                path = (pair.root or Path()) / str(pair.chosen.image)
                rows.append(Request(prompt, (path,), noise, closed=True, max_new_tokens=8))
            conditions.append(rows)
    fast = HFGenerator(work / "model")
    fast.generate(conditions[0][:2])  # start-up
    fast.inputs = fast.inputs.fresh()
    began = time.perf_counter()
    together = fast.generate([request for rows in conditions for request in rows])
    quick = time.perf_counter() - began
    slow = HFGenerator(work / "model", batch_size=1, cache_bytes=0)
    began = time.perf_counter()
    apart = [slow.generate([request])[0] for rows in conditions for request in rows]
    return {
        "seconds": quick,
        "one_by_one_seconds": time.perf_counter() - began,
        "answers": len(together),
        "same_answers": sum(a.text == b.text for a, b in zip(together, apart, strict=True)),
    }


JOBS = {"ours": ours, "ours_warm": ours, "trl": trl, "released": released, "pairs": pair_building}


# --- the comparison -------------------------------------------------------------------------------


def run(work: Path, job: str, checkpointing: bool, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--job", job, "--work", str(work),
               "--shape", options.shape]  # fmt: skip
    command += ["--quick"] * options.quick + ["--checkpointing"] * checkpointing
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    count, batch, epochs, rank = SCALE[options.shape, options.quick]
    plan = [("ours", False), ("trl", False), ("trl", True), ("released", False)]
    if options.shape == "7b":  # a 7B keeps no activations
        plan = [("ours", True), ("trl", True), ("released", True)]
    runs: dict[str, list[dict[str, Any]]] = {}
    # in turn, so that a drifting machine hits all alike; the first warm run fills the cache
    turns = [*plan * options.rounds, ("ours_warm", plan[0][1]), ("ours_warm", plan[0][1])]
    for job, checkpointing in turns:
        name = job + ("_checkpointing" if checkpointing else "")
        runs.setdefault(name, []).append(run(work, job, checkpointing, options))
    runs["ours_warm" + ("_checkpointing" if plan[0][1] else "")].pop(0)
    middle = {
        name: {
            "seconds": statistics.median(r["seconds"] for r in found),
            "cpu_seconds": statistics.median(r["cpu_seconds"] for r in found),
            "added_mib": statistics.median(r["added_mib"] for r in found),
            "last_loss": found[0]["loss"],
        }
        for name, found in runs.items()
        if found
    }
    mine = middle["ours_checkpointing" if plan[0][1] else "ours"]
    ratios = {
        name: {
            "time_ratio": row["seconds"] / mine["seconds"],
            "cpu_time_ratio": row["cpu_seconds"] / mine["cpu_seconds"],
            "memory_ratio": mine["added_mib"] / row["added_mib"],
        }
        for name, row in middle.items()
        if not name.startswith("ours")
    }
    stock = runs["trl_checkpointing" if plan[0][1] else "trl"][-1]
    inside, total = stock["inside"], stock["seconds"]
    look = inside.get("vision", 0.0) + inside.get("vision_no_grad", 0.0)
    frozen = inside.get("forward_no_grad", 0.0) - inside.get("vision_no_grad", 0.0)
    removed = look + frozen * (1 - 1 / epochs)
    return {
        "shape": options.shape,
        "pairs": count, "batch": batch, "epochs": epochs, "lora_rank": rank,
        "median_of": options.rounds,
        "jobs": middle,
        "against": ratios,
        "stock_step": {
            "vision_share": look / total,
            "reference_share": frozen / total,
            "bound": total / (total - removed),  # without vision, and the reference once
        },
        "pair_building": run(work, "pairs", False, options),
    }  # fmt: skip


def claims(found: dict[str, Any]) -> list[Claim]:
    """The figures that the comparison is about, each beside its target and bound."""
    against, built, step = found["against"], found["pair_building"], found["stock_step"]
    rows = []
    for name in (n for n in against if n.startswith("trl")):
        how = " with checkpointing" if name.endswith("checkpointing") else ""
        rows.append(
            Claim(f"time: ours : stock TRL{how}", against[name]["time_ratio"], ">=1.5",
                  None if how and "trl" in against else step["bound"])
        )  # fmt: skip
        rows.append(Claim(f"memory: ours / stock TRL{how}", against[name]["memory_ratio"], "<=0.6"))
    (name,) = (n for n in against if n.startswith("released"))
    rows.append(Claim("time: ours : released step", against[name]["time_ratio"], ">=3"))
    rows.append(
        Claim("pair building: ours : four passes one by one",
              built["one_by_one_seconds"] / built["seconds"], ">=5")
    )  # fmt: skip
    rows.append(Claim("share of vision in a stock step", step["vision_share"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--shape", choices=["embedded", "7b"], default="embedded")
    parser.add_argument("--random", action="store_true", help="random weights in any case")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--job", choices=sorted(JOBS))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    if options.job:
        from mmedrag.encoders import torchvision_shim

        torchvision_shim.ready()  # before any of the jobs imports peft or trl
        print(json.dumps(JOBS[options.job](options.work, options)))
        return
    facts = machine()
    model = None if options.random else trained(options.shape)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), model, options.shape, SCALE[options.shape, options.quick][0])
        weights = "trained" if model else "random"
        found = {"machine": facts, "weights": weights, **compare(Path(folder), options)}
    name = f"tuning-{options.shape}{'-quick' if options.quick else ''}"
    finish(options.out, name, found, claims(found))


if __name__ == "__main__":
    main()
