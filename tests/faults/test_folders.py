"""Folders belong to somebody: no command changes what it did not write, and a folder is only data.

Every test runs commands; what they may not touch is compared byte by byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import make_small_data
from mmedrag.answering.generators import ScriptedGenerator
from mmedrag.cli.main import main
from mmedrag.pipeline import Pipeline, RunSettings, run_examples
from mmedrag.records.records import UserError
from mmedrag.retrieval.embeddings import text_key
from mmedrag.retrieval.index import IndexFolder
from mmedrag.retrieval.index_build import build_index, remove_from_index
from mmedrag.retrieval.stores import folder
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import new_folder, part_of, write_json, write_text
from retrieval_tools import ColourEncoder, make_data

MINE = ("notes.txt", "scan-2024.txt", "film-000123.png", "draft.part", "rows-000001.parquet")


def mmedrag(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code of a command and what it said on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0), capsys.readouterr().err


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "data"
    with pytest.raises(SystemExit):
        main(["data", "phantom", str(out), "--studies", "12", "--domain", "radiology"])
    return out


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a scripted model, and the two shards of another."""
    home = tmp_path_factory.mktemp("done")
    data = DataFolder(make_small_data(home / "data"))
    asked = Pipeline(rule=None, generator=ScriptedGenerator("said", script=lambda _: "yes"))
    run_examples(asked, data, home / "run", RunSettings(references="none"))
    for shard in ("1/2", "2/2"):
        run_examples(asked, data, home / shard, RunSettings(references="none", shard=shard))
    return home


# --- somebody's files -------------------------------------------------------------------------


def test_an_index_is_not_built_in_somebody_s_folder(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {
        "files": dict.fromkeys(MINE, "mine"),
        "site": {"manifest.json": '{"name": "a web page"}', "notes.txt": "mine"},
        "bare": {"manifest.json": "{}"},
        "cache": {"cache/notes.txt": "mine"},
        "lock": {".lock": "pid 4711"},
    }
    for kind, files in kinds.items():
        for name, text in files.items():
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / kind / name).write_text(text)
        before = contents(tmp_path / kind)
        code, said = mmedrag(capsys, "index", "build", drawn, "--out", tmp_path / kind)
        assert (code, said.count("\n")) == (2, 1) and "no index" in said, (kind, said)
        assert contents(tmp_path / kind) == before


def test_files_beside_an_index_stay(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index"
    build = ("index", "build", drawn, "--domain", "radiology", "--out", index)
    assert mmedrag(capsys, *build)[0] == 0
    mine = [index / name for name in (*MINE[:-1], "rows-000002.parquet", "cache/notes.txt")]
    for path in mine:
        path.write_text("mine")
    row = DataFolder(drawn).corpus("train")[0].id
    assert mmedrag(capsys, *build)[0] == 0
    assert mmedrag(capsys, "index", "remove", index, "--id", row)[0] == 0
    assert mmedrag(capsys, "index", "update", index, drawn)[0] == 0
    assert mmedrag(capsys, "index", "add", index, drawn)[0] == 0
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)
    own = {path.name for path in index.iterdir() if path.is_file()} - {path.name for path in mine}
    assert own == {*folder.read_manifest(index)["files"], "manifest.json", ".lock"}


def test_a_file_of_the_same_name_is_not_written_over(
    drawn: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: dict[str, tuple[object, ...]] = {
        "phantom/examples.jsonl": ("data", "phantom", tmp_path / "phantom", "--studies", 1),
        "metrics/m.json": ("eval", done / "run", "--out", tmp_path / "metrics/m.json"),
        "report/report.html": ("report", done / "run", "--out", tmp_path / "report"),
        "said/domains.jsonl": (
            *("domain", "predict", drawn, "--out", tmp_path / "said/domains.jsonl"),
        ),
        "import/notes.txt": ("data", "import", "table", __file__, tmp_path / "import"),
        "run/notes.txt": ("run", drawn, "--no-rag", "--limit", 1, "--out", tmp_path / "run"),
        "pairs/config.json": ("pairs", drawn, "--out", tmp_path / "pairs"),
        "retriever/README.md": ("train", "retriever", drawn, "--out", tmp_path / "retriever"),
        "domain/README.md": ("train", "domain", drawn, "--out", tmp_path / "domain"),
        "check/page.html": ("data", "check", drawn, "--html", tmp_path / "check/page.html"),
        "merged/traces.jsonl": (
            *("run", "merge", done / "1/2", done / "2/2", "--out", tmp_path / "merged"),
        ),
        "ablation/metrics.json": ("ablation", drawn, "--out", tmp_path / "ablation"),
        "demo/sample.json": ("demo", "--studies", 1, "--out", tmp_path / "demo"),
        "calibrated/recipe.toml": (
            *("retriever", "calibrate", tmp_path / "index", drawn, "--precision", 0.5),
            *("--out", tmp_path / "calibrated/recipe.toml"),
        ),
        "audit/log.jsonl": (
            *("serve", "start", "--port", 0, "--audit", tmp_path / "audit/log.jsonl"),
        ),
        "train/report.json": ("data", "export", drawn, tmp_path),
        "model/config.json": ("model", "convert", drawn, tmp_path / "model"),
    }
    built = ("index", "build", drawn, "--domain", "radiology", "--out", tmp_path / "index")
    assert mmedrag(capsys, *built)[0] == 0
    for name, words in commands.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
        code, said = mmedrag(capsys, *words)
        assert code == 2 and str((tmp_path / name).parent) in said.splitlines()[-1], (name, said)
        assert contents((tmp_path / name).parent) == {Path(name).name: b"mine"}, name


def test_our_own_results_are_written_again_until_they_are_edited(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ("eval", done / "run", "--out", tmp_path / "m.json")
    for seed in (0, 1, 0):
        assert mmedrag(capsys, *again, "--seed", seed)[0] == 0
    (tmp_path / "m.json").write_text("{} edited")
    code, said = mmedrag(capsys, *again)
    assert code == 2 and "no longer, what this command wrote" in said
    assert (tmp_path / "m.json").read_text() == "{} edited"


def test_what_lies_beside_an_output_under_the_name_of_a_part_stays(tmp_path: Path) -> None:
    """Names of parts are nobody else's; one of ours that a kill left is written over."""
    for name in ("x.json.part", "out.part", ".x.json.part"):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    part_of(tmp_path / "x.json").write_text("torn")
    part_of(tmp_path / "out").mkdir()
    write_json(tmp_path / "x.json", 1)
    with new_folder(tmp_path / "out"):
        pass
    assert contents(tmp_path) == {**before, "x.json": b"1\n"}
    part_of(tmp_path / "out2").mkdir()
    (part_of(tmp_path / "out2") / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="in the way"), new_folder(tmp_path / "out2"):
        pass
    assert (part_of(tmp_path / "out2") / "notes.txt").read_text() == "mine"


def test_two_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = [letter * 100_000 for letter in "abcdefgh" * 10]
        list(pool.map(lambda text: write_text(tmp_path / "x", text), texts))
    assert (tmp_path / "x").read_text() in texts
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


# --- an index is data -------------------------------------------------------------------------


def reseal(index: Path, change: Callable[[dict], None]) -> None:
    """What anybody can do who sends an index: the seal has no secret."""
    manifest = folder.read_manifest(index)
    change(manifest)
    for name, entry in manifest["files"].items():
        if (index / name).is_file():
            entry["sha256"] = folder.sha256(index / name)
            entry["bytes"] = (index / name).stat().st_size
    manifest["seal"] = folder._seal(manifest)
    (index / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def index(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "index"
    words = ("index", "build", drawn, "--domain", "radiology", "--out", path)
    assert mmedrag(capsys, *words)[0] == 0
    return path


@pytest.mark.parametrize(
    "spec",
    [
        "evil:Class",
        "hf:org/name",
        "hf-hub:org/name",
        "open_clip:RN50@/tmp/weights.pt",
        "relative:../retriever",
        "/tmp",
        "inside:../retriever",
        "inside:/tmp",
        "embedded:../../x",
    ],
)
def test_an_index_names_no_code_and_nothing_outside(
    spec: str, index: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "evil.py").write_text("open('was-here', 'w')\nclass Class: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    reseal(index, lambda manifest: manifest["encoder"].update(spec=spec))
    for words in (
        ("retrieve", drawn, "--index", index, "--out", tmp_path / "found.jsonl"),
        ("index", "add", index, drawn),
    ):
        code, said = mmedrag(capsys, *words)
        assert code == 2 and "Traceback" not in said
        line = said.strip().splitlines()[-1]
        assert spec.removeprefix("inside:") in line, line
    assert not (tmp_path / "was-here").exists()


def test_an_index_names_no_store_and_no_file_elsewhere(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def elsewhere(manifest: dict) -> None:
        rows = next(name for name in manifest["files"] if name.startswith("rows"))
        manifest["files"]["../rows-000001.parquet"] = manifest["files"].pop(rows)

    sound = (index / "manifest.json").read_bytes()
    reseal(index, lambda manifest: manifest.update(store="os:system"))
    code, said = mmedrag(capsys, "index", "verify", index)
    assert code != 0 and "Traceback" not in said
    (index / "manifest.json").write_bytes(sound)
    reseal(index, elsewhere)
    assert mmedrag(capsys, "index", "info", index)[0] == 2
    (index / "manifest.json").write_bytes(sound)
    rows = next(index.glob("rows-*"))
    rows.rename(tmp_path / "rows")
    rows.symlink_to(tmp_path / "rows")
    code, said = mmedrag(capsys, "index", "info", index)
    assert code == 2 and "a link" in said


@pytest.mark.parametrize("cached", [True, False])
def test_verify_finds_rows_in_another_order_than_their_vectors(
    cached: bool, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmedrag(capsys, "index", "verify", index)[0] == 0
    rows = next(index.glob("rows-*"))
    table = pq.read_table(rows)
    pq.write_table(table.take(list(range(len(table)))[::-1]), rows)
    if not cached:
        for file in (index / "cache").iterdir():
            file.unlink()
    reseal(index, lambda manifest: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["index", "verify", str(index)])
    assert ended.value.code == 1
    assert "rows and vectors do not belong together" in capsys.readouterr().out


# --- removing ---------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def vectors_of(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    index = IndexFolder.open(path)
    return zip(index.ids, index.store.vectors(), strict=True)


def test_a_killed_removal_is_completed_by_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at each of its durable operations in turn."""
    data = make_data(tmp_path / "data", 8)
    secret = data.corpus()[3].text
    stopped = 0
    for at in range(1, 40):
        path = tmp_path / f"index{at}"
        build_index([data], path, None, ColourEncoder())
        build_index([data], path, None, ColourEncoder("earlier"))  # its cache holds the text, too
        [vector] = (v.tobytes() for i, v in vectors_of(path) if i == "s0003")
        calls = 0

        def counted(original: Callable, at: int = at) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == at:
                    raise Killed
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "replace"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            try:
                remove_from_index(path, ["s0003"])
            except Killed:
                stopped += 1
        result = remove_from_index(path, ["s0003"])
        if calls < at:
            break
        assert (result["count"], result["removed"], result["missing"]) in [
            (7, 1, []),
            (7, 0, ["s0003"]),  # the first call had done all, but for saying so
        ]
        for file in path.rglob("*"):
            if file.is_file():
                held = file.read_bytes()
                for trace in (secret.encode(), text_key(secret), vector):
                    assert trace not in held, (at, file)
        assert {p.name for p in path.iterdir() if p.is_file()} == {
            *folder.read_manifest(path)["files"],
            "manifest.json",
            ".lock",
        }
    assert stopped >= 8


def test_a_busy_or_killed_writer_raises_no_alarm(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next((index / "cache").glob("*-text.emb"))
    sound = file.read_bytes()
    for cut in (len(sound) - 1, len(sound) - 300):
        file.write_bytes(sound[:cut])
        assert mmedrag(capsys, "index", "verify", index)[0] == 0
    file.write_bytes(b"")  # as a full disk leaves it
    assert mmedrag(capsys, "index", "verify", index)[0] == 0
    file.write_bytes(sound[:-5] + b"wrong")
    assert mmedrag(capsys, "index", "verify", index)[0] == 1


# --- runs -------------------------------------------------------------------------------------


def test_a_finished_run_that_lost_rows_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_small_data(tmp_path / "data")
    asked = Pipeline(rule=None, generator=ScriptedGenerator("said", script=lambda _: "yes"))
    run = tmp_path / "run"
    run_examples(asked, DataFolder(data), run, RunSettings(references="none"))
    sound = (run / "traces.jsonl").read_bytes()
    for broken in (sound[: sound.index(b"\n") + 1], sound[:-40], sound.replace(b"yes", b"no!", 1)):
        (run / "traces.jsonl").write_bytes(broken)
        for words in (
            ("eval", run, "--out", tmp_path / "m.json"),
            ("report", run, "--out", tmp_path / "page"),
        ):
            code, said = mmedrag(capsys, *words)
            assert code == 2 and "36 rows" in said.strip().splitlines()[-1]
        with pytest.raises(UserError, match="rows were lost or changed"):
            run_examples(asked, DataFolder(data), run, RunSettings(references="none"))
    (run / "traces.jsonl").unlink()
    assert "gone since" in mmedrag(capsys, "eval", run, "--out", tmp_path / "m.json")[1]
    (run / "traces.jsonl").write_bytes(sound)
    (run / "finished.json").unlink()  # a run of before that file
    assert mmedrag(capsys, "eval", run, "--out", tmp_path / "m.json")[0] == 0


def test_shards_of_different_making_are_merged_only_when_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataFolder(make_small_data(tmp_path / "data"))
    asked = Pipeline(rule=None, generator=ScriptedGenerator("said", script=lambda _: "yes"))
    shards = [tmp_path / f"s{n}" for n in (1, 2)]
    for n, out in enumerate(shards, 1):
        run_examples(asked, data, out, RunSettings(references="none", shard=f"{n}/2"))
    config = shards[1] / "config.json"
    before = json.loads(config.read_text())
    changes: list[tuple[str, dict]] = [
        ("dtype", {**before, "dtype": "bfloat16"}),
        ("device", {**before, "device": "cuda:0"}),
        ("versions.torch", {**before, "environment": {"versions": {"torch": "0.1"}}}),
    ]
    for what, changed in changes:
        config.write_text(json.dumps(changed))
        code, said = mmedrag(capsys, "run", "merge", *shards, "--out", tmp_path / "whole")
        assert code == 2 and "--mixed" in said, what
        out = tmp_path / f"mixed-{what}"
        code, said = mmedrag(capsys, "run", "merge", *shards, "--mixed", "--out", out)
        assert code == 0, said
        made = json.loads((out / "config.json").read_text())["shards"]
        assert len(made) == 2 and made[0] != made[1]
    config.write_text(json.dumps(before))
    assert mmedrag(capsys, "run", "merge", *shards, "--out", tmp_path / "whole")[0] == 0
    assert "shards" not in json.loads((tmp_path / "whole" / "config.json").read_text())


# --- imports ----------------------------------------------------------------------------------


def test_an_import_writes_over_nothing_that_was_edited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src").mkdir()
    for name in "ab":
        Image.effect_noise((64, 64), 80).save(tmp_path / "src" / f"{name}.png")
    table = tmp_path / "src" / "t.csv"
    table.write_text("image,report,domain\na.png,No effusion.,radiology\nb.png,,radiology\n,,\n")
    again = ("data", "import", "table", table, tmp_path / "out")
    code = mmedrag(capsys, *again)[0]
    sound = contents(tmp_path / "out")
    assert "rejected.jsonl" in sound and "images/a.png" in sound
    assert mmedrag(capsys, *again)[0] == code
    assert contents(tmp_path / "out") == sound
    for name in ("examples.jsonl", "corpus.jsonl", "rejected.jsonl", "images/a.png"):
        (tmp_path / "out" / name).write_bytes(sound[name] + b"edited")
        before = contents(tmp_path / "out")
        ended, said = mmedrag(capsys, *again)
        assert (ended, said.count("\n")) == (2, 1) and str(tmp_path / "out" / name) in said
        assert contents(tmp_path / "out") == before
        (tmp_path / "out" / name).write_bytes(sound[name])
    assert mmedrag(capsys, *again)[0] == code


def test_an_import_goes_around_a_picture_of_somebody_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was put into the folder of an import that had been stopped."""
    (tmp_path / "src").mkdir()
    Image.effect_noise((64, 64), 80).save(tmp_path / "src" / "a.png")
    table = tmp_path / "src" / "t.csv"
    table.write_text("image,report,domain\na.png,No effusion.,radiology\n")
    again = ("data", "import", "table", table, tmp_path / "out")
    assert mmedrag(capsys, *again)[0] == 0
    for path in (tmp_path / "out").rglob("*.jsonl"):
        path.unlink()
    (tmp_path / "out" / "images" / "a.png").write_text("mine")
    assert mmedrag(capsys, *again)[0] == 0
    assert (tmp_path / "out" / "images" / "a.png").read_text() == "mine"
    [row] = DataFolder(tmp_path / "out").corpus()
    assert row.images[0].is_file() and row.images[0].name != "a.png"


# --- domain models ----------------------------------------------------------------------------


def test_a_domain_model_asks_again_for_an_encoder_of_the_user_s_own(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.toml").write_text('radiology = ["a film"]\npathology = ["a tile"]\n')
    own, model, out = "retrieval_tools:ColourEncoder", tmp_path / "model", tmp_path / "out.jsonl"
    prompts = ("--prompts", tmp_path / "prompts.toml")
    assert mmedrag(capsys, "train", "domain", *prompts, "--encoder", own, "--out", model)[0] == 0
    run = ("run", drawn, "--no-rag", "--limit", 1, "--domain-model", model)
    commands = {
        "predict": ("domain", "predict", drawn, "--model", model, "--out", out),
        "run": (*run, "--out", tmp_path / "run"),
    }
    for words in commands.values():
        code, said = mmedrag(capsys, *words)
        assert code == 2 and said.splitlines()[-1].endswith(f"--domain-encoder {own}")
        assert mmedrag(capsys, *words, "--domain-encoder", own)[0] == 0
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "evil.py").write_text("open('was-here', 'w')\nclass Class: pass\n")
    for spec in ("evil:Class", "hf:org/name", "../model", "inside:../model", "/tmp", "hf-hub:o/n"):
        changed = {**config, "encoder": {**config["encoder"], "spec": spec}}
        (model / "config.json").write_text(json.dumps(changed))
        code, said = mmedrag(capsys, *commands["predict"])
        assert code == 2 and "Traceback" not in said and spec.removeprefix("inside:") in said
    (model / "config.json").rename(tmp_path / "config.json")
    (model / "config.json").symlink_to(tmp_path / "config.json")
    code, said = mmedrag(capsys, *commands["predict"])
    assert code == 2 and "a link" in said
