"""System files, flags and recipes name the same parts for every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmedrag.pipeline import system
from mmedrag.pipeline.system import Flags, resolve_system
from mmedrag.records.records import UserError
from mmedrag.retrieval.stores import folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Indexes (their manifests) of two domains and a generic one, and an empty model folder."""
    for domain in ("radiology", "pathology", None):
        at = tmp_path / f"index-{domain or 'generic'}"
        with folder.writer(at):
            folder.commit(at, {"domain": domain}, {"rows.txt": lambda path: path.write_text("x")})
    (tmp_path / "model").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "system.toml").write_text(
        '[domain]\nlabel = "radiology"\n'
        '[domains.radiology]\nindex = "index-radiology"\nadapter = "adapter"\n'
        '[generator]\nkind = "hf"\nmodel = "model"\nbatch_size = 4\n'
        '[selection]\nrule = "log_ratio"\ngamma = 0.2\n[prompts]\nset = "llava_med"\n'
    )
    return tmp_path


def test_file_gives_the_parts_relative_to_itself(place: Path) -> None:
    found = resolve_system(Flags(system=place / "system.toml"))
    assert found.domain.label == "radiology"
    assert found.domains["radiology"].index == str(place / "index-radiology")
    assert found.generator == {"kind": "hf", "model": str(place / "model"), "batch_size": 4}
    assert found.selection == {"rule": "log_ratio", "gamma": 0.2}
    assert found.prompts.set == "llava_med"
    assert json.dumps(found.describe())
    assert set(found.inputs()) == {
        str(place / "model"),
        str(place / "adapter"),
        str(place / "index-radiology"),
    }
    assert found.inputs()[str(place / "index-radiology")].name == "manifest.json"


def test_flags_win(place: Path) -> None:
    flags = Flags(
        system=place / "system.toml",
        domain="pathology",
        model="other",
        rule="fixed_k",
        index=[str(place / "index-pathology"), str(place / "index-generic")],
    )
    found = resolve_system(flags)
    assert found.domain.label == "pathology"
    assert found.generator["model"] == "other"
    assert found.selection == {"rule": "fixed_k"}
    assert {name: part.index is not None for name, part in found.domains.items()} == {
        "radiology": True,
        "pathology": True,
        "generic": True,
    }


def test_recipe_lies_between_flags_and_file(place: Path) -> None:
    recipe = {"selection": {"gamma": 0.5}, "generator": {"batch_size": 2}, "prompts": {"set": "x"}}
    found = resolve_system(Flags(system=place / "system.toml", model="other"), recipe)
    assert found.selection == {"rule": "log_ratio", "gamma": 0.5}
    assert (found.generator["batch_size"], found.generator["model"]) == (2, "other")
    assert found.prompts.set == "x"


def test_auto_leaves_the_label_of_the_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody names a domain model: the embedded one is asked for the benchmark's indexes only."""
    flags = Flags(system=place / "system.toml", domain="auto")
    found = resolve_system(flags)
    assert (found.domain.label, found.domain.model) == (None, None)
    monkeypatch.setattr(system, "of_benchmark", lambda index: True)
    found = resolve_system(flags)
    assert (found.domain.model, found.routing) == ("embedded:domain", "embedded")
    found = resolve_system(Flags(system=place / "system.toml", domain_model="mine"))
    assert (found.domain.label, found.domain.model) == (None, "mine")


def test_a_foreign_model_gets_no_embedded_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmedrag.pipeline.embedded.index_folders", lambda: {"radiology": Path("r")})
    assert resolve_system(Flags(model="foreign")).domains == {}
    own = resolve_system(Flags())
    assert own.domains["radiology"].index == "r"
    assert own.generator["model"] == "embedded:vlm"
    assert resolve_system(Flags(), references=False).domains == {}


def test_adapter_none_takes_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_embedded_has", lambda name: True)
    assert resolve_system(Flags(), references=False).generator["adapter"] == "embedded:adapter"
    assert "adapter" not in resolve_system(Flags(adapter="none"), references=False).generator


def test_two_indexes_for_a_domain(place: Path) -> None:
    twice = [str(place / "index-radiology")] * 2
    with pytest.raises(UserError, match="'radiology' has one already"):
        resolve_system(Flags(model="m", index=twice))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[genrator]\n", r"unknown table \[genrator\]"),
        ("generator = 3\n", r"unknown table \[generator\]"),
        ("[domain]\nlabl = 'x'\n", r"\[domain\]: unknown key 'labl'"),
        ("[domains]\nradiology = 3\n", r"table per domain, such as \[domains.radiology\]"),
        ("[domains.pathology]\nindex = 'index-radiology'\n", "is of domain 'radiology'"),
        ("[selection]\nrule = 'best'\n", "best"),
        ("[selection]\nrule = 'fixed_k'\ngamma = 1\n", "gamma"),
        ("[prompts]\nset = 3\n", r"\[prompts\]: set"),
        ("[a\n", "not valid TOML"),
    ],
)
def test_wrong_files_are_named(place: Path, text: str, what: str) -> None:
    file = place / "wrong.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=what):
        resolve_system(Flags(system=file, model="m"))


def test_generator_options_are_checked(place: Path) -> None:
    from mmedrag.answering.generators.scripted import ScriptedGenerator

    fixed = Flags(domain="radiology")
    scripted = resolve_system(fixed, {"generator": {"kind": "scripted", "image_size": 8}})
    built = system.build_pipeline(scripted, references=False)
    assert isinstance(built.generator, ScriptedGenerator) and built.generator.image_size == 8
    strict = resolve_system(
        fixed, {"generator": {"kind": "mmedrag.retrieval.select:fixed_k", "heat": 1}}
    )
    with pytest.raises(UserError, match="unknown key 'heat', expected one of k, kind, scores"):
        system.build_pipeline(strict, references=False)
    with pytest.raises(UserError, match="'fog' is not known"):
        system.build_pipeline(
            resolve_system(fixed, {"generator": {"kind": "fog"}}), references=False
        )


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        resolve_system(Flags(system=tmp_path / "none.toml"))
