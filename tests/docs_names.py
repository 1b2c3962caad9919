"""What the command lines of the documentation name, in one folder. Not a test itself."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from docs_tools import ROOT
from mmedrag.cli.main import main
from mmedrag.embedded import path as embedded_path
from mmedrag.phantom import build_benchmark
from mmedrag.serve.audit import Audit
from model.test_convert_layouts import official
from retrieval_tools import tiny_open_clip

SYSTEM = """
[domain]
label = "radiology"
[domains.radiology]
index = "I"
retriever = "R"
[generator]
model = "MODEL"
adapter = "A0"
"""
PROMPTS = """
radiology = ["a chest X-ray"]
ophthalmology = ["a fundus photograph"]
pathology = ["an H&E tile"]
"""
MADE = (
    "mmedrag index build DATA --domain radiology --retriever R --out I",
    "mmedrag run DATA --system S.toml --split test --limit 24 --out RUN",
)
MODELS = {"MODEL": "vlm", "M": "vlm", "A0": "adapter", "R": "retriever-radiology", "D": "domain"}
ASK = "q? [yes, no] 1 reference report(s)"
TUNED = {"cross-modal": "cross_modal", "copy": "copy", "copy-resist": "copy+resist"} | {
    f"resist-{domain}": "resist" for domain in ("rad", "path")
}


def prepare(folder: Path) -> Path:
    """Fill a folder: a drawn benchmark as DATA and in other layouts, models, system files."""
    build_benchmark(folder / "DATA", studies=24, seed=1)  # with ten pictures of split val
    for name, target in MODELS.items():
        (folder / name).symlink_to(embedded_path(target))
    for name in ("S.toml", "SYSTEM"):
        (folder / name).write_text(SYSTEM)
    (folder / "PROMPTS.toml").write_text(PROMPTS)
    _layouts(folder)
    _pairs(folder)
    _films(folder / "films")
    _page_files(folder)
    tiny_open_clip(folder / "OPEN_CLIP")
    official(folder / "CHECKPOINT", "llava_mistral")
    for name in ("FILE", "LOG"):
        log = Audit(folder / name)
        log.write([{"request": "1"}])
        log.close()
    with chdir(folder):
        for line in MADE:
            command(line)
    return folder


def command(line: str) -> tuple[int, str]:
    """Exit code and all that a line ``mmedrag …`` prints, run in this process."""
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown):
        try:
            main(shlex.split(line)[1:])
        except SystemExit as done:
            return int(done.code or 0), shown.getvalue()
    raise AssertionError("main() did not exit")


def _layouts(folder: Path) -> None:
    """DATA as a manifest, a table, a released file; a saved datasets folder; two data folders."""
    shutil.copytree(folder / "DATA/images", folder / "pictures")
    rows = read(folder / "DATA/corpus.jsonl")
    questions = [r for r in read(folder / "DATA/examples.jsonl") if r["task"] == "vqa"]
    found = []
    for row in rows:
        image = f"pictures/{Path(row['image']).name}"
        asked = [q for q in questions if q["image"] == row["image"]]
        qa = [{k: q[k] for k in ("question", "answer", "answer_type")} for q in asked]
        shared = {k: row[k] for k in ("id", "domain", "patient", "split", "source", "text")}
        found.append({**shared, "image": image, "text_kind": "report", "qa": qa})
    write(folder / "ROWS", found)
    asked = [{k: q[k] for k in ("id", "question", "answer")} for q in questions[:6]]
    pictures = [{"image": f"pictures/{Path(q['image']).name}"} for q in questions[:6]]
    write(folder / "vqa.jsonl", [{**q, **p} for q, p in zip(asked, pictures, strict=True)])
    for name in ("a", "b", "a2"):
        shutil.copy(folder / "DATA" / rows[len(name)]["image"], folder / f"{name}.png")
    _saved_dataset(folder / "my_dataset")
    shutil.copytree(folder / "DATA", folder / "ALL/a")


def _saved_dataset(folder: Path) -> None:
    import pyarrow as pa

    folder.mkdir()
    table = pa.table({"caption": ["Clear lungs.", "A nodule."], "id": ["1", "2"]})
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")


def _pairs(folder: Path) -> None:
    rows = read(folder / "DATA/examples.jsonl")
    closed = [r for r in rows if r.get("answer_type") == "closed" and r["split"] == "train"][:8]
    pairs, released = [], []
    for number, row in enumerate(closed):
        prompt = {"template": "test", "text": row["question"], "style": "chat"}
        side = {"prompt": prompt, "image": row["image"], "noise": None}
        texts = ("Yes.", "No.") if row["answer"] == "yes" else ("No.", "Yes.")
        pairs.append(
            {
                "id": f"pair-{number}",
                "kind": "resist",
                "chosen": {**side, "text": texts[0]},
                "rejected": {**side, "text": texts[1]},
                "reference_ids": [],
                "trace_ids": [],
                "reason": "made for the test",
            }
        )
        asked = f"<image>\n{row['question']} [yes, no] 1 reference report(s)"
        human = {"from": "human", "value": asked}
        released.append(
            {
                "id": row["id"],
                "image": row["image"],
                "conversations": [human, {"from": "gpt", "value": texts[0]}],
                "rejected_conversations": [human, {"from": "gpt", "value": texts[1]}],
                "rejected_noised": 0,
            }
        )
    (folder / "FOLDER").symlink_to("DATA")
    (folder / "PAIRS").mkdir()
    (folder / "PAIRS/config.json").write_text('{"data": "../DATA"}')
    write(folder / "PAIRS/pairs.jsonl", pairs)
    write(folder / "SRC", released)


def _films(folder: Path) -> None:
    pydicom = __import__("pytest").importorskip("pydicom")
    folder.mkdir()
    own = Path(pydicom.__file__).parent / "data" / "test_files"
    shutil.copy(own / "CT_small.dcm", folder)


def _page_files(folder: Path) -> None:
    """Blocks of the pages that are files: a first line names them, or the sentence before."""
    page = (ROOT / "docs/data.md").read_text()
    found = re.search(r"^```\n(exam,.*?)^```", page, re.M | re.S)
    assert found
    (folder / "exams.csv").write_text(found[1])
    page = (ROOT / "docs/evaluation.md").read_text()
    found = re.search(r"^```toml\n(# recipe.toml.*?)^```", page, re.M | re.S)
    assert found
    (folder / "recipe.toml").write_text(found[1])
    (folder / "tuned").mkdir()
    for name, target in TUNED.items():
        (folder / "tuned" / name).symlink_to(embedded_path(f"adapter-{target}"))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
