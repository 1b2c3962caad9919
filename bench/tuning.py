"""RAG-PT tuning against stock TRL and against the released step; pair building against one-by-one.

A complete job each, the building of its caches included, start-up (imports, loading) excluded;
every job in a process of its own, the same model, pairs, batch size, epochs and LoRA. Peak memory
is what a job adds to the loaded model (CPU: resident set, sampled; GPU: allocated). Beside the
wall clock stands the processor time, which a shared machine disturbs less. The bound is what the
removed work implies: images, tokens and logits of a rival's job over those of ours, counted.

Pairs are as real ones: references are found by the picture, noise is drawn by the picture, a
picture has 1.75 pairs (872 pairs over 502 pictures in the adapter that ships), a third of each
kind (the released balance).

    python bench/tuning.py [--quick] [--shape embedded|336|7b] [--random] [--rounds N]
                           [--only jobs|pairs] [--out bench/results]

Measured is the embedded model, or with ``--random`` (and where it is absent) one of its shape
with random weights. ``336``: random weights, a small model that sees as LLaVA does (336 pixels,
576 tokens a picture, 32,000 words).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TRL reports its use to a hub unless told not to
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
from common import Claim, finish, machine, save, trained  # noqa: E402
from common.rivals import Work, bare  # noqa: E402

SCALE = {  # pairs, batch, epochs, LoRA rank
    ("embedded", True): (32, 16, 3, 32),
    ("embedded", False): (160, 16, 3, 32),
    ("336", True): (4, 4, 3, 32),
    ("336", False): (14, 7, 3, 32),
    ("7b", True): (32, 4, 3, 128),
    ("7b", False): (128, 4, 3, 128),
}


# --- what is tuned --------------------------------------------------------------------------------


def prepare(work: Path, model: Path | None, shape: str, count: int) -> None:
    """A model, benchmark images, and pairs with real prompts (three references)."""
    from mmedrag.answering import TemplateSet
    from mmedrag.answering.generators import random_llava
    from mmedrag.phantom import build_benchmark
    from mmedrag.preference.pairs import write_pairs
    from mmedrag.records import Domain, Hit, Noise, Pair, PairSet, Side, Trace
    from mmedrag.runtime import DataFolder

    build_benchmark(work / "data", studies=count, domains=["radiology"], size=128, workers=1)
    data = DataFolder(work / "data")
    corpus, templates = data.corpus(), TemplateSet()
    asked: dict[str, list[Any]] = {}
    for example in data.examples(task="vqa"):
        if example.answer_type == "closed":
            asked.setdefault(str(example.image), []).append(example)
    pictures = [rows[: (1, 2, 2, 2)[n % 4]] for n, rows in enumerate(asked.values())]
    chosen = [(n, example) for n, rows in enumerate(pictures) for example in rows][:count]
    pairs = []
    for i, (picture, example) in enumerate(chosen):
        hits = [
            Hit(id=r.id, text=r.text, score=0.5, rank=k)
            for k, r in enumerate(corpus[(7 * picture + k) % len(corpus)] for k in range(1, 4))
        ]
        trace = Trace.of(example)
        trace.domain = Domain(label="radiology")
        prompt = templates.render(trace, hits, None)
        kind = ("cross_modal", "resist", "copy")[i % 3]
        noise = Noise(kind="gaussian_clip", seed=picture) if kind == "cross_modal" else None
        right = str(example.answer)
        wrong = right if noise else "no" if right == "yes" else "yes"
        pairs.append(
            Pair(
                id=f"{kind}:{example.id}",
                kind=kind,
                chosen=Side(prompt=prompt, image=example.image, text=right),
                rejected=Side(prompt=prompt, image=example.image, noise=noise, text=wrong),
            )
        )
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
    from mmedrag.preference.dpo import DpoTraining

    _, batch, epochs, rank = SCALE[options.shape, options.quick]
    chosen = DpoTraining(
        batch_size=batch,
        epochs=epochs,
        lora_r=rank,
        lora_alpha=2 * rank,
        learning_rate=1e-4,
        gradient_checkpointing=options.checkpointing,
        log_steps=5,
        max_length=2048,
    )
    return replace(chosen, **getattr(options, "changes", {}))


def ours(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """``train_dpo`` as it is, caches cold (or warm, from an earlier run of the same pairs)."""
    from mmedrag.preference.dpo import card  # noqa: F401
    from mmedrag.preference.dpo import train as module  # isort: skip
    import peft  # noqa: F401  start-up, like the imports of the other jobs

    from mmedrag.preference.pairs import read_pairs

    meter, load, counters = Meter(), module.load_model, []

    def loaded(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        counters.append(Work(found.model))
        meter.start()
        return found

    module.load_model = loaded
    out = tempfile.mkdtemp(dir=work)
    cache = work / "cache" if options.job == "ours_warm" else Path(out) / "cache"
    result = module.train_dpo(
        read_pairs(work / "pairs"),
        work / "model",
        Path(out) / "run",
        settings(options),
        cache=cache,
    )
    return {
        **meter.finish(),
        "loss": result["loss"],
        "steps": result["steps"],
        "cache": result["cache"],
        "parts": result["seconds"],
        "work": counters[0].take(2 + options.checkpointing),
    }


class Common:
    """What the two baselines share: model, LoRA, encoded pairs, pixel values."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        from mmedrag.answering.generators import Inputs
        from mmedrag.models import load_model
        from mmedrag.preference.dpo import PairTokenizer, image_tokens, linear_targets, pixel_reader
        from mmedrag.preference.pairs import read_pairs

        self.settings = settings(options)
        self.loaded = load_model(work / "model")
        inputs = Inputs(self.loaded.model, self.loaded.processor, 1, 0)
        tokenizer = PairTokenizer(inputs, image_tokens(self.loaded), self.settings.max_length)
        self.rows = tokenizer(read_pairs(work / "pairs"))
        self.pixels, self.pad = pixel_reader(inputs), inputs.pad_id
        self.counter = Work(self.loaded.model)
        from peft import LoraConfig

        self.lora = LoraConfig(
            r=self.settings.lora_r,
            lora_alpha=self.settings.lora_alpha,
            lora_dropout=0.0,
            target_modules=linear_targets(self.loaded.model),
        )

    def batch(self, sides: list[Any]) -> dict[str, Any]:
        import torch

        longest = max(len(s.prompt) + len(s.answer) for s in sides)
        fill = [longest - len(s.prompt) - len(s.answer) for s in sides]
        both = list(zip(sides, fill, strict=True))
        return {
            "input_ids": torch.tensor([[*s.prompt, *s.answer, *[self.pad] * n] for s, n in both]),
            "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in fill]),
            "completion_mask": torch.tensor(
                [[0] * len(s.prompt) + [1] * len(s.answer) + [0] * n for s, n in both]
            ),
            "pixel_values": self.pixels([s.view for s in sides]),
        }


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
            output_dir=tempfile.mkdtemp(dir=work),
            beta=s.beta,
            num_train_epochs=s.epochs,
            per_device_train_batch_size=s.batch_size,
            learning_rate=s.learning_rate,
            lr_scheduler_type=s.schedule,
            warmup_steps=s.warmup_ratio,
            logging_steps=s.log_steps,
            report_to="none",
            use_cpu=cpu,  # noqa: E501
            bf16=not cpu,
            remove_unused_columns=False,
            max_length=None,
            save_strategy="no",
            gradient_checkpointing=options.checkpointing,
            disable_tqdm=True,
            seed=s.seed,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list(
            [{"index": i, "image": i} for i in range(len(common.rows))]
        ),
        processing_class=common.loaded.processor,
        peft_config=common.lora,
    )
    clock: dict[str, float] = {}
    base = trainer.model.get_base_model()
    with timed(base.model.vision_tower, clock, "vision"), timed(base, clock, "forward"):
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        **meter.finish(),
        "loss": losses[-1],
        "steps": trainer.state.global_step,
        "inside": clock,
        "work": common.counter.take(2 + options.checkpointing),
    }


def released(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The released step, as docs/differences.md describes it (T1) and written again: chosen and
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
    return {
        **meter.finish(),
        "loss": loss.item(),
        "steps": steps,
        "inside": clock,
        "work": common.counter.take(2 + options.checkpointing),
    }


def pair_building(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """``pairs`` of the paper's three sets, from the data to the written pairs (its retrieval too),
    against answering row by row, condition after condition, as released; there without retrieval.

    Both are asked for the same pairs. The released procedure answers four conditions, whatever
    they are for; ours the three that these sets compare (``four_conditions``: all four, for
    stage 1 as well). Measured is a drawn part of the passes one by one.
    """
    from mmedrag.answering.generators import HFGenerator
    from mmedrag.pipeline import TRACES, Pipeline
    from mmedrag.preference.pairs import PairSettings, make_pairs
    from mmedrag.records import PAPER_KINDS, Trace
    from mmedrag.retrieval import build_index, open_retriever
    from mmedrag.runtime import DataFolder, read_jsonl

    class Short(Pipeline):  # a random model never stops: as long as real answers are
        def request(self, trace: Trace) -> Any:
            whole = super().request(trace)
            limit = {16: 2, 48: 4}.get(whole.max_new_tokens, 48)
            return replace(whole, max_new_tokens=limit)

    data = DataFolder(work / "pictures")
    build_index([data], work / "index", "radiology", "embedded:retriever-radiology")
    generator = HFGenerator(work / "model")
    kind = Short if options.random else Pipeline

    def pipeline() -> Pipeline:
        retriever = open_retriever(work / "index")
        return kind("radiology", {"radiology": retriever}, generator=generator)

    pipeline()(data.examples()[:4])  # start-up
    generator.inputs = generator.inputs.fresh()
    asked = pipeline()
    found: dict[str, Any] = {}
    for task in (None, "vqa"):
        spent, counts = {}, {}
        for name, kinds in (("", PAPER_KINDS), ("four_conditions_", (*PAPER_KINDS, "stage1"))):
            generator.inputs = generator.inputs.fresh()
            out = work / f"built-{name}{task}"
            began, worked = time.perf_counter(), time.process_time()
            made = make_pairs(
                lambda: asked, data, out, PairSettings(split=None, task=task, kinds=kinds)
            )
            spent[f"{name}seconds"] = time.perf_counter() - began
            spent[f"{name}cpu_seconds"] = time.process_time() - worked
            counts[f"{name}pairs"] = made["pairs"]
        traces: list[Trace] = []
        for condition in sorted(p for p in (out / "traces").iterdir() if p.is_dir()):
            traces += read_jsonl(condition / TRACES, Trace)
        examples = {example.id: example for example in data.examples()}
        for trace in traces:
            trace.example = examples[trace.example_id]
        part = random.Random(0).sample(traces, min(len(traces), 96 if options.quick else 480))
        requests = [asked.request(trace) for trace in part]
        bare(generator, requests[:2], 1)
        began, worked = time.perf_counter(), time.process_time()
        said = bare(generator, requests, 1)
        each = (
            (time.perf_counter() - began) / len(part),
            (time.process_time() - worked) / len(part),
        )
        texts = [trace.answer.text for trace in part if trace.answer]
        found[task or "all"] = {
            "answers": len(traces),
            **counts,
            **spent,
            "one_by_one_seconds": each[0] * len(traces),
            "one_by_one_cpu_seconds": each[1] * len(traces),
            "one_by_one_measured": len(part),
            "same_answers": sum(a == b for a, b in zip(texts, said, strict=True)) / len(part),
        }
    return found


JOBS = {"ours": ours, "ours_warm": ours, "trl": trl, "released": released, "pairs": pair_building}


# --- the comparison -------------------------------------------------------------------------------


def run(work: Path, job: str, checkpointing: bool, options: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable,
        str(Path(__file__)),
        "--job",
        job,
        "--work",
        str(work),
        "--shape",
        options.shape,
    ]
    command += ["--quick"] * options.quick + ["--checkpointing"] * checkpointing
    command += ["--random"] * options.random
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{job}{' with checkpointing' * checkpointing}: done", file=sys.stderr)
    return found


def compare(work: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is known after every job."""
    count, batch, epochs, rank = SCALE[options.shape, options.quick]
    plan = [("ours", False), ("released", False), ("trl", False), ("trl", True)]
    if options.shape == "336":
        plan = plan[:3]
    if options.shape == "7b":  # a 7B keeps no activations
        plan = [("ours", True), ("trl", True), ("released", True)]
    runs: dict[str, list[dict[str, Any]]] = {}
    # in turn, so that a drifting machine hits all alike; the first warm run fills the cache
    turns = plan * options.rounds
    if options.shape != "336":
        turns += [("ours_warm", plan[0][1]), ("ours_warm", plan[0][1])]
    for job, checkpointing in turns:
        name = job + ("_checkpointing" if checkpointing else "")
        found = run(work, job, checkpointing, options)
        if job == "ours_warm" and not (runs.get(name) or found["cache"]["features"]["found"]):
            continue
        runs.setdefault(name, []).append(found)
        yield {
            "shape": options.shape,
            "pairs": count,
            "batch": batch,
            "epochs": epochs,
            "lora_rank": rank,
            **table(runs, "ours_checkpointing" if plan[0][1] else "ours"),
        }


def table(runs: dict[str, list[dict[str, Any]]], mine: str) -> dict[str, Any]:
    """Medians of every job, and the others against ours: times, memory, counted work."""
    numbers = ("seconds", "cpu_seconds", "added_mib")
    middle: dict[str, Any] = {
        name: {
            **{n: statistics.median(r[n] for r in found) for n in numbers},
            "runs": len(found),
            "last_loss": found[0]["loss"],
            "work": found[0]["work"],
        }
        for name, found in runs.items()
    }
    against = {}
    for name in (n for n in middle if not n.startswith("ours")):
        inside = runs[name][-1]["inside"]
        look = inside.get("vision", 0.0) + inside.get("vision_no_grad", 0.0)
        row, own = middle[name], middle[mine]
        against[name] = {
            "time_ratio": row["seconds"] / own["seconds"],
            "cpu_time_ratio": row["cpu_seconds"] / own["cpu_seconds"],
            "memory_ratio": own["added_mib"] / row["added_mib"],
            "bound": row["work"]["gflop"] / own["work"]["gflop"],
            "vision_share": look / runs[name][-1]["seconds"],
        }
    return {"jobs": middle, "against": against}


def claims(found: dict[str, Any]) -> list[Claim]:
    """The figures that the comparison is about, each beside its target and bound."""
    rows = []
    for name, row in found.get("against", {}).items():
        released = name.startswith("released")
        what = "released step" if released else "stock TRL"
        what += " with checkpointing" if name.endswith("checkpointing") else ""
        rows.append(
            Claim(
                f"time: ours : {what}",
                row["time_ratio"],
                ">=3" if released else ">=1.5",
                row["bound"],
            )
        )
        rows.append(Claim(f"processor time: ours : {what}", row["cpu_time_ratio"]))
        if not released:
            rows.append(Claim(f"memory: ours / {what}", row["memory_ratio"], "<=0.6"))
        rows.append(Claim(f"share of vision in the time of {what}", row["vision_share"]))
    for task, built in found.get("pair_building", {}).items():
        what = "questions and reports" if task == "all" else "questions alone"
        whole = built["one_by_one_seconds"]
        rows.append(
            Claim(f"pairs, {what}: ours : four passes one by one", whole / built["seconds"], ">=5")
        )
        rows.append(
            Claim(
                f"pairs, {what}: ours with stage 1 : the same",
                whole / built["four_conditions_seconds"],
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--shape", choices=["embedded", "336", "7b"], default="embedded")
    parser.add_argument("--random", action="store_true", help="random weights in any case")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--only", choices=["jobs", "pairs"], help="one of the two comparisons")
    parser.add_argument("--job", choices=sorted(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        from mmedrag.runtime import torchvision_shim

        torchvision_shim.ready()  # before any of the jobs imports peft or trl
        print(json.dumps(JOBS[options.job](options.work, options)))
        return
    facts = machine()
    model = None if options.random else trained(options.shape)
    options.random = model is None
    found: dict[str, Any] = {"machine": facts, "weights": "random" if model is None else "trained"}
    name = f"tuning-{options.shape}{'-quick' if options.quick else ''}"
    name += f"-{options.only}" if options.only else ""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, model, options.shape, SCALE[options.shape, options.quick][0])
        if options.only != "pairs":
            for known in compare(work, options):
                found |= known
                save(options.out, name, found)
        if options.only != "jobs" and options.shape != "336":
            from mmedrag.phantom import build_benchmark

            studies = 12 if options.quick or options.shape == "7b" else 64
            build_benchmark(
                work / "pictures", studies=studies, domains=["radiology"], size=128, workers=1
            )
            found["pair_building"] = run(work, "pairs", False, options)
    finish(options.out, name, found, claims(found))


if __name__ == "__main__":
    main()
