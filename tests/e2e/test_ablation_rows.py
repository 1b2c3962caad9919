"""The ablation: rows differ by constructor arguments, finished rows stand, chance is chance."""

from __future__ import annotations

import pytest

from mmedrag.ablation import Parts, headline, rows, run_rows, sample
from mmedrag.evaluate import evaluate
from mmedrag.phantom.build import build
from mmedrag.select import RuleSpec
from mmedrag.types import Answer, DataFolder, Hit, Trace, read_jsonl


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
    build(folder, studies=40, seed=5, twins="image", size=32, workers=1)
    return DataFolder(folder)


def parts(reader):
    shelves = {d: Shelf(d) for d in ("radiology", "ophthalmology", "pathology")}
    return Parts(
        domain=None, domain_retrievers=shelves, generic=Shelf("generic"),
        generator=lambda adapter, beams: reader, rule=RuleSpec("log_ratio", gamma=0.1),
    )  # fmt: skip


def test_rows_run_stand_and_differ_as_stated(data, tmp_path):
    reader = Reader()
    made = parts(reader)
    table = rows(made, {"copy": "adapters/copy", "all": "adapters/all"})
    names = ["base", "beam", "naive", "domain", "selection", "pt-copy", "pt-all"]
    assert [r.name for r in table] == names
    examples = sample(data, 2)
    folders = run_rows(table, made, data, examples, tmp_path)
    calls = reader.calls
    assert calls > 0
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


def test_always_the_same_answer_is_chance_and_is_marked(data, tmp_path):
    reader = Reader()
    made = parts(reader)
    folders = run_rows(rows(made, {})[:1], made, data, sample(data, 6), tmp_path)
    result = evaluate(folders, data, resamples=200)
    closed = result["runs"]["none"]["tasks"]["vqa_closed"]["overall"]
    assert closed["metrics"]["balanced_accuracy"]["value"] == pytest.approx(0.5)
    assert "balanced_accuracy" in closed["marked"] or "accuracy" in closed["marked"]
    text = headline({**result, "examples": 1, "report": "page"})
    assert "0.500" in text and "*" in text


def test_sample_takes_the_first_studies_of_every_domain(data):
    chosen = sample(data, 2)
    studies = {}
    for example in chosen:
        assert example.split == "test"
        study = example.meta["study"].split("-twin-")[0]
        studies.setdefault(example.domain, set()).add(study)
    assert {len(found) for found in studies.values()} == {2}
    assert any(e.meta.get("twin_of") for e in chosen)
