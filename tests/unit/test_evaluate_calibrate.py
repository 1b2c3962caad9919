"""The parameter of a selection rule: fitted on half of the patients, checked on the others."""

import numpy as np
import pytest

from mmedrag.evaluation.calibrate import PARAMETERS, Looked, fit, headline, write_recipe
from mmedrag.records.records import Hit
from mmedrag.retrieval.select import RuleSpec
from mmedrag.runtime import config

HITS = 8


def pictures(rng, patients, right, k=HITS):
    """``right``: similarities -> P(agrees). Two pictures of each patient, who agree alike."""
    found = []
    for i in range(2 * patients):
        scores = np.sort(rng.uniform(0.2, 1, k))[::-1]
        agrees = (rng.random(k) < right(scores)).astype(float)
        found.append(Looked(f"p{i // 2}", scores.tolist(), agrees))
    return found


def test_what_no_parameter_reaches_is_rarely_claimed():
    """Of 200 draws in which three of four references agree whatever their similarity, at most one
    in twenty is told that four of five do."""
    rng = np.random.default_rng(1)
    claimed = sum(
        fit(pictures(rng, 60, lambda s: 0.75), "calibrated", 0.8)["threshold"] is not None
        for _ in range(200)
    )
    assert claimed <= 10


@pytest.mark.parametrize(
    "rule", ["calibrated", "score_floor", "log_ratio", "top1_ratio", "fixed_k"]
)
def test_every_rule_keeps_its_word_on_patients_that_nobody_fitted(rule, tmp_path):
    """References agree the more the nearer they are to the best; the parameter that is found
    keeps the aim on pictures of other patients, and a useful share of the references."""
    rng = np.random.default_rng(2)

    def right(scores):
        return np.where((scores > 0.75) & (scores > 0.8 * scores[0]), 0.95, 0.5)

    found = fit(pictures(rng, 300, right), rule, 0.8)
    name = PARAMETERS[rule]
    assert found[name] is not None and next(iter(found)) == "held_out"
    assert found["held_out"]["low"] < found["held_out"]["reached"] < found["held_out"]["high"]
    said = headline(found).splitlines()
    assert f"{found['held_out']['reached']:.3f} [" in said[0] and f"{name} = " in said[1]
    path = tmp_path / "kept.toml"
    write_recipe(path, found | {"split": "val", "measure": "m", "level": 0.75})
    spec = RuleSpec(**config.load(str(path))["selection"])
    assert spec.rule == rule and spec.params[name] == pytest.approx(found[name])
    kept = agreed = 0
    for picture in pictures(rng, 400, right):
        hits = [Hit(id=str(i), text="", score=s, rank=i) for i, s in enumerate(picture.scores)]
        count = len(spec(hits).kept)
        kept, agreed = kept + count, agreed + picture.agrees[:count].sum()
    assert agreed / kept > 0.77
    assert kept > 400


def test_a_rule_that_is_not_reached_writes_no_recipe(tmp_path):
    found = fit(pictures(np.random.default_rng(3), 40, lambda s: 0.3), "log_ratio", 0.8)
    assert found["gamma"] is None and found["held_out"]["reached"] is None
    assert "no gamma of log_ratio reaches precision 0.8" in headline(found)
    write_recipe(tmp_path / "r.toml", found | {"split": "val", "measure": "m", "level": 0.75})
    assert not (tmp_path / "r.toml").exists()
    assert fit([], "calibrated", 0.8)["threshold"] is None


def test_few_patients_cannot_claim(tmp_path):
    """All agree, of three patients in the fitted half: that is no certainty of four in five."""
    few = pictures(np.random.default_rng(4), 5, lambda s: 1.0)
    assert fit(few, "score_floor", 0.8)["floor"] is None
