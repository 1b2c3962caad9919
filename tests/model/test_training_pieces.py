"""Pieces of the embedded models' training: shares of the data, dialogues, tokens, pairs, card."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from training.embedded import check, maps, preference, stages, vqa
from training.embedded.data import PROBE_SEED, TRAIN_SEEDS, StudySet, study_set
from training.embedded.dialogue import QUOTES, Writer
from training.embedded.loop import fit
from training.embedded.reports import OtherReports, pattern
from training.embedded.text import train_tokenizer
from training.embedded.vlm import DialogueEncoder

from mmedrag import embedded
from mmedrag.phantom import Rng, build_benchmark, findings_in, has, label_report
from mmedrag.records import Pair, Side
from mmedrag.retrieval.encoders import load_encoder
from mmedrag.runtime import DataFolder

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    cache = tmp_path_factory.mktemp("data")
    return Writer(study_set("radiology", TRAIN_SEEDS[:1], 60, cache=cache))


@pytest.fixture(scope="module")
def tokenizer(writer: Writer):
    return train_tokenizer(vqa.texts({"radiology": writer}, 200))


# --- data -----------------------------------------------------------------------------------


def test_no_benchmark_serves_two_ends() -> None:
    """What is tuned, fitted, probed and measured on was not trained on."""
    sizes = stages.FULL
    used = [*sizes.seeds, PROBE_SEED, stages.DOMAIN_SEED, *sizes.pair_seeds]
    used += [preference.VALIDATION_SEED, check.CHECK_SEED]
    assert max(Counter(used).values()) == 1
    assert set(sizes.retriever_seeds) <= set(sizes.seeds)
    assert set(sizes.regime_seeds) <= set(sizes.retriever_seeds)


def test_a_study_set_is_kept_and_read_back(writer: Writer, tmp_path: Path) -> None:
    first = study_set("pathology", [5], 4, cache=tmp_path)
    kept = list(tmp_path.iterdir())
    again = study_set("pathology", [5], 4, cache=tmp_path)
    assert np.array_equal(first.pixels, again.pixels) and list(tmp_path.iterdir()) == kept
    assert first.pixels.shape == (4, 64, 64, 3) and first.pixels.dtype == np.uint8


def test_labels_are_those_of_the_studies(writer: Writer) -> None:
    found: StudySet = writer.studies
    cells, values = found.cells(), found.attributes()
    assert cells.shape[0] == len(found.studies) and 0.1 < cells.mean() < 0.5
    domain = found.domain
    for study, row in zip(found.studies, values, strict=True):
        names = [list(a.values)[i] for a, i in zip(domain.attributes, row, strict=True)]
        assert names == list(study.attributes.values())


# --- dialogues ------------------------------------------------------------------------------


def test_questions_are_answered_by_the_picture_they_stand_beside(writer: Writer) -> None:
    for row in range(40):
        dialogue = writer.unaided(row, Rng("t", row), 10)
        assert dialogue.image == row and len(dialogue.turns) == 10
    answers = Counter(
        answer for row in range(60) for _, answer in writer.unaided(row, Rng(row), 20).turns
    )
    assert 0.4 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.6


def test_the_report_is_asked_for_and_says_the_truth(writer: Writer) -> None:
    for make in (writer.unaided, writer.with_references):
        (_, text), study = make(3, Rng("r"), 0).turns[-1], writer.studies.studies[3]
        there = {name for name, state in study.findings.items() if state.present}
        assert set(label_report("radiology", text)["findings"]) == there


def test_beside_a_stray_image_the_first_reference_is_the_study(writer: Writer) -> None:
    """Its quotes are sentences of it, and the picture is any."""
    images = set()
    for row in range(30):
        dialogue = writer.with_references(row, Rng("stray", row), 6, stray_share=1.0)
        images.add(dialogue.image == row)
        study = writer.studies.studies[row]
        quotes = [(q, a) for q, a in dialogue.turns if a not in ("yes", "no")]
        assert len(dialogue.turns) <= 6 and len(quotes) >= min(1, QUOTES)
        for question, answer in quotes:
            if answer.endswith("."):
                assert answer in question  # the reference stands in the prompt
                for name, read in label_report("radiology", answer)["findings"].items():
                    if not read["uncertain"]:
                        assert read["present"] == study.findings[name].present
    assert False in images


def test_mentioned_findings_are_asked_evenly(writer: Writer) -> None:
    answers: Counter[str] = Counter()
    for row, study in enumerate(writer.studies.studies):
        rng = Rng("m", row)
        text = writer.report(study, rng)
        stated = label_report("radiology", text)["findings"]
        for question in writer.mentioned(study, text, rng, 4):
            assert question.finding in stated
            state = study.findings[question.finding]
            assert (question.answer == "yes") == has(writer.studies.domain, state, question.side)
            answers[question.answer] += 1
    assert 0.35 < answers["yes"] / answers.total() < 0.65


# --- tokens and batches ---------------------------------------------------------------------


def test_the_tokenizer_keeps_any_text_and_is_short_on_its_own(writer: Writer, tokenizer) -> None:
    for text in ("Ωmega 3 µg\n\ttab", writer.report(writer.studies.studies[0], Rng(0))):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    report = "There is a right pleural effusion. The heart is enlarged."
    words = len(report.split())
    assert len(tokenizer(report, add_special_tokens=False)["input_ids"]) < 2 * words


def test_a_row_holds_each_prompt_as_it_stands_alone(writer: Writer, tokenizer) -> None:
    encode = DialogueEncoder(tokenizer)
    dialogue = writer.with_references(2, Rng("row"), 6)
    row = encode(dialogue)
    for number, (text, answer) in enumerate(dialogue.turns, 1):
        own = [i for i, branch in enumerate(row.branch) if branch in (0, number)]
        assert [row.place[i] for i in own] == list(range(len(own)))
        ids = tuple(row.ids[i] for i in own)
        spoken = encode.piece(answer)
        assert ids == (*encode.prompt(text), *spoken)
        labels = [row.label[i] for i in own if row.label[i] != -100]
        assert labels == [*spoken, tokenizer.eos_token_id]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hm?"}]}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    whole = tokenizer(chat.replace("<image>", "<image>" * 16), add_special_tokens=False)
    assert tuple(whole["input_ids"]) == encode.prompt("Hm?")


def test_batches_follow_their_mix(writer: Writer, tokenizer) -> None:
    def kinds(**mix) -> Counter:
        batches = vqa.Batches(
            {"radiology": writer}, tokenizer, vqa.TrainingMix(40, 1e-3, 0, batch=2, **mix)
        )
        assert batches[7] == batches[7]
        texts = [tokenizer.decode(batches[step][0][2].ids) for step in range(40)]
        return Counter(reference_line in text for text in texts)

    reference_line = writer.prompt("vqa", "Hm?", True, ["A report."]).splitlines()[0]

    never, always = lambda done: 0.0, lambda done: 1.0
    assert kinds(references=never) == {False: 40}
    assert kinds(references=always) == {True: 40}
    late = kinds(references=lambda done: float(done >= 0.5))
    assert late == {False: 20, True: 20}


def test_the_loop_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def trained(state: Path, stop: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss_of(step: int, _: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            x = torch.from_numpy(np.random.default_rng(step).normal(size=(8, 3))).float()
            return ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()

        fit(model, lambda todo: todo, loss_of, state, steps=60, rate=0.1, every=20)
        return model.weight.detach()

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "a.pt", stop=45)
    saved = torch.load(tmp_path / "a.pt", weights_only=True)["step"]
    assert saved == 40 and not list(tmp_path.glob("*.part"))
    resumed, whole = trained(tmp_path / "a.pt"), trained(tmp_path / "b.pt")
    assert torch.equal(resumed, whole)
    assert (whole - 1).abs().max() < 0.5


# --- pairs, card --------------------------------------------------------------------


def pair(number: int, kind: str, answer: str) -> Pair:
    side = {"prompt": {"text": "q", "template": "t"}, "text": answer}
    other = side | {"text": "no" if answer == "yes" else "yes"}
    return Pair(
        id=f"{kind}-{number}",
        kind=kind,
        chosen=Side(**side),
        rejected=Side(**other),
        meta={"task": "vqa", "domain": "radiology"},
    )


def test_chosen_pairs_are_capped_and_their_answers_even() -> None:
    pairs = [pair(i, "copy", "yes" if i % 3 else "no") for i in range(300)]
    pairs += [pair(i, "resist", "yes" if i % 4 else "no") for i in range(240)]
    pairs += [pair(i, "cross_modal", "yes") for i in range(7000)]
    chosen = preference.choose(pairs, ("cross_modal", "copy", "resist"))
    assert Counter(p.kind for p in chosen) == {"cross_modal": 6000, "copy": 120, "resist": 120}
    for kind in ("copy", "resist"):
        answers = Counter(p.chosen.text for p in chosen if p.kind == kind)
        assert answers == {"yes": 60, "no": 60}
    assert preference.choose(pairs, ("cross_modal", "copy", "resist")) == chosen
    assert {p.kind for p in preference.choose(pairs, ("resist",))} == {"resist"}


def test_the_card_says_what_the_scores_say() -> None:
    scores = json.loads((Path(embedded.__path__[0]) / "scores.json").read_text())
    shipped = (Path(embedded.__path__[0]) / "README.md").read_text()
    text = check.card(scores)

    def cells(page: str) -> dict[str, list[list[str]]]:
        return {
            part.split("\n")[0]: sorted(
                sorted(line.split(" | ")) for line in part.split("\n") if line.startswith("| ")
            )
            for part in page.split("\n## ")[1:]
        }

    assert cells(text) == cells(shipped)
    assert text.split("\n## ")[0] == shipped.split("\n## ")[0]
    assert sorted(text.rpartition("machine)")[2]) == sorted(shipped.rpartition("machine)")[2])
    assert "\n\n\n" not in text and text.endswith(".\n") and not text.endswith("\n\n")


# --- retrievers of the regimes ----------------------------------------------------------------


def test_other_reports_keep_the_chosen_findings_and_take_the_rest_from_others(tmp_path) -> None:
    domains, count, seed = ["pathology"], 40, 5
    build_benchmark(tmp_path, studies=count, domains=domains, seed=seed, size=64, workers=1)
    kept = {"pathology": pattern("pathology")}
    data, truth = OtherReports(tmp_path, seed, count, kept), DataFolder(tmp_path).truth()
    agreed: dict[bool, list[bool]] = {True: [], False: []}
    for row in data.corpus("train"):
        said = findings_in("pathology", row.text)
        for name, state in truth[str(row.meta["study"])].findings.items():
            there = bool(said.get(name, {}).get("present"))
            agreed[name in kept["pathology"]].append(there == state.present)
    assert np.mean(agreed[True]) > 0.97  # an absent finding may be put in doubt
    assert 0.5 < np.mean(agreed[False]) < 0.8
    first = DataFolder(tmp_path).corpus()
    assert {r.split for r in data.corpus("train")} == {"train", "test"}
    assert len(data.corpus("train")) == 3 * sum(r.split != "val" for r in first)
    assert len({r.id for r in data.corpus("train")}) == len(data.corpus("train"))


def test_maps_train_over_frozen_towers_and_ship_as_an_ordinary_encoder(tmp_path) -> None:
    towers, before = maps.trainable("embedded:encoder"), load_encoder("embedded:encoder", "cpu")
    picture, text = Image.new("RGB", (64, 64), (90, 40, 10)), "PA view. No cardiomegaly."
    towers.model.visual.weight.data *= 2
    with torch.no_grad():
        mine = towers.image_features(towers.prepare(picture)[None])
        told = towers.text_features(towers.tokenize([text]))
    towers.save(tmp_path)
    after = load_encoder(str(tmp_path), "cpu")
    assert np.allclose(after.images([picture]), F.normalize(mine, dim=-1), atol=1e-5)
    assert np.allclose(after.texts([text]), F.normalize(told, dim=-1), atol=1e-5)
    assert after.fingerprint != before.fingerprint
    assert not np.allclose(after.images([picture]), before.images([picture]), atol=1e-2)
