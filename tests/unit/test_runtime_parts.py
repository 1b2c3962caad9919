"""Draws, the cache folder, progress and model cards: one of each, and what it promises."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mmedrag.records import UserError
from mmedrag.runtime import (
    Figures,
    ModelCard,
    cache_folder,
    each,
    named_random,
    numpy_rng,
    python_rng,
    seeded_int,
    seeded_share,
)


def test_draws_are_those_that_files_already_made_were_drawn_with() -> None:
    """Each line is the formula of one use as it was written out before there was one."""

    def head(text: str, size: int) -> int:
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big")

    for seed, name in ((0, "p1"), (11, "é"), (-3, "a/b")):
        assert seeded_int(seed, name) == head(f"{seed}\0{name}", 4) >> 1  # noise of a condition
        assert seeded_share(seed, name) == head(f"{seed}:{name}", 8) / 2**64  # splits
        assert seeded_int(seed, "vary", name, joint=":", bits=64) == head(f"{seed}:vary:{name}", 8)
        assert seeded_int(seed, name, joint="|", bits=63) == head(f"{seed}|{name}", 8) >> 1
        assert seeded_int(name, bits=1) == head(name, 1) >> 7  # halves of a calibration
        said = random.Random(f"{seed}/{name}").random()
        assert named_random(seed, name).random() == said  # drawn answers, benchmark pictures
    assert python_rng(5).random() == random.Random(5).random()
    assert numpy_rng(7).random() == np.random.default_rng(7).random()
    assert numpy_rng(7, 2).random() == np.random.default_rng([7, 2]).random()
    assert numpy_rng(2**40).random() == np.random.Generator(np.random.PCG64(2**40)).random()


def test_draws_are_even_and_names_are_kept_apart() -> None:
    shares = [seeded_share(0, f"patient {n}") for n in range(4000)]
    assert all(0 <= share < 1 for share in shares)
    assert np.histogram(shares, 10, (0, 1))[0] == pytest.approx(400, abs=80)
    assert seeded_int(0, "a", "b") != seeded_int(0, "ab") != seeded_int(0, "b", "a")


def test_torch_draws_do_not_touch_the_global_stream() -> None:
    torch = pytest.importorskip("torch")
    from mmedrag.runtime import torch_rng

    before = torch.random.get_rng_state()
    assert torch.equal(
        torch.randperm(9, generator=torch_rng(3)), torch.randperm(9, generator=torch_rng(3))
    )
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_rule_for_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mmedrag.evaluation.metrics.text import wordnet_folder
    from mmedrag.preference.dpo.cache import default_folder

    monkeypatch.delenv("NLTK_DATA", raising=False)
    monkeypatch.setenv("MMEDRAG_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for expected in (tmp_path / "own", tmp_path / "xdg" / "mmedrag", tmp_path / ".cache/mmedrag"):
        assert cache_folder() == expected
        assert default_folder() == expected / "dpo"
        assert wordnet_folder() == expected / "nltk_data" / "corpora" / "wordnet"
        if expected.name == "own":
            monkeypatch.setenv("MMEDRAG_CACHE", "")
        else:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
            monkeypatch.setenv("HOME", str(tmp_path))


def test_progress_of_a_loop_ends_where_the_loop_does(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mmedrag")
    assert list(each("abc", "letters")) == ["a", "b", "c"]
    assert [r.getMessage().split(",")[0] for r in caplog.records] == [
        "letters: 0 of 3",
        "letters: 3 of 3",
    ]


def test_a_training_tells_its_steps_and_logs_what_the_trainer_logs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = pytest.importorskip("mmedrag.runtime.training", reason="needs transformers")
    caplog.set_level("INFO", logger="mmedrag")
    steps: list[tuple[int, int]] = []
    tell = training.Steps(lambda *step: steps.append(step), ("loss", "margin"))
    state = SimpleNamespace(global_step=2, max_steps=2, is_world_process_zero=True)
    tell.on_log(None, state, None, logs={"loss": 0.5, "margin": 0.25, "epoch": 1})
    tell.on_step_end(None, state, None)
    tell.on_log(None, state, None, logs={"train_runtime": 3.0})
    with pytest.raises(UserError, match="the loss at step 2 is nan"):
        tell.on_log(None, state, None, logs={"loss": float("nan"), "margin": 0.0})
    state.is_world_process_zero = False
    tell.on_log(None, state, None, logs={"loss": 0.5, "margin": 0.25})
    tell.on_step_end(None, state, None)
    said = [r.getMessage() for r in caplog.records]
    assert said == ["step 2 of 2: loss 0.5000 margin 0.2500"] and steps == [(2, 2)]


def test_a_model_card_says_all_of_it(tmp_path: Path) -> None:
    figures = Figures("On 3 pictures:", ("metric", "value"), [("mrr", 0.51239), ("gap", None)])
    ModelCard(
        title="Retriever",
        what="An encoder.",
        facts=("10 pairs",),
        figures=(figures,),
        settings={"seed": 1, "pattern": "a|b"},
        licence="CC0-1.0",
        head={"library_name": "peft"},
    ).write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: peft\n---\n\n# Retriever\n\nAn encoder. ")
    for line in (
        "An encoder. Research software, not a medical device.",
        "- 10 pairs",
        "- Training rows: `train_ids.jsonl`",
        "- Licence: CC0-1.0",
        "| mrr | 0.5124 |",
        "| gap | – |",
        "| pattern | a\\|b |",
    ):
        assert line in text.split("\n"), line
