"""Regimes of the benchmark: uniform is what it was, the others share what their tables say."""

import hashlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedrag.cli.main import main
from mmedrag.phantom.build import build_benchmark
from mmedrag.phantom.grammar import DOMAINS, load_domain
from mmedrag.phantom.regimes import load_regime
from mmedrag.phantom.sample import studies
from mmedrag.phantom.settings import Knobs
from mmedrag.records import UserError

# of `data phantom` as it was before there were regimes
UNIFORM = "fdf66fc97eefef2fe827ccbf3a683ac28ef5e80d07be0c2625b44198001341be"
ROOT = Path(__file__).parents[2]
STRONG, RELEASED = load_regime("strong"), load_regime("released")


def run(words: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0)


def digest(folder: Path) -> str:
    """Names and bytes of every file but ``benchmark.json``; of pictures the pixels."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name != "benchmark.json":
            found.update(path.relative_to(folder).as_posix().encode() + b"\0")
            drawn = path.suffix == ".png"
            found.update(np.asarray(Image.open(path)).tobytes() if drawn else path.read_bytes())
    return found.hexdigest()


@pytest.mark.parametrize("said", [{}, {"regime": "uniform", "redraw": 0.2, "similarity_of": {}}])
def test_uniform_is_byte_for_byte_what_data_phantom_drew(tmp_path, said):
    build_benchmark(tmp_path, studies=3, seed=5, size=64, twins="image", workers=1, **said)
    assert digest(tmp_path) == UNIFORM


@pytest.mark.parametrize(
    "knob",
    [
        {"regime": "strong"},
        {"similarity_of": {"pathology": {"fat": 0.1}}},
        {"redraw": 0.9},
        {"even": True},
        {"appearance": {"radiology": ["view"]}},
    ],
)
def test_every_new_knob_changes_what_is_drawn_and_is_kept(tmp_path, knob):
    build_benchmark(tmp_path, studies=3, seed=5, size=64, twins="image", workers=1, **knob)
    assert digest(tmp_path) != UNIFORM
    kept = json.loads((tmp_path / "phantom.json").read_text())["knobs"]
    assert all(kept[name] == value for name, value in knob.items())
    build_benchmark(tmp_path, studies=3, seed=5, size=64, twins="image", workers=1, **knob)
    with pytest.raises(UserError, match="another phantom build"):
        build_benchmark(tmp_path, studies=3, seed=5, size=64, twins="image", workers=1)


def test_a_regime_fixes_its_knobs():
    for name in ("released", "strong"):
        knobs = Knobs(regime=name)
        assert knobs.redraw == load_regime(name).redraw and knobs.even
        assert knobs.appearance == load_regime(name).appearance
        assert knobs.similarity_of == load_regime(name).similarity
        assert Knobs(**vars(knobs)) == knobs == replace(knobs, size=128)
        for other in ({"similarity": 0.9}, {"redraw": 0.7}, {"similarity_of": {"pathology": {}}}):
            with pytest.raises(UserError, match=f"{next(iter(other))}: regime {name} fixes it"):
                Knobs(regime=name, **other)


def test_tables_name_every_finding_of_every_domain_and_keep_their_promises():
    for regime in (RELEASED, STRONG):
        for table in (regime.agreement, regime.similarity):
            assert {d: set(row) for d, row in table.items()} == {
                d: set(load_domain(d).by_name) for d in DOMAINS
            }
    for aims in RELEASED.agreement.values():
        assert np.mean(list(aims.values())) == pytest.approx(0.53, abs=0.01)
        assert all(0.50 <= aim <= 0.61 for aim in aims.values())
    first = {d: max(aims, key=aims.get) for d, aims in RELEASED.agreement.items()}
    assert first["radiology"] == "pacemaker"  # a device, as measured on released results
    for aims in STRONG.agreement.values():
        pattern = [aim for aim in aims.values() if aim > 0.7]
        assert len(pattern) >= 5 and all(0.85 <= aim <= 0.92 for aim in pattern)
        assert all(0.50 <= aim <= 0.62 for aim in aims.values() if aim not in pattern)


def mates_agree(name: str, seed: int, knobs: Knobs) -> dict[str, np.ndarray]:
    """Finding -> over all pairs of patients of one phenotype: how many have it, of how many whose
    mate has it, and how many lack it, of how many whose mate lacks it."""
    domain, groups = load_domain(name), {}
    for study in studies(domain, 600, seed, knobs):
        if study.id.endswith("-0"):  # the first visit: nothing was drawn anew
            look = knobs.appearance.get(name, study.attributes)
            phenotype = tuple(study.attributes[key] for key in look)
            groups.setdefault(phenotype, []).append(study.findings)
    found = {}
    for spec in domain.findings:
        counts = np.zeros(4)
        for members in groups.values():
            has = np.array([findings[spec.name].present for findings in members])
            yes, no = has.sum(), (~has).sum()
            counts += (yes * (yes - 1), yes * (len(has) - 1), no * (no - 1), no * (len(has) - 1))
        found[spec.name] = counts
    return found


def balanced(counts: np.ndarray) -> float:
    return float(counts[0] / counts[1] + counts[2] / counts[3]) / 2


@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("regime", ["uniform", "released", "strong"])
def test_mates_agree_as_far_as_the_table_says_in_every_seed(regime, name, seed):
    """Both have a finding from their phenotype with probability s², and are independent else, so
    that they agree in 0.5 + 0.5 s². A finding alone differs by seed, findings of like s less."""
    knobs = Knobs(regime=regime)
    found = mates_agree(name, seed, knobs)
    due = {finding: 0.5 + 0.5 * knobs.similar(name, finding) ** 2 for finding in found}
    for finding, counts in found.items():
        slack = 0.12 if knobs.even else 0.2
        assert balanced(counts) == pytest.approx(due[finding], abs=slack), finding
    for low, high in ((0.5, 0.6), (0.6, 0.8), (0.8, 1.01)):
        group = [finding for finding in found if low <= due[finding] < high]
        if len(group) > 3:
            got = balanced(sum(found[finding] for finding in group))
            assert got == pytest.approx(np.mean([due[f] for f in group]), abs=0.04), group


def test_redraw_is_how_often_a_finding_changes_between_visits():
    def kept(redraw: float) -> float:
        domain, last, same = load_domain("radiology"), None, []
        for study in studies(domain, 400, 3, Knobs(redraw=redraw)):
            if last is not None and last.patient == study.patient:
                same += [study.findings[n] == state for n, state in last.findings.items()]
            last = study
        return float(np.mean(same))

    assert kept(0.0) == 1.0
    assert 0.5 < kept(1.0) < kept(0.5) < kept(0.2) < kept(0.05) < 1.0


def test_command_draws_a_regime_and_says_what_it_aims_at(tmp_path, capsys):
    assert run(["data", "phantom", str(tmp_path), "--studies", "2", "--regime", "strong"]) == 0
    told = json.loads((tmp_path / "benchmark.json").read_text())
    assert told["regime"] == "strong" and "our construction" in told["about"]
    assert told["agreement"] == STRONG.agreement
    measured = told["measured"]
    assert set(measured["agreement"]) == set(DOMAINS) and measured["corpus"] > 0
    for domain, aims in told["agreement"].items():
        for finding, aim in aims.items():
            got = measured["agreement"][domain]["findings"][finding]
            assert got["low"] - 0.03 <= aim <= got["high"] + 0.03 and got["present"] >= 300


def test_where_another_knob_was_turned_nothing_is_claimed(tmp_path):
    few = {"studies": 1, "domains": ["pathology"], "regime": "strong", "workers": 1}
    build_benchmark(tmp_path / "a", contrast=0.9, **few)
    build_benchmark(tmp_path / "b", closed=9, size=64, **few)
    a, b = (json.loads((tmp_path / n / "benchmark.json").read_text()) for n in "ab")
    assert a["agreement"] == a["measured"] == {} and set(b["agreement"]) == {"pathology"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--regime", "weak"], "weak"),
        (["--set", "regime=weak"], "'uniform', 'released' or 'strong'"),
        (["--regime", "strong", "--set", "redraw=0.5"], "regime strong fixes it"),
        (["--set", "redraw=2"], "redraw"),
        (["--set", "similarity_of={radiology={nodule=2}}"], "radiology.nodule: got 2.0"),
        (["--set", "similarity_of={radiology={nodules=1}}"], "no such finding"),
        (["--set", "similarity_of={cardiology={nodule=1}}"], "cardiology"),
        (["--set", "similarity_of=1"], "similarity_of"),
        (["--set", 'appearance={radiology=["hue"]}'], "no attribute 'hue', expected some of view"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys, words, line):
    assert run(["data", "phantom", str(tmp_path / "d"), *words]) != 0
    said = capsys.readouterr().err.strip()
    assert line in said and "Traceback" not in said
    assert not (tmp_path / "d").exists()


def measure(words: list[str]) -> int:
    """bench/regimes.py in this process."""
    path = ROOT / "bench" / "regimes.py"
    spec = importlib.util.spec_from_file_location("bench_regimes", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
        return module.main(words)


def test_the_measuring_command_runs_small_and_says_what_it_does_not_know(tmp_path, capsys):
    """Every regime is drawn, indexed by its own retriever, searched and tabled; so few cases prove
    nothing, which the same command without ``--quick`` refuses to pass over."""
    words = ["--studies", "12", "--work", str(tmp_path / "w"), "--regime", "released"]
    words += ["--out", str(tmp_path)]
    assert measure(["--quick", *words]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("| ")]
    found = json.loads((tmp_path / "regimes.json").read_text())["regimes"]["released"]
    assert len(lines) == 1 + sum(len(found[d]["findings"]) + 1 for d in DOMAINS)
    assert found["pathology"]["cases"] + found["pathology"]["without"] == 12
    assert "| radiology | pacemaker | 0.610 |" in said
    assert measure(["--seed", "5001", *words]) == 1
    assert "radiology, pacemaker: only" in capsys.readouterr().out


def test_a_regimes_retriever_makes_an_index_that_loads_by_itself(tmp_path, capsys):
    build_benchmark(tmp_path / "d", studies=4, domains=["pathology"], regime="released", workers=1)
    told = json.loads((tmp_path / "d" / "benchmark.json").read_text())
    spec, index = told["retriever"]["pathology"], str(tmp_path / "i")
    words = ["--domain", "pathology", "--retriever", spec, "--split", "all", "--out", index]
    assert run(["index", "build", str(tmp_path / "d"), *words]) == 0
    out = tmp_path / "r.jsonl"
    words = ["--index", index, "--out", str(out)]
    assert run(["retrieve", str(tmp_path / "d"), *words]) == 0
    hits = [json.loads(line)["hits"] for line in out.read_text().splitlines()]
    assert hits and all(hits)
    assert run(["index", "info", index]) == 0 and spec in capsys.readouterr().out
