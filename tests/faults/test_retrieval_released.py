"""``retrieve --format released`` against the released procedure, written again from its
description on the bare library: row by row the same references, except where that is at fault
(B1: list-valued image fields mixed between rows; B6: negative similarities; B7: k = 0).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.pipeline.retrieve import retrieve_examples
from mmedrag.records.records import Example
from mmedrag.retrieval.index_build import build_index
from mmedrag.retrieval.search import open_retriever
from mmedrag.retrieval.select import RuleSpec
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import write_jsonl
from retrieval_tools import make_data, tiny_open_clip

pytestmark = pytest.mark.model


class Released:
    """Both towers over everything, all logits, one sort per row, ratio to the best, then a cap."""

    def __init__(self, folder: Path) -> None:
        import open_clip

        name = f"local-dir:{folder}"
        self.model, _, self.transform = open_clip.create_model_and_transforms(name)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.model.eval()

    @torch.no_grad()
    def logits(self, images: list[Path], texts: list[str]) -> torch.Tensor:
        pixels = torch.stack([self.transform(Image.open(p).convert("RGB")) for p in images])
        tokens = self.tokenizer(texts, context_length=32)
        v = self.model.encode_image(pixels, normalize=True)
        t = self.model.encode_text(tokens, normalize=True)
        return self.model.logit_scale.exp() * v @ t.T

    @staticmethod
    def choose(
        row: torch.Tensor, texts: list[str], threshold: float, k: int
    ) -> tuple[list[str], bool]:
        """The references, and whether a similarity that is not positive is among them."""
        values, order = row.sort(descending=True)
        kept = [j for j in range(len(values)) if values[0] / values[j] < threshold][:k]
        return [texts[int(order[j])] for j in kept], any(values[j] <= 0 for j in kept)


MODEL: list[Path] = []  # an index names no folder outside of itself: it is given again


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    MODEL[:] = [tiny_open_clip(tmp_path_factory.mktemp("model") / "m")]
    return MODEL[0]


@pytest.fixture(scope="module")
def place(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DataFolder]]:
    """60 references, some too long for the context, and 25 questions over 12 images."""
    base = tmp_path_factory.mktemp("released")
    corpus = make_data(base / "train", 60)
    rows = corpus.corpus()
    for row in rows[::7]:
        row.text = " ".join([row.text] * 12)  # beyond 32 tokens: released cuts it
    write_jsonl(corpus.path / "corpus.jsonl", rows)
    test = make_data(base / "test", 12, seed=9, split="test", first=200)
    asked = [e.model_copy(update={"id": f"{e.id}-{n}"}) for e in test.examples() for n in range(2)]
    asked.append(test.examples()[0].model_copy(update={"id": "last"}))
    write_jsonl(test.path / "examples.jsonl", asked)
    build_index([corpus], base / "index", "radiology", str(model), long_text="truncate")
    return base / "index", [corpus, test]


def _of(texts: list[str], chosen: torch.Tensor) -> list[str]:
    return [text for text, keep in zip(texts, chosen.tolist(), strict=True) if keep]


def ours(
    index: Path, examples: list[Example], out: Path, threshold: float, k: int
) -> list[dict[str, Any]]:
    rule = RuleSpec("top1_ratio", threshold=threshold, k=k)
    retriever = open_retriever(index, str(MODEL[0]), views="first")
    pipeline = Pipeline("radiology", {"radiology": retriever}, rule, k=max(k, 60))
    retrieve_examples(pipeline, examples, out, "released")
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize(("threshold", "k"), [(1.5, 1), (1.5, 5), (1.05, 60), (3.0, 60)])
def test_row_by_row(
    threshold: float, k: int, place: tuple[Path, list[DataFolder]], model: Path, tmp_path: Path
) -> None:
    index, (corpus, test) = place
    examples, texts = test.examples(), [r.text for r in corpus.corpus()]
    released = Released(model)
    logits = released.logits([e.images[0] for e in examples], texts)
    rows = ours(index, examples, tmp_path / "out.jsonl", threshold, k)
    assert len(rows) == len(examples) == 25
    equal = faulty = 0
    for example, row, line in zip(examples, rows, logits, strict=True):
        expected, faulty_row = released.choose(line, texts, threshold, k)
        assert row["question_id"] == example.id and row["image"] == example.image
        assert row["retrieve_k"] == len(row["reference_reports"])
        if not faulty_row:
            assert row["reference_reports"] == expected
            equal += 1
        else:  # B6: it keeps negative similarities; ours keeps the others, in the same order
            sound, _ = released.choose(line[line > 0], _of(texts, line > 0), threshold, k)
            assert row["reference_reports"] == sound != expected
            faulty += 1
    assert equal + faulty == 25
    assert equal == 25 if k == 1 else faulty > 0


def test_ratio_does_cut_somewhere(
    place: tuple[Path, list[DataFolder]], model: Path, tmp_path: Path
) -> None:
    """The comparison above is worth something: rows keep different numbers of references."""
    index, (_, test) = place
    rows = ours(index, test.examples(), tmp_path / "out.jsonl", 3.0, 60)
    counts = {row["retrieve_k"] for row in rows}
    assert len(counts) > 1 and max(counts) < 60


def test_b1_a_row_keeps_its_own_images(
    place: tuple[Path, list[DataFolder]], model: Path, tmp_path: Path
) -> None:
    """Rows with a list of one path: the released collation gave every row the batch's list."""
    index, (corpus, test) = place
    listed = [e.model_copy(update={"image": [e.image]}) for e in test.examples()]
    texts = [r.text for r in corpus.corpus()]
    right = Released(model).logits([e.images[0] for e in listed], texts).argmax(dim=1)
    rows = ours(index, listed, tmp_path / "out.jsonl", 1.5, 1)
    assert [row["image"] for row in rows] == [e.image for e in listed]
    assert [row["reference_reports"] for row in rows] == [[texts[int(i)]] for i in right]
    assert len({row["reference_reports"][0] for row in rows}) > 1


def test_b6_and_b7_by_hand(tmp_path: Path) -> None:
    """Best negative: released keeps all, ours none; nothing kept: released says k = 1, ours 0."""
    line = torch.tensor([-0.1, -0.2, -0.3])
    assert Released.choose(line, ["a", "b", "c"], 1.5, 3) == (["a", "b", "c"], True)
    assert Released.choose(torch.tensor([0.3, 0.2]), ["a", "b"], 1.0, 2) == ([], False)
    from mmedrag.records.records import Hit
    from mmedrag.retrieval.search import released_rows

    hits = [Hit(id=str(n), text="abc"[n], score=float(s), rank=n) for n, s in enumerate(line)]
    example = Example(id="q", task="vqa", question="?", answer="Yes.")
    (row,) = released_rows([example], [hits], [RuleSpec("top1_ratio", threshold=1.5, k=3)(hits)])
    assert (row["reference_reports"], row["retrieve_k"]) == ([], 0)
    assert math.isclose(hits[0].score, -0.1, rel_tol=1e-6)


def test_an_imported_row_comes_back_with_all_its_fields() -> None:
    from mmedrag.retrieval.search import released_rows

    fields = {
        "question_id": 7,
        "question": "Is it?\n<image>",
        "answer": "Yes.",
        "image": "a.jpg",
        "report": "Text.",
        "more": [1],
    }
    meta = {"released": {"file": "test/vqa/harvard_test.jsonl", "row": 1, "fields": fields}}
    example = Example(id="x/7", task="vqa", question="Is it?", answer="Yes.", meta=meta)
    (row,) = released_rows([example], [[]], [None])
    assert row == {**fields, "reference_reports": [], "retrieve_k": 0}


def test_an_unreadable_image_is_a_failed_row(
    place: tuple[Path, list[DataFolder]], tmp_path: Path
) -> None:
    index, (_, test) = place
    examples = test.examples()[:3]
    examples[1] = examples[1].model_copy(update={"image": "images/none.png"})
    rule = RuleSpec("fixed_k", k=1)
    pipeline = Pipeline("radiology", {"radiology": open_retriever(index, str(MODEL[0]))}, rule)
    result = retrieve_examples(pipeline, examples, tmp_path / "out.jsonl")
    assert (result["rows"], result["failed"]) == (3, 1)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "cannot be read" in rows[1]["error"] and not rows[0].get("error")
    assert [len(row["hits"]) for row in rows] == [8, 0, 8]
