"""A run on a real (random) model that stops midway ends with the same bytes, p_yes included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.pipeline.run import RunSettings, run_conditions
from mmedrag.records import ConditionSpec
from mmedrag.records.records import Trace, UserError
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import read_jsonl

pytestmark = pytest.mark.model
PLANS = {
    "clean": ConditionSpec("none"),
    "own": ConditionSpec("own"),
    "noise": ConditionSpec("own", "additive"),
}
SETTINGS = RunSettings(task="vqa", chunk=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mmedrag.answering.generators.random_model import random_llava

    return random_llava(tmp_path_factory.mktemp("model") / "m")


def pipeline(model: Path) -> Pipeline:
    from mmedrag.answering.generators.hf import HFGenerator

    return Pipeline(rule=None, generator=HFGenerator(model, device="cpu", dtype="float32"))


def test_stopped_run_goes_on_to_the_same_bytes(
    small_data: Path, tmp_path: Path, model: Path
) -> None:
    data = DataFolder(small_data)
    run_conditions(pipeline(model), data, PLANS, tmp_path / "whole", SETTINGS)
    stopped = tmp_path / "stopped"
    for calls in (1, 2, 1):
        asked = pipeline(model)
        inner, left = asked.generator.generate, [calls]  # type: ignore[union-attr]

        def stop(requests: Sequence[Any], inner: Any = inner, left: list = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return inner(requests)

        asked.generator.generate = stop  # type: ignore[union-attr, method-assign]
        with pytest.raises(KeyboardInterrupt):
            run_conditions(asked, data, PLANS, stopped, SETTINGS)
    run_conditions(pipeline(model), data, PLANS, stopped, SETTINGS)
    for name in PLANS:
        files = [at / name / "traces.jsonl" for at in (tmp_path / "whole", stopped)]
        assert files[0].read_bytes() == files[1].read_bytes()
        rows = [json.loads(line) for line in files[0].read_text().splitlines()]
        assert all(0 < row["answer"]["p_yes"] < 1 for row in rows)


def test_vision_features_are_shared_between_conditions(
    small_data: Path, tmp_path: Path, model: Path
) -> None:
    asked = pipeline(model)
    run_conditions(asked, DataFolder(small_data), PLANS, tmp_path / "r", RunSettings(task="vqa"))
    facts = asked.generator.facts()  # type: ignore[union-attr]
    # 12 images for 48 clean rows, and a noisy copy of each for the 24 rows that see noise
    assert facts["vision_encoded"] == 12 + 12


def test_conditions_together_are_the_conditions_one_by_one(
    small_data: Path, tmp_path: Path, model: Path
) -> None:
    """Shared pictures, beginnings and batches change no answer of a row answered alone."""
    data, settings = DataFolder(small_data), RunSettings(task="vqa")
    run_conditions(pipeline(model), data, PLANS, tmp_path / "together", settings)
    for name, plan in PLANS.items():
        alone = pipeline(model)
        alone.generator.batch_size = 1  # type: ignore[union-attr]
        run_conditions(alone, data, {name: plan}, tmp_path / "alone", settings)
        one, other = (
            list(read_jsonl(tmp_path / way / name / "traces.jsonl", Trace))
            for way in ("together", "alone")
        )
        assert len(one) > 0
        for a, b in zip(one, other, strict=True):
            assert a.answer is not None and b.answer is not None
            assert (a.example_id, a.condition, a.answer.text) == (
                b.example_id,
                b.condition,
                b.answer.text,
            )
            assert a.answer.p_yes == pytest.approx(b.answer.p_yes, abs=1e-5)


def test_a_changed_input_is_refused(small_data: Path, tmp_path: Path, model: Path) -> None:
    asked, data, out = pipeline(model), DataFolder(small_data), tmp_path / "r"
    run_conditions(asked, data, PLANS, out, SETTINGS, inputs={"model": model})
    (small_data / "images" / "s00.png").write_bytes(b"")
    with pytest.raises(UserError, match="other images"):
        run_conditions(asked, data, PLANS, out, SETTINGS, inputs={"model": model})
