"""BLEU, ROUGE and METEOR equal the libraries that they are named after."""

import os
from pathlib import Path

import numpy as np
import pytest
from nltk.translate.bleu_score import sentence_bleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from mmedrag.evaluation.metrics import text as mt
from mmedrag.records.records import UserError

TEXTS = [
    "There is a large left pleural effusion.",
    "No acute cardiopulmonary abnormality.",
    "hi",
    "",
    "The heart is enlarged, the lungs are clear and the bones are intact.",
]
TARGETS = [
    "A big effusion is seen in the left pleural space.",
    "No acute cardiopulmonary abnormality.",
    "hi you",
    "Normal.",
    "Heart enlarged. Lungs are clear. The bones are intact.",
]
WORDNET = next((p for p in mt.WORDNET_SOURCES if (p / "data.noun").exists()), None)


@pytest.mark.parametrize("order", mt.ORDERS)
def test_bleu_is_sacrebleu(order):
    ours = mt.bleu(TEXTS, TARGETS)[f"bleu_{order}"]
    theirs = BLEU(lowercase=True, tokenize="13a", max_ngram_order=order)
    assert ours.point() == pytest.approx(theirs.corpus_score(TEXTS, [TARGETS]).score / 100)
    short = BLEU(lowercase=True, max_ngram_order=order, effective_order=True)
    each = [short.sentence_score(a, [b]).score / 100 for a, b in zip(TEXTS, TARGETS, strict=True)]
    assert ours.values == pytest.approx(each)
    signature = str(theirs.get_signature()).replace("|version", "|order:n|version")
    assert mt.signatures()["bleu_n"] == f"sacrebleu|corpus|{signature}"


def test_bleu_without_matches_or_output_is_zero():
    assert mt.bleu(["x"], ["y"])["bleu_4"].point() == 0.0
    assert mt.bleu([""], ["y"])["bleu_1"].point() == 0.0


def test_bleu_resamples_as_a_corpus_not_as_a_mean():
    stat = mt.bleu(TEXTS, TARGETS)["bleu_2"]
    weights = np.array([2, 0, 1, 1, 1])
    twice = [TEXTS[0], TEXTS[0], *TEXTS[2:]], [TARGETS[0], TARGETS[0], *TARGETS[2:]]
    direct = BLEU(lowercase=True, max_ngram_order=2).corpus_score(twice[0], [twice[1]]).score / 100
    assert stat.finish((weights @ stat.rows)[None])[0] == pytest.approx(direct)


def test_nltk_variant_is_nltk():
    found = mt.nltk_bleu(TEXTS, TARGETS)
    a, b = (mt.words(t[4]) for t in (TEXTS, TARGETS))
    assert found["bleu_nltk_2"].values[4] == pytest.approx(sentence_bleu([b], a, (0.5, 0.5)))
    assert found["bleu_nltk_4"].values[0] == pytest.approx(0.0, abs=1e-9)  # no 4-gram matches
    assert found["bleu_nltk_1"].values[3] == 0.0  # an empty report


def test_words_split_stops_and_commas():
    assert mt.words("Clear lungs, no mass.") == ["clear", "lungs", ",", "no", "mass", "."]


def test_rouge_is_rouge_score():
    found = mt.rouge(TEXTS, TARGETS)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        each = [scorer.score(b, a)[theirs].fmeasure for a, b in zip(TEXTS, TARGETS, strict=True)]
        assert found[ours].values == pytest.approx(each)


@pytest.fixture
def nltk_data(tmp_path, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    mt._wordnet.cache_clear()
    mt._meteor.cache_clear()
    yield tmp_path
    mt._wordnet.cache_clear()
    mt._meteor.cache_clear()


@pytest.mark.skipif(WORDNET is None, reason="Debian's wordnet-base is not installed")
def test_meteor_with_wordnet_knows_synonyms(nltk_data):
    assert mt.meteor_ready()
    folder = nltk_data / "corpora" / "wordnet"
    assert len((folder / "lexnames").read_text().splitlines()) == 45
    scores = mt.meteor(TEXTS, TARGETS)["meteor"].values
    assert scores[1] > 0.99 and scores[3] == 0.0
    # words that the Porter stemmer leaves alone: nltk looks synonyms up for stems
    synonym = mt.meteor(["a sick lung"], ["a ill lung"])["meteor"].point()
    stranger = mt.meteor(["a blue lung"], ["a ill lung"])["meteor"].point()
    assert synonym > stranger
    assert mt.prepare_wordnet() == folder  # a second time does nothing


def test_meteor_absent_is_left_out_with_a_way_to_get_it(nltk_data, monkeypatch):
    monkeypatch.setattr(mt, "WORDNET_SOURCES", (Path("nowhere"),))
    assert "meteor" not in mt.reports(TEXTS, TARGETS)
    assert {"bleu_1", "rouge_l", "bleu_nltk_avg"} <= set(mt.reports(TEXTS, TARGETS))
    with pytest.raises(UserError, match="make meteor"):
        mt.prepare_wordnet()


def test_wordnet_is_laid_out_from_any_dict_folder(tmp_path):
    source, folder = tmp_path / "dict", tmp_path / "out" / "corpora" / "wordnet"
    source.mkdir()
    (source / "data.noun").write_text("x")
    assert mt.prepare_wordnet(source, folder) == folder
    names = set(os.listdir(folder))
    assert {"data.noun", "lexnames", "index.sense", "noun.exc", "adj.exc"} <= names
