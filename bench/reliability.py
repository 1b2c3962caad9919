"""The service under load, abuse and stop: no answer lost or mixed, every bad upload refused.

One process serves over a real socket while clients in the same process ask: both share the
machine, so throughput is a floor. Batching is compared with one question at a time, in turns.
While no answering model is embedded, a random one of the same shape answers.

    python bench/reliability.py [--quick | --full] [--out bench/results] [--docs PAGE] [--note TEXT]

--full: five minutes of load and 5,000 uploads. --docs also writes the figures into that page,
with --note beside the machine: what else ran there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import httpx  # noqa: E402

from mmedrag.serve import ServeSettings, create_app  # noqa: E402
from serve_hostile import attack  # noqa: E402
from serve_tools import (  # noqa: E402
    Live,
    Load,
    echo,
    encoded,
    live,
    load,
    make_pipeline,
    phantom_cases,
    picture,
    same_as_alone,
    shipped_pipeline,
)

CLIENTS = 50
SIZES = {  # seconds of load, seconds a turn of the batching comparison, hostile uploads
    "quick": (10, 4, 100),
    "default": (60, 10, 500),
    "full": (300, 20, 5000),
}
MARKS = ("<!-- figures -->", "<!-- end of figures -->")


@contextmanager
def serving(pipeline: Any, **settings: Any) -> Iterator[Live]:
    chosen = ServeSettings(**{"port": 0, "rate": 0, **settings})
    with live(create_app(pipeline, chosen), chosen) as server:
        yield server


def summary(found: Load, seconds: float) -> dict[str, Any]:
    batches = sum(found.batches.values())
    return {
        "clients": CLIENTS,
        "seconds": seconds,
        "answered": found.answered,
        "lost": len(found.lost),
        "mixed": len(found.mixed),
        "told_to_wait": found.waited,
        "seconds_p50": round(found.quantile(0.5), 3),
        "seconds_p95": round(found.quantile(0.95), 3),
        "batch_mean": round(sum(n * c for n, c in found.batches.items()) / max(1, batches), 1),
    }


def model_load(pipeline: Any, cases: Any, seconds: float) -> dict[str, Any]:
    with serving(pipeline) as server:
        expect, alone = same_as_alone(server.url, cases)
        found = load(server.url, seconds, CLIENTS, expect, cases)
    return {**summary(found, seconds), "cases": len(cases), "distinct": len(set(alone.values()))}


def batching(pipeline: Any, cases: Any, seconds: float, rounds: int = 3) -> dict[str, Any]:
    """Answers a second with up to 16 questions together, against one at a time, in turns."""
    rates: dict[int, list[float]] = {16: [], 1: []}
    for _ in range(rounds):
        for size, seen in rates.items():
            with serving(pipeline, batch=size) as server:
                start = time.perf_counter()
                found = load(server.url, seconds, 32, lambda *_: True, cases)
                seen.append(found.answered / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(rates[16], rates[1], strict=True)]
    return {
        "per_second_together": round(statistics.median(rates[16]), 2),
        "per_second_alone": round(statistics.median(rates[1]), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(r, 2) for r in ratios],
    }


def overload(seconds: float) -> dict[str, Any]:
    """50 clients, 8 places, a model that takes 20 ms: refused clients come back and are served."""

    def slow(request: Any) -> str:
        time.sleep(0.02)
        return echo(request)

    with serving(make_pipeline(slow), max_waiting=8) as server:
        return summary(load(server.url, seconds), seconds)


def uploads(count: int) -> dict[str, Any]:
    with serving(make_pipeline()) as server:
        found = attack(server.url, count, seed=2)
        replaced = server.app.state.decoders.replaced
    return {
        "sent": count,
        "refused": {str(status): n for status, n in sorted(found.refused.items())},
        "still_readable": len(found.answered),
        "answered_though_unreadable": len(found.swallowed),
        "refused_though_readable": len(found.strict),
        "server_errors_or_hangs": len(found.broken),
        "slowest_seconds": round(found.slowest, 2),
        "decoders_replaced": replaced,
    }


def stop(requests: int = 8) -> dict[str, Any]:
    """How many of the running requests a stop still answers, and how long it takes."""

    def slow(request: Any) -> str:
        time.sleep(0.25)
        return echo(request)

    with serving(make_pipeline(slow), batch=2) as server:
        statuses: list[int] = []

        def ask() -> None:
            answer = httpx.post(
                server.url + "/v1/ask",
                files={"image": ("a.png", encoded(picture(5)))},
                data={"question": "Is it so?"},
                timeout=60,
            )
            statuses.append(answer.status_code)

        threads = [threading.Thread(target=ask) for _ in range(requests)]
        for thread in threads:
            thread.start()
        while server.app.state.engine.batcher.depth < requests:
            time.sleep(0.01)
        start = time.perf_counter()
        server.stop()
        seconds = time.perf_counter() - start
        for thread in threads:
            thread.join(60)
    return {"running": requests, "answered": statuses.count(200), "seconds": round(seconds, 2)}


def machine() -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def seconds_of_processor() -> float:
    """What this process and its ended children have used."""
    return sum(os.times()[:4])


def page(found: dict[str, Any]) -> str:
    """The figures in Markdown."""
    facts, loaded, upload = found["machine"], found["load"], found["uploads"]
    together, over, stopped = found["batching"], found["overload"], found["stop"]
    refused = ", ".join(f"{n} × {status}" for status, n in upload["refused"].items())

    def counts(row: dict[str, Any]) -> str:
        return f"{row['answered']:,} answered, {row['lost']} lost, {row['mixed']} mixed"

    rows = [
        (
            f"{loaded['clients']} clients on the model, {loaded['seconds']:g} s, "
            f"{loaded['cases']} questions with {loaded['distinct']} different p(yes)",
            f"{counts(loaded)}; seconds to the answer: median "
            f"{loaded['seconds_p50']}, 95 % under {loaded['seconds_p95']}",
        ),
        (
            "batches of up to 16 against one question at a time",
            f"{together['ratio']}× as many answers (rounds: "
            f"{', '.join(map(str, together['ratios']))})",
        ),
        (
            f"{over['clients']} clients, 8 places, {over['seconds']:g} s",
            f"{counts(over)}; {over['told_to_wait']:,} times 429, all of them came back",
        ),
        (
            f"{upload['sent']:,} mutated uploads",
            f"{refused}; {upload['still_readable']} × 200 that Pillow or pydicom reads whole too; "
            f"{upload['answered_though_unreadable']} answered though not readable, "
            f"{upload['refused_though_readable']} refused though readable; "
            f"{upload['server_errors_or_hangs']} server errors or hangs; slowest "
            f"{upload['slowest_seconds']} s; {upload['decoders_replaced']} decoders replaced",
        ),
        (
            f"stop with {stopped['running']} requests inside",
            f"{stopped['answered']} answered, stopped after {stopped['seconds']} s",
        ),
    ]
    return "\n".join(
        [
            f"Model: {found['model']}. {facts['cpu']}, {facts['cores']} cores, "
            f"{facts['threads']} threads, load {facts['load_at_start']} at the start, "
            f"torch {facts['torch']}; service and clients on the same machine, where they got "
            f"{facts['processors']} of a processor"
            + (f" ({facts['note']})." if facts["note"] else "."),
            "",
            "| what | found |",
            "|---|---|",
            *(f"| {what} | {said} |" for what, said in rows),
        ]
    )


def write_page(path: Path, found: dict[str, Any]) -> None:
    """Put the figures between the marks of the page."""
    text = path.read_text(encoding="utf-8")
    block = f"{MARKS[0]}\n{page(found)}\n{MARKS[1]}"
    made, count = re.subn(
        re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1]), lambda _: block, text, flags=re.DOTALL
    )
    if count != 1:
        sys.exit(f"{path}: expected the marks {MARKS[0]} and {MARKS[1]} once")
    path.write_text(made, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const="quick", dest="size")
    size.add_argument("--full", action="store_const", const="full", dest="size")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--docs", type=Path, help="a page with marks, to write the figures into")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    options = parser.parse_args()
    chosen = options.size or "default"
    seconds, turn, count = SIZES[chosen]
    facts = {**machine(), "note": options.note}
    begun, used = time.perf_counter(), seconds_of_processor()
    with tempfile.TemporaryDirectory() as folder:
        pipeline, name = shipped_pipeline(Path(folder))
        cases = phantom_cases(Path(folder) / "data", 24)
        found = {
            "machine": facts,
            "model": name,
            "load": model_load(pipeline, cases, seconds),
            "batching": batching(pipeline, cases, turn),
            "overload": overload(turn),
            "uploads": uploads(count),
            "stop": stop(),
        }
    share = (seconds_of_processor() - used) / (time.perf_counter() - begun)
    facts["processors"] = round(share, 2)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"reliability{'' if chosen == 'default' else '-' + chosen}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    if options.docs:
        write_page(options.docs, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
