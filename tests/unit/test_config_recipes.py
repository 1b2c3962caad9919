"""The shipped recipes: every table fits its class, and says what the code says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mmedrag.answering.prompts import TemplateSet
from mmedrag.experiments.settings import AblationSettings, SweepSettings
from mmedrag.pipeline.run import RunSettings
from mmedrag.preference.dpo.settings import DpoTraining
from mmedrag.preference.pairs.build import PairSettings
from mmedrag.retrieval.select import RuleSpec
from mmedrag.retrieval.settings import RetrieverTraining
from mmedrag.runtime import config

CLASSES: dict[str, Any] = {
    "retriever": RetrieverTraining,
    "dpo": DpoTraining,
    "run": RunSettings,
    "pairs": PairSettings,
    "ablation": AblationSettings,
    "sweep": SweepSettings,
}
NAMES = ("default", "paper", "released")


def test_the_recipes_that_ship() -> None:
    assert set(NAMES) <= set(config.recipe_names())


@pytest.mark.parametrize("name", config.recipe_names())
def test_every_table_fits_its_class(name: str) -> None:
    for table, values in config.load(name).items():
        if table in CLASSES:
            config.settings(CLASSES[table], values, f"[{table}]")
        elif table == "selection":
            assert RuleSpec(**values).function
        elif table == "prompts":
            TemplateSet(values["set"])
        else:
            assert table in ("domain", "generator"), f"add [{table}] to this test"


def test_default_says_what_the_code_does() -> None:
    """When this fails, change recipes/default.toml together with the class."""
    tables = config.load("default")
    for name, cls in CLASSES.items():
        assert config.settings(cls, tables[name], name) == cls()
    assert RuleSpec(**tables["selection"]).resolved == RuleSpec().resolved


@pytest.mark.parametrize("name", NAMES)
def test_dpo_recipes_are_one(name: str) -> None:
    made = config.settings(DpoTraining, config.load(name)["dpo"], "[dpo]")
    assert made == DpoTraining.recipe(name)


def test_published_values() -> None:
    """Paper and released code disagree (docs/differences.md), and each has its recipe."""
    paper, released = (config.load(n) for n in ("paper", "released"))
    for recipe in (paper, released):
        dpo = config.settings(DpoTraining, recipe["dpo"], "[dpo]")
        assert (dpo.lora_r, dpo.lora_alpha, dpo.beta, dpo.epochs) == (128, 256, 0.1, 3)
        assert (dpo.schedule, dpo.warmup_ratio) == ("cosine", 0.03)
    assert (paper["dpo"]["learning_rate"], released["dpo"]["learning_rate"]) == (1e-7, 2e-7)
    of_paper, of_code = (
        config.settings(RetrieverTraining, r["retriever"], "") for r in (paper, released)
    )
    assert (of_paper.lr, of_paper.weight_decay, of_paper.batch_size) == (1e-3, 1e-2, 32)
    assert (of_code.lr, of_code.weight_decay, of_code.batch_size) == (1e-4, 0.2, 1024)
    assert of_code.warmup == 10_000 and of_code.epochs == of_paper.epochs == 360
    assert released["selection"] == {"rule": "top1_ratio", "threshold": 1.5, "k": 1}
    assert replace(PairSettings(), mode="released").mode == released["pairs"]["mode"]
