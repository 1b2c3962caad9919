"""One GPU, one run of at most eight minutes: what only a GPU can tell, against the same rivals.

A 7B of LLaVA-Med-1.5's shape with random weights, made on the device, answers against bare
``generate`` (and vLLM where it is installed) and is tuned (LoRA 128, two-image pairs) against
stock TRL and the released step; pictures go through encoders of RN50's and ViT-B/16's shape; a
million vectors are searched against bare FAISS; log-probabilities are compared with a plain loop;
the tests marked ``gpu`` run. Every part is a process with a time limit of its own; one that fails
or is cut leaves its error line and what it had measured, and the others go on. The results file
is written again after each part and names what was not run.

    python bench/gpu.py [--minutes 8] [--only PART ...] [--commit NAME] [--out bench/results]
    python bench/gpu.py --rehearse        # on the CPU, at a small shape, in a minute or two
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
from common import Claim, finish, machine, save, weightless  # noqa: E402

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "faiss-cpu", "open_clip_torch")


@dataclass(frozen=True)
class Size:
    """What is measured: all of it on the GPU, enough to try the script on a CPU."""

    shape: str
    pictures: int
    rounds: int
    report_rows: int
    report_tokens: int
    pairs: int
    batch: int
    epochs: int
    rank: int
    vectors: int
    centres: int
    encoded: int
    towers: dict[str, tuple[int, int, int]]  # name -> width, layers, side of a CLIP


GPU = Size("7b", 8, 2, 8, 128, 12, 2, 2, 128, 1_000_000, 10_000, 320, {"ViT-B/16": (768, 12, 224)})
SMALL = Size("embedded", 2, 1, 2, 4, 4, 2, 2, 8, 5_000, 50, 8, {"ViT-B/16": (128, 2, 64)})


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Part:
    """One part's process: its folder, its size, and its results, on disk after every section."""

    def __init__(self, name: str, work: Path, size: Size) -> None:
        self.name, self.work, self.size = name, work, size
        self.found: dict[str, Any] = {}

    @property
    def model(self) -> Path:
        return self.work / "model"

    def keep(self, **found: Any) -> None:
        self.found |= found
        say(f"{self.name}: {', '.join(found)}")
        save(self.work, f"part-{self.name}", self.found)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            yield Path(folder)


def peak(work: Callable[[], Any]) -> dict[str, float] | None:
    """MiB that the allocator held at most during ``work``, and before it (GPU only)."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return {"before_mib": before / 2**20, "peak_mib": torch.cuda.max_memory_allocated() / 2**20}


# --- 1: what all parts share ----------------------------------------------------------------------


def prepare(part: Part) -> None:
    """Facts of the machine, pictures and questions, pairs, and the model's folder."""
    import tuning
    from answering import requests_of
    from mmedrag.phantom import build_benchmark

    part.keep(machine=facts())
    data, size = part.work / "data", part.size
    studies = 2 * size.pictures + 4  # some have fewer than four closed questions
    build_benchmark(data, studies=studies, domains=["radiology"], size=128, workers=1)
    texts = [r.prompt.text for r in requests_of(data, True)["clean+references"]]
    weightless.write(part.model, size.shape, texts)
    tuning.prepare(part.work / "tuning", part.model, size.shape, size.pairs)
    part.keep(questions=len(texts))


def facts() -> dict[str, Any]:
    from importlib import metadata

    import torch

    found = machine()
    found["versions"] = {
        name: metadata.version(name) for name in LIBRARIES if _installed(name) is not None
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            driver = ""
        found |= {
            "gpu_memory_mib": device.total_memory / 2**20,
            "compute_capability": f"{device.major}.{device.minor}",
            "cuda": torch.version.cuda,
            "driver": driver.strip().split("\n")[0],
        }
    return found


def _installed(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- 2: answering ---------------------------------------------------------------------------------


def questions(part: Part, closed: bool = True) -> dict[str, list[Any]]:
    """Requests by condition: four closed questions a picture, or its report."""
    from answering import requests_of

    by_condition = requests_of(part.work / "data", short=True)
    found: dict[str, list[Any]] = {}
    for name, rows in by_condition.items():
        pictures: dict[Any, list[Any]] = {}
        for row in rows:
            if row.closed == closed:
                pictures.setdefault(row.images, []).append(row)
        whole = [r[:4] for r in pictures.values() if len(r) >= (4 if closed else 1)]
        found[name] = [row for rows in whole[: part.size.pictures] for row in rows]
    wanted = part.size.pictures * (4 if closed else 1)
    if any(len(rows) != wanted for rows in found.values()):
        raise SystemExit(f"questions: {[len(r) for r in found.values()]}, expected {wanted} each")
    return found


def answering(part: Part) -> None:
    """Closed questions under four conditions, then reports, against bare ``generate``."""
    import answering as bench
    from common.rivals import bare
    from mmedrag.answering.generators import load_generator

    weightless.serve()
    began = time.perf_counter()
    generator = load_generator("hf", part.model)
    part.keep(model=generator.facts(), load_seconds=time.perf_counter() - began)
    asked, rounds = questions(part), part.size.rounds
    every = [row for rows in asked.values() for row in rows]
    bench.ours(generator, every)  # kernels, allocator, decoded pictures
    bare(generator, every[:: len(asked)])

    answers = generator.generate(every)
    if any(a.p_yes is None or not 0 <= a.p_yes <= 1 for a in answers):
        raise SystemExit("answering: a closed question without p_yes")
    ran = bench.four_conditions(generator, asked, rounds)
    for name, counted in ran["work"].items():
        if counted["images"] == 0 or counted["tokens"] < len(every):
            raise SystemExit(f"answering: {name} computed nothing: {counted}")
    ran["seconds_per_row"] = {name: t / ran["rows"] for name, t in ran["seconds"].items()}
    part.keep(
        four_conditions=ran, p_yes=[min(a.p_yes for a in answers), max(a.p_yes for a in answers)]
    )

    def one_by_one() -> None:
        for rows in asked.values():
            bench.one_by_one(generator, rows[:8])

    count = sum(len(rows[:8]) for rows in asked.values())
    alone = statistics.median(bench.seconds(one_by_one, generator)[0] for _ in range(rounds))
    part.keep(
        one_by_one={
            "rows": count,
            "seconds_per_row": alone / count,
            "ratio": alone / count / ran["seconds_per_row"]["together"],
        }
    )
    part.keep(throughput=bench.throughput(generator, asked, rounds))
    bench.forget(generator)
    part.keep(
        memory={
            "ours": peak(lambda: bench.ours(generator, every)),
            "bare": peak(lambda: bare(generator, every)),
        }
    )
    part.keep(reports=reports(part, generator))
    usual, generator.batch_size = generator.batch_size, 32
    larger: dict[str, float] = {}
    for name, job in (("ours", bench.ours), ("bare", bare)):
        spent = [bench.seconds(lambda j=job: j(generator, every), generator)[0] for _ in range(2)]
        larger[name] = spent[-1] / len(every)
    generator.batch_size = usual
    part.keep(
        batch_32={"seconds_per_row": larger, "ratio_to_bare": larger["bare"] / larger["ours"]}
    )
    if not _installed("vllm"):
        part.keep(vllm="not run: not installed")
        return
    part.keep(vllm=vllm(part, generator, every, ran["seconds_per_row"]["together"]))


def reports(part: Part, generator: Any) -> dict[str, Any]:
    """Long answers: a batch, the same through bare ``generate``, and two rows one by one."""
    from dataclasses import replace

    import answering as bench
    from common.rivals import bare

    size = part.size
    asked = questions(part, closed=False)
    rows = [*asked["clean+references"], *asked["noise+references"]][: size.report_rows]
    rows = [replace(row, max_new_tokens=size.report_tokens) for row in rows]
    jobs: dict[str, Callable[[], Any]] = {
        "ours": lambda: bench.ours(generator, rows),
        "bare": lambda: bare(generator, rows),
        "one_by_one": lambda: bench.one_by_one(generator, rows[:2]),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(size.rounds):
        for name, job in jobs.items():
            times[name].append(bench.seconds(job, generator)[0])
    counts = {"ours": len(rows), "bare": len(rows), "one_by_one": 2}
    each = {name: statistics.median(t) / counts[name] for name, t in times.items()}
    return {
        "rows": counts,
        "new_tokens": size.report_tokens,
        "seconds_per_row": each,
        "ratio": {name: each[name] / each["ours"] for name in ("bare", "one_by_one")},
    }


def vllm(part: Part, generator: Any, rows: list[Any], ours: float) -> dict[str, Any]:
    """The same rows through vLLM, weights from a folder of the same model."""
    from vllm import LLM, SamplingParams

    from mmedrag.answering.generators import open_view

    folder = part.work / "vllm"
    generator.model.save_pretrained(folder)
    generator.inputs.processor.save_pretrained(folder)
    engine = LLM(
        str(folder), dtype="bfloat16", max_model_len=4096, gpu_memory_utilization=0.5, seed=0
    )
    limit = SamplingParams(temperature=0.0, max_tokens=rows[0].max_new_tokens)

    def run() -> float:
        began = time.perf_counter()
        asked = [
            {
                "prompt": generator.inputs.text(r.prompt, 1),
                "multi_modal_data": {
                    "image": open_view((r.images[0], r.noise), generator.image_size)
                },
            }
            for r in rows
        ]
        engine.generate(asked, limit)
        return time.perf_counter() - began

    spent = [run() for _ in range(part.size.rounds + 1)][1:]
    each = statistics.median(spent) / len(rows)
    return {"seconds_per_row": each, "ratio": each / ours}


# --- 3: tuning ------------------------------------------------------------------------------------


def tuned(job: str, checkpointing: bool) -> Callable[[Part], None]:
    """A job of the tuning benchmark, its steps timed one by one: seconds a pair and peak memory."""

    def run(part: Part) -> None:
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        import tuning

        weightless.serve()  # before anything imports peft or trl
        size = part.size
        changes = dict(
            batch_size=size.batch, epochs=size.epochs, lora_r=size.rank, lora_alpha=2 * size.rank
        )
        options = argparse.Namespace(
            shape="7b",
            quick=True,
            job=job,
            checkpointing=checkpointing,
            # no checkpoint on disk between the steps
            changes={**changes, "max_length": 1024, "log_steps": 4, "save_steps": 10_000},
        )
        ends: list[float] = []

        def ended(*_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        hook = register_optimizer_step_post_hook(ended)
        found = tuning.JOBS[job](part.work / "tuning", options)
        hook.remove()
        steps = [b - a for a, b in zip(ends[1:], ends[2:], strict=False)]  # two steps warm up
        expected = size.pairs * size.epochs // size.batch
        if len(ends) != expected or found["work"]["tokens_with_gradient"] < size.pairs:
            raise SystemExit(f"{part.name}: {len(ends)} steps of {expected}, {found['work']}")
        part.keep(
            seconds_per_pair=statistics.median(steps) / size.batch,
            steps=len(ends),
            step_seconds=steps,
            tokens_per_pair=found["work"]["tokens_with_gradient"] / (size.pairs * size.epochs),
            job=found,
        )

    return run


# --- 4: exactness ---------------------------------------------------------------------------------

NATS = {"float32": 0.01, "bfloat16": 0.25}  # a text's log-probability, ours and the plain loop's


def exactness(part: Part) -> None:
    """Log-probabilities of ours against a plain loop, one row at a time, in both number types;
    both against the loop in float32. And which type is chosen without being asked."""
    import torch

    from mmedrag.answering.generators import load_generator
    from mmedrag.models.load import best_device, choose_dtype, speed

    weightless.serve()
    device = torch.device(best_device())
    part.keep(
        chosen=str(choose_dtype(device, 7_000_000_000)).removeprefix("torch."),
        measured_gflops={
            str(d).removeprefix("torch."): speed(device.type, d)
            for d in (torch.bfloat16, torch.float32)
        },
    )
    if device.type == "cuda" and part.found["chosen"] != "bfloat16":
        raise SystemExit(f"exactness: {part.found['chosen']} was chosen, expected bfloat16")
    asked = questions(part)
    rows = [row for condition in asked.values() for row in condition[:6]]
    texts = [("Yes", "No", "There is no pleural effusion.")[n % 3] for n in range(len(rows))]
    sums: dict[str, dict[str, list[float]]] = {}
    for name in ("bfloat16", "float32"):
        generator = load_generator("hf", part.model, dtype=name)
        answers = generator.generate(rows)
        plain = [plain_loop(generator, row, text) for row, text in zip(rows, texts, strict=True)]
        sums[name] = {
            "ours": generator.logprobs(rows, texts),
            "plain": [total for total, _ in plain],
            "ours_p_yes": [a.p_yes for a in answers],
            "plain_p_yes": [p for _, p in plain],
        }
        apart = gap(sums[name]["ours"], sums[name]["plain"])
        part.keep(
            **{
                name: {
                    "rows": len(rows),
                    "largest_difference": apart,
                    "tolerance": NATS[name],
                    "within": apart <= NATS[name],
                    "largest_p_yes_difference": gap(
                        sums[name]["ours_p_yes"], sums[name]["plain_p_yes"]
                    ),
                }
            }
        )
        del generator
    exact = sums["float32"]["plain"]
    part.keep(
        from_float32={
            "ours_bfloat16": gap(sums["bfloat16"]["ours"], exact),
            "plain_bfloat16": gap(sums["bfloat16"]["plain"], exact),
            "spread": max(exact) - min(exact),
        }
    )
    part.keep(tuning=tuning_exactness(part))


def gap(a: list[float], b: list[float]) -> float:
    """The largest difference; infinite where a value is missing or not finite."""
    import math

    apart = [abs(x - y) if x is not None else math.inf for x, y in zip(a, b, strict=True)]
    return max(d if math.isfinite(d) else math.inf for d in apart)


def plain_loop(generator: Any, request: Any, text: str) -> tuple[float, float]:
    """Σ log p of a text and its end token, and p_yes, from the processor and one whole forward."""
    import torch

    from mmedrag.answering.generators import open_view

    inputs, tokenizer = generator.inputs, generator.tokenizer
    batch = inputs.processor(
        images=[open_view((request.images[0], request.noise), generator.image_size)],
        text=[inputs.text(request.prompt, 1)],
        return_tensors="pt",
    ).to(generator.device, generator.dtype)
    said = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    tail = torch.tensor([said], device=generator.device)
    before = batch["input_ids"].shape[1]
    with torch.inference_mode():
        logits = generator.model(
            input_ids=torch.cat([batch["input_ids"], tail], 1),
            pixel_values=batch["pixel_values"],
            use_cache=False,
        ).logits[0]
    logp = logits[before - 1 : -1].float().log_softmax(-1)
    words = generator.verbalizers
    yes, no = (logp[0, list(ids)].logsumexp(0) for ids in (words.yes, words.no))
    total = logp.gather(1, tail[0][:, None]).double().sum()
    return float(total), float(torch.sigmoid(yes - no))


def tuning_exactness(part: Part) -> dict[str, Any]:
    """Reference log-probabilities as the tuning computes them (shared prompts, packed rows)
    against a whole forward of each side."""
    import torch

    import tuning
    from mmedrag.preference.dpo import train_dpo
    from mmedrag.preference.dpo.cache import Journal
    from mmedrag.preference.pairs import read_pairs

    options = argparse.Namespace(
        shape="7b", quick=True, checkpointing=False, changes={"max_length": 1024}
    )
    common = tuning.Common(part.work / "tuning", options)
    found = {}
    with part.scratch() as cache:
        train_dpo(
            read_pairs(part.work / "tuning/pairs"),
            part.work / "tuning/model",
            cache / "run",
            common.settings,
            cache=cache,
            prepare_only=True,
        )
        (folder,) = (cache / "reference").iterdir()
        about = json.loads((folder / "about.json").read_text())
        ours = Journal(folder, about).entries
    for pair in common.rows:
        for side in (pair.chosen, pair.rejected):
            batch = {k: v.to(common.loaded.device) for k, v in common.batch([side]).items()}
            with torch.inference_mode():
                logits = common.loaded.model(
                    input_ids=batch["input_ids"],
                    pixel_values=batch["pixel_values"].to(common.loaded.dtype),
                    use_cache=False,
                ).logits[0]
            logp = logits[len(side.prompt) - 1 : -1].float().log_softmax(-1)
            wanted = torch.tensor(side.answer, device=logp.device)
            found[side.key] = float(logp.gather(1, wanted[:, None]).double().sum())
    name = str(common.loaded.dtype).removeprefix("torch.")
    apart = gap([float(ours[key]) for key in found], list(found.values()))
    return {
        "dtype": name,
        "sides": len(found),
        "largest_difference": apart,
        "tolerance": NATS[name],
        "within": apart <= NATS[name],
    }


# --- 5: encoders and index ------------------------------------------------------------------------


def encoders(part: Part) -> None:
    """Pictures a second through our encoder, from files and prepared, against the bare loops."""
    from mmedrag.retrieval.encoders import load_encoder
    from retrieval import random_clip

    size = part.size
    for name, (width, layers, side) in size.towers.items():
        spec = str(random_clip(part.work / "clip", width, layers, side))
        part.keep(**{name: rates(part, load_encoder(spec))})
    if not _installed("open_clip_torch"):
        part.keep(RN50="not run: open_clip_torch is not installed")
        return
    part.keep(RN50=rates(part, load_encoder("open_clip:RN50")))


def rates(part: Part, encoder: Any) -> dict[str, Any]:
    from retrieval import encoder_rates

    with part.scratch() as folder:
        found = encoder_rates(encoder, folder, part.size.encoded, part.size.rounds + 1)
    count = found["rows"]
    found["per_second"] = {name: count / spent for name, spent in found["seconds"].items()}
    found["device"] = str(encoder.device)
    return found


def clustered(count: int, centres: int, seed: int, dim: int = 512) -> Any:
    """Unit rows around ``centres`` directions: a direction plus as long a random vector."""
    import numpy as np

    axes = np.random.default_rng(0).standard_normal((centres, dim), dtype=np.float32)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, dim), dtype=np.float32) / np.sqrt(dim, dtype=np.float32)
    rows += axes[rng.integers(0, centres, count)]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def index_build(part: Part) -> None:
    """The exact index, and inverted lists, which ``auto`` chooses above 100,000 rows."""
    from mmedrag.retrieval.stores.faiss import FaissStore

    size = part.size
    rows = clustered(size.vectors, size.centres, seed=1)
    names = [str(n) for n in range(len(rows))]
    queries = clustered(256, size.centres, seed=2)
    (part.work / "index").mkdir()
    for engine in ("flat", "ivf"):
        began = time.perf_counter()
        store = FaissStore(rows.shape[1], engine)
        store.add(names, rows)
        store.finish(queries)
        settings = store.save(part.work / f"index/{engine}.faiss")
        part.keep(**{engine: {"settings": settings, "seconds": time.perf_counter() - began}})
        del store


def index_search(part: Part) -> None:
    """Our store against bare FAISS on the same file, alone and by 64; other queries than those
    that chose ``nprobe``."""
    import faiss

    from mmedrag.retrieval.stores.faiss import FaissStore
    from retrieval import search_times

    size, built = part.size, json.loads((part.work / "part-index-build.json").read_text())
    names = [str(n) for n in range(size.vectors)]
    queries = clustered(256, size.centres, seed=3)
    truth = None
    for engine in ("flat", "ivf"):
        path, settings = part.work / f"index/{engine}.faiss", built[engine]["settings"]
        store, bare = FaissStore.open(path, settings, names), faiss.read_index(str(path))
        parameters = None
        if settings["kind"] == "ivf":
            parameters = faiss.SearchParametersIVF(nprobe=settings["nprobe"])
        found = search_times(store, bare, parameters, queries, size.rounds)
        _, rows = store.search(queries, 10)
        truth = rows if truth is None else truth
        hits = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), truth.tolist(), strict=True)]
        found |= {"kind": settings["kind"], "recall_at_10": sum(hits) / (10 * len(hits))}
        if hasattr(faiss, "StandardGpuResources"):
            found["faiss_gpu"] = gpu_search(faiss, bare, queries, parameters)
        part.keep(**{engine: found})
    if not hasattr(faiss, "StandardGpuResources"):
        part.keep(faiss_gpu="not run: the installed FAISS has no GPU part")


def gpu_search(faiss: Any, index: Any, queries: Any, parameters: Any) -> dict[str, float]:
    """Milliseconds a query of FAISS's own GPU index, by 64."""
    there = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    if parameters is not None:
        there.nprobe = parameters.nprobe
    times = []
    for _ in range(4):
        began = time.perf_counter()
        there.search(queries[:64], 10)
        times.append(1000 * (time.perf_counter() - began) / 64)
    return {"milliseconds_per_query": statistics.median(times[1:])}


# --- 6: the suite's own ---------------------------------------------------------------------------


def tests(part: Part) -> None:
    """The tests marked ``gpu``."""
    import re

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-rs"]
    files = [f for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text()]
    if not files:
        raise SystemExit("tests: none is marked gpu")
    command += ["--durations=5", *map(str, sorted(files))]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    counts = {
        w: int(n) for n, w in re.findall(r"(\d+) (passed|failed|skipped|errors?)", ended.stdout)
    }
    part.keep(counts=counts, exit=ended.returncode, output=ended.stdout[-6000:])
    if ended.returncode:
        raise SystemExit(f"tests: {counts}: {ended.stdout[-300:]} {ended.stderr[-300:]}")
    if not counts.get("passed"):
        part.keep(note="not run: every test was skipped")


# --- the run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    run: Callable[[Part], None]
    seconds: float  # its share of the time
    beside: bool = False  # runs beside the next parts, which measure no time


PARTS = {
    "prepare": Plan(prepare, 90),
    "answering": Plan(answering, 130),
    "dpo-ours-checkpointing": Plan(tuned("ours", True), 60),
    "dpo-trl-checkpointing": Plan(tuned("trl", True), 60),
    "dpo-ours": Plan(tuned("ours", False), 60),
    "dpo-trl": Plan(tuned("trl", False), 60),
    "dpo-released-checkpointing": Plan(tuned("released", True), 70),
    "encoders": Plan(encoders, 60),
    "index-build": Plan(index_build, 150, beside=True),
    "tests": Plan(tests, 75),
    "exactness": Plan(exactness, 60),
    "index-search": Plan(index_search, 60),
}


class Child:
    """A part in a process group of its own; its error output passes through and is remembered."""

    def __init__(self, name: str, work: Path, options: argparse.Namespace) -> None:
        self.name, self.file = name, work / f"part-{name}.json"
        self.limit = PARTS[name].seconds * (5 if options.rehearse else 1)  # a CPU, and busy
        self.began = time.monotonic()
        command = [sys.executable, __file__, "--part", name, "--work", str(work)]
        command += ["--rehearse"] * options.rehearse
        threads = {}
        if PARTS[name].beside:  # leaves some cores to the parts that it runs beside
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) - 4))}
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, **threads},
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines = [*self.lines[-60:], line.rstrip()]
            sys.stderr.write(line)
            sys.stderr.flush()

    def result(self, left: float) -> dict[str, Any]:
        """What it measured, once it ended or its time was over, and how it ended."""
        how = "complete"
        limit = max(1.0, min(self.limit - (time.monotonic() - self.began), left))
        try:
            if self.process.wait(limit):
                how = f"failed: {next((x for x in reversed(self.lines) if x.strip()), '')[:500]}"
        except subprocess.TimeoutExpired:
            how = "cut: its time was over"
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.reader.join(5)
        found = json.loads(self.file.read_text()) if self.file.exists() else {}
        found.pop("complete", None)
        seconds = round(time.monotonic() - self.began, 1)
        say(f"{self.name}: {how} after {seconds} s")
        return {**found, "ended": how, "seconds_in_all": seconds}


def run_all(work: Path, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Every part in its order, until the time is over."""
    deadline = time.monotonic() + 60 * options.minutes
    beside: dict[str, Child] = {}
    parts = found["parts"]

    def finished(child: Child) -> None:
        parts[child.name] = child.result(deadline - time.monotonic())
        save(options.out, options.name, found | {"not_run": not_run(parts)})

    for name, plan in PARTS.items():
        left = deadline - time.monotonic()
        if name == "index-search" and "index-build" in beside:
            finished(beside.pop("index-build"))
            left = deadline - time.monotonic()
        if options.only and name not in ("prepare", *options.only):
            parts[name] = {"ended": "not run: not asked for"}
        elif left < 8:
            parts[name] = {"ended": "not run: no time was left"}
        else:
            say(f"{name}: begins, {left:.0f} s left")
            child = Child(name, work, options)
            if plan.beside:
                beside[name] = child
                continue
            finished(child)
        if name == "prepare":
            found["machine"] = parts[name].pop("machine", {"cpu": "?", "cores": os.cpu_count()})
            if parts[name]["ended"] != "complete":
                break
    for child in beside.values():
        finished(child)


def not_run(parts: dict[str, Any]) -> list[str]:
    """What a reader must not take for measured: parts, and sections inside them."""
    missing = [f"{name}: not reached" for name in PARTS if name not in parts]
    for name, part in parts.items():
        if part["ended"] != "complete":
            missing.append(f"{name}: {part['ended'].removeprefix('not run: ')}")
        for key, value in part.items():
            if key != "ended" and isinstance(value, str) and value.startswith("not run"):
                missing.append(f"{name}, {key}: {value.removeprefix('not run: ')}")
    return missing


def pick(found: dict[str, Any], *keys: str) -> Any:
    """A value deep inside, None where a part did not get there."""
    value: Any = found
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def claims(parts: dict[str, Any]) -> list[Claim]:
    """The ratios that were measured, each beside its target and bound."""
    found: list[Claim] = []

    def claim(what: str, value: Any, target: str | None = None, bound: Any = None) -> None:
        if value is not None:
            found.append(Claim(what, float(value), target, bound))

    said = parts.get("answering", {})
    for key, what in (("bare_passes", "bare generate"), ("passes", "ours")):
        claim(
            f"four conditions together : four passes of {what}",
            pick(said, "four_conditions", "ratio", key),
            ">=1.6" if key == "bare_passes" else None,
            pick(said, "four_conditions", "bound", key),
        )
    claim("four conditions together : one by one", pick(said, "one_by_one", "ratio"), ">=5")
    for key, what in (("as_they_come", "4 questions a picture"), ("every_picture_once", "one")):
        ratio = pick(said, "throughput", key, "ratio_to_bare")
        claim(f"ours : bare generate, {what}", ratio, ">=0.95")
    claim("ours : bare generate, batches of 32", pick(said, "batch_32", "ratio_to_bare"), ">=0.95")
    claim("reports: ours : bare generate", pick(said, "reports", "ratio", "bare"), ">=0.95")
    claim("reports: ours : one by one", pick(said, "reports", "ratio", "one_by_one"))
    claim("ours : vLLM", pick(said, "vllm", "ratio"))
    for rival, what, wanted in (
        ("trl", "stock TRL", ">=1.5"),
        ("released", "released step", ">=3"),
    ):
        for suffix in ("-checkpointing", ""):
            own, other = parts.get(f"dpo-ours{suffix}"), parts.get(f"dpo-{rival}{suffix}")
            each = [pick(p or {}, "seconds_per_pair") for p in (own, other)]
            if None in each:
                continue
            label = f"{what}{' with checkpointing' * bool(suffix)}"
            work = [pick(p or {}, "job", "work", "gflop") for p in (own, other)]
            claim(f"seconds a pair: ours : {label}", each[1] / each[0], wanted, work[1] / work[0])
            memory = [pick(p or {}, "job", "added_mib") for p in (own, other)]
            claim(f"added memory: ours / {label}", memory[0] / memory[1], "<=0.6")
    for name, part in parts.get("encoders", {}).items():
        if isinstance(part, dict):
            ratio = part["rate_to_one_after_another"]
            claim(f"{name}: pictures from files / the loop", ratio, ">=0.95")
            ratio = part["prepared_rate_to_model_alone"]
            claim(f"{name}: prepared pictures / the model alone", ratio, ">=0.95")
    for name in ("flat", "ivf"):
        part = parts.get("index-search", {}).get(name, {})
        for batch, ratio in part.get("time_ratio", {}).items():
            claim(f"search / bare FAISS, {part['kind']}, {batch}", ratio, "<=1.1")
        claim(f"recall at 10, {part.get('kind')}", part.get("recall_at_10"), ">=0.98")
    errors = parts.get("exactness", {}).get("from_float32")
    if errors:
        ratio = errors["ours_bfloat16"] / max(errors["plain_bfloat16"], 1e-9)
        claim("bfloat16's error against float32: ours / plain loop", ratio, "<=1.5")
    for name in ("bfloat16", "float32", "tuning"):
        part = parts.get("exactness", {}).get(name, {})
        apart, limit = part.get("largest_difference"), part.get("tolerance")
        claim(f"log-probability: ours - plain loop, {name}", apart, f"<={limit}")
    return found


def commit() -> str:
    asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    said = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return said or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts")
    parser.add_argument("--commit", help="what is measured, where it is no checkout")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.part:
        part = Part(options.part, options.work, SMALL if options.rehearse else GPU)
        try:
            PARTS[options.part].run(part)
        except Exception as error:
            traceback.print_exc()
            raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
        sys.stdout.flush()
        os._exit(0)  # everything is on disk; taking 15 GB apart costs seconds
    options.name = "gpu-rehearsal" if options.rehearse else "gpu"
    size = SMALL if options.rehearse else GPU
    found: dict[str, Any] = {
        "commit": options.commit or commit(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "weights": "random",
        "size": vars(size),
        "parts": {},
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run_all(Path(folder), options, found)
    found["seconds_in_all"] = round(time.monotonic() - began, 1)
    found["not_run"] = not_run(found["parts"])
    finish(options.out, options.name, found, claims(found["parts"]))
    for line in found["not_run"]:
        print(f"not run: {line}")
    if pick(found, "machine", "gpu") is None and not options.rehearse:
        print("no GPU was found: these are times of the CPU")


if __name__ == "__main__":
    main()
