"""Plans and substituted references are pure functions of (seed, example id or picture)."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmedrag.pipeline.conditions import Pool, is_own
from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.records import ConditionSpec
from mmedrag.records.records import Domain, Example, Hit, Trace, UserError
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.draws import seeded_int


def live(example: Example, hits: int = 3, **condition: object) -> Trace:
    trace = Trace.of(example)
    trace.domain = Domain(label=example.domain or "unknown")
    trace.hits = [Hit(id=f"h{i}", text=f"hit {i}", score=0.9 - i / 10, rank=i) for i in range(hits)]
    return trace


@pytest.fixture
def pool(small_data: Path) -> Pool:
    data = DataFolder(small_data)
    return Pool(data.examples(), data.corpus(), data.truth(), seed=7)


def test_draw_is_a_fixed_function() -> None:
    assert seeded_int(0, "a") == seeded_int(0, "a")
    assert (
        len({seeded_int(0, "a"), seeded_int(1, "a"), seeded_int(0, "b"), seeded_int(0, "a", "b")})
        == 4
    )


def test_unknown_patient_never_matches() -> None:
    one = Example(id="1", task="report", image="a.png")
    other = Example(id="2", task="report", image="b.png")
    assert not is_own(one, other)
    assert is_own(one, Example(id="3", task="report", image="a.png"))


def test_partner_is_another_patient_of_the_domain(pool: Pool) -> None:
    for example in pool.examples:
        partner = pool.partner(example, "shuffle")
        assert partner is not None
        assert partner.domain == example.domain
        assert partner.patient != example.patient


def test_partner_is_the_same_for_all_questions_of_a_picture(pool: Pool) -> None:
    first = pool.examples[0]
    again = first.model_copy(update={"id": "another question"})
    partners = [pool.partner(e, "shuffle") for e in (first, again)]
    assert partners[0] == partners[1]


def test_partner_does_not_depend_on_the_shard(small_data: Path, pool: Pool) -> None:
    again = Pool(pool.examples, pool.corpus, pool.truth, seed=7)
    first = pool.examples[5]
    assert again.partner(first, "x").id == pool.partner(first, "x").id  # type: ignore[union-attr]
    other = Pool(pool.examples, pool.corpus, pool.truth, seed=8)
    moved = [
        e
        for e in pool.examples
        if other.partner(e, "x").id != pool.partner(e, "x").id  # type: ignore[union-attr]
    ]
    assert moved


def test_nobody_to_swap_with() -> None:
    alone = Example(id="1", task="report", image="a.png", domain="radiology")
    assert Pool([alone]).partner(alone, "x") is None


def test_random_keeps_number_scores_and_domain(pool: Pool) -> None:
    for example in pool.examples:
        trace = live(example)
        hits = pool.random(trace)
        assert [h.score for h in hits] == [h.score for h in trace.hits]
        assert len({h.id for h in hits}) == 3
        rows = {row.id: row for row in pool.corpus}
        assert {rows[h.id].domain for h in hits} == {example.domain}
        assert example.patient not in {rows[h.id].patient for h in hits}


def test_random_ends_when_the_corpus_does(pool: Pool) -> None:
    assert len(pool.random(live(pool.examples[0], hits=40))) <= 6


def test_own_is_the_study_report(pool: Pool) -> None:
    for example in pool.examples:
        assert [h.id for h in pool.own(live(example))] == [example.meta["study"]]


def test_contradicting_states_the_opposite(pool: Pool) -> None:
    asked = [e for e in pool.examples if e.domain == "radiology"]
    for example in asked:
        (hit,) = pool.contradicting(live(example))
        present = pool.truth[example.meta["study"]].findings["cardiomegaly"].present
        assert ("not enlarged" in hit.text) == present
        assert hit.id != example.meta["study"]


def test_contradicting_needs_a_question_that_one_finding_decides(pool: Pool) -> None:
    example = pool.examples[0].model_copy(update={"meta": {"study": "s00"}})
    assert pool.contradicting(live(example)) == []
    both = pool.examples[0].model_copy(update={"meta": {**pool.examples[0].meta, "form": "both"}})
    assert pool.contradicting(live(both)) == []


def test_plan_draws_noise_per_picture(pool: Pool) -> None:
    plan = ConditionSpec(noise="gaussian_clip")
    seeds: dict[str, set[int]] = {}
    for example in pool.examples:
        noise = pool.condition(example, plan).noise
        assert noise is not None
        seeds.setdefault(str(example.image), set()).add(noise.seed)
    assert len(seeds) > 1
    assert all(len(found) == 1 for found in seeds.values())  # the questions of a picture share it
    assert len(set.union(*seeds.values())) == len(seeds)


def test_noise_does_not_depend_on_where_the_data_lies(pool: Pool) -> None:
    plan, example = ConditionSpec(noise="gaussian_clip"), pool.examples[0]
    moved = example.model_copy(update={"root": Path("elsewhere")})
    assert pool.condition(moved, plan).noise == pool.condition(example, plan).noise
    no_picture = [example.model_copy(update={"image": None, "id": name}) for name in "ab"]
    first, second = (pool.condition(e, plan).noise for e in no_picture)
    assert first and second and first.seed != second.seed


def test_plan_other_patient_names_a_file(pool: Pool) -> None:
    example = pool.examples[0]
    noise = pool.condition(example, ConditionSpec(noise="other_patient")).noise
    assert noise and Path(noise.params["path"]).is_file()
    assert noise.params["path"] != str(example.images[0])


@pytest.mark.parametrize("wrong", [{"references": "some"}, {"noise": "fog"}])
def test_plan_refuses_unknown_names(wrong: dict) -> None:
    with pytest.raises(UserError, match="expected one of"):
        ConditionSpec(**wrong)


def test_shown_references_are_those_of_the_degraded_picture(pool: Pool, tmp_path: Path) -> None:
    """Every blank picture is one file, whose references all rows of a domain then share."""
    searched: list[tuple[str, Path]] = []

    class Spy:
        def search(self, examples: list[Example], k: int) -> tuple[list[list[Hit]], list[int]]:
            for example in examples:
                picture = Image.open(example.images[0])
                assert picture.getextrema() == ((127, 127),) * 3
                searched.append((example.id, example.images[0]))
            return [[Hit(id=e.id, text="x", score=0.5, rank=0)] for e in examples], [0] * len(
                examples
            )

    rows = [e for e in pool.examples if e.domain == "radiology"][:4]
    system = Pipeline(retrievers={"radiology": Spy()}, pool=pool)  # type: ignore[dict-item]
    shown = []
    for row in rows:
        trace = live(row)
        trace.condition = pool.condition(row, ConditionSpec("shown", "blank"))
        shown.append(trace)
    system.references(shown)
    assert [name for name, _ in searched] == [row.id for row in rows]
    assert len({path for _, path in searched}) == 1
    assert [trace.hits[0].id for trace in shown] == [row.id for row in rows]
    assert not searched[0][1].exists()  # nothing is left behind
