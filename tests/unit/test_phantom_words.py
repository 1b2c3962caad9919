"""The tables of words: what is wrong in one is said in one line; drawings and words agree."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from mmedrag.phantom import chest, fundus, histology
from mmedrag.phantom.grammar import DOMAINS, load_domain, sentences
from mmedrag.phantom.words import read_domain
from mmedrag.records import UserError

TABLE = (files("mmedrag.phantom") / "chest.toml").read_text(encoding="utf-8")


def read(folder: Path, text: str):
    path = folder / "table.toml"
    path.write_text(text, encoding="utf-8")
    return read_domain(path, chest.render)


def test_a_table_gives_the_domain_in_its_order(tmp_path: Path) -> None:
    domain = read(tmp_path, TABLE)
    assert domain.findings == load_domain("radiology").findings
    written = [line for line in TABLE.splitlines() if line.startswith("name = ")]
    specs = [domain, *domain.attributes, *domain.findings]
    assert written == [f'name = "{spec.name}"' for spec in specs]
    assert domain.single_sides == ("left", "right") and domain.by_name["nodule"].most == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('noun = "atelectasis"', 'noum = "atelectasis"', "findings.5.noun: Field required"),
        ('noun = "atelectasis"', 'noun = "a"\ncolour = "red"', "findings.5.colour: Unexpected"),
        ("most = 3", 'most = "many"', "most"),
        ('both = "bilateral"', 'both = "everywhere"', "both: 'everywhere' is no side"),
        ('both = "bilateral"\n', "", "both: Field required"),
        ('name = "nodule"', 'name = "cardiomegaly"', "'cardiomegaly' stands twice"),
        ('"Heart size is normal."', '"Heart size is {grad}."', "slot 'grad' is unknown"),
        ('"Heart size is normal."', '"Heart size {side}."', "slot 'side' is unknown"),
        ('"Heart size is normal."', '"Heart size {grade."', "cardiomegaly.negative"),
        ('PA = ["PA view.", ', 'PA = []\nXA = ["PA view.", ', "view.PA: is empty"),
        ("[sides]", "[sides", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TABLE
    with pytest.raises(UserError) as raised:
        read(tmp_path, TABLE.replace(old, new, 1))
    text = str(raised.value)
    assert message in text and "table.toml" in text and "\n" not in text


def test_a_table_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing.toml: cannot be read"):
        read_domain(tmp_path / "missing.toml", chest.render)


def test_a_sentence_with_two_meanings_is_refused(tmp_path: Path, monkeypatch) -> None:
    domain = read(tmp_path, TABLE.replace('"No nodules."', '"No cardiomegaly."', 1))
    monkeypatch.setattr("mmedrag.phantom.grammar.load_domain", lambda name: domain)
    with pytest.raises(UserError, match="'no cardiomegaly' has two meanings"):
        sentences.__wrapped__("radiology")


def test_every_finding_is_drawn() -> None:
    """By a painter of its own, or as a change of what is there anyway."""
    shaped = {
        "radiology": {"cardiomegaly", "elevated_hemidiaphragm", "pulmonary_edema"}
        | {"rib_fracture", "hiatal_hernia"},
        "ophthalmology": {"cup_to_disc", "peripapillary_atrophy", "tortuous_veins"},
        "pathology": {"gland_loss", "mitoses", "fibrosis", "nuclear_atypia"},
    }
    painted = (set(chest.PAINT), set(fundus.PAINT), set(histology.PAINT))
    for name, paint in zip(DOMAINS, painted, strict=True):
        assert paint | shaped[name] == set(load_domain(name).by_name)
        assert not paint & shaped[name]
    assert set(fundus.PAINT) == {*fundus.SUPERFICIAL, *(n for names in fundus.DEEP for n in names)}
