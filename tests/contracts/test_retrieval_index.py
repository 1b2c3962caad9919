"""The index folder and the retriever over it: what is found, excluded, counted, and refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmedrag.records.protocols import Searcher
from mmedrag.records.records import Example, Reference, UserError
from mmedrag.retrieval.index import Filter, IndexFolder, index_info, verify_index
from mmedrag.retrieval.index_build import add_to_index, build_index, remove_from_index, update_index
from mmedrag.retrieval.search import Exclusion, Retriever, open_retriever, released_rows
from mmedrag.retrieval.select import RuleSpec
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import write_jsonl
from retrieval_tools import ColourEncoder, make_data

OFF = Exclusion(patient=False, image=False, near=None)


@pytest.fixture
def data(tmp_path: Path) -> DataFolder:
    return make_data(tmp_path / "data")


@pytest.fixture
def built(data: DataFolder, tmp_path: Path) -> Path:
    build_index([data], tmp_path / "index", "radiology", ColourEncoder())
    return tmp_path / "index"


def change(data: DataFolder, **texts: str) -> None:
    rows = [r.model_copy(update={"text": texts.get(r.id, r.text)}) for r in data.corpus()]
    write_jsonl(data.path / "corpus.jsonl", rows)


# --- build, add, update, remove --------------------------------------------------------------


def test_build_and_info(data: DataFolder, tmp_path: Path) -> None:
    result = build_index([data], tmp_path / "i", "radiology", ColourEncoder())
    assert (result["added"], result["skipped"], result["count"]) == (40, [], 40)
    info = index_info(tmp_path / "i")
    assert info["domain"] == "radiology"
    assert (info["dim"], info["engine"]["kind"], info["patients"]) == (24, "flat", 20)
    assert info["encoder"]["fingerprint"] == ColourEncoder().fingerprint
    assert verify_index(tmp_path / "i") == []


def test_the_folder_is_inspectable(built: Path, data: DataFolder) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["rows-000001.parquet", "vectors-000001.faiss"]
    table = pq.read_table(built / "rows-000001.parquet").to_pylist()
    assert [r["id"] for r in table] == [r.id for r in data.corpus()]
    assert table[3]["patient"] == "p1" and table[3]["date"] == "2020-01-04"
    assert [r.text for r in IndexFolder.open(built).references()] == [r.text for r in data.corpus()]


def test_opening_and_reading_do_not_import_pandas(built: Path) -> None:
    """It takes 25 MiB and a third of a second, for nothing that an index needs."""
    code = (
        "import sys; from mmedrag import Index\n"
        f"index = Index.open({str(built)!r})\n"
        "print(index.texts([3, 1]), index.patients[3], len(index.pixels[0][0]))\n"
        "print('pandas' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    texts = IndexFolder.open(built).texts([3, 1])
    assert said.stdout.splitlines() == [f"{texts} p1 32", "False"]


def test_columns_are_read_from_the_state_that_was_opened(built: Path, data: DataFolder) -> None:
    index = IndexFolder.open(built)
    change(data, s0003="Another text.")
    update_index(built, [data], encoder=ColourEncoder())
    assert not (built / "rows-000001.parquet").exists()
    assert index.texts([3])[0].startswith("Study 3.")
    assert "Another text." in IndexFolder.open(built).texts(range(40))
    assert index.mask(Filter(patient=["p1"])).sum() == 2


def test_only_the_split_and_the_domain(tmp_path: Path) -> None:
    mixed = make_data(tmp_path / "d", 6)
    rows = mixed.corpus()
    others = [("val", "radiology"), ("train", "pathology"), ("train", None)]
    for row, (split, domain) in zip(rows, others, strict=False):
        row.split, row.domain = split, domain  # type: ignore[assignment]
    write_jsonl(mixed.path / "corpus.jsonl", rows)
    for name, wanted in (("radiology", 3), (None, 5)):
        result = build_index([mixed], tmp_path / f"i{name}", name, ColourEncoder())
        assert result["count"] == wanted


def test_unusable_rows_are_skipped_with_a_reason(data: DataFolder, tmp_path: Path) -> None:
    change(data, s0001=" ")
    (data.path / "images/s0002.png").write_bytes(b"not an image")
    (data.path / "images/s0003.png").unlink()
    result = build_index([data], tmp_path / "i", None, ColourEncoder())
    reasons = {entry["id"]: entry["reason"] for entry in result["skipped"]}
    assert set(reasons) == {"s0001", "s0002", "s0003"}
    assert reasons["s0001"] == "no text"
    assert "not an image" in reasons["s0002"] and "cannot be read" in reasons["s0003"]
    assert result["count"] == 37


def test_add_encodes_only_what_was_never_seen(built: Path, tmp_path: Path) -> None:
    more = make_data(tmp_path / "more", 10, seed=1, first=100)
    repeated = more.corpus()
    texts = {r.text for r in make_data(tmp_path / "same").corpus()}
    repeated[0].text = min(texts)  # a text that is in the index
    repeated[1].text = repeated[2].text  # twice the same
    write_jsonl(more.path / "corpus.jsonl", repeated)
    encoder = ColourEncoder()
    result = add_to_index(built, [more], encoder=encoder)
    assert (result["added"], result["count"]) == (10, 50)
    assert encoder.encoded_texts == 8
    again = ColourEncoder()
    result = add_to_index(built, [more], encoder=again)
    assert (result["added"], result["unchanged"], result["generation"]) == (0, 10, 2)
    assert (again.encoded_texts, again.encoded_images) == (0, 0)


def test_changed_rows_need_update(built: Path, data: DataFolder) -> None:
    change(data, s0005="There is fracture.", s0006="There is oedema.")
    result = add_to_index(built, [data], encoder=ColourEncoder())
    assert [entry["id"] for entry in result["skipped"]] == ["s0005", "s0006"]
    assert "use update" in result["skipped"][0]["reason"]
    assert (result["added"], result["unchanged"], result["generation"]) == (0, 38, 1)
    result = update_index(built, [data], encoder=ColourEncoder())
    assert (result["replaced"], result["unchanged"], result["count"]) == (2, 38, 40)
    index = IndexFolder.open(built)
    texts = dict(zip(index.ids, index.texts(range(40)), strict=True))
    assert texts["s0005"] == "There is fracture."
    stored = index.store.vectors()[index.ids.index("s0005")]
    assert stored == pytest.approx(ColourEncoder().texts(["There is fracture."])[0])
    assert verify_index(built) == []


def test_remove_leaves_nothing_behind(built: Path) -> None:
    result = remove_from_index(built, ["s0007", "s0008", "nobody"])
    assert (result["removed"], result["missing"], result["count"]) == (2, ["nobody"], 38)
    for path in built.rglob("*"):
        if path.is_file():
            assert b"Study 7." not in path.read_bytes()
    from mmedrag.retrieval.embeddings import EmbeddingCache, text_key

    cache = EmbeddingCache(built / "cache", ColourEncoder(), "text")
    assert len(cache) == 38
    index = IndexFolder.open(built)
    assert all(text_key(t) in cache for t in index.texts(range(38)))
    assert verify_index(built) == []
    with pytest.raises(UserError, match="would remove every reference"):
        remove_from_index(built, index.ids)


def test_building_again_gives_the_same_bytes(data: DataFolder, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_index([data], tmp_path / name, "radiology", ColourEncoder())
    encoder = ColourEncoder()
    build_index([data], tmp_path / "b", "radiology", encoder)  # from its cache
    assert encoder.encoded_texts == 0
    first, second = (sorted((tmp_path / n).glob("*-0*")) for n in ("a", "b"))
    for x, y in zip(first, second, strict=True):
        assert x.read_bytes() == y.read_bytes()


def test_another_folder_is_not_overwritten(data: DataFolder, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty and no index"):
        build_index([data], tmp_path / "notes", None, ColourEncoder())
    with pytest.raises(UserError, match="no reference to index"):
        build_index([data], tmp_path / "none", "pathology", ColourEncoder())


def test_another_encoder_is_refused(built: Path, data: DataFolder) -> None:
    other = ColourEncoder("another")
    for call in (
        lambda: open_retriever(built, other),
        lambda: add_to_index(built, [data], encoder=other),
        lambda: Retriever(IndexFolder.open(built), other),
    ):
        with pytest.raises(UserError, match="built with encoder colour"):
            call()


def test_encoder_folder_moves_with_the_index(data: DataFolder, tmp_path: Path) -> None:
    """A copy lies in the index, because an index may not read what is outside of it."""
    from mmedrag.embedded import path as embedded

    shutil.copytree(embedded("retriever-radiology"), tmp_path / "all" / "retriever")
    index = tmp_path / "all" / "index"
    made = build_index([data], index, None, str(tmp_path / "all" / "retriever"))
    assert made["encoder"]["spec"].startswith("inside:encoder-")
    shutil.rmtree(tmp_path / "all" / "retriever")
    (tmp_path / "all").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "index"
    assert len(open_retriever(moved).search(data.examples()[:2], 3)[0][0]) == 3
    assert verify_index(moved) == []
    copy = moved / made["encoder"]["spec"].removeprefix("inside:")
    (copy / "config.json").unlink()
    assert any("no encoder here" in finding for finding in verify_index(moved))
    with pytest.raises(UserError, match="give it again by --retriever"):
        open_retriever(moved)


# --- search -----------------------------------------------------------------------------------


def test_hits_are_the_nearest_reports(built: Path, data: DataFolder) -> None:
    encoder = ColourEncoder()
    retriever: Searcher = open_retriever(built, encoder, exclude=OFF)
    examples = data.examples()[:7]
    hits, excluded = retriever.search(examples, 5)
    assert excluded == [0] * 7
    references = data.corpus()
    scores = (
        encoder.images([e.images[0] for e in examples])
        @ encoder.texts([r.text for r in references]).T
    )
    for row, found in zip(scores, hits, strict=True):
        order = np.lexsort((np.arange(40), -row.astype(np.float64).round(6)))[:5]
        assert [h.id for h in found] == [references[i].id for i in order]
        assert [h.score for h in found] == pytest.approx(row[order], abs=1e-5)
        assert [h.rank for h in found] == list(range(5))
        assert found[0].text == references[order[0]].text


def test_own_patient_is_excluded_and_counted(built: Path, data: DataFolder) -> None:
    retriever = open_retriever(built, ColourEncoder(), exclude=Exclusion(True, False, None))
    example = data.examples()[0]  # patient p0 has s0000 and s0001
    hits, excluded = retriever.search([example], 40)
    assert excluded == [2]
    assert len(hits[0]) == 38
    assert not {"s0000", "s0001"} & {h.id for h in hits[0]}


def test_a_null_patient_matches_nobody(built: Path, data: DataFolder, tmp_path: Path) -> None:
    rows = data.corpus()
    for row in rows:
        row.patient = None
    write_jsonl(data.path / "corpus.jsonl", rows)
    build_index([data], tmp_path / "nobody", None, ColourEncoder())
    rows[1].patient = "p0"
    write_jsonl(data.path / "corpus.jsonl", rows)
    build_index([data], tmp_path / "one", None, ColourEncoder())
    hits, excluded = open_retriever(tmp_path / "one", ColourEncoder(), exclude=Exclusion()).search(
        [data.examples()[0]], 40
    )
    assert excluded == [2]  # its own image, and the one reference of a patient who is known
    assert {"s0000", "s0001"}.isdisjoint(h.id for h in hits[0])
    example = data.examples()[0].model_copy(update={"patient": None})
    exclude = Exclusion(True, False, None)
    for path in (built, tmp_path / "nobody"):
        retriever = open_retriever(path, ColourEncoder(), exclude=exclude)
        hits, excluded = retriever.search([example], 40)
        assert (excluded, len(hits[0])) == ([0], 40)


def test_the_same_image_is_excluded(built: Path, data: DataFolder) -> None:
    example = data.examples()[4].model_copy(update={"patient": "someone else"})
    retriever = open_retriever(built, ColourEncoder(), exclude=Exclusion(True, True, None))
    hits, excluded = retriever.search([example], 40)
    assert (excluded, len(hits[0])) == ([1], 39)
    assert "s0004" not in {h.id for h in hits[0]}


def test_near_identical_images_are_excluded(tmp_path: Path) -> None:
    """The same picture as a JPEG has other pixels, but hardly another perceptual hash."""
    from mmedrag.images.alike import hamming, perceptual_hash
    from mmedrag.images.files import load_image

    rng = np.random.default_rng(3)
    folder = tmp_path / "d" / "images"
    folder.mkdir(parents=True)
    rows = []
    for n in range(6):
        smooth = rng.integers(0, 256, (6, 6), dtype=np.uint8)
        picture = Image.fromarray(smooth).resize((96, 96), Image.Resampling.BICUBIC)
        picture.save(folder / f"{n}.png")
        rows.append(Reference(id=str(n), text=f"There is nodule {n}.", image=f"images/{n}.png"))
        if n == 0:
            picture.save(folder / "copy.jpg", quality=85)
    write_jsonl(tmp_path / "d" / "corpus.jsonl", rows)
    copy = Example(id="q", task="vqa", question="?", image="images/copy.jpg", root=tmp_path / "d")
    looks = [perceptual_hash(load_image(folder / n)) for n in ("0.png", "copy.jpg", "1.png")]
    assert hamming(looks[0], looks[1]) <= 2 < hamming(looks[0], looks[2])
    build_index([DataFolder(tmp_path / "d")], tmp_path / "i", None, ColourEncoder(), split=None)
    for near, wanted in ((2, 1), (None, 0)):
        exclude = Exclusion(True, True, near)
        retriever = open_retriever(tmp_path / "i", ColourEncoder(), exclude=exclude)
        hits, excluded = retriever.search([copy], 6)
        assert excluded == [wanted]
        assert ("0" in {h.id for h in hits[0]}) == (near is None)


def test_exclusion_never_costs_hits(tmp_path: Path) -> None:
    """More than the first look's references are the patient's own: the search goes on."""
    data = make_data(tmp_path / "d", 300, patients=60)
    build_index([data], tmp_path / "i", None, ColourEncoder())
    retriever = open_retriever(tmp_path / "i", ColourEncoder())
    hits, excluded = retriever.search(data.examples(), 8)
    assert all(len(found) == 8 for found in hits)
    patients = {r.id: r.patient for r in data.corpus()}
    for example, found in zip(data.examples(), hits, strict=True):
        assert example.patient not in {patients[h.id] for h in found}
    assert max(excluded) > 8


def test_ties_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """Hundreds of equal reports: the first rows win, whoever asks beside whom."""
    data = make_data(tmp_path / "d", 120)
    change(data, **{f"s{n:04d}": "There is nodule." for n in range(100)})
    build_index([data], tmp_path / "i", None, ColourEncoder())
    retriever = open_retriever(tmp_path / "i", ColourEncoder(), exclude=OFF)
    examples = data.examples()
    together = retriever.search(examples, 5)[0]
    assert together == [retriever.search([e], 5)[0][0] for e in examples]
    tied = [found for found in together if found[0].text == "There is nodule."]
    assert tied
    assert all([h.id for h in found] == [f"s{n:04d}" for n in range(5)] for found in tied)


def test_each_image_is_encoded_once_ever(built: Path, data: DataFolder) -> None:
    examples = data.examples()
    asked = [e.model_copy(update={"id": f"{e.id}{n}"}) for e in examples for n in range(6)]
    first, second = ColourEncoder(), ColourEncoder()
    found = open_retriever(built, first, cache=built / "cache").search(asked, 3)
    assert first.encoded_images == 40  # not 240: one per image, not one per question
    assert open_retriever(built, second, cache=built / "cache").search(asked, 3) == found
    assert second.encoded_images == 0  # a later process finds them on disk


def test_several_views(tmp_path: Path) -> None:
    data = make_data(tmp_path / "d", 8)
    build_index([data], tmp_path / "i", None, ColourEncoder())
    a, b = data.examples()[0], data.examples()[5]
    both = Example(id="both", task="vqa", question="?", image=[a.image, b.image], root=data.path)
    encoder = ColourEncoder()
    seen = encoder.images([a.images[0], b.images[0]])
    mean = seen.mean(axis=0) / np.linalg.norm(seen.mean(axis=0))
    for views, vector in (("mean", mean), ("first", seen[0])):
        retriever = open_retriever(tmp_path / "i", encoder, exclude=OFF, views=views)
        assert retriever.embed([both]).vectors[0] == pytest.approx(vector, abs=1e-5)
    retriever = open_retriever(tmp_path / "i", encoder, exclude=Exclusion(False, True, None))
    assert retriever.search([both], 8)[1] == [2]  # either view's own row


def test_an_unreadable_image_does_not_stop_the_others(built: Path, data: DataFolder) -> None:
    examples = data.examples()[:3]
    broken = examples[1].model_copy(update={"image": "images/none.png", "id": "broken"})
    retriever = open_retriever(built, ColourEncoder())
    hits, _ = retriever.search([examples[0], broken, examples[2]], 3)
    assert [len(found) for found in hits] == [3, 0, 3]
    assert "cannot be read" in retriever.errors["broken"]


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        (Filter(patient=["p3", "p4"]), {"s0006", "s0007", "s0008", "s0009"}),
        (Filter(date_from="2020-01-27"), {"s0026", "s0027"}),
        (Filter(date_to="2020-01-01"), {"s0000", "s0028"}),
        (Filter(source=["elsewhere"]), set()),
        (
            Filter(source="made", split=["train"], domain=["radiology"], patient=["p0"]),
            {"s0000", "s0001"},
        ),
    ],
)
def test_filters(built: Path, data: DataFolder, where: Filter, wanted: set[str]) -> None:
    retriever = open_retriever(built, ColourEncoder(), exclude=OFF, where=where)
    hits, _ = retriever.search([data.examples()[-1]], 40)
    assert {h.id for h in hits[0]} == wanted


def test_image_to_image(data: DataFolder, tmp_path: Path) -> None:
    """Rows without text serve image-image search; each picture finds itself."""
    change(data, **{f"s{n:04d}": "" for n in range(40)})
    build_index([data], tmp_path / "i", None, ColourEncoder(), key="image")
    retriever = open_retriever(tmp_path / "i", ColourEncoder(), exclude=OFF)
    hits, _ = retriever.search(data.examples(), 1)
    same = [h[0].id == e.id.removesuffix("-q") for h, e in zip(hits, data.examples(), strict=True)]
    assert np.mean(same) > 0.9
    assert verify_index(tmp_path / "i") == []


def test_released_rows(built: Path, data: DataFolder) -> None:
    retriever = open_retriever(built, ColourEncoder())
    examples = data.examples()[:2]
    hits, _ = retriever.search(examples, 3)
    selections = [RuleSpec("fixed_k", k=2)(hits[0]), RuleSpec("fixed_k", k=0)(hits[1])]
    rows = released_rows(examples, hits, selections)
    assert rows[0]["reference_reports"] == [h.text for h in hits[0][:2]]
    assert [row["retrieve_k"] for row in rows] == [2, 0]
    assert rows[0]["question"] == "Is there a nodule?"
    assert rows[0]["image"] == "images/s0000.png"
