"""One test per fault of the released trainer, kills, damaged files.

Faults: B3, B4 and B8 to B10 of docs/differences.md.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo_tools import losses, make_model, make_pairs, quick
from mmedrag.preference.dpo.cache import FeatureStore, Journal
from mmedrag.preference.dpo.train import train_dpo
from mmedrag.records.records import Noise, UserError

pytestmark = pytest.mark.model
CHILD = Path(__file__).parents[1] / "dpo_child.py"
STEPWISE = {"save_steps": 1, "epochs": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dpo")
    make_model(path / "model")
    return path


def train(home: Path, name: str, pairs, **settings):
    return train_dpo(pairs, home / "model", home / name, quick(**settings), cache=home / "cache")


def child(home: Path, name: str, **options) -> int:
    done = subprocess.run(
        [sys.executable, str(CHILD), str(home), name, json.dumps(options)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, -9), done.stderr[-2000:]
    return done.returncode


# --- B10: pairs without signal --------------------------------------------------------------------


def test_pairs_without_labels_or_room_stop_the_run_by_id(home: Path) -> None:
    pairs = make_pairs(home / "data", 6)
    masked = [pair.model_copy(deep=True) for pair in pairs]
    for new, old in zip(masked, pairs, strict=True):
        new.root = old.root
    masked[1].rejected.text = "  "
    with pytest.raises(UserError, match="resist:e1: answer has no tokens"):
        train(home, "masked", masked)
    assert not (home / "masked").exists()  # nothing was begun
    with pytest.raises(UserError, match=r"cross_modal:e0: prompt and image take .* image tokens"):
        train(home, "long", pairs, max_length=20)
    masked[1].rejected.text = "ok"
    masked[2].chosen.image = "missing.png"
    with pytest.raises(UserError, match=r"copy:e2: .*missing.png: image cannot be read"):
        train(home, "missing", masked)
    masked[2].chosen.image = masked[3].chosen.image
    masked[3].chosen.prompt.text = "<image> twice"
    with pytest.raises(UserError, match="stage1:e3: prompt has 2 image places"):
        train(home, "places", masked)
    with pytest.raises(UserError, match="no pairs"):
        train(home, "none", [])


def test_long_answers_are_cut_and_counted_never_images(home: Path) -> None:
    pairs = make_pairs(home / "data", 4)
    for pair in pairs:
        pair.chosen.text = "yes " * 60
    result = train(home, "cut", pairs, max_length=100, epochs=1)
    assert result["truncated_answers"] == 4


# --- B9: noise at model resolution ----------------------------------------------------------------


def test_noise_strength_does_not_depend_on_the_picture_s_size(home: Path) -> None:
    """Released: drawn at native size, then resized; a large film became near-uniform grey."""
    from PIL import Image

    from mmedrag.answering.generators.vision import open_view

    spreads = []
    for side in (32, 512):
        path = home / f"{side}.png"
        Image.new("RGB", (side, side), (90, 90, 90)).save(path)
        seen = open_view((path, Noise(kind="gaussian_clip", seed=1)), 32)
        spreads.append(np.asarray(seen, dtype=float).std())
    assert spreads[0] == spreads[1] > 80


# --- B3, B4: one adapter, one model ---------------------------------------------------------------


def test_adapter_is_applied_once_and_one_model_is_loaded(home: Path, monkeypatch) -> None:
    import peft
    from transformers import AutoModelForImageTextToText

    calls = {"adapter": 0, "model": 0}
    wrap, read = peft.get_peft_model, AutoModelForImageTextToText.from_pretrained

    def get_peft_model(*args, **kwargs):
        calls["adapter"] += 1
        return wrap(*args, **kwargs)

    def from_pretrained(*args, **kwargs):
        calls["model"] += 1
        return read(*args, **kwargs)

    monkeypatch.setattr(peft, "get_peft_model", get_peft_model)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    train(home, "once", make_pairs(home / "data", 4), train_projector=True)
    assert calls == {"adapter": 1, "model": 1}


# --- kills ----------------------------------------------------------------------------------------


ROUNDS = [pytest.param(2, marks=()), pytest.param(6, marks=pytest.mark.slow)]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_resume_after_kill_gives_the_same_losses(home: Path, rounds: int) -> None:
    """SIGKILL after a step, and between a checkpoint's files and its mark, in turn."""
    rng = random.Random(rounds)
    pairs = make_pairs(home / "data", 12)
    train(home, f"whole{rounds}", pairs, **STEPWISE)
    killed = f"killed{rounds}"
    steps = sorted(rng.sample(range(2, 9), rounds))
    for turn, step in enumerate(steps):
        when = "before_mark" if turn % 2 else "after"
        assert child(home, killed, settings=STEPWISE, kill_at=[step, when]) == -9
    assert not (home / killed / "result.json").exists()
    result = train(home, killed, pairs, **STEPWISE)
    assert result["resumed_from"] == f"checkpoint-{steps[-1] - 1}"  # the unmarked one is not used
    whole = losses(home / f"whole{rounds}")
    assert losses(home / killed) == pytest.approx(whole, abs=1e-6)
    ours, theirs = (
        load_file(home / name / "adapter_model.safetensors") for name in (killed, f"whole{rounds}")
    )
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in theirs)


def test_out_of_another_run_is_refused(home: Path) -> None:
    pairs = make_pairs(home / "data", 4)
    train(home, "taken", pairs)
    with pytest.raises(UserError, match="holds a run with other settings"):
        train(home, "taken", pairs, beta=0.5)
    with pytest.raises(UserError, match="holds a run with other pairs"):
        train(home, "taken", pairs[:3])
    again = train_dpo(
        pairs[:3], home / "model", home / "taken", quick(), cache=home / "cache", resume=False
    )
    assert again["pairs"] == 3


# --- damaged caches -------------------------------------------------------------------------------


def test_journal_survives_torn_and_poisoned_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    journal.append([("a", -1.5), ("b", -2.5)])
    file = tmp_path / "index-0.jsonl"
    text = file.read_text()
    file.write_text(text.replace("-2.5", "-9.5") + '["c", -3.')  # poisoned value, torn last line
    again = Journal(tmp_path, {})
    assert again.entries == {"a": -1.5} and again.damaged == 2
    again.append([("c", -3.0)])
    assert Journal(tmp_path, {}).entries == {"a": -1.5, "c": -3.0}
    other = Journal(tmp_path, {}, writer=1)
    other.append([("d", -4.0)])
    again.reload()
    assert again.entries["d"] == -4.0


def test_feature_store_finds_a_flipped_byte(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, {})
    features = torch.randn(3, 4, 5)
    store.append(["a", "b", "c"], features)
    assert torch.equal(store.get(["c", "a"]), features[[2, 0]])
    half = FeatureStore(tmp_path / "half", {})
    half.append(["x"], features[:1].bfloat16())
    assert torch.equal(half.get(["x"]), features[:1].bfloat16())
    path = tmp_path / "features-0.bin"
    raw = bytearray(path.read_bytes())
    raw[4 * 5 * 4 + 3] ^= 1  # inside the second
    path.write_bytes(raw)
    again = FeatureStore(tmp_path, {})
    assert again.missing(["a", "b", "c"]) == ["b"]
    path.write_bytes(raw[:100])  # torn data
    assert FeatureStore(tmp_path, {}).missing(["a", "b", "c"]) == ["b", "c"]


def test_training_repairs_a_damaged_cache(home: Path, tmp_path: Path) -> None:
    pairs = make_pairs(home / "data", 6)

    def tuned(name: str):
        return train_dpo(pairs, home / "model", tmp_path / name, quick(), cache=tmp_path / "cache")

    tuned("sound")
    for file in sorted((tmp_path / "cache").rglob("index-*.jsonl")):
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines)[:-4])  # torn
    for file in sorted((tmp_path / "cache").rglob("features-*.bin")):
        raw = bytearray(file.read_bytes())
        raw[5] ^= 255  # the first image
        file.write_bytes(raw)
    result = tuned("repaired")
    assert result["cache"]["reference"] == {"found": 11, "computed": 1}
    assert result["cache"]["features"]["computed"] == 2
    assert losses(tmp_path / "repaired") == pytest.approx(losses(tmp_path / "sound"), abs=1e-6)


def test_wrong_model_is_one_clear_line(home: Path, tmp_path: Path) -> None:
    pairs = make_pairs(home / "data", 2)
    with pytest.raises(UserError, match="no weights here, expected"):
        train_dpo(pairs, tmp_path, tmp_path / "out", quick())
    from mmedrag.preference.dpo.policy import install

    with pytest.raises(UserError, match="Linear is not a LLaVA-shaped model"):
        install(torch.nn.Linear(2, 2))
