"""The keyword labeller: mentions, denials, doubt, and a user's own findings."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmedrag.evaluation.keywords import findings_of, load_keywords, present
from mmedrag.records import UserError

CHEST = findings_of(load_keywords(), "radiology")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("There is a small left pleural effusion.", {"effusion"}),
        ("No focal consolidation, pleural effusion, or pneumothorax.", set()),
        ("No pneumothorax but a large effusion is seen.", {"effusion"}),
        ("No pneumothorax. Bibasilar atelectasis.", {"atelectasis"}),
        ("Pneumothorax is not seen; the PICC ends in the right atrium.", {"devices"}),
        ("Pneumonia has resolved.", set()),
        ("Possible pneumonia cannot be excluded.", {"pneumonia"}),
        ("No significant change in the moderate effusions.", {"effusion"}),
        ("Mild cardiomegaly\nwithout overt edema.", {"cardiomegaly"}),
        ("Lungs are clear, negative for\n pneumothorax.", set()),
        ("", set()),
    ],
)
def test_reads_a_sentence(text: str, found: set[str]) -> None:
    assert present(text, CHEST) == found


def test_a_domain_has_its_own_findings_and_an_unknown_one_has_all() -> None:
    keywords = load_keywords()
    assert "effusion" not in findings_of(keywords, "pathology")
    assert {"effusion", "drusen", "necrosis"} <= set(findings_of(keywords, None))
    both = findings_of(keywords, "made up")["haemorrhage"]
    assert set(both) >= set(keywords["ophthalmology"]["haemorrhage"])


def test_own_findings_are_added_and_replace(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[radiology]\nscar = ["scar*"]\nfracture = ["broken rib"]\n[skin]\nmole = ["m"]')
    findings = findings_of(load_keywords(own), "radiology")
    text = "Apical scarring and a fractured rib. An effusion."
    assert present(text, findings) == {"scar", "effusion"}
    assert findings_of(load_keywords(own), "skin") == {"mole": ["m"]}


@pytest.mark.parametrize("content", ["[radiology]\nscar = 3", "scar", 'radiology = ["x"]', None])
def test_a_bad_file_of_findings_is_one_line(tmp_path: Path, content: str | None) -> None:
    own = tmp_path / "own.toml"
    if content is not None:
        own.write_text(content)
    with pytest.raises(UserError, match="own.toml") as caught:
        load_keywords(own)
    assert "\n" not in str(caught.value)


def test_phrases_are_words_not_patterns(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[radiology]\nodd = ["(a+)+$", "c.t"]\nnone = ["", " "]')
    findings = findings_of(load_keywords(own), "radiology")
    assert present("cat aaaaaaaaaaaaaaaaaaaaaaaaaaaa!", findings) == set()
