"""The optional clinical metrics: absent package, absent weights, and what they return."""

import sys
import types

import pytest

from mmedrag.evaluation.metrics import clinical


@pytest.fixture(autouse=True)
def fresh():
    clinical._scorer.cache_clear()
    yield
    clinical._scorer.cache_clear()


def radeval(monkeypatch, build):
    module = types.ModuleType("radeval")
    module.RadEval = build
    monkeypatch.setitem(sys.modules, "RadEval", module)
    monkeypatch.setitem(sys.modules, "radeval", module)


def test_without_the_package_each_metric_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", None)
    found, missing = clinical.clinical(["a"], ["a"])
    assert found == {} and set(missing) == {"radgraph", "f1chexbert", "ratescore"}
    assert all("mmedrag[clinical]" in why for why in missing.values())


def test_a_library_that_does_not_load_is_one_line(monkeypatch, capsys, caplog):
    def build(metrics, per_sample, show_progress):
        print("[nltk_data] Error loading punkt_tab")
        print("a warning", file=sys.stderr)
        if metrics == ["radgraph"]:
            raise ModuleNotFoundError("No module named 'RadEval'", name="RadEval")
        raise ValueError("numpy.dtype size changed, may indicate binary incompatibility.")

    radeval(monkeypatch, build)
    caplog.set_level("INFO")
    found, missing = clinical.clinical(["a"], ["a"])
    assert found == {} and capsys.readouterr() == ("", "") and caplog.records == []
    assert missing["radgraph"] == (
        "RadGraph F1 cannot be loaded by the installed RadEval (No module named 'RadEval')"
    )
    assert missing["ratescore"].endswith("built for numpy 1 below Python 3.12")
    assert all("\n" not in why for why in missing.values())


def test_one_metric_without_weights_does_not_cost_the_others(monkeypatch):
    class RadEval:
        def __init__(self, metrics, per_sample, show_progress):
            assert per_sample and not show_progress
            if metrics == ["radgraph"]:
                raise OSError("no file radgraph.tar.gz\nin the cache")
            self.name = metrics[0]

        def __call__(self, refs, hyps):
            return {self.name: [0.25, 0.75]}

    radeval(monkeypatch, RadEval)
    found, missing = clinical.clinical(["a", "b"], ["c", "d"])
    assert found["ratescore"].point() == 0.5 and found["ratescore"].values.tolist() == [0.25, 0.75]
    assert set(missing) == {"radgraph"}
    assert missing["radgraph"] == (
        "RadGraph F1 needs its weights in the Hugging Face cache "
        "(no file radgraph.tar.gz in the cache)"
    )
