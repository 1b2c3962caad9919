"""Answering against a bare batched ``generate``, and against one-by-one as released.

Also: four conditions together against four passes, and memory against the number of rows.

Steady state: loading and a warm-up are excluded, the rivals run in turn in one process (memory:
a process each), medians over rounds. All decode the same tokens; texts are compared, so that a
fast wrong answer does not count.

    python bench/answering.py [--quick] [--shape embedded|7b | --model FOLDER] [--random]
                              [--rounds N] [--out bench/results]

Without ``--model`` the embedded model is measured, or with ``--random`` (and where it is absent)
one of its shape with random weights, which says as many tokens as a real one would.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
from common import Claim, finish, machine, save, trained  # noqa: E402
from common.rivals import Work, bare  # noqa: E402

STUDIES = {("embedded", True): 24, ("embedded", False): 64, ("7b", True): 8, ("7b", False): 32}
CHUNK = 128  # rows that a batch run answers in one call, as `mmedrag run`
TOKENS = {"closed": 2, "report": 48}  # a random model never stops: as long as real answers are


def requests_of(data: Path, short: bool) -> dict[str, list[Any]]:
    """Closed questions and reports of the benchmark under the four conditions.

    Each condition is one list; rows are in the same order, all questions of a study together.
    """
    from mmedrag.answering import TemplateSet
    from mmedrag.records import Domain, Hit, Noise, Request, Trace
    from mmedrag.runtime import DataFolder

    folder, templates = DataFolder(data), TemplateSet()
    corpus = [row for row in folder.corpus() if row.text]
    found: dict[str, list[Any]] = {}
    pictures: dict[str, int] = {}  # references are found by the picture: all its rows have the same
    for example in folder.examples():
        closed = example.task == "vqa" and example.answer_type == "closed"
        if not closed and example.task != "report":
            continue
        n = pictures.setdefault(str(example.image), len(pictures))
        trace = Trace.of(example)
        trace.domain = Domain(label=example.domain or "radiology")
        hits = [
            Hit(id=r.id, text=r.text, score=0.5, rank=k)
            for k, r in enumerate(corpus[(7 * n + k) % len(corpus)] for k in range(1, 4))
        ]
        noise = Noise(kind="gaussian_clip", seed=sum(str(example.image).encode()))
        limit = TOKENS["closed" if closed else "report"] if short else 16 if closed else 256
        for name, refs, seen in (
            ("clean", [], None),
            ("clean-references", hits, None),
            ("noise", [], noise),
            ("noise-references", hits, noise),
        ):
            found.setdefault(name, []).append(
                Request(
                    templates.render(trace, refs, None), tuple(example.images), seen, closed, limit
                )
            )
    return found


# --- the rivals -----------------------------------------------------------------------------------


def ours(generator: Any, requests: Sequence[Any]) -> list[str]:
    """What a batch run does: chunk by chunk."""
    said = []
    for start in range(0, len(requests), CHUNK):
        said += [answer.text for answer in generator.generate(requests[start : start + CHUNK])]
    return said


def one_by_one(generator: Any, requests: Sequence[Any]) -> list[str]:
    """As released: one question at a time, its image opened and encoded again."""
    return bare(generator, requests, size=1)


# --- measuring ------------------------------------------------------------------------------------


def forget(generator: Any) -> None:
    for kept in (generator.inputs.features, generator.inputs.prefixes):
        if kept is not None:
            kept.clear()


def seconds(work: Callable[[], Any], generator: Any) -> tuple[float, Any]:
    import torch

    forget(generator)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def in_turn(jobs: dict[str, Callable[[], Any]], generator: Any, rounds: int) -> dict[str, Any]:
    """Median seconds of each job and its last result; one more round first, to warm up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    results = {}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            spent, results[name] = seconds(job, generator)
            if number:
                times[name].append(spent)
    return {"seconds": {n: statistics.median(t) for n, t in times.items()}, "results": results}


def agreement(a: Sequence[str], b: Sequence[str]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def throughput(generator: Any, by_condition: dict[str, list[Any]], rounds: int) -> dict[str, Any]:
    """Questions as they come (several per picture), and every picture once."""
    closed = [r for r in by_condition["clean-references"] if r.closed]
    once = list({r.images: r for r in closed}.values())
    few = once[: max(8, len(once) // 3)]
    found: dict[str, Any] = {}
    for name, rows in (("as_they_come", closed), ("every_picture_once", once)):
        jobs = {
            "ours": lambda r=rows: ours(generator, r),
            "bare": lambda r=rows: bare(generator, r),
        }
        ran = in_turn(jobs, generator, rounds)
        spent = ran["seconds"]
        found[name] = {
            "rows": len(rows),
            "rows_per_second": {job: len(rows) / t for job, t in spent.items()},
            "ratio_to_bare": spent["bare"] / spent["ours"],
            "same_answers": agreement(ran["results"]["ours"], ran["results"]["bare"]),
        }
    part = [r for r in closed if r.images in {f.images for f in few}]
    jobs = {"ours": lambda: ours(generator, closed), "one": lambda: one_by_one(generator, part)}
    ran = in_turn(jobs, generator, max(1, rounds - 1))
    each = {"ours": ran["seconds"]["ours"] / len(closed), "one": ran["seconds"]["one"] / len(part)}
    own = dict(zip(map(id, closed), ran["results"]["ours"], strict=True))
    found["one_by_one"] = {
        "rows": {"ours": len(closed), "one": len(part)},
        "rows_per_second": {name: 1 / t for name, t in each.items()},
        "ratio": each["one"] / each["ours"],
        "same_answers": agreement([own[id(r)] for r in part], ran["results"]["one"]),
    }
    return found


def four_conditions(generator: Any, by_condition: dict[str, list[Any]], rounds: int) -> Any:
    """Chunks of rows under all four conditions in one call, against a pass for each condition."""
    names = list(by_condition)
    count = len(by_condition[names[0]])

    def together() -> list[str]:
        said: list[list[str]] = [[] for _ in names]
        for start in range(0, count, CHUNK):
            part = [by_condition[n][start : start + CHUNK] for n in names]
            answers = generator.generate([r for rows in part for r in rows])
            for k, rows in enumerate(part):
                said[k] += [a.text for a in answers[k * len(rows) : (k + 1) * len(rows)]]
        return [text for row in said for text in row]

    def separate(work: Callable[[Any, Any], list[str]]) -> Callable[[], list[str]]:
        def passes() -> list[str]:
            said = []
            for name in names:
                forget(generator)  # a pass of its own starts with nothing kept
                said += work(generator, by_condition[name])
            return said

        return passes

    jobs = {"together": together, "passes": separate(ours), "bare_passes": separate(bare)}
    ran = in_turn(jobs, generator, rounds)
    work, counter = {}, Work(generator.model)
    for name, job in jobs.items():
        forget(generator)
        counter.take()
        job()
        work[name] = counter.take()
    counter.remove()
    spent = ran["seconds"]
    rivals = ("passes", "bare_passes")
    return {
        "rows": count * len(names),
        "seconds": spent,
        "work": work,
        "ratio": {name: spent[name] / spent["together"] for name in rivals},
        "bound": {name: work[name]["gflop"] / work["together"]["gflop"] for name in rivals},
        "same_answers": agreement(ran["results"]["together"], ran["results"]["bare_passes"]),
    }


def memory(model: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory above the loaded model, for some rows and for four times as many."""
    found = {}
    for times in (1, 4):
        out = subprocess.run(
            [
                sys.executable,
                __file__,
                "--memory",
                str(times),
                "--model",
                str(model),
                "--data",
                str(data),
                *(["--short"] if options.short else []),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        found[times] = json.loads(out.stdout.splitlines()[-1])
    grown = found[4]["peak_mib"] - found[1]["peak_mib"]
    rows = found[4]["rows"] - found[1]["rows"]
    ratio = found[4]["peak_mib"] / found[1]["peak_mib"]
    return {"runs": found, "ratio": ratio, "kib_per_row": 1024 * grown / rows}


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """A batch run's loop over ``--memory`` copies of the data, answers thrown away."""
    import psutil

    from mmedrag.answering.generators import load_generator

    rows = requests_of(options.data, options.short)["clean-references"]
    pictures = {path for r in rows for path in r.images}
    copies: list[dict[Path, Path]] = []
    where = Path(tempfile.mkdtemp())
    for k in range(options.memory):  # every copy has pictures of its own
        (where / str(k)).mkdir()
        copies.append({p: where / str(k) / f"{i}.png" for i, p in enumerate(sorted(pictures))})
        for old, new in copies[-1].items():
            os.link(old, new) if old.stat().st_dev == new.parent.stat().st_dev else (
                new.write_bytes(old.read_bytes())
            )
    limit = 8 << 20  # room for features and prefixes, small enough to be filled here
    generator = load_generator("hf", options.model, cache_bytes=limit)
    ours(generator, rows[:CHUNK])
    base = psutil.Process().memory_info().rss
    peak, done = base, 0
    for copy in copies:
        for start in range(0, len(rows), CHUNK):
            part = [
                replace(r, images=tuple(copy[p] for p in r.images))
                for r in rows[start : start + CHUNK]
            ]
            generator.generate(part)
            done += len(part)
            peak = max(peak, psutil.Process().memory_info().rss)
    return {"rows": done, "base_mib": base / 2**20, "peak_mib": peak / 2**20}


def claims(found: dict[str, Any]) -> list[Claim]:
    """The figures that the comparison is about, each beside its target and bound."""
    speed, four = found["throughput"], found["four_conditions"]
    rows = [
        Claim(
            "ours : bare generate, several questions a picture",
            speed["as_they_come"]["ratio_to_bare"],
            ">=0.95",
        ),
        Claim(
            "ours : bare generate, every picture once",
            speed["every_picture_once"]["ratio_to_bare"],
            ">=0.95",
        ),
        Claim("ours : one by one as released", speed["one_by_one"]["ratio"], ">=5"),
        Claim(
            "four conditions together : four passes of bare generate",
            four["ratio"]["bare_passes"],
            ">=1.6",
            four["bound"]["bare_passes"],
        ),
        Claim(
            "four conditions together : four passes of ours",
            four["ratio"]["passes"],
            None,
            four["bound"]["passes"],
        ),
    ]
    if "memory" in found:
        rows.append(
            Claim("peak memory: four times the rows : the rows", found["memory"]["ratio"], "<=1.05")
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--shape", choices=["embedded", "7b"], default="embedded")
    parser.add_argument("--model", type=Path, help="a trained model's folder instead of a shape")
    parser.add_argument("--random", action="store_true", help="random weights in any case")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(measure_memory(options)))
        return
    from mmedrag.answering.generators import load_generator, random_llava
    from mmedrag.phantom import build_benchmark

    facts = machine()
    if options.model is None and not options.random:
        options.model = trained(options.shape)
    options.short = options.model is None
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        studies = STUDIES[options.shape, options.quick]
        build_benchmark(data, studies=studies, domains=["radiology"], size=128, workers=1)
        by_condition = requests_of(data, options.short)
        model = options.model
        if model is None:
            texts = [r.prompt.text for r in by_condition["clean-references"]]
            model = random_llava(Path(folder) / "model", options.shape, corpus=texts)
        generator = load_generator("hf", model)
        found: dict[str, Any] = {
            "machine": facts,
            "weights": "random" if options.short else "trained",
            "model": generator.facts(),
        }
        name = f"answering-{options.shape}{'-quick' if options.quick else ''}"
        found["throughput"] = throughput(generator, by_condition, options.rounds)
        save(options.out, name, found)
        found["four_conditions"] = four_conditions(generator, by_condition, options.rounds)
        save(options.out, name, found)
        if options.shape == "embedded":
            found["memory"] = memory(Path(model), data, options)
    finish(options.out, name, found, claims(found))


if __name__ == "__main__":
    main()
