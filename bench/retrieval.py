"""Retrieval against the released procedure, bare FAISS, and the bare model loop.

Also against itself with ten times the rows.

Start-up (imports, loading weights) is excluded everywhere. Rivals share one encoder, one data
set and one run; where they take seconds or less they run in turn and medians are compared.
Beside wall clock stands the processor time, which a shared machine disturbs less. The released
procedure's references are compared row by row with ours, so that a fast wrong answer does not
count.

    python bench/retrieval.py [--quick] [--full] [--only PART] [--rounds N] [--out bench/results]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402

from common import Claim, finish, machine, save  # noqa: E402

QUESTIONS, IMAGES, TEXTS = 4285, 711, 7000  # of the released ophthalmology test
BATCH, THRESHOLD, K = 64, 1.5, 3  # released: batch, ratio; its k is 1 in every file
FINDINGS = ("drusen", "haemorrhage", "exudate", "cupping", "myopia", "oedema", "scar", "naevus")


# --- data and encoders ----------------------------------------------------------------------------


def draw(path: Path, seed: int, side: int) -> None:
    """A smooth coloured picture, as a JPEG."""
    from PIL import Image

    cells = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)
    picture.save(path, quality=90)


def report(seed: int, words: int = 40) -> str:
    rng = np.random.default_rng(seed)
    said = [f"Case {seed}."]
    while sum(len(s.split()) for s in said) < words:
        finding, size = rng.choice(FINDINGS), rng.integers(1, 40)
        said.append(
            f"There is {finding} of {size} mm in the {rng.choice(['upper', 'lower'])} half."
        )
    return " ".join(said)


def make_data(
    folder: Path, questions: int, images: int, texts: int, side: int, pictured: bool = True
) -> Any:
    """``questions`` over ``images`` (split test), and a corpus of ``texts`` (split train)."""
    from mmedrag.records import Example, Reference
    from mmedrag.runtime import DataFolder, write_jsonl

    (folder / "images").mkdir(parents=True)
    for n in range(images):
        draw(folder / f"images/q{n}.jpg", n, side)
    corpus = []
    for n in range(texts):
        image = f"images/c{n}.jpg" if pictured else None
        if image:
            draw(folder / image, 1_000_000 + n, side)
        corpus.append(
            Reference(
                id=f"c{n}",
                text=report(n),
                image=image,
                patient=f"c{n}",
                domain="ophthalmology",
                split="train",
            )
        )
    examples = [
        Example(
            id=f"e{n}",
            task="vqa",
            question=f"Is there {FINDINGS[n % 8]}?",
            answer="Yes.",
            answer_type="closed",
            image=f"images/q{n * images // questions}.jpg",
            patient=f"q{n * images // questions}",
            domain="ophthalmology",
            split="test",
        )
        for n in range(questions)
    ]
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "examples.jsonl", examples)
    return DataFolder(folder)


def random_clip(folder: Path, width: int = 256, layers: int = 4, side: int = 96) -> Path:
    """A CLIP with random weights, large enough that the model's part outweighs the files'."""
    from mmedrag.runtime import torchvision_shim

    torchvision_shim.ready()
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    words = sorted({w.lower().strip(".") for n in range(500) for w in report(n).split()})
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", ".", *words])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=77,
    )
    torch.manual_seed(0)
    shape = dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    text = dict(vocab_size=len(vocab), max_position_embeddings=77, **shape, **ids)
    vision = dict(image_size=side, patch_size=16, **shape)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)
    return folder


class HashEncoder:
    """Vectors from a seed in the content: the cost of everything but the model."""

    def __init__(self, dim: int) -> None:
        self.dim, self.spec = dim, f"hash-{dim}"
        self.fingerprint = hashlib.sha256(self.spec.encode()).hexdigest()

    def images(self, images: Sequence[Any]) -> np.ndarray:
        return self._vectors([picture.tobytes() for picture in images])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors([text.encode() for text in texts])

    def _vectors(self, contents: list[bytes]) -> np.ndarray:
        rows = np.empty((len(contents), self.dim), np.float32)
        for row, content in zip(rows, contents, strict=True):
            seed = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
            np.random.Generator(np.random.SFC64(seed)).standard_normal(out=row, dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclass
class Clock:
    """Wall-clock and processor seconds of what ran inside the block."""

    seconds: float = 0.0
    processor: float = 0.0

    def __enter__(self) -> Clock:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start[0]
        self.processor = time.process_time() - self._start[1]

    def as_dict(self) -> dict[str, float]:
        return {"seconds": round(self.seconds, 4), "processor_seconds": round(self.processor, 4)}


def start_up() -> None:
    """Imports of everything that is measured: they belong to no measurement."""
    import faiss  # noqa: F401
    import pyarrow.compute  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import mmedrag.pipeline.retrieve
    import mmedrag.retrieval.index_build
    import mmedrag.retrieval.search  # noqa: F401


class Counted:
    """Counts and times what goes through the towers of an encoder, whoever calls them."""

    def __init__(self, towers: Any) -> None:
        self.towers, self.kept = towers, (towers.image_features, towers.text_features)
        self.rows = {"image": 0, "text": 0}
        self.seconds = {"image": 0.0, "text": 0.0}
        self.processor = {"image": 0.0, "text": 0.0}  # of the calling thread
        towers.image_features = self._wrap("image", self.kept[0])
        towers.text_features = self._wrap("text", self.kept[1])

    def _wrap(self, kind: str, tower: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(batch: Any) -> Any:
            start, own = time.perf_counter(), time.thread_time()
            found = tower(batch)
            self.seconds[kind] += time.perf_counter() - start
            self.processor[kind] += time.thread_time() - own
            self.rows[kind] += len(found)
            return found

        return call

    def take(self) -> dict[str, Any]:
        found = {
            "encoded": dict(self.rows),
            "tower_seconds": dict(self.seconds),
            "tower_processor_seconds": dict(self.processor),
        }
        for kind in self.rows:
            self.rows[kind], self.seconds[kind], self.processor[kind] = 0, 0.0, 0.0
        return found

    def remove(self) -> None:
        self.towers.image_features, self.towers.text_features = self.kept


# --- 1: the released procedure --------------------------------------------------------------------


def released(encoder: Any, data: Any, counted: Counted) -> tuple[list[list[str]], Any, dict]:
    """As the released retrieval: everything through both towers, every question its image again,
    all similarities at once and transposed, one sort per row, S_1/S_j below the threshold, cap.

    Written from its description. In its favour: no worker processes to start, and pictures are
    read ahead by the same threads as ours. Returns the references, all similarities, and the work
    that corpus and questions took apart: a report costs more than the one word of an answer.
    """
    import torch

    from mmedrag.images import load_image
    from mmedrag.retrieval.encoders import ahead

    towers = encoder.towers

    def embed(rows: list[tuple[Path, str]]) -> tuple[Any, Any]:
        images, texts = [], []
        batches = ahead(lambda row: towers.prepare(load_image(row[0])), rows, BATCH)
        for n, pictures in enumerate(batches):
            said = [text for _, text in rows[n * BATCH : (n + 1) * BATCH]]
            with torch.inference_mode():
                images.append(towers.image_features(torch.stack(pictures)))
                texts.append(towers.text_features(towers.tokenize(said)))
        unit = torch.nn.functional.normalize
        return unit(torch.cat(images), dim=-1), unit(torch.cat(texts), dim=-1)

    corpus = [(r.images[0], r.text) for r in data.corpus("train")]
    _, keys = embed(corpus)
    of_corpus = counted.take()
    queries, _ = embed([(e.images[0], e.answer) for e in data.examples("test")])
    logits = 100.0 * queries @ keys.T
    _transposed = logits.T.cpu().clone()
    found = []
    for row in logits.cpu():
        scores, order = torch.sort(row, descending=True)
        keep = int((scores[0] / scores < THRESHOLD).sum())
        found.append([corpus[i][1] for i in order[: min(keep, K)].tolist()])
    return found, logits / 100, {"corpus": of_corpus, "questions": counted.take()}


def ours(encoder: Any, index: Path, data: Any, out: Path) -> list[list[str]]:
    from mmedrag.pipeline import Pipeline, retrieve
    from mmedrag.retrieval import RuleSpec, open_retriever

    retriever = open_retriever(index, encoder, views="first")
    rule = RuleSpec("top1_ratio", threshold=THRESHOLD, k=K)
    pipeline = Pipeline("ophthalmology", {"ophthalmology": retriever}, rule, k=K)
    retrieve(pipeline, data.examples("test"), out, "released")
    return [json.loads(row)["reference_reports"] for row in out.read_text().splitlines()]


def against_released(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    from mmedrag.retrieval import build_index
    from mmedrag.retrieval.encoders import load_encoder

    shrink = 10 if options.quick else 1
    data = make_data(work / "data", QUESTIONS // shrink, IMAGES // shrink, TEXTS // shrink, 160)
    start_up()
    encoder: Any = load_encoder(str(random_clip(work / "clip")))
    encoder.images([r.images[0] for r in data.corpus("train")[:BATCH]])  # warm-up
    encoder.texts([r.text for r in data.corpus("train")[:BATCH]])
    counted = Counted(encoder.towers)
    with Clock() as old:
        theirs, similarities, theirs_work = released(encoder, data, counted)
    with Clock() as cold:
        build_index([data], work / "index", "ophthalmology", encoder)
        found = ours(encoder, work / "index", data, work / "cold.jsonl")
    ours_work = counted.take()
    counted.remove()
    warm = sorted((child("--warm", str(work)) for _ in range(3)), key=lambda w: w["seconds"])[1]
    by_clock = shares(
        old.seconds, cold.seconds, warm["seconds"], "tower_seconds", theirs_work, ours_work
    )
    by_processor = shares(
        old.processor,
        cold.processor,
        warm["processor_seconds"],
        "tower_processor_seconds",
        theirs_work,
        ours_work,
    )
    same = sum(a == b for a, b in zip(theirs, found, strict=True)) / len(found)
    row_of = {r.text: n for n, r in enumerate(data.corpus("train"))}
    gaps = [
        abs(float(row[row_of[a]] - row[row_of[b]])) if len(their) == len(our) else float("inf")
        for row, their, our in zip(similarities, theirs, found, strict=True)
        for a, b in zip(their, our, strict=False)
    ]
    return {
        "questions": len(found),
        "released": {**old.as_dict(), **theirs_work},
        "cold": {**cold.as_dict(), **ours_work},
        "warm": warm,
        **by_clock,
        "by_processor_time": by_processor,
        "same_references": same,
        "largest_gap_where_they_differ": max(gaps),
        "warm_equals_cold": warm["sha256"] == digest(work / "cold.jsonl"),
    }


def shares(
    old: float, cold: float, warm: float, spent: str, theirs: dict[str, Any], ours: dict[str, Any]
) -> dict[str, Any]:
    """Ratios of the released procedure to ours, and what the encode counts alone imply: ours at
    the released procedure's own cost of a picture and of a report of the corpus."""
    corpus = theirs["corpus"]
    cost = {kind: corpus[spent][kind] / rows for kind, rows in corpus["encoded"].items()}
    whole = sum(sum(part[spent].values()) for part in theirs.values())
    implied = whole / sum(rows * cost[kind] for kind, rows in ours["encoded"].items())
    return {
        "milliseconds_per_encode": {kind: 1000 * value for kind, value in cost.items()},
        "ratio_cold": old / cold,
        "ratio_implied_by_counts": implied,
        "share_of_implied": old / cold / implied,
        "ratio_warm": old / warm,
    }


def warm_again(work: Path) -> dict[str, Any]:
    """A later process: embeddings are on disk."""
    from mmedrag.retrieval.encoders import load_encoder
    from mmedrag.runtime import DataFolder

    start_up()
    encoder: Any = load_encoder(str(work / "clip"))
    encoder.images([Path(work / "data/images/q0.jpg")])
    counted = Counted(encoder.towers)
    with Clock() as clock:
        ours(encoder, work / "index", DataFolder(work / "data"), work / "warm.jsonl")
    return {**clock.as_dict(), **counted.take(), "sha256": digest(work / "warm.jsonl")}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- 2: bare FAISS --------------------------------------------------------------------------------


def against_faiss(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time in turn in one process, memory in a process each, over the same file."""
    from mmedrag.retrieval import build_index

    sizes = [1_000, 10_000] if options.quick else [10_000, 100_000]
    if options.full:
        sizes.append(1_000_000)
    small = make_data(work / "small", 1, 1, 100, 32, pictured=False)
    build_index([small], work / "small/index", None, HashEncoder(512))
    return {str(n): one_size(work / str(n), n, options.rounds) for n in sizes}


def one_size(work: Path, count: int, rounds: int) -> dict[str, Any]:
    from mmedrag.retrieval import IndexFolder, build_index

    data = make_data(work / "data", 1, 1, count, 32, pictured=False)
    with Clock() as built:
        build_index([data], work / "index", None, HashEncoder(512))
    index = IndexFolder.open(work / "index")
    bare, parameters = bare_index(work / "index")
    queries = HashEncoder(512).texts([f"query {n}" for n in range(256)])
    timed = search_times(index.store, bare, parameters, queries, rounds)
    who = ("bare", "search", "with_texts")
    memory = {name: child("--resident", str(work / "index"), name) for name in who}
    ratio = {
        since: {name: memory[name][since] / memory["bare"][since] for name in who[1:]}
        for since in ("grown_mib", "from_imports_mib")
    }
    return {
        "engine": index.manifest["vectors"],
        "build": built.as_dict(),
        **timed,
        "memory": memory,
        "memory_ratio": ratio["grown_mib"],
        "memory_ratio_from_imports": ratio["from_imports_mib"],
    }


def search_times(
    store: Any, bare: Any, parameters: Any, queries: np.ndarray, rounds: int
) -> dict[str, Any]:
    """Milliseconds a query through the store and through the library, in turn, alone and by 64."""
    times: dict[str, list[float]] = {}
    same = []
    for number in range(rounds + 1):
        for size in (1, 64):
            parts = [queries[n * size : (n + 1) * size] for n in range(max(2, 64 // size))]
            found = {}
            rivals: dict[str, Callable[[np.ndarray], Any]] = {
                "bare": lambda q: bare.search(q, 10, params=parameters),
                "ours": lambda q: store.search(q, 10),
            }
            for name, search in sorted(rivals.items(), reverse=bool(number % 2)):
                start = time.perf_counter()
                found[name] = [search(part) for part in parts]
                spent = (time.perf_counter() - start) / (len(parts) * size)
                if number:
                    times.setdefault(f"{name}-batch-{size}", []).append(1000 * spent)
            pairs = zip(found["ours"], found["bare"], strict=True)
            same.append(all((a[1] == b[1]).all() for a, b in pairs))
    spent = {name: statistics.median(values) for name, values in times.items()}
    return {
        "milliseconds_per_query": spent,
        "same_rows": all(same),
        "time_ratio": {
            f"batch_{s}": spent[f"ours-batch-{s}"] / spent[f"bare-batch-{s}"] for s in (1, 64)
        },
    }


def bare_index(path: Path) -> tuple[Any, Any]:
    """The same file in the bare library, with the same search parameters."""
    import faiss

    made = json.loads((path / "manifest.json").read_bytes())
    name = next(n for n in made["files"] if n.startswith("vectors"))
    parameters = None
    if made["vectors"]["kind"] == "ivf":
        parameters = faiss.SearchParametersIVF(nprobe=made["vectors"]["nprobe"])
    return faiss.read_index(str(path / name)), parameters


def resident(path: Path, who: str) -> dict[str, float]:
    """Growth of resident memory to the end of 64 searches: after the imports, and after the same
    searches in an index of 100 rows, which load what the libraries load once."""
    import psutil

    start_up()
    queries = HashEncoder(512).texts([f"query {n}" for n in range(64)])
    imported = psutil.Process().memory_info().rss
    search_all(path.parents[1] / "small/index", queries, who)
    start = psutil.Process().memory_info().rss
    held = search_all(path, queries, who)
    end = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    del held
    return {
        "grown_mib": (end - start) / 2**20,
        "from_imports_mib": (end - imported) / 2**20,
        "start_mib": start / 2**20,
        "peak_mib": peak,
    }


def search_all(path: Path, queries: np.ndarray, who: str) -> Any:
    """Open an index and search it once per query. Returns what was opened."""
    from mmedrag.retrieval import IndexFolder

    if who != "bare":
        index = IndexFolder.open(path)
        for query in queries:
            _, rows = index.store.search(query[None], 10)
            if who == "with_texts":
                index.texts(rows[0].tolist())
        return index
    bare, parameters = bare_index(path)
    for query in queries:
        bare.search(query[None], 10, params=parameters)
    return bare


# --- 3: the bare model loop -----------------------------------------------------------------------


def encoding(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """``encoder.images`` (files) and ``.texts`` against the model alone on inputs made before,
    and against the loop that prepares a batch, then runs it."""
    from mmedrag.retrieval.encoders import load_encoder

    spec = encoder_like_the_seed(work)
    found = encoder_rates(load_encoder(spec), work, 64 if options.quick else 192, options.rounds)
    return {"encoder": spec if spec.startswith("open_clip") else "random CLIP", **found}


def encoder_rates(encoder: Any, work: Path, count: int, rounds: int) -> dict[str, Any]:
    """``count`` pictures and reports through one encoder and through its bare rivals."""
    import torch

    from mmedrag.images import load_image

    towers, batch, device = encoder.towers, 64, encoder.device
    work.mkdir(exist_ok=True)
    paths = [work / f"{n}.jpg" for n in range(count)]
    for n, path in enumerate(paths):
        draw(path, n, 512)
    texts = [report(n) for n in range(count)]
    with Clock() as preparing:
        pixels = torch.stack([encoder.prepare(path) for path in paths])
    cuts = [slice(n, n + batch) for n in range(0, count, batch)]

    @torch.inference_mode()
    def model_on_pixels() -> Any:
        return torch.cat([towers.image_features(pixels[cut].to(device)) for cut in cuts])

    @torch.inference_mode()
    def loop_on_files() -> Any:
        parts = []
        for cut in cuts:
            pictures = [towers.prepare(load_image(path)) for path in paths[cut]]
            parts.append(towers.image_features(torch.stack(pictures).to(device)))
        return torch.cat(parts)

    @torch.inference_mode()
    def model_on_texts() -> Any:
        tokens = [towers.tokenize(texts[cut]) for cut in cuts]
        rows = [{name: part.to(device) for name, part in row.items()} for row in tokens]
        return torch.cat([towers.text_features(row) for row in rows])

    jobs: dict[str, Callable[[], Any]] = {
        "images_ours": lambda: encoder.images(paths),
        "prepared_ours": lambda: encoder.images(list(pixels)),
        "images_model_alone": model_on_pixels,
        "images_one_after_another": loop_on_files,
        "texts_ours": lambda: encoder.texts(texts),
        "texts_bare": model_on_texts,
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    rows: dict[str, np.ndarray] = {}
    for _ in range(rounds):  # in turn, so that a drifting machine hits all alike
        for name, job in jobs.items():
            with Clock() as clock:
                made = np.asarray(job() if "ours" in name else job().cpu())
            times[name].append(clock.seconds)
            rows[name] = made / np.linalg.norm(made, axis=1, keepdims=True)
    least = {name: min(values) for name, values in times.items()}  # the least disturbed
    return {
        "rows": count,
        "seconds": least,
        "preparing_seconds": preparing.seconds,
        "largest_difference": {
            kind: float(np.abs(rows[f"{kind}_ours"] - rows[f"{kind}_{other}"]).max())
            for kind, other in (("images", "one_after_another"), ("texts", "bare"))
        },
        "rate_to_model_alone": least["images_model_alone"] / least["images_ours"],
        "prepared_rate_to_model_alone": least["images_model_alone"] / least["prepared_ours"],
        "rate_to_one_after_another": least["images_one_after_another"] / least["images_ours"],
        "texts_rate_to_bare": least["texts_bare"] / least["texts_ours"],
    }


def encoder_like_the_seed(work: Path) -> str:
    """open_clip's RN50, as the released retriever uses, with random weights; else a small CLIP."""
    import importlib.util

    if importlib.util.find_spec("open_clip"):
        return "open_clip:RN50"
    return str(random_clip(work / "clip", 512, 6, 224))


# --- 4: ten times the rows ------------------------------------------------------------------------


def scaling(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Building with ten times the corpus, and retrieving for ten times the examples (each with
    its own image), by an encoder that costs nothing."""
    from mmedrag.retrieval import build_index

    base = 200 if options.quick else 1000
    found: dict[str, Any] = {}
    for times in (1, 1, 10):  # the first is a warm-up
        where = Path(tempfile.mkdtemp(dir=work.parent))
        data = make_data(where / "data", base * times, base * times, base * times, 96)
        with Clock() as built:
            build_index([data], where / "index", "ophthalmology", HashEncoder(128))
        # the first corpus for all, never searched before: only the number of examples differs
        if not work.exists():
            shutil.copytree(where / "index", work)
        shutil.copytree(work, where / "first")
        with Clock() as retrieved:
            ours(HashEncoder(128), where / "first", data, where / "out.jsonl")
        found[str(times)] = {
            "rows": base * times,
            "build": built.as_dict(),
            "retrieve": retrieved.as_dict(),
        }
    return {
        **found,
        **{
            f"{part}_times": found["10"][part]["seconds"] / found["1"][part]["seconds"]
            for part in ("build", "retrieve")
        },
    }


# --- the run --------------------------------------------------------------------------------------


def child(*arguments: str) -> dict[str, Any]:
    """This script in a process of its own; its last line is the result."""
    command = [sys.executable, __file__, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {ended.stderr.strip()[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def claims(found: dict[str, Any]) -> list[Claim]:
    """The measured ratios beside what they should reach."""
    made = []
    if part := found.get("released"):
        bound = part["ratio_implied_by_counts"]
        made += [
            Claim("released procedure / ours, cold", part["ratio_cold"], None, bound),
            Claim(
                "... as a share of what the encode counts imply", part["share_of_implied"], ">=0.9"
            ),
            Claim("released procedure / ours, warm", part["ratio_warm"], ">=100"),
            Claim(
                "... cold as a share, in processor time",
                part["by_processor_time"]["share_of_implied"],
            ),
            Claim("... warm, in processor time", part["by_processor_time"]["ratio_warm"]),
            Claim("rows with the same references", part["same_references"], ">=1"),
            Claim(
                "... else the similarities of theirs and ours differ by at most",
                part["largest_gap_where_they_differ"],
            ),
        ]
    for count, part in found.get("faiss", {}).items():
        if isinstance(part, dict):
            for batch, ratio in part["time_ratio"].items():
                what = f"search / bare FAISS, {count} rows, {batch}"
                made.append(Claim(what, ratio, "<=1.1"))
            what = f"memory / bare FAISS, {count} rows"
            made.append(Claim(what, part["memory_ratio"]["search"], "<=1.2"))
            made.append(Claim(f"{what}, with texts", part["memory_ratio"]["with_texts"]))
    if part := found.get("encoding"):
        made += [
            Claim(
                "images from files / the loop that prepares, then encodes",
                part["rate_to_one_after_another"],
                ">=0.95",
            ),
            Claim("images from files / the model alone on tensors", part["rate_to_model_alone"]),
            Claim("texts / tokenizer and model", part["texts_rate_to_bare"], ">=0.95"),
        ]
    if part := found.get("scaling"):
        made += [
            Claim(f"ten times the rows: {name}", part[f"{name}_times"], "<=10.5")
            for name in ("build", "retrieve")
        ]
    return made


PARTS = {
    "released": against_released,
    "faiss": against_faiss,
    "encoding": encoding,
    "scaling": scaling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--full", action="store_true", help="search at a million rows, too")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--warm", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resident", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warm:
        print(json.dumps(warm_again(options.warm)))
        return
    if options.resident:
        print(json.dumps(resident(Path(options.resident[0]), options.resident[1])))
        return
    suffix = f"-{options.only}" if options.only else ""
    suffix += "-quick" if options.quick else "-full" if options.full else ""
    found: dict[str, Any] = {"machine": machine()}
    with Clock() as whole, tempfile.TemporaryDirectory() as folder:
        for name, part in PARTS.items():
            if options.only in (None, name):
                with Clock() as clock:
                    found[name] = part(Path(folder) / name, options)
                found[name]["whole_seconds"] = round(clock.seconds, 1)
                save(options.out, f"retrieval{suffix}", found)
                print(f"{name}: {clock.seconds:.0f} s", file=sys.stderr)
    found["whole_seconds"] = round(whole.seconds, 1)
    finish(options.out, f"retrieval{suffix}", found, claims(found))


if __name__ == "__main__":
    main()
