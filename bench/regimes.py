"""How far references agree with the case in each regime of the benchmark, beside the aims.

Draws every regime, builds an index a domain with the regime's retriever, and searches it with every
study's picture (own patient excluded; no model has seen these seeds). Agreement is that of
``retriever eval``: per finding the mean of sensitivity and specificity of the top-1 reference, over
presence and negated questions, with a 95 % interval by patient, beside another case's reference.

    python bench/regimes.py [--regime NAME ...] [--seed S ...] [--studies N] [--quick]
                            [--work build/regimes] [--out bench/results] [--ship]

It fails where an aim is missed: the mean by more than 0.02, a finding's interval by more than 0.03,
or with fewer than 300 cases that have the finding (``--quick`` only shows). Work resumes by itself.
``--ship`` also writes what ``data phantom`` puts into ``benchmark.json``.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
from common import machine, save  # noqa: E402

SEEDS = (5201, 5202, 5203, 5204, 5205, 5206)  # nothing was trained or fitted on them
STUDIES = 600  # of each seed and domain, of which 60 % can be found
QUESTIONS = 24  # closed ones of a study: nearly every finding is asked about
BEGIN, END = "<!-- bench/regimes.py --ship -->", "<!-- end -->"
MEAN, FINDING, PRESENT = 0.02, 0.03, 300  # how near the aims it must be, on how many cases


def cases_of(regime: str, path: Path, domain: str) -> tuple[list[Any], int]:
    """What the top-1 reference says of every study of a domain, and the size of the corpus."""
    from mmedrag.evaluation import Case, asked_cells, stated, true_of
    from mmedrag.phantom import regime_retriever
    from mmedrag.retrieval import build_index, open_retriever
    from mmedrag.runtime import DataFolder

    data, index = DataFolder(path), path.with_name(f"{path.name}-{domain}")
    if not (index / "manifest.json").exists():
        build_index([data], index, domain, regime_retriever(regime, domain))
    rows = {str(e.meta["study"]): e for e in data.examples() if e.domain == domain}
    hits, _ = open_retriever(index).search(list(rows.values()), 1)
    asked, truth = asked_cells(data.examples()), data.truth()
    cases = [
        Case(
            row.patient,
            true_of(domain, truth[study].findings, asked.get(study, ())),
            stated(domain, found[0].text) if found else None,
        )
        for (study, row), found in zip(rows.items(), hits, strict=True)
    ]
    return cases, len(data.corpus("train", domain))


def measure(
    regime: str, seeds: Sequence[int], studies: int, work: Path, resamples: int
) -> dict[str, Any]:
    """domain -> agreement of all seeds together: ``mean`` and per finding."""
    from mmedrag.evaluation import agreement
    from mmedrag.phantom import DOMAINS, build_benchmark

    folders = [work / f"{regime}-{studies}-{seed}" for seed in seeds]
    for seed, path in zip(seeds, folders, strict=True):
        build_benchmark(path, studies=studies, seed=seed, regime=regime, closed=QUESTIONS, open=0)
    found = {}
    for domain in DOMAINS:
        parts = [cases_of(regime, path, domain) for path in folders]
        corpus = round(sum(size for _, size in parts) / len(parts))
        cases = [case for some, _ in parts for case in some]
        found[domain] = asdict(agreement(cases, corpus, resamples=resamples))
    return found


def fault_of(name: str, aim: float, got: dict[str, Any]) -> str:
    """In what the mean or a finding misses its aim; "" where it does not."""
    if name == "mean":
        return "" if math.isclose(got["value"], aim, abs_tol=MEAN) else "off its aim"
    if got["present"] < PRESENT:
        return f"only {got['present']} present"
    near = got["low"] - FINDING <= aim <= got["high"] + FINDING
    return "" if near else "off its aim"


def table(regime: str, found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Lines of a Markdown table, and what misses its aim. ``uniform`` aims at nothing."""
    from mmedrag.phantom import load_regime

    spec, faults = load_regime(regime), []
    lines = [f"`{regime}`: {spec.about}.", ""]
    lines += ["| domain | finding | aim | agreement | 95 % interval | present | shuffled |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for domain, got in found.items():
        aims = dict(spec.agreement.get(domain, {}))
        if aims:
            aims["mean"] = sum(aims.values()) / len(aims)
        for name, cell in {**got["findings"], "mean": got["mean"]}.items():
            aim, fault = aims.get(name), ""
            if cell["value"] is None:
                fault = "nothing measured"
            elif aim is not None:
                fault = fault_of(name, aim, cell)
            faults += [f"{regime}, {domain}, {name}: {fault}"] if fault else []
            value, low, high = (_shown(cell[key]) for key in ("value", "low", "high"))
            lines.append(
                f"| {domain} | {name} | {_shown(aim)} | {value} | {low} to {high} "
                f"| {cell['present']} | {_shown(cell['shuffled']['value'])} |"
            )
    return lines, faults


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def ship(found: dict[str, Any]) -> None:
    """What was measured, into the package (for ``benchmark.json``) and into docs/benchmark.md."""
    from mmedrag.runtime import write_json, write_text

    about = {key: found[key] for key in ("command", "commit", "seeds", "studies")}
    regimes, pages = {}, []
    for name, got in found["regimes"].items():
        corpus = {part["corpus"] for part in got.values()}
        regimes[name] = {**about, "corpus": max(corpus), "agreement": got}
        pages += table(name, got)[0] + [""]
    write_json(ROOT / "src" / "mmedrag" / "phantom" / "regimes.json", {"regimes": regimes})
    page = ROOT / "docs" / "benchmark.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    said = (
        f"`{found['command']}` at {found['commit']}, seeds {', '.join(map(str, found['seeds']))}, "
        f"{found['studies']} studies of each seed and domain, of which 60 % can be found:"
    )
    write_text(page, before + "\n".join([BEGIN, said, "", *pages]) + END + after)


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--regime", action="append", choices=["uniform", "released", "strong"])
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--quick", action="store_true", help="one seed, few studies, no verdict")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "regimes")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--ship", action="store_true")
    options = parser.parse_args(given)
    seeds = options.seed or (SEEDS[:1] if options.quick else list(SEEDS))
    studies = min(options.studies, 40) if options.quick else options.studies
    found: dict[str, Any] = {"machine": machine(), "commit": commit(), "regimes": {}}
    found |= {"command": "python bench/regimes.py", "seeds": seeds, "studies": studies}
    faults: list[str] = []
    for regime in options.regime or ["uniform", "released", "strong"]:
        got = measure(regime, seeds, studies, options.work, 200 if options.quick else 2000)
        found["regimes"][regime] = got
        lines, missing = table(regime, got)
        faults += missing
        print("\n".join(lines), end="\n\n", flush=True)
        save(options.out, "regimes", found)
    save(options.out, "regimes", found, complete=True)
    if options.ship:
        ship(found)
    print("\n".join(faults) or "every aim is met")
    return int(bool(faults) and not options.quick)


if __name__ == "__main__":
    sys.exit(main())
