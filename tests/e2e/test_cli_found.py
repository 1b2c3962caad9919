"""Nothing fails silently: rows without a hit, a picture or an answer, and who states the domain."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmedrag.cli.main import main
from mmedrag.pipeline.found import Found

SYSTEM = '[generator]\nkind = "scripted"\n[selection]\nrule = "fixed_k"\nk = 2\n'


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return int(done.value.code or 0)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures of three domains; ``foreign``: the same rows under a source of their own."""
    place = tmp_path_factory.mktemp("found")
    assert command("data", "phantom", place / "data", "--studies", "12", "--seed", "3") == 0
    shutil.copytree(place / "data", place / "foreign")
    for name in ("examples.jsonl", "corpus.jsonl"):
        file = place / "foreign" / name
        file.write_text(file.read_text().replace('"source": "phantom"', '"source": "clinic"'))
    for data in ("data", "foreign"):
        for domain in ("radiology", "pathology"):
            index = place / f"{data}-{domain}"
            assert command("index", "build", place / data, "--domain", domain, "--out", index) == 0
    (place / "system.toml").write_text(SYSTEM)
    return place


@pytest.fixture
def retrieve(drawn: Path, tmp_path: Path) -> Any:
    def call(data: Path, *more: object) -> tuple[int, list[dict[str, Any]]]:
        out = tmp_path / "hits.jsonl"
        code = command("retrieve", data, "--out", out, "--split", "test", *more)
        return code, [json.loads(line) for line in out.read_text().splitlines()]

    return call


def rows_of(drawn: Path, tmp_path: Path, source: str, **changes: Any) -> Path:
    """A data folder of changed examples (of test by default); None takes a field out."""
    made = tmp_path / "changed"
    shutil.copytree(drawn / source, made)
    rows = [json.loads(line) for line in (made / "examples.jsonl").open()]
    wanted = changes.pop("only", None)
    kept = [r for r in rows if wanted in (None, r["domain"])]
    for row in kept:
        row.update({"split": "test", **changes})
    text = "".join(
        json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in kept
    )
    (made / "examples.jsonl").write_text(text)
    return made


def by(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(row["domain"]["label"], row["domain"]["by"]) for row in rows}


def test_pictures_of_ones_own_get_references(drawn: Path, retrieve: Any) -> None:
    """The embedded domain model calls them unknown; it is not asked for an index of theirs."""
    indexes = [drawn / "foreign-radiology", drawn / "foreign-pathology"]
    more = [word for index in indexes for word in ("--index", index)]
    code, rows = retrieve(drawn / "foreign", *more)
    served = [row for row in rows if row["target_domain"] != "ophthalmology"]
    assert code == 0 and served and all(row["hits"] for row in served)
    assert {b for _, b in by(rows)} == {"row"}


def test_the_embedded_domain_model_routes_rows_that_state_none(
    drawn: Path, tmp_path: Path, retrieve: Any
) -> None:
    indexes = ["--index", drawn / "data-radiology", "--index", drawn / "data-pathology"]
    code, rows = retrieve(drawn / "data", *indexes)
    assert code == 0 and {b for _, b in by(rows)} == {"row"}
    code, rows = retrieve(rows_of(drawn, tmp_path, "data", domain=None), *indexes)
    assert code == 0 and {b for _, b in by(rows)} == {"embedded"}
    assert len({label for label, _ in by(rows)} & {"radiology", "pathology"}) == 2


def test_the_user_goes_first(drawn: Path, retrieve: Any) -> None:
    index = ["--index", drawn / "foreign-radiology"]
    _, rows = retrieve(drawn / "foreign", *index, "--domain", "radiology")
    assert by(rows) == {("radiology", "option")}
    _, rows = retrieve(drawn / "foreign", *index, "--domain-model", "embedded:domain")
    assert {b for _, b in by(rows)} == {"model"}


def test_the_only_index_serves_rows_without_a_domain(
    drawn: Path, tmp_path: Path, retrieve: Any
) -> None:
    data = rows_of(drawn, tmp_path, "foreign", domain=None)
    code, rows = retrieve(data, "--index", drawn / "foreign-pathology")
    assert code == 0 and by(rows) == {("pathology", "index")} and all(r["hits"] for r in rows)


def test_several_indexes_and_no_domain_end_in_one_line(
    drawn: Path, tmp_path: Path, retrieve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = rows_of(drawn, tmp_path, "foreign", domain=None)
    more = ["--index", drawn / "foreign-pathology", "--index", drawn / "foreign-radiology"]
    code, rows = retrieve(data, *more)
    line = [x for x in caplog.messages if x.startswith("error")]
    assert code == 1 and len(line) == 1
    assert line[0].startswith(f"error: no reference was found in {len(rows)} of {len(rows)} rows: ")
    assert "--domain-model" in line[0]


def test_a_domain_without_an_index_says_so(
    drawn: Path, tmp_path: Path, retrieve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = rows_of(drawn, tmp_path, "foreign", only="ophthalmology")
    code, _ = retrieve(data, "--index", drawn / "foreign-pathology")
    assert code == 1
    assert "no index of domain ophthalmology is given, only of pathology" in caplog.text


def test_pictures_that_are_not_the_benchmarks_warn_once(
    drawn: Path, retrieve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    retrieve(drawn / "foreign", "--index", drawn / "foreign-radiology")
    assert caplog.text.count("trained on drawn benchmark pictures only") == 1
    caplog.clear()
    retrieve(drawn / "data", "--index", drawn / "data-radiology")
    assert "drawn benchmark pictures" not in caplog.text


def test_a_rule_that_keeps_nothing_is_a_line(
    drawn: Path, retrieve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    more = ["--rule", "score_floor", "--set", "selection.floor=2"]
    code, rows = retrieve(drawn / "data", "--index", drawn / "data-radiology", *more)
    assert code == 0 and any(row["hits"] for row in rows)
    assert caplog.text.count("the selection rule kept nothing") == 1


@pytest.mark.parametrize("noun", ["run", "pairs"])
def test_runs_and_pairs_say_that_nothing_was_found(
    noun: str, drawn: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = rows_of(drawn, tmp_path, "foreign", only="ophthalmology", split="val")
    words = ["--system", drawn / "system.toml", "--index", drawn / "foreign-pathology"]
    assert command(noun, data, *words, "--out", tmp_path / "out") == 1
    said = caplog.text
    assert "error: no reference was found in" in said and "no index of domain ophth" in said


def test_a_run_without_an_answer_is_no_result(
    drawn: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mute.toml").write_text('[generator]\nkind = "scripted"\nscript = ""\n')
    words = ["--system", tmp_path / "mute.toml", "--split", "test", "--limit", "6"]
    assert command("run", drawn / "data", *words, "--out", tmp_path / "run") == 1
    for words in (["eval", "--out", tmp_path / "m.json"], ["report", "--out", tmp_path / "page"]):
        caplog.clear()
        assert command(words[0], tmp_path / "run", *words[1:]) == 1
        assert caplog.text.count("error: no answer in 6 of 6 rows: the model wrote nothing") == 1


def test_rows_are_counted_before_a_model_is_loaded(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", tmp_path / "no-model", "--split", "test", "--only-domain", "cardiology"]
    assert command("run", drawn / "data", *words, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "no example of split test, domain cardiology; there are: " in said
    assert "of split test, report, domain radiology" in said


LONG = {  # command: what its line says, before a model that is not there is asked for
    "index build DATA --domain radiology --retriever GONE --out OUT": r"index: \d+ rows of split "
    "train, domain radiology",
    "train domain DATA --encoder GONE --out OUT": r"\d+ pictures of split train \(\d+ ophthalm",
    "train retriever DATA --domain radiology --set encoder=GONE --out OUT": r"\d+ pairs of split "
    r"train, \d+ of split val, domain radiology",
    "retriever eval DATA --domain radiology --retriever GONE": r"\d+ pictures of split test ask "
    r"among \d+ rows of split train, domain radiology",
    "retriever calibrate INDEX DATA --precision 0.9 --retriever GONE": r"\d+ rows with picture and "
    "text of split val, domain radiology",
    "domain eval DATA --model GONE": r"\d+ pictures whose domain is stated, of split test",
    "domain predict DATA --model GONE --out OUT": r"\d+ rows with a picture of split any",
    "run DATA --model GONE --out OUT": r"\d+ examples of any split, any domain",
    "pairs DATA --model GONE --out OUT": r"\d+ examples of split val, any domain",
    "ablation DATA --model GONE --out OUT": r"\d+ examples of split test, any domain",
}


@pytest.mark.parametrize("line", LONG)
def test_a_line_comes_before_the_model(
    line: str, drawn: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    caplog.set_level("INFO", "mmedrag")
    places = {"DATA": drawn / "data", "INDEX": drawn / "data-radiology", "OUT": tmp_path / "out"}
    gone = str(tmp_path / "no-model")
    words = [str(places.get(w, w)).replace("GONE", gone) for w in line.split()]
    assert command(*words) == 2
    assert re.search(LONG[line], caplog.text), caplog.text
    assert gone in capsys.readouterr().err


EMPTY = (
    "index build DATA --domain cardiology --retriever GONE --out OUT",
    "train domain EMPTY --encoder GONE --out OUT",
    "train retriever DATA --domain cardiology --set encoder=GONE --out OUT",
    "retriever eval DATA --domain cardiology --retriever GONE",
    "retriever calibrate INDEX EMPTY --precision 0.9 --retriever GONE",
    "domain eval EMPTY --model GONE",
    "domain predict EMPTY --model GONE --out OUT",
    "run EMPTY --model GONE --out OUT",
    "retrieve EMPTY --index INDEX --retriever GONE --out OUT",
    "pairs EMPTY --model GONE --out OUT",
    "ablation EMPTY --model GONE --out OUT",
)


@pytest.mark.parametrize("line", EMPTY)
def test_nothing_to_work_on_is_one_line(
    line: str, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"DATA": drawn / "data", "INDEX": drawn / "data-radiology", "OUT": tmp_path / "out"}
    places["EMPTY"] = tmp_path / "empty"
    words = [str(places.get(w, w)).replace("GONE", str(tmp_path / "gone")) for w in line.split()]
    assert command(*words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and "there are" in said[-1]
    assert "gone" not in said[-1] and not (tmp_path / "out").exists()


def test_tuning_the_embedded_model_on_other_pictures_warns(
    drawn: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    side = {"prompt": {"template": "t", "text": "Is it?"}, "text": "yes"}
    for data, times in (("foreign", 1), ("data", 0)):
        (image, *_) = [json.loads(x)["image"] for x in (drawn / data / "corpus.jsonl").open()]
        row = {"id": "a", "kind": "copy", "chosen": {**side, "image": image}}
        row["rejected"] = {**side, "image": image, "text": "no"}
        (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
        words = ["--data", drawn / data, "--reference", "init", "--out", tmp_path / "o"]
        caplog.clear()
        command("train", "dpo", tmp_path / "pairs.jsonl", "--model", "embedded:vlm", *words)
        assert caplog.text.count("trained on drawn benchmark pictures only") == times


def trace(**changes: Any) -> dict[str, Any]:
    made = {
        "image": "a.png",
        "condition": {"references": "selected"},
        "domain": {"label": "radiology", "by": "row"},
        "hits": [{"id": "r"}],
        "selection": {"rule": "fixed_k", "kept": ["r"], "reason": ""},
        "answer": {"text": "yes"},
    }
    return {**made, **changes}


def test_many_rows_warn_and_few_do_not(caplog: pytest.LogCaptureFixture) -> None:
    few = Found(model=True).add([trace()] * 19 + [trace(hits=[], excluded=3)])
    assert few.tell() == {"reference": 1} and not few.nothing and not caplog.records
    errors = [trace(answer=None, error=f"/x/{n}.png: no such image") for n in range(3)]
    many = Found(model=True).add([*errors, *[trace()] * 7])
    assert many.tell() == {"answer": 3} and not many.nothing
    assert caplog.messages == ["no answer in 3 of 10 rows, most often: no such image"]


def test_rows_without_a_picture_are_nothing_found(caplog: pytest.LogCaptureFixture) -> None:
    found = Found(index=False, model=True).add([trace(image=None)] * 2)
    assert found.nothing and found.tell() == {"image": 2}
    assert caplog.messages == ["error: no picture in 2 of 2 rows: their rows name no image"]
