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
from mmedrag.retrieval.train import open_tracker, pairs_of, train_retriever, train_towers, usable
from mmedrag.retrieval.trainer import (
    EpochSteps,
    Pairs,
    RetrieverTrainer,
    StepPixels,
    Steps,
    TwoTowers,
    arguments,
    crop,
    learning_rate,
)
from mmedrag.runtime.processes import Processes
from mmedrag.runtime.training import Clock
from retrieval_tools import make_data, tiny_clip, tiny_open_clip, tiny_siglip

pytestmark = pytest.mark.model
QUICK = RetrieverTraining(batch_size=16, chunk=16, epochs=4, lr=3e-3, save_every=2, weight_decay=0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list:
    base = tmp_path_factory.mktemp("data")
    train = make_data(base / "train", 40)
    val = make_data(base / "val", 12, seed=1, split="val", first=60)
    return [train, val]


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

    def encode(chunk: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return towers[0](chunk[0]), towers[1](chunk[1])

    parameters = [*towers[0].parameters(), *towers[1].parameters(), scale]
    chunks = list(zip(x.split(chunk), y.split(chunk), strict=True))
    torch.manual_seed(5)
    value = loss(*(torch.cat(side) for side in zip(*map(encode, chunks), strict=True)))
    value.backward()
    plain = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    after_plain = torch.rand(1)
    for p in parameters:
        p.grad = None
    torch.manual_seed(5)
    cached = cached_backward(encode, chunks, loss)
    assert torch.rand(1) == after_plain  # the second pass has not moved the random state
    assert float(cached) == pytest.approx(float(value.detach()), abs=1e-6)
    for p, expected in zip(parameters, plain, strict=True):
        assert p.grad is not None
        assert (p.grad - expected).abs().max() <= 1e-5
    assert max(float(g.abs().max()) for g in plain) > 1e-3  # there was something to compare


def trainer_of(towers: Any, pairs: Pairs, s: RetrieverTraining, folder: Path) -> RetrieverTrainer:
    steps = Steps(pairs, s)
    return RetrieverTrainer(TwoTowers(towers, s), arguments(folder, steps, False, "cpu"), steps)


@pytest.mark.parametrize("build", [tiny_clip, tiny_siglip, tiny_open_clip])
def test_cached_step_equals_plain_step_on_real_towers(
    build: Any, data: list, tmp_path: Path
) -> None:
    build(tmp_path / "m")
    gradients = []
    for chunk in (16, 3):
        towers = load_towers(str(tmp_path / "m"))
        pairs = pairs_of(usable(data, None, "train")[:16], towers)
        trainer = trainer_of(towers, pairs, replace(QUICK, chunk=chunk), tmp_path / "run")
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(trainer.model, trainer.train_dataset[0])
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
    plan = list(Steps(pairs, s))
    assert [len(step.pairs) for step in plan] == [10, 10, 10, 7] * 2
    for epoch in (plan[:4], plan[4:]):
        assert sorted(i for step in epoch for i in step.pairs) == list(range(37))
    assert plan[0].pairs != plan[4].pairs
    resumed = Steps(pairs, s)[5]
    assert resumed.pairs == plan[5].pairs
    assert torch.equal(resumed.crops, plan[5].crops)
    assert torch.equal(resumed.windows, plan[5].windows)
    short = Steps(pairs, replace(s, max_steps=6))
    assert [list(EpochSteps(short, Clock(epoch))) for epoch in (0, 1)] == [[0, 1, 2, 3], [4, 5]]


def test_processes_share_every_batch() -> None:
    """Their parts, in order, are the batch; also of the last one, which does not divide evenly."""
    pixels = torch.arange(37.0)[:, None, None, None].expand(37, 3, 2, 2)
    steps = Steps(Pairs([str(n) for n in range(37)], pixels), replace(QUICK, batch_size=10))
    parts = [StepPixels(steps, Processes(rank, 3)) for rank in range(3)]
    for number in (0, 3):
        read = [part[number]["pixels"][:, 0, 0, 0] for part in parts]
        assert torch.cat(read).tolist() == steps[number].pictures
        assert max(map(len, read)) - min(map(len, read)) <= 1


def test_warm_up_and_cosine_end_where_the_run_ends() -> None:
    """Released: 10,000 warm-up steps for runs of 1080 to 2160, the cosine never started (B2)."""
    pairs = Pairs(["x"] * 7000, torch.zeros(0))
    total = len(Steps(pairs, replace(QUICK, batch_size=1024, epochs=360)))
    assert total == 2520  # 7 batches an epoch, the partial one too
    rates = [learning_rate(step, total, 0.1) for step in range(total)]
    assert max(rates) == 1.0 and rates.index(1.0) == 251
    assert rates[0] == pytest.approx(1 / 252)
    assert rates[(252 + total) // 2] == pytest.approx(0.5, abs=0.01)
    assert rates[-1] < 1e-5
    released = [learning_rate(step, 2160, 10_000) for step in range(2160)]
    assert max(released) == pytest.approx(0.216)


def test_the_optimiser_is_open_clip_s(clip: Path, tmp_path: Path) -> None:
    """AdamW; gains, biases and the scale are not decayed; the rate is the schedule's."""
    pairs = Pairs(["There is nodule.", "Normal."] * 4, torch.randn(8, 3, 32, 32))
    s = replace(QUICK, batch_size=2, epochs=2, weight_decay=0.3, warmup=0.25, beta2=0.97, eps=1e-7)
    trainer = trainer_of(load_towers(str(clip)), pairs, s, tmp_path)
    trainer.train()
    decayed, plain = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert min(p.ndim for p in decayed["params"]) == 2
    assert {p.ndim for p in plain["params"]} == {0, 1}
    assert (decayed["betas"], decayed["eps"]) == ((0.9, 0.97), 1e-7)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert rates == pytest.approx([s.lr * learning_rate(n, 8, 0.25) for n in range(8)])


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
    assert not (tmp_path / "r" / "checkpoints").exists()
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
    with pytest.raises(UserError, match="holds a run with other settings"):
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


@pytest.mark.parametrize("freeze", ["image", "text"])
def test_a_frozen_tower_is_cached_too(freeze: str, clip: Path) -> None:
    """The tower without gradients takes no part in the second pass."""
    after = []
    for chunk in (8, 3):
        towers = load_towers(str(clip))
        pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        pairs = Pairs([f"There is nodule {n}." for n in range(8)], pixels)
        s = replace(QUICK, batch_size=8, chunk=chunk, epochs=2, freeze=freeze)
        train_towers(towers, pairs, s, device="cpu")
        after.append({k: v.clone() for k, v in towers.model.state_dict().items()})
    assert all(torch.allclose(after[0][k], after[1][k], atol=1e-5) for k in after[0])


def test_scale_stays_within_the_released_clamp(clip: Path) -> None:
    towers = load_towers(str(clip))
    pairs = Pairs(["There is nodule.", "Normal."], torch.randn(2, 3, 32, 32))
    s = replace(QUICK, batch_size=2, init_scale=4.6, lr=1.0, warmup=0.0, epochs=3)
    train_towers(towers, pairs, s, device="cpu")
    assert 0 <= float(towers.model.logit_scale.detach()) <= MAX_LOG_SCALE + 1e-6


def test_patience_ends_a_training_and_the_best_weights_are_kept(clip: Path) -> None:
    """Scores as given, one an epoch: the fourth validation is the second without a better one."""
    scores = iter([0.2, 0.5, 0.4, 0.3, 0.9])
    towers, kept = load_towers(str(clip)), {}
    pairs = Pairs(["There is nodule."] * 4 + ["Normal."] * 4, torch.randn(8, 3, 32, 32))

    def validate() -> dict[str, float]:
        value = next(scores)
        kept[value] = {k: v.clone() for k, v in towers.model.state_dict().items()}
        return {"value": value}

    s = replace(QUICK, batch_size=8, epochs=5, patience=2)
    result = train_towers(towers, pairs, s, validate=validate, device="cpu")
    assert [row["value"] for row in result["history"]] == [0.2, 0.5, 0.4, 0.3]
    assert (result["steps"], result["best_step"]) == (4, 2)
    now = towers.model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in kept[0.5].items())
    assert any(not torch.equal(now[k], v) for k, v in kept[0.3].items())


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


def test_a_loss_that_is_no_number_ends_the_training(clip: Path) -> None:
    pairs = Pairs(["There is nodule.", "Normal."], torch.full((2, 3, 32, 32), float("nan")))
    with pytest.raises(UserError, match="the loss at step 1 is nan, expected a finite number"):
        train_towers(load_towers(str(clip)), pairs, replace(QUICK, batch_size=2), device="cpu")


def test_what_an_earlier_version_left_unfinished_is_refused(
    clip: Path, data: list, tmp_path: Path
) -> None:
    (tmp_path / "r" / "checkpoint").mkdir(parents=True)
    with pytest.raises(UserError, match="an earlier version left unfinished"):
        train_retriever(data, tmp_path / "r", None, replace(QUICK, encoder=str(clip)), "cpu")


def test_killed_while_the_model_is_written(
    clip: Path, data: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint stands, no step is taken again, and the result is that of a whole run."""
    from mmedrag.retrieval import train

    s = replace(QUICK, encoder=str(clip), max_steps=5)  # ends inside an epoch
    whole = train_retriever(data, tmp_path / "w", None, s, "cpu")

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_train_ids", die)
        with pytest.raises(Killed):
            train_retriever(data, tmp_path / "b", None, s, "cpu")
    seen: list[int] = []
    broken = train_retriever(
        data, tmp_path / "b", None, s, "cpu", progress=lambda done, total: seen.append(done)
    )
    assert not seen and {**broken, "out": ""} == {**whole, "out": ""}
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("w", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)


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


# --- the command line -------------------------------------------------------------------------


def options(out: Path, data: Path, *changes: str) -> list[str]:
    given = [part for change in changes for part in ("--set", change)]
    return [str(data), "--out", str(out), "--domain", "radiology", "--device", "cpu", *given]


def command(*words: str) -> dict[str, Any]:
    """``train retriever`` in this process."""
    from click.testing import CliRunner

    from mmedrag.cli.train import noun

    done = CliRunner().invoke(noun, ["retriever", "--json", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark as ``data phantom`` draws it."""
    from mmedrag.phantom import build_benchmark

    folder = tmp_path_factory.mktemp("drawn") / "data"
    build_benchmark(folder, studies=24, seed=11)
    return folder


LOCAL = {"clip": tiny_clip, "siglip": tiny_siglip, "open_clip": tiny_open_clip}
DOMAINS = ("radiology", "ophthalmology", "pathology")
ENCODERS = ["embedded", *(f"embedded:retriever-{name}" for name in DOMAINS), *LOCAL]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_kind_of_encoder_is_trained(
    encoder: str, dtype: str, drawn: Path, tmp_path: Path
) -> None:
    """The shipped weights are stored in half precision; they are trained in single."""
    if make := LOCAL.get(encoder):
        encoder = str(make(tmp_path / encoder))
    changes = ("epochs=3", f"encoder={encoder}", f"dtype={dtype}")
    result = command(*options(tmp_path / "r", drawn, *changes))
    assert result["steps"] == 3 and result["train_pairs"] > 8
    assert 0 < result["loss"] < 5 and 0 < result["metrics"]["mrr"] <= 1
    assert result["dtype"] in (("float32", "bfloat16") if dtype == "auto" else (dtype,))
    start, end = (load_towers(spec).model.state_dict() for spec in (encoder, str(tmp_path / "r")))
    assert set(start) == set(end)
    assert {v.dtype for v in end.values() if v.is_floating_point()} == {torch.float32}
    assert max((end[k].float() - start[k].float()).abs().max() for k in end) > 1e-5
    assert load_encoder(str(tmp_path / "r")).dim == load_encoder(encoder).dim


def test_two_commands_train_like_one(drawn: Path, tmp_path: Path) -> None:
    """gloo on CPU. A part of the batch fits into a chunk here, so DDP makes the one pass; the last
    batch does not divide evenly, so the processes differ in what they encode."""
    changes = ("epochs=2", "batch_size=5", "lr=1e-3", "seed=3")
    alone = command(*options(tmp_path / "one", drawn, *changes))
    assert alone["train_pairs"] % 5 not in (0, 1) and alone["steps"] > 4
    paths = os.pathsep.join(filter(None, sys.path))
    base = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    words = ["-m", "mmedrag", "train", "retriever", "--json"]
    running = [
        subprocess.Popen(
            [sys.executable, *words, *options(tmp_path / "two", drawn, *changes)],
            env={**base, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=400) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    (told,) = [out for out, _ in said if out.strip()]  # one JSON, of the first process
    for found in [json.loads(told)]:
        assert (found["steps"], found["best_step"]) == (alone["steps"], alone["best_step"])
        assert found["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert found["metrics"] == pytest.approx(alone["metrics"], abs=1e-4)
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    start = load_towers("embedded").model.state_dict()
    moved = max(float((one[k] - start[k].float()).abs().max()) for k in one)
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-2 * moved
    assert not (tmp_path / "two" / "checkpoints").exists()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
