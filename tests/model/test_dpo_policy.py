"""The policy's log-probabilities: against a naive loop, side by side, gradients, caches, TRL."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpo_tools import make_model, make_pairs, quick
from mmedrag.answering.generators.inputs import Inputs
from mmedrag.models.load import load_model
from mmedrag.preference.dpo.cache import FeatureStore
from mmedrag.preference.dpo.collate import Collator, LengthGrouped
from mmedrag.preference.dpo.encode import EncodedPair, PairTokenizer
from mmedrag.preference.dpo.loss import chosen_nll, dpo_loss, token_logps
from mmedrag.preference.dpo.policy import as_reference, install, linear_targets, vision_features
from mmedrag.preference.dpo.prepare import image_tokens, pixel_reader
from mmedrag.preference.dpo.train import _policy
from mmedrag.records.records import Noise, Prompt, Side, UserError
from mmedrag.runtime.training import Clock

pytestmark = pytest.mark.model


class Setup:
    """A random model with everything that turns pairs into log-probabilities."""

    def __init__(self, folder: Path, **settings) -> None:
        self.loaded = load_model(folder / "model", "cpu", "float32")
        self.naive = load_model(folder / "model", "cpu", "float32").model
        self.inputs = Inputs(self.loaded.model, self.loaded.processor, 1, 0)
        self.pairs = make_pairs(folder / "data", 6)
        self.tokenizer = PairTokenizer(self.inputs, image_tokens(self.loaded), 512)
        self.encoded = self.tokenizer(self.pairs)
        self.pixels = pixel_reader(self.inputs)
        install(self.loaded.model)
        self.settings = quick(**settings)
        self.policy = _policy(self.loaded.model, self.settings, None, "base")

    def logps(self, encoded=None, **options) -> torch.Tensor:
        collator = Collator(self.pixels, pad=self.inputs.pad_id, **options)
        batch = collator.part(encoded or self.encoded)
        batch.pop("kinds")
        return self.policy(**batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dpo")
    make_model(path / "model")
    return path


@pytest.fixture
def setup(folder: Path) -> Setup:
    return Setup(folder)


def naive(setup: Setup, side) -> float:
    """One sequence through the plain model: Σ log softmax at every answer token."""
    ids = torch.tensor([[*side.prompt, *side.answer]])
    with torch.no_grad():
        logits = setup.naive(input_ids=ids, pixel_values=setup.pixels([side.view])).logits[0]
    total = 0.0
    for k, token in enumerate(side.answer):
        total += torch.log_softmax(logits[len(side.prompt) + k - 1].double(), -1)[token].item()
    return total


@pytest.mark.parametrize("share", [True, False])
def test_logps_equal_a_naive_loop(setup: Setup, share: bool) -> None:
    found = setup.logps(share=share).tolist()
    sides = [p.chosen for p in setup.encoded] + [p.rejected for p in setup.encoded]
    assert found == pytest.approx([naive(setup, side) for side in sides], abs=2e-5)


def test_an_end_that_does_not_count_is_left_out(setup: Setup) -> None:
    whole = setup.logps()
    tokenizer = PairTokenizer(setup.inputs, image_tokens(setup.loaded), 512, count_end=False)
    bare = tokenizer(setup.pairs)
    sides = [p.chosen for p in setup.encoded] + [p.rejected for p in setup.encoded]
    short = [p.chosen for p in bare] + [p.rejected for p in bare]
    end = setup.inputs.tokenizer.eos_token_id
    assert [side.answer for side in sides] == [(*side.answer, end) for side in short]
    found = setup.logps(bare).tolist()
    assert found == pytest.approx([naive(setup, side) for side in short], abs=2e-5)
    assert all(part > all_of_it for part, all_of_it in zip(found, whole.tolist(), strict=True))


def questions_of_one_picture(setup: Setup) -> list[EncodedPair]:
    """Three pairs about one picture with the same references, one of them against noise."""
    pairs = []
    for n, asked in enumerate(("Is it there?", "Is it on the left?", "How many are there?")):
        pair = setup.pairs[2 if n else 0].model_copy(deep=True)  # copy, and cross_modal once
        pair.id, pair.root = f"{pair.id}-{n}", setup.pairs[0].root
        for side in (pair.chosen, pair.rejected):
            side.image = "0.png"
            side.prompt.text = f"Reference: 1. there is a finding on the left\n{asked}"
        pairs.append(pair)
    return setup.tokenizer(pairs)


def test_questions_of_one_picture_share_a_row(setup: Setup) -> None:
    """Picture and references once for three questions of two answers each, and once in noise;
    every log-probability and the gradient stay what each side alone gives."""
    pairs = questions_of_one_picture(setup)
    shared = Collator(setup.pixels, pad=setup.inputs.pad_id).part(pairs)
    alone = Collator(setup.pixels, pad=setup.inputs.pad_id, share=False).part(pairs)
    assert len(shared["input_ids"]) == 2 and len(alone["input_ids"]) == 6
    assert shared["input_ids"].numel() < 0.6 * alone["input_ids"].numel()
    found = setup.logps(pairs)
    sides = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    assert found.tolist() == pytest.approx([naive(setup, side) for side in sides], abs=2e-5)
    weights = [p for p in setup.policy.parameters() if p.requires_grad]
    for part in weights:
        torch.nn.init.normal_(part, std=0.1)
    weighted = torch.arange(6.0)
    one = torch.autograd.grad((setup.logps(pairs) * weighted).sum(), weights)
    other = torch.autograd.grad((setup.logps(pairs, share=False) * weighted).sum(), weights)
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_passes_hold_a_picture_s_pairs_together(setup: Setup) -> None:
    pairs = [*setup.encoded, *questions_of_one_picture(setup)]
    collator = Collator(setup.pixels, pad=setup.inputs.pad_id, tokens=200)
    parts = collator.cut(pairs)
    assert sorted(p.id for part in parts for p in part) == sorted(p.id for p in pairs)
    assert len(parts) > 1
    sizes = [collator.part(part)["input_ids"].numel() for part in parts]
    assert all(size <= 200 for size, part in zip(sizes, parts, strict=True) if len(part) > 1)


def test_cached_features_and_live_pixels_agree(setup: Setup, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, {})
    views = {s.view.key: s.view for p in setup.encoded for s in (p.chosen, p.rejected)}
    keys = sorted(views)[::2]  # some cached, some live in one batch
    store.append(keys, vision_features(setup.naive, setup.pixels([views[k] for k in keys])))
    assert torch.allclose(setup.logps(features=store), setup.logps(), atol=1e-5)


def test_features_are_what_the_model_projects(setup: Setup) -> None:
    pixels = setup.pixels([setup.encoded[0].chosen.view])
    with torch.no_grad():
        whole = setup.naive.get_image_features(pixels).pooler_output[0]
        ours = setup.naive.model.multi_modal_projector(vision_features(setup.naive, pixels))[0]
    assert torch.allclose(whole, ours, atol=1e-6)


def test_loss_is_ln2_before_the_first_step(setup: Setup) -> None:
    with torch.no_grad():
        policy = setup.logps()
        with as_reference(setup.policy):
            reference = setup.logps()
    value = dpo_loss(*policy.chunk(2), *reference.chunk(2), beta=0.1)[0].mean().item()
    assert abs(value - math.log(2)) < 1e-6


def test_dpo_loss_against_ten_lines() -> None:
    """−log σ(β·((a − c) − (b − d))) in plain Python floats."""
    rng = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(5, generator=rng, dtype=torch.float64) * 9 for _ in range(4))
    found, own, other = dpo_loss(a, b, c, d, beta=0.3)
    for i in range(5):
        inside = 0.3 * ((a[i].item() - c[i].item()) - (b[i].item() - d[i].item()))
        loss = (
            math.log1p(math.exp(-inside)) if inside > 0 else -inside + math.log1p(math.exp(inside))
        )
        assert found[i].item() == pytest.approx(loss, abs=1e-9)
        assert own[i].item() == pytest.approx(0.3 * (a[i] - c[i]).item())
        assert other[i].item() == pytest.approx(0.3 * (b[i] - d[i]).item())


def test_chosen_nll_is_the_mean_over_a_text_s_tokens() -> None:
    found = chosen_nll(torch.tensor([-6.0, -2.0]), torch.tensor([3, 1]))
    assert found.tolist() == [2.0, 2.0]


def test_changing_one_side_moves_that_side_alone(setup: Setup) -> None:
    """Image, noise and prompt of one side leave the other side's log-probability alone."""
    pair_at = 1  # resist: both sides start with the same image and prompt
    base = setup.logps().detach()
    for which, at in (("chosen", pair_at), ("rejected", len(setup.pairs) + pair_at)):
        for change in (
            {"image": "5.png"},
            {"noise": Noise(kind="blank", seed=0)},
            {"prompt": Prompt(template="t", text="Another question?")},
        ):
            pair = setup.pairs[pair_at].model_copy(deep=True)
            side: Side = getattr(pair, which)
            setattr(pair, which, side.model_copy(update=change))
            pair.root = setup.pairs[pair_at].root
            changed = list(setup.encoded)
            (changed[pair_at],) = setup.tokenizer([pair])
            moved = setup.logps(changed).detach()
            different = (moved - base).abs() > 1e-5
            assert different.nonzero().flatten().tolist() == [at], (which, change)


@pytest.mark.parametrize("projector", [False, True])
def test_gradient_reaches_adapters_and_projector_and_nothing_else(
    folder: Path, projector: bool
) -> None:
    setup = Setup(folder, train_projector=projector)
    for name, parameter in setup.policy.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide lora_A's gradient
            torch.nn.init.normal_(parameter, std=0.1)
    setup.logps().sum().backward()
    with_gradient = {
        n
        for n, p in setup.policy.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    trainable = {n for n, p in setup.policy.named_parameters() if p.requires_grad}
    assert with_gradient == trainable
    assert all("lora_" in n or "modules_to_save" in n for n in trainable)
    assert any("multi_modal_projector" in n for n in trainable) == projector
    assert not any("lm_head" in n or "vision_tower" in n for n in trainable)
    layers = {n.split(".lora_")[0] for n in trainable if "lora_" in n}
    assert len(layers) == 2 * 7  # every linear layer of both decoder layers


def test_reference_ignores_a_trained_projector_and_adapter(folder: Path) -> None:
    """B3: the released projector was shared with the reference, which therefore drifted."""
    setup = Setup(folder, train_projector=True)
    with torch.no_grad():
        with as_reference(setup.policy):
            before = setup.logps()
        for parameter in setup.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        moved = setup.logps()
        with as_reference(setup.policy):
            after = setup.logps()
    assert torch.equal(before, after)
    assert (moved - before).abs().min() > 1e-4


def test_each_distinct_image_is_encoded_once_a_step(setup: Setup, monkeypatch) -> None:
    """At most two images a pair where the released step encodes eight times."""
    seen = []
    tower = setup.loaded.model.model.vision_tower
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda p, **kw: seen.append(len(p)) or forward(p, **kw))
    setup.logps()
    kinds = [pair.kind for pair in setup.encoded]
    assert seen == [sum(2 if kind in ("cross_modal", "stage1") else 1 for kind in kinds)]


def test_token_logps_in_chunks(monkeypatch) -> None:
    """The vocabulary axis is chunked; values and gradients stay."""
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, requires_grad=True)
    head, targets = torch.nn.Linear(6, 17, bias=False), torch.randint(0, 17, (11,))
    whole = token_logps(hidden, head, targets)
    (gradient,) = torch.autograd.grad(whole.sum(), hidden)
    monkeypatch.setattr("mmedrag.preference.dpo.loss.CHUNK_LOGITS", 40)
    parts = token_logps(hidden, head, targets)
    (other,) = torch.autograd.grad(parts.sum(), hidden)
    assert torch.allclose(whole, parts, atol=1e-6) and torch.allclose(gradient, other, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(token_logps(hidden, head, targets), whole, atol=1e-6)


def test_batch_order() -> None:
    """A permutation, grouped, the same for the same epoch, another in the next one."""
    lengths = [(i * 37) % 101 for i in range(90)]
    clock = Clock()
    sampler = LengthGrouped(lengths, 8, clock, seed=1, group=True)
    first = list(sampler)
    assert sorted(first) == list(range(90)) and first == list(sampler)
    spread = [
        max(lengths[i] for i in first[s : s + 8]) - min(lengths[i] for i in first[s : s + 8])
        for s in range(0, 80, 8)
    ]
    assert max(spread) < 20
    clock.epoch = 1
    assert list(sampler) != first
    plain = LengthGrouped(lengths, 8, Clock(), seed=1, group=False)
    assert sorted(plain) == list(range(90))


def test_batch_order_keeps_a_picture_s_pairs_together() -> None:
    pictures = [f"p{i % 40}" for i in range(120)]
    lengths = [100 + i % 7 for i in range(120)]
    clock = Clock()
    sampler = LengthGrouped(lengths, 12, clock, seed=1, group=True, pictures=pictures)
    order = list(sampler)
    assert sorted(order) == list(range(120))
    for start in range(0, 120, 12):  # a batch of twelve: four pictures, three pairs each
        assert len({pictures[i] for i in order[start : start + 12]}) == 4
    clock.epoch = 1
    assert list(sampler) != order


def test_targets_leave_the_head_out(setup: Setup) -> None:
    names = linear_targets(setup.naive)
    assert "lm_head" not in names and "q_proj" in names and "down_proj" in names
    few = linear_targets(setup.naive, ("q_proj", "v_proj"))
    assert "q_proj" in few and "v_proj" in few and "down_proj" not in few
    with pytest.raises(UserError, match="no linear layer 'lm_head', there are down_proj"):
        linear_targets(setup.naive, ("q_proj", "lm_head"))


def test_trl_gives_the_same_loss(setup: Setup, tmp_path: Path) -> None:
    """Our step against TRL's own on the same rows: fails loudly when either side moves."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [replace(p, redraw=False) for p in setup.encoded]
    pad = setup.inputs.pad_id

    def collate(items):
        sides = [rows[i["index"]].chosen for i in items] + [
            rows[i["index"]].rejected for i in items
        ]
        longest = max(len(s.prompt) + len(s.answer) for s in sides)
        fill = [longest - len(s.prompt) - len(s.answer) for s in sides]
        return {
            "input_ids": torch.tensor(
                [[*s.prompt, *s.answer, *[pad] * n] for s, n in zip(sides, fill, strict=True)]
            ),
            "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in fill]),
            "completion_mask": torch.tensor(
                [
                    [0] * len(s.prompt) + [1] * len(s.answer) + [0] * n
                    for s, n in zip(sides, fill, strict=True)
                ]
            ),
            "pixel_values": setup.pixels([s.view for s in sides]),
        }

    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, target_modules=linear_targets(setup.naive))
    trainer = DPOTrainer(
        setup.naive,
        args=DPOConfig(
            output_dir=str(tmp_path),
            beta=0.3,
            report_to="none",
            use_cpu=True,
            bf16=False,
            remove_unused_columns=False,
            max_length=None,
            gradient_checkpointing=False,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list([{"index": i, "image": i} for i in range(len(rows))]),
        processing_class=setup.loaded.processor,
        peft_config=config,
    )
    theirs = dict(trainer.model.named_parameters())
    torch.manual_seed(3)
    for name, parameter in setup.policy.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
            theirs[name].data.copy_(parameter.data)
    loss = trainer.compute_loss(trainer.model, collate([{"index": i} for i in range(len(rows))]))
    policy = setup.logps()
    with torch.no_grad(), as_reference(setup.policy):
        reference = setup.logps()
    ours = dpo_loss(*policy.chunk(2), *reference.chunk(2), beta=0.3)[0].mean()
    assert abs(ours.item() - math.log(2)) > 0.01  # a loss worth comparing
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    margin = trainer._metrics["train"]["rewards/margins"][0]
    _, own, other = dpo_loss(*policy.chunk(2), *reference.chunk(2), beta=0.3)
    assert margin == pytest.approx((own - other).mean().item(), abs=1e-5)
