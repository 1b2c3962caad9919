"""The contrastive loss and its cached gradient; the training learns, resumes, and drops nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmedrag.records.records import UserError
from mmedrag.retrieval.encoders.load import load_encoder, load_towers
from mmedrag.retrieval.loss import MAX_LOG_SCALE, cached_backward, false_negatives, info_nce
from mmedrag.retrieval.settings import RetrieverTraining
from mmedrag.retrieval.train import open_tracker, pairs_of, train_retriever, usable
from mmedrag.retrieval.train_loop import (
    Pairs,
    Trainer,
    crop,
    learning_rate,
    steps,
    total_steps,
    train_towers,
)
from retrieval_tools import make_data, tiny_clip, tiny_open_clip, tiny_siglip

pytestmark = pytest.mark.model
QUICK = RetrieverTraining(batch_size=16, chunk=16, epochs=4, lr=3e-3, save_every=2, weight_decay=0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list:
    base = tmp_path_factory.mktemp("data")
    train_towers = make_data(base / "train", 40)
    val = make_data(base / "val", 12, seed=1, split="val", first=60)
    return [train_towers, val]


# --- loss -------------------------------------------------------------------------------------


def test_info_nce_by_hand() -> None:
    """Two pairs, log scale ln 2: logits 2·[[1, .6], [0, .8]]."""
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    t = torch.tensor([[2.0, 0.0], [0.6, 0.8]])
    logits = np.array([[2.0, 1.2], [0.0, 1.6]])
    rows = [-math.log(math.exp(logits[i, i]) / np.exp(logits[i]).sum()) for i in range(2)]
    columns = [-math.log(math.exp(logits[i, i]) / np.exp(logits[:, i]).sum()) for i in range(2)]
    expected = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert float(info_nce(v, t, torch.tensor(math.log(2)))) == pytest.approx(expected, abs=1e-6)


def test_chance_level_is_ln_batch() -> None:
    same = torch.ones(8, 4)
    assert float(info_nce(same, same, torch.tensor(0.0))) == pytest.approx(math.log(8), abs=1e-6)


def test_equal_texts_do_not_push_each_other_away() -> None:
    masked = false_negatives(["normal", "mass", " normal "])
    assert masked.nonzero().tolist() == [[0, 2], [2, 0]]
    v = torch.randn(3, 4, requires_grad=True)
    t = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    info_nce(v, t, torch.tensor(1.0), masked).backward()
    alone = v.detach()[:2].clone().requires_grad_()
    assert v.grad is not None
    # row 0 sees only row 1 as a negative: its image loss is that of the two pairs alone
    info_nce(alone, t[:2], torch.tensor(1.0)).backward()
    plain = v.detach().clone().requires_grad_()
    info_nce(plain, t, torch.tensor(1.0)).backward()
    assert plain.grad is not None
    assert (v.grad[0] - plain.grad[0]).abs().max() > 1e-3


class Dropping(nn.Module):
    """A tower with dropout: the second pass must draw the same zeros as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.parametrize("chunk", [1, 3, 4, 12])
def test_cached_gradient_equals_plain(chunk: int) -> None:
    torch.manual_seed(0)
    towers = [Dropping(), Dropping()]
    scale = nn.Parameter(torch.tensor(1.3))
    x, y = torch.randn(12, 6), torch.randn(12, 6)
    masked = false_negatives(["a", "b", "a", *"cdefghijk"])

    def loss(v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return info_nce(v, t, scale, masked)

    parameters = [*towers[0].parameters(), *towers[1].parameters(), scale]
    chunks = [list(part.split(chunk)) for part in (x, y)]
    torch.manual_seed(5)
    value = loss(
        torch.cat([towers[0](c) for c in chunks[0]]), torch.cat([towers[1](c) for c in chunks[1]])
    )
    value.backward()
    plain = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    for p in parameters:
        p.grad = None
    torch.manual_seed(5)
    cached = cached_backward(towers[0], towers[1], *chunks, loss)
    after = torch.rand(1)
    assert cached == pytest.approx(float(value.detach()), abs=1e-6)
    for p, expected in zip(parameters, plain, strict=True):
        assert p.grad is not None
        assert (p.grad - expected).abs().max() <= 1e-5
    assert max(float(g.abs().max()) for g in plain) > 1e-3  # there was something to compare
    assert after == torch.rand(1, generator=_after(towers, chunks))


def _after(towers: list, chunks: list) -> torch.Generator:
    """The random state that one plain pass leaves: the second pass must not have moved it."""
    torch.manual_seed(5)
    with torch.no_grad():
        for tower, part in zip(towers, chunks, strict=True):
            for chunk in part:
                tower(chunk)
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return generator


@pytest.mark.parametrize("build", [tiny_clip, tiny_siglip, tiny_open_clip])
def test_cached_step_equals_plain_step_on_real_towers(
    build: Any, data: list, tmp_path: Path
) -> None:
    build(tmp_path / "m")
    gradients = []
    for chunk in (16, 3):
        towers = load_towers(str(tmp_path / "m"))
        pairs = pairs_of(usable(data, None, "train")[:16], towers)
        trainer = Trainer(towers, pairs, replace(QUICK, chunk=chunk, max_grad_norm=0.0), "cpu")
        step = next(steps(pairs, trainer.s))
        trainer.run_step(step, pairs.batch(step.pictures))
        gradients.append({n: p.grad for n, p in towers.model.named_parameters()})
    assert set(gradients[0]) == set(gradients[1])
    largest = 0.0
    for name, plain in gradients[0].items():
        if plain is None:
            assert gradients[1][name] is None
            continue
        size = float(plain.abs().max())
        largest = max(largest, size)
        assert (gradients[1][name] - plain).abs().max() <= 1e-5 * max(1.0, size), name
    assert largest > 1e-3


# --- schedule and batches ---------------------------------------------------------------------


def test_no_pair_is_dropped() -> None:
    pairs = Pairs([str(n) for n in range(37)], torch.zeros(37, 3, 2, 2))
    s = replace(QUICK, batch_size=10, epochs=2)
    plan = list(steps(pairs, s))
    assert [len(step.pairs) for step in plan] == [10, 10, 10, 7] * 2
    for epoch in (plan[:4], plan[4:]):
        assert sorted(i for step in epoch for i in step.pairs) == list(range(37))
    assert plan[0].pairs != plan[4].pairs
    resumed = list(steps(pairs, s, start=5))
    assert resumed[0].pairs == plan[5].pairs
    assert torch.equal(resumed[0].crops, plan[5].crops)


def test_warm_up_and_cosine_end_where_the_run_ends() -> None:
    """Released: 10,000 warm-up steps for runs of 1080 to 2160, the cosine never started (B2)."""
    s = replace(QUICK, lr=1.0, warmup=0.1)
    total = total_steps(7000, replace(s, batch_size=1024, epochs=360))
    assert total == 2520  # 7 batches an epoch, the partial one too
    rates = [learning_rate(step, total, s) for step in range(total)]
    assert max(rates) == 1.0 and rates.index(1.0) == 251
    assert rates[0] == pytest.approx(1 / 252)
    assert rates[(252 + total) // 2] == pytest.approx(0.5, abs=0.01)
    assert rates[-1] < 1e-5
    released = [learning_rate(step, 2160, replace(s, warmup=10_000)) for step in range(2160)]
    assert max(released) == pytest.approx(0.216)


def test_crop_keeps_size_and_content() -> None:
    pixels = torch.linspace(0, 1, 32)[None, None, None].expand(4, 3, 32, 32).contiguous()
    seen = crop(pixels, 0.9, torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))
    assert seen.shape == pixels.shape
    assert (seen - pixels).abs().max() < 0.15
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    assert crop(pixels, 1.0, torch.rand(4, 3)) is pixels


# --- training ---------------------------------------------------------------------------------


def test_training_learns_and_writes_an_encoder(clip: Path, data: list, tmp_path: Path) -> None:
    s = replace(QUICK, encoder=str(clip), epochs=30, crop=1.0)
    result = train_retriever(data, tmp_path / "r", "radiology", s, device="cpu")
    assert result["steps"] == 90
    assert result["metrics"]["mrr"] > 0.4  # 12 pairs: chance 0.26
    assert result["loss"] < 1.5  # chance: ln 16 = 2.77
    encoder = load_encoder(str(tmp_path / "r"))
    rows = usable(data, None, "val")
    images = encoder.images([r.images[0] for r in rows])
    scores = images @ encoder.texts([r.text for r in rows]).T
    from mmedrag.retrieval.ranks import per_query

    mrr = per_query(scores, np.eye(12, dtype=bool))["mrr"].mean()
    assert mrr == pytest.approx(result["metrics"]["mrr"], abs=0.02)  # the best weights were kept
    ids = [json.loads(line) for line in (tmp_path / "r/train_ids.jsonl").read_text().splitlines()]
    assert len(ids) == 40 and ids[0]["patient"] == "p0" and len(ids[0]["image_sha256"]) == 64
    card = (tmp_path / "r" / "README.md").read_text()
    assert "| mrr |" in card and "not a medical device" in card
    assert not (tmp_path / "r" / "checkpoint").exists()
    with pytest.raises(UserError, match="holds a model already"):
        train_retriever(data, tmp_path / "r", "radiology", s)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 6])
def test_resume_equals_an_uninterrupted_run(
    at: int, clip: Path, data: list, tmp_path: Path
) -> None:
    s = replace(QUICK, encoder=str(clip), dtype="float32")
    seen: dict[str, dict[int, float]] = {"whole": {}, "broken": {}}

    def tracker(name: str, stop: int) -> Any:
        def note(metrics: dict[str, float], step: int) -> None:
            if "loss" in metrics:
                seen[name][step] = metrics["loss"]
                if step == stop:
                    raise Killed

        return note

    whole = train_retriever(data, tmp_path / "w", None, s, "cpu", tracker("whole", 0))
    with pytest.raises(Killed):
        train_retriever(data, tmp_path / "b", None, s, "cpu", tracker("broken", at))
    with pytest.raises(UserError, match="an unfinished training with other settings"):
        train_retriever(data, tmp_path / "b", None, replace(s, lr=1.0), "cpu")
    broken = train_retriever(data, tmp_path / "b", None, s, "cpu", tracker("broken", 0))
    assert seen["broken"].keys() == seen["whole"].keys()
    assert max(abs(seen["broken"][n] - seen["whole"][n]) for n in seen["whole"]) <= 1e-6
    assert broken["metrics"] == whole["metrics"]
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("w", "b"))
    assert max(float((a[k] - b[k]).abs().max()) for k in a) <= 1e-6


def test_open_clip_trains_and_saves(data: list, tmp_path: Path) -> None:
    tiny_open_clip(tmp_path / "o")
    s = replace(QUICK, encoder=str(tmp_path / "o"), epochs=1, chunk=5)
    train_retriever(data, tmp_path / "r", None, s, device="cpu")
    assert (tmp_path / "r" / "open_clip_model.safetensors").exists()
    trained, start = load_encoder(str(tmp_path / "r")), load_encoder(str(tmp_path / "o"))
    assert trained.fingerprint != start.fingerprint


def test_in_memory_pairs_and_frozen_tower(clip: Path) -> None:
    towers = load_towers(str(clip))
    before = {n: p.detach().clone() for n, p in towers.model.named_parameters()}
    pairs = Pairs(["There is nodule."] * 4 + ["Normal."] * 4, torch.randn(8, 3, 32, 32))
    s = replace(QUICK, batch_size=8, epochs=2, freeze="image")
    result = train_towers(towers, pairs, s, device="cpu")
    assert result["steps"] == 2
    for name, parameter in towers.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert not (moved and name.startswith("vis")), name
    assert any(not torch.equal(p, before[n]) for n, p in towers.model.named_parameters())


def test_scale_stays_within_the_released_clamp(clip: Path) -> None:
    towers = load_towers(str(clip))
    pairs = Pairs(["There is nodule.", "Normal."], torch.randn(2, 3, 32, 32))
    s = replace(QUICK, batch_size=2, init_scale=4.6, lr=1.0, warmup=0.0, epochs=3)
    train_towers(towers, pairs, s, device="cpu")
    assert 0 <= float(towers.model.logit_scale.detach()) <= MAX_LOG_SCALE + 1e-6


@pytest.mark.parametrize(
    "change", [{"views": "all"}, {"lr": 0.0}, {"crop": 0.0}, {"dtype": "int8"}, {"batch_size": 0}]
)
def test_settings_are_checked(change: dict) -> None:
    with pytest.raises(UserError, match=f"retriever: {next(iter(change))}: got"):
        replace(QUICK, **change)


def test_curves_go_to_the_tracker(
    clip: Path, data: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer with TensorBoard's interface gets every step and every validation."""
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, key: str, value: float, step: int) -> None:
            written.append((key, value, step))

        def flush(self) -> None: ...

    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    tracker = open_tracker("tensorboard", tmp_path / "logs")
    s = replace(QUICK, encoder=str(clip), epochs=1)
    train_retriever(data, tmp_path / "r", None, s, "cpu", tracker)
    assert [step for key, _, step in written if key == "loss"] == [1, 2, 3]
    assert [step for key, _, step in written if key == "val/mrr"] == [3]
    with pytest.raises(UserError, match="tracker: got 'excel'"):
        open_tracker("excel", tmp_path)


def test_no_pairs(clip: Path, data: list, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pairs"):
        train_retriever(data, tmp_path / "r", "pathology", replace(QUICK, encoder=str(clip)))


def sharded_training(clip: Path) -> dict[str, Any]:
    """A small training on made-up pictures, by as many processes as the environment says."""
    towers = load_towers(str(clip))
    pixels = torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = [f"There is nodule {n % 9}." for n in range(11)]
    s = replace(QUICK, batch_size=6, chunk=2, epochs=2, crop=0.9)
    result = train_towers(towers, Pairs(texts, pixels), s, device="cpu")
    total = sum(float(p.detach().double().abs().sum()) for p in towers.model.parameters())
    return {"losses": result["losses"], "total": total}


CHILD = """
import json, sys
from test_retrieval_training import sharded_training
print(json.dumps(sharded_training(sys.argv[1])))
"""


def test_two_processes_train_like_one(clip: Path) -> None:
    """gloo on CPU: the loss sees the whole batch, gradients add up to the single process's."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *filter(None, sys.path)]
    base = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(clip)],
            text=True,
            env={**base, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]
    alone = sharded_training(clip)
    outputs = [child.communicate(timeout=400) for child in children]
    assert all(child.returncode == 0 for child in children), outputs
    for out, _ in outputs:  # every process ends with the same weights
        found = json.loads(out.strip().splitlines()[-1])
        assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert found["total"] == pytest.approx(alone["total"], rel=1e-5)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
