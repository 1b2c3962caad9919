"""The ablation: rows differ by constructor arguments, finished rows stand, chance is chance."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmedrag.cli.main import main
from mmedrag.evaluation.evaluate_runs import evaluate
from mmedrag.experiments.ablation import AGAINST, OWN, PAIRWISE, SETS, Parts, rows, run_rows, sample
from mmedrag.experiments.demo import Ablation, headline
from mmedrag.phantom.build import build_benchmark
from mmedrag.records.records import Answer, Hit, Trace, UserError
from mmedrag.retrieval.select import RuleSpec
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import read_jsonl


class Reader:
    """Says yes to everything it is shown references for, and counts its calls."""

    name, image_size, context = "reader", 64, 4096

    def __init__(self):
        self.calls = 0

    def generate(self, requests):
        self.calls += 1
        return [
            Answer(text="yes" if r.prompt.references else "no", p_yes=0.5, model=self.name)
            for r in requests
        ]

    def logprobs(self, requests, texts):
        return [0.0 for _ in requests]

    def count_tokens(self, prompt, images=1):
        return len(prompt.text.split())


class Shelf:
    """Two reports for everyone; the second far below the first."""

    def __init__(self, name):
        self.name = name

    def search(self, examples, k):
        hits = [
            Hit(id=f"{self.name}-{i}", text="No nodules.", score=s, rank=i)
            for i, s in enumerate((0.9, 0.3))
        ]
        return [hits[:k] for _ in examples], [0 for _ in examples]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation") / "data"
    build_benchmark(folder, studies=40, seed=5, twins="image", size=32, workers=1)
    return DataFolder(folder)


def parts(reader):
    shelves = {d: Shelf(d) for d in ("radiology", "ophthalmology", "pathology")}
    return Parts(
        domain=None,
        domain_retrievers=shelves,
        generic=Shelf("generic"),
        generator=lambda adapter, beams: reader,
        rule=RuleSpec("log_ratio", gamma=0.1),
    )


def adapters(folder, *names):
    """Folders that look like adapters; the generators of these tests do not open them."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text("{}")
    return {name: str(folder / name) for name in names}


def test_every_row_is_listed_and_says_what_it_lacks(tmp_path):
    made = parts(Reader())
    table = rows(made, adapters(tmp_path, "copy", "copy+resist", "mine", "all"))
    steps = ["base", "beam", "naive", "domain", "selection"]
    tuned = [f"pt-{name}" for name in (*SETS, *PAIRWISE, "mine", "all")]
    assert [r.name for r in table] == steps + tuned
    assert {r.name for r in table if r.lacks} == {
        "pt-cross_modal",
        "pt-resist",
        "pt-cross_modal+copy",
        "pt-cross_modal+resist",
    }
    titles = {r.name: r.title for r in table}
    assert titles["pt-cross_modal"] == "+ RAG-PT, cross-modal only"
    assert titles["pt-copy+resist"] == "+ RAG-PT, copy and resist"

    def lacking(other, **chosen):
        return {r.name: r.lacks for r in rows(other, chosen) if r.lacks}

    bare = replace(made, generic=None, domain_retrievers={}, beams=1, adapts=False)
    found = lacking(bare, all=str(tmp_path / "all"))
    assert set(found) == {r.name for r in table} - {"base", "pt-mine"}
    assert found["naive"] == "no index over all domains"
    assert found["beam"] == "this generator has no beam search"
    gone = lacking(made, all=str(tmp_path / "nowhere"), copy="embedded:adapter-nothing")
    assert gone["pt-all"].endswith("nowhere: no adapter (adapter_config.json) in it")
    assert gone["pt-copy"] == "embedded:adapter-nothing is not in this installation"


def test_rows_run_stand_and_differ_as_stated(data, tmp_path):
    reader = Reader()
    made = parts(reader)
    table = rows(made, adapters(tmp_path, "copy", "all"), pairwise=False)
    examples = sample(data, 2)
    folders = run_rows(table, made, data, examples, tmp_path)
    calls = reader.calls
    assert calls > 0 and not (tmp_path / "runs" / "pt-resist").exists()
    before = [(f / "traces.jsonl").read_bytes() for f in folders]
    assert run_rows(table, made, data, examples, tmp_path) == folders
    assert reader.calls == calls, "finished rows were run again"
    assert [(f / "traces.jsonl").read_bytes() for f in folders] == before

    def traces(row, condition):
        return list(read_jsonl(tmp_path / "runs" / row / condition / "traces.jsonl", Trace))

    assert all(not t.prompt.references for t in traces("base", "none"))
    assert all(t.hits[0].id == "generic-0" for t in traces("naive", "references"))
    assert all(len(t.prompt.references) == 2 for t in traces("naive", "references"))
    selected = traces("selection", "references")
    assert all(t.hits[0].id.startswith(t.domain.label) for t in selected)
    assert all(len(t.prompt.references) == 1 for t in selected)
    assert all(t.condition.noise for t in traces("pt-all", "noise-references"))
    assert {t.condition.noise.kind for t in traces("base", "blank-none")} == {"blank"}
    # image twins are asked where image sensitivity is measured, and nowhere else
    for condition in ("none", "references"):
        assert any(t.meta.get("twin_of") for t in traces("pt-copy", condition))
    assert not any(t.meta.get("twin_of") for t in traces("pt-copy", "shuffled"))


def test_other_weights_do_not_stand_as_the_finished_row(data, tmp_path):
    made = parts(Reader())
    table = rows(made, adapters(tmp_path, "all"))[-1:]
    run_rows(table, made, data, sample(data, 1), tmp_path)
    (tmp_path / "all" / "adapter_config.json").write_text('{"r": 8}')
    with pytest.raises(UserError, match="was begun with other inputs"):
        run_rows(table, made, data, sample(data, 1), tmp_path)


def test_all_controls_stand_beside_every_score(data, tmp_path):
    made = parts(Reader())
    table = rows(made, adapters(tmp_path, "all"), pairwise=False)
    folders = run_rows(table, made, data, sample(data, 3), tmp_path)
    result = evaluate(folders, data, resamples=100)
    always = {"constant", "random_reference"}
    images = {"generator_blank", "generator_noise", "system_blank"}
    hits = {"copied_reference", "shuffled_references"}
    names = set(result.runs)
    assert {"base/none", "beam/none", "naive/references", "pt-all/none"} <= names
    for name, run in result.runs.items():
        wanted = always | (images if run.plain else set())
        if run.plain and name.endswith("references"):
            wanted |= hits | {"run_shuffled", "run_random"}
        for task, groups in run.tasks.items():
            for group in groups.values():
                assert wanted <= set(group.controls), (name, task)
                assert task != "vqa_closed" or {"always_yes", "always_no", "question_prior"} <= set(
                    group.controls
                )


def test_without_exact_findings_no_row_asks_for_them(tmp_path):
    made = parts(Reader())
    table = rows(made, adapters(tmp_path, "all"), truth=False)
    assert not any(set(r.plans) & {*AGAINST, *OWN} for r in table)


def test_always_the_same_answer_is_chance_and_is_marked(data, tmp_path):
    reader = Reader()
    made = parts(reader)
    folders = run_rows(rows(made, {})[:1], made, data, sample(data, 6), tmp_path)
    result = evaluate(folders, data, resamples=200, not_run={"+ RAG-PT": "no such adapter"})
    closed = result.runs["none"].scores("vqa_closed")
    assert closed.metrics["balanced_accuracy"].value == pytest.approx(0.5)
    assert "balanced_accuracy" in closed.marked or "accuracy" in closed.marked
    assert result.not_computed["+ RAG-PT"] == "no such adapter"
    text = headline(Ablation(result, Path("page"), 1, {"+ RAG-PT": "why"}))
    assert "0.500" in text and "*" in text and "not run: why" in text


def test_sample_takes_as_many_patients_as_studies_where_it_can(data):
    chosen = sample(data, 3)
    studies, patients = {}, {}
    for example in chosen:
        assert example.split == "test"
        study = example.meta["study"].split("-twin-")[0]
        studies.setdefault(example.domain, set()).add(study)
        patients.setdefault(example.domain, set()).add(example.patient)
    everyone = {}
    for example in data.examples("test"):
        everyone.setdefault(example.domain, set()).add(example.patient)
    assert {len(found) for found in studies.values()} == {3}
    assert {d: len(p) for d, p in patients.items()} == {
        d: min(3, len(p)) for d, p in everyone.items()
    }
    assert any(e.meta.get("twin_of") for e in chosen)
    assert sample(data) == data.examples("test")


THEIRS = '''
"""A third party's encoder and generator."""
import numpy as np
from mmedrag.images import load_image
from mmedrag.records import Answer

class Grid:
    dim, fingerprint, spec = 48, "grid-1", "their_parts:Grid"

    def __init__(self, spec, device=None):
        self.spec = spec

    def images(self, images):
        rows = [(i if hasattr(i, "resize") else load_image(i)).convert("RGB").resize((4, 4))
                for i in images]
        rows = np.array([np.asarray(r, np.float32).ravel() - 126.5 for r in rows])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def texts(self, texts):
        return np.ones((len(texts), self.dim), np.float32) / self.dim**0.5

class Teller:
    """Says what its adapter is called."""
    image_size, context = 32, 4096

    def __init__(self, model=None, adapter=None, **options):
        self.name = "teller" + (f"+{adapter}" if adapter else "")

    def with_adapter(self, adapter):
        return Teller(adapter=adapter.rpartition("/")[2])

    def generate(self, requests):
        return [Answer(text="yes" if self.name.endswith("all") else "no", model=self.name)
                for _ in requests]

    def logprobs(self, requests, texts):
        return [0.0] * len(texts)

    def count_tokens(self, prompt, images=1):
        return len(prompt.text.split())
'''


def call(capsys, *words, code=0):
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main([str(w) for w in words])
    shown = capsys.readouterr()
    assert done.value.code == code, shown.err
    return shown.out if code == 0 else shown.err


def test_the_command_runs_a_system_of_one_s_own(data, tmp_path, capsys, monkeypatch):
    (tmp_path / "their_parts.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("radiology", "pathology", None):
        call(
            capsys,
            "index",
            "build",
            data.path,
            *(("--domain", name) if name else ()),
            "--retriever",
            "their_parts:Grid",
            "--out",
            tmp_path / f"index-{name}",
        )
    each = adapters(tmp_path, "all", "copy-r", "copy-p")
    (tmp_path / "system.toml").write_text(
        '[domain]\nlabel = "radiology"\n[domains.radiology]\nindex = "index-radiology"\n'
        'retriever = "their_parts:Grid"\n'
        '[domains.pathology]\nindex = "index-pathology"\nretriever = "their_parts:Grid"\n'
        f'[generator]\nkind = "their_parts:Teller"\nadapter = "{each["all"]}"\n'
    )
    (tmp_path / "recipe.toml").write_text(
        f'[ablation]\ngeneric = "{tmp_path / "index-None"}"\n'
        'generic_retriever = "their_parts:Grid"\n'
        "pairwise = false\nk = 2\n"
        f'[ablation.adapters]\nresist = "{tmp_path / "nowhere"}"\n'
        f'copy = {{ radiology = "{each["copy-r"]}", pathology = "{each["copy-p"]}" }}\n'
    )
    words = (
        "ablation",
        data.path,
        "--system",
        tmp_path / "system.toml",
        "--out",
        tmp_path / "out",
        "--config",
        tmp_path / "recipe.toml",
        "--studies",
        2,
    )
    said = json.loads(call(capsys, *words, "--json"))
    assert set(said["not_run"]) == {
        "base model, beam search",
        "+ RAG-PT, cross-modal only",
        "+ RAG-PT, resist only",
    }
    assert said["failed"] == 0 and Path(said["report"]).is_file()
    page = Path(said["report"]).read_text()
    assert "no adapter (adapter_config.json) in it" in page and "+ RAG-PT (full method)" in page

    def traces(row, condition="references"):
        path = tmp_path / "out" / "runs" / row / condition / "traces.jsonl"
        return list(read_jsonl(path, Trace))

    assert {t.answer.model for t in traces("selection")} == {"teller"}  # without the adapter
    assert {t.answer.model for t in traces("pt-all")} == {"teller+all"}
    assert {t.answer.model for t in traces("pt-copy")} == {"teller+copy-r"}  # of its domain
    domains = {row.domain for row in data.corpus("train")}
    own = {row.id: row.domain for row in data.corpus()}
    assert {own[h.id] for t in traces("domain") for h in t.hits} == {"radiology"}
    assert {own[h.id] for t in traces("naive") for h in t.hits} <= domains
    assert all(len(t.hits) <= 2 for t in traces("naive"))
    before = Path(said["report"]).stat().st_mtime_ns, traces("pt-all")
    assert "not run: " in call(capsys, *words)  # again: finished rows stand
    assert traces("pt-all") == before[1]
    error = call(capsys, *words, "--set", "ablation.ks=3", code=2)
    assert "[ablation]: unknown key" in error


def test_a_folder_without_the_asked_split_is_refused(data, tmp_path, capsys, monkeypatch):
    (tmp_path / "their_parts.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("their_parts", None)
    error = call(
        capsys,
        "ablation",
        data.path,
        "--out",
        tmp_path / "out",
        "--split",
        "final",
        "--domain",
        "radiology",
        "--set",
        "generator.kind=their_parts:Teller",
        "--model",
        "x",
        code=2,
    )
    assert error.strip().splitlines()[-1].startswith(f"error: {data.path}: no example")
