"""Whole tunings on a random LLaVA: learning, caches, stages, resuming, what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_tools import losses, make_model, make_pairs, quick
from mmedrag.preference.dpo.train import train_dpo
from mmedrag.records.records import Prompt, UserError

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dpo")
    make_model(path / "model")
    return path


@pytest.fixture(scope="module")
def first(home: Path):
    """One tuning that several tests look at: (pairs, result, folder)."""
    pairs = make_pairs(home / "data", 10)
    return pairs, train(home, "first", pairs), home / "first"


def train(home: Path, name: str, pairs=None, *, settings=None, **options):
    settings = settings or quick()
    pairs = pairs if pairs is not None else make_pairs(home / "data", 10)
    options = {"cache": home / "cache", **options}
    return train_dpo(pairs, home / "model", home / name, settings, **options)


def test_overfits_eight_pairs(home: Path) -> None:
    pairs = make_pairs(home / "eight", 8)
    settings = quick(batch_size=8, epochs=40, learning_rate=1e-2, log_steps=5, lora_r=16)
    result = train(home, "overfit", pairs, settings=settings)
    metrics = result["metrics"]
    assert metrics["rewards/accuracies"] == 1.0
    assert metrics["rewards/margins"] > 0.5
    for kind in ("cross_modal", "resist", "copy", "stage1"):
        assert metrics[f"rewards/accuracies/{kind}"] == 1.0


def test_sft_weight_adds_the_chosen_texts_likelihood(home: Path, first) -> None:
    """The loss starts at ln 2 plus the mean NLL per chosen token, and the chosen text gains."""
    pairs, *_ = first
    train(home, "sft", pairs, settings=quick(batch_size=10, sft_weight=0.5, epochs=8))
    lines = (home / "sft/training_log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert rows[0]["loss"] > math.log(2) + 0.1
    assert rows[-1]["logps/chosen"] > rows[0]["logps/chosen"] + 0.1
    with pytest.raises(UserError, match="sft_weight: got -1, expected at least 0"):
        quick(sft_weight=-1)


def test_first_loss_is_ln2_and_metrics_are_trl_s(first) -> None:
    _, result, folder = first
    assert losses(folder)[0] == pytest.approx(math.log(2), abs=1e-6)
    rows = [json.loads(x) for x in (folder / "training_log.jsonl").read_text().splitlines()]
    names = {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    }
    assert names <= rows[0].keys()
    assert any(key.startswith("rewards/margins/") for key in rows[0])
    assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert result["steps"] == 6 and result["pairs"] == 10
    assert result["kinds"] == {"copy": 2, "cross_modal": 3, "resist": 3, "stage1": 2}


def test_what_a_trained_folder_holds(first) -> None:
    pairs, _, folder = first
    held = {path.name for path in folder.iterdir()}
    assert held == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "result.json",
        "run.json",
        "train_ids.jsonl",
        "training_log.jsonl",
    }
    ids = [json.loads(x) for x in (folder / "train_ids.jsonl").read_text().splitlines()]
    assert [row["id"] for row in ids] == sorted(pair.id for pair in pairs)
    assert all(len(row["sha256"]) == 64 and row["patient"] for row in ids)
    card = (folder / "README.md").read_text()
    assert "10 preference pairs" in card and "not a medical device" in card
    assert str(folder.parent) not in card  # no path of this machine


def test_finished_run_is_not_repeated_and_caches_serve_the_next(home: Path, first) -> None:
    pairs, result, _ = first
    assert result["cache"]["features"]["computed"] > 0
    assert result["images_encoded_in_training"] == 0  # all vision work was done once, before
    again = train(home, "first", pairs)
    assert again["steps"] == result["steps"] and "seconds" not in again
    second = train(home, "second", pairs)
    assert second["cache"]["features"]["computed"] == 0
    assert second["cache"]["reference"] == {"found": 20, "computed": 0}
    assert losses(home / "second") == losses(home / "first")
    weights = [load_file(home / n / "adapter_model.safetensors") for n in ("first", "second")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_cache_is_invalid_when_anything_changes(home: Path, first, tmp_path: Path) -> None:
    """Text, template, noise, image bytes: each recomputes that side; weights: everything."""
    pairs, _, _ = first

    def computed(changed, model: str = "model", **options) -> tuple[int, int]:
        options = {"cache": home / "cache", "prepare_only": True, **options}
        made = train_dpo(changed, home / model, tmp_path / "x", quick(), **options)["cache"]
        return made["reference"]["computed"], made["features"]["computed"]

    def copies():
        found = [pair.model_copy(deep=True) for pair in pairs]
        for new, old in zip(found, pairs, strict=True):
            new.root = old.root
        return found

    assert computed(pairs) == (0, 0)
    text = copies()
    text[1].rejected.text = "something else"
    assert computed(text) == (1, 0)
    template = copies()
    template[1].chosen.prompt = Prompt(template="t/y@2", text="Really?")
    assert computed(template) == (1, 0)
    noise = copies()
    noise[0].rejected.noise.seed += 99
    assert computed(noise) == (1, 1)
    image = copies()
    other = home / "other"
    make_pairs(other, 1)
    (other / "1.png").write_bytes((other / "0.png").read_bytes())
    image[1].root = other
    assert computed(image)[0] == 2
    from mmedrag.answering.generators.random_model import random_llava

    random_llava(home / "model2", "tiny", seed=2)
    assert computed(pairs, "model2") == (20, len({p.id for p in pairs}) + 5)
    (home / "model2/chat_template.jinja").write_text(
        (home / "model2/chat_template.jinja").read_text().replace("USER", "HUMAN")
    )
    assert computed(pairs, "model2")[0] == 20


def test_cached_and_live_reference_agree(home: Path, first) -> None:
    pairs, result, _ = first
    live = train(home, "live", pairs, settings=quick(cache_reference=False, cache_features=False))
    assert live["live_reference"] and not result["live_reference"]
    assert live["images_encoded_in_training"] > 0
    assert losses(home / "live") == pytest.approx(losses(home / "first"), abs=1e-5)


def test_sharing_prefixes_changes_nothing(home: Path, first) -> None:
    pairs, _, _ = first
    train(home, "unshared", pairs, settings=quick(share_prefix=False, group_by_length=False))
    train(home, "shared", pairs, settings=quick(group_by_length=False))
    assert losses(home / "unshared") == pytest.approx(losses(home / "shared"), abs=1e-5)


def test_accumulation_equals_a_larger_batch(home: Path) -> None:
    pairs = make_pairs(home / "data", 8)
    train(home, "whole", pairs, settings=quick(batch_size=4))
    train(home, "halves", pairs, settings=quick(batch_size=2, accumulation=2))
    assert losses(home / "halves") == pytest.approx(losses(home / "whole"), abs=1e-5)


def test_batches_cut_into_passes_take_the_same_steps(home: Path, first) -> None:
    pairs, _, _ = first
    train(home, "cut", pairs, settings=quick(tokens_per_pass=1))
    assert losses(home / "cut") == pytest.approx(losses(home / "first"), abs=1e-5)


def test_killed_while_the_result_is_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint stands and no step is taken again, also where it is inside an epoch."""
    from mmedrag.preference.dpo import card

    pairs, settings = make_pairs(home / "data", 10), quick(max_steps=4)  # 3 steps an epoch
    train(home, "unbroken", pairs, settings=settings)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(card, "write", die)
        with pytest.raises(KeyboardInterrupt):
            train(home, "broken", pairs, settings=settings)
    seen: list[int] = []
    result = train(
        home, "broken", pairs, settings=settings, progress=lambda done, total: seen.append(done)
    )
    assert not seen and result["steps"] == 4 and result["resumed_from"] == "checkpoint-4"
    assert losses(home / "broken") == losses(home / "unbroken")
    weights = [load_file(home / n / "adapter_model.safetensors") for n in ("broken", "unbroken")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_second_stage(home: Path, first) -> None:
    """`init`: ln 2 again, against the first stage; `base`: the loss goes on from where it was."""
    pairs, _, folder = first
    init = train(home, "init", pairs, init_adapter=folder, reference="init")
    assert losses(home / "init")[0] == pytest.approx(math.log(2), abs=1e-5)
    train(home, "base", pairs, init_adapter=folder, reference="base")
    assert losses(home / "base")[0] < math.log(2) - 1e-3
    assert init["reference"] == "init"
    live = train(
        home,
        "init-live",
        pairs,
        init_adapter=folder,
        reference="init",
        settings=quick(cache_reference=False),
    )
    assert live["live_reference"]
    assert losses(home / "init-live") == pytest.approx(losses(home / "init"), abs=1e-5)
    assert not (home / "init-live" / "reference").exists()  # the frozen twin is not shipped
    with pytest.raises(UserError, match="needs an initial adapter"):
        train(home, "none", pairs, reference="init")


def test_projector_is_trained_kept_and_merged(home: Path) -> None:
    settings = quick(train_projector=True, projector_lr=1e-2)
    pairs = make_pairs(home / "data", 8)
    train(home, "projector", pairs, settings=settings)
    saved = load_file(home / "projector/adapter_model.safetensors")
    before = load_file(home / "model/model.safetensors")
    trained = {k: v for k, v in saved.items() if "multi_modal_projector" in k}
    assert len(trained) == 4
    for name, value in trained.items():
        original = before[name.removeprefix("base_model.model.").removeprefix("model.")]
        assert (value - original).abs().max() > 1e-3
    # a base-model answer is not touched by it, an adapted one is, and merging changes nothing
    from peft import PeftModel

    from mmedrag.models.load import load_model

    ids = torch.tensor([[1, *[3] * 16, 40, 41, 42]])
    pixels = torch.randn(1, 3, 32, 32)

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, pixel_values=pixels).logits

    adapted = PeftModel.from_pretrained(load_model(home / "model").model, home / "projector").eval()
    with_adapter = logits(adapted)
    with adapted.disable_adapter():
        without = logits(adapted)
    assert torch.equal(without, logits(load_model(home / "model").model.eval()))
    assert (with_adapter - without).abs().max() > 1e-3
    assert torch.allclose(logits(adapted.merge_and_unload()), with_adapter, atol=1e-4)


def test_released_recipe_redraws_noise(home: Path) -> None:
    """Its noise differs at every access, so neither features nor references of it are kept."""
    from mmedrag.preference.dpo.settings import DpoTraining

    pairs = make_pairs(home / "data", 8)
    settings = DpoTraining.recipe("released", epochs=1, lora_r=4, batch_size=4, log_steps=1)
    result = train(home, "released", pairs, settings=settings, cache=home / "cache-released")
    assert result["live_reference"] and "reference" not in result["cache"]
    assert result["cache"]["features"]["computed"] == 8  # clean images only
    assert result["images_encoded_in_training"] == 4  # the noisy ones, at each access
    assert losses(home / "released")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_redrawn_noise_differs_between_epochs_and_is_reproducible() -> None:
    from mmedrag.preference.dpo.encode import redrawn
    from mmedrag.records.records import Noise

    noise = Noise(kind="gaussian_clip", seed=5)
    assert redrawn(noise, 0) == redrawn(noise, 0) != redrawn(noise, 1)
    assert redrawn(noise, 0).kind == "gaussian_clip"


def test_recipes_are_the_published_values() -> None:
    from mmedrag.preference.dpo.settings import DpoTraining

    paper, released = DpoTraining.recipe("paper"), DpoTraining.recipe("released")
    assert (paper.lora_r, paper.lora_alpha, paper.beta, paper.epochs) == (128, 256, 0.1, 3)
    assert (paper.learning_rate, released.learning_rate) == (1e-7, 2e-7)
    assert (paper.schedule, paper.warmup_ratio, released.batch_size) == ("cosine", 0.03, 2)
    assert released.redraw_noise and not paper.redraw_noise
    with pytest.raises(UserError, match="best"):
        DpoTraining.recipe("best")
    with pytest.raises(UserError, match="unknown key 'lr'"):
        DpoTraining.recipe("paper", lr=1)
    with pytest.raises(UserError, match="beta: got 0"):
        DpoTraining(beta=0)


def test_gradient_checkpointing_gives_the_same_losses(home: Path, first) -> None:
    pairs, _, _ = first
    train(home, "checkpointing", pairs, settings=quick(gradient_checkpointing=True))
    assert losses(home / "checkpointing") == pytest.approx(losses(home / "first"), abs=1e-6)
