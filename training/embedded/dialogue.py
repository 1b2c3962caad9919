"""Training dialogues of the small vision-language model, in the exact strings it will meet.

Three kinds, as a person would write them: unaided (image, questions), with references (image,
similar cases' reports that mostly agree, questions), and these beside a stray image that has
nothing to do with them (the questions are about the first report).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from mmedrag.answering import TemplateSet
from mmedrag.phantom import (
    Findings,
    Question,
    Rng,
    Study,
    ask_closed,
    ask_open,
    ask_presence,
    balance,
    cells,
    has,
    label_report,
    split_sentences,
    structured_report,
    write_report,
)
from mmedrag.records import Domain, Hit, Task, Trace
from training.embedded.data import KNOBS, StudySet

Turn = tuple[str, str]  # user text, answer
QUOTES = 2  # of the turns beside a stray image
OWN = 0.6  # share of references that are the study's own report, in words of their own
MORE = (0.3, 0.15, 0.15, 0.4)  # how often none, one, two, three follow the first reference


@dataclass
class Dialogue:
    """Questions about one picture, each asked as if it were the only one."""

    image: int  # row of the study set
    turns: list[Turn]


def _phenotype(study: Study) -> tuple[str, ...]:
    seed = study.key.split("/")[0]
    return (seed, *study.attributes.values())


@dataclass
class Writer:
    """Makes dialogues about the studies of one set; ``rng`` names the randomness of each."""

    studies: StudySet
    templates: TemplateSet = field(default_factory=TemplateSet)

    def __post_init__(self) -> None:
        self.by_phenotype: dict[tuple[str, ...], list[int]] = defaultdict(list)
        everyone = [study.findings for study in self.studies.studies]
        self.balance = balance(self.studies.domain, everyone)
        for i, study in enumerate(self.studies.studies):
            self.by_phenotype[_phenotype(study)].append(i)

    def similar(self, study: Study) -> list[int]:
        """Rows of the studies that look alike, of the same seed; its own among them."""
        return self.by_phenotype[_phenotype(study)]

    def prompt(self, task: Task, text: str | None, closed: bool, references: list[str]) -> str:
        domain = self.studies.domain.name
        trace = Trace(
            example_id="-",
            task=task,
            question=text,
            domain=Domain(label=domain),
            answer_type="closed" if closed else "open",
        )  # type: ignore[arg-type]
        hits = [Hit(id=str(i), text=r, score=1.0, rank=i) for i, r in enumerate(references)]
        return self.templates.render(trace, hits, None).text

    def report(self, study: Study, rng: Rng) -> str:
        return write_report(
            self.studies.domain,
            study.findings,
            study.attributes,
            rng,
            KNOBS.omission,
            KNOBS.hedging,
        )

    def questions(self, findings: Findings, rng: Rng, count: int) -> list[Question]:
        """Questions of every form, yes and no equally likely; three of four about presence."""
        domain, asked = self.studies.domain, []
        for _ in range(count):
            form = "presence" if rng.chance(0.75) else ""
            question = None if form or not rng.chance(0.15) else ask_open(domain, findings, rng)
            asked.append(question or ask_closed(domain, findings, rng, self.balance, form))
        return asked

    def simple(self, findings: Findings, rng: Rng, count: int) -> list[Question]:
        """Presence questions about any cell, and more than their share about what is there.

        Balanced questions are a poor teacher: yes is as likely for every picture and for every
        question, only the two together tell, and there is no gradient to begin with. Here a
        picture with many findings has more yes, and so has a common finding.
        """
        domain = self.studies.domain
        every = cells(domain)
        there = [c for c in every if has(domain, findings[c[0]], c[1])]
        asked = []
        for _ in range(count):
            name, side = rng.choice(there if there and rng.chance(0.4) else every)
            asked.append(ask_presence(domain, domain.by_name[name], side, findings, rng))
        return asked

    def mentioned(self, study: Study, text: str, rng: Rng, count: int) -> list[Question]:
        """Presence questions about what a report states, yes and no equally likely; half of the
        no about findings that are there, but on another side."""
        domain = self.studies.domain
        reported = label_report(domain.name, text)["findings"]
        options = [c for c in cells(domain) if c[0] in reported]
        yes = [c for c in options if has(domain, study.findings[c[0]], c[1])]
        no = [c for c in options if not has(domain, study.findings[c[0]], c[1])]
        aside = [c for c in no if study.findings[c[0]].present]
        asked = []
        for _ in range(count if options else 0):
            wrong = aside if aside and rng.chance(0.5) else no
            name, side = rng.choice((yes if rng.chance(0.5) else wrong) or yes or no)
            asked.append(ask_presence(domain, domain.by_name[name], side, study.findings, rng))
        return asked

    def quotes(self, references: list[str], rng: Rng, count: int) -> list[Turn]:
        """What the first report says of a finding, word for word; the bare name asks for it.

        Finding the sentence is most of reading, and a sentence teaches more than a yes or no.
        """
        domain, sentences = self.studies.domain, dict[str, str]()
        for sentence in split_sentences(references[0]):
            sentences |= dict.fromkeys(label_report(domain.name, sentence)["findings"], sentence)
        turns = []
        for name in rng.shuffled(sorted(sentences))[:count]:
            text = domain.by_name[name].noun.capitalize() + "?"
            turns.append((self.prompt("vqa", text, False, references), sentences[name]))
        return turns

    def unaided(self, row: int, rng: Rng, count: int = 10, simple: bool = False) -> Dialogue:
        """Questions about a picture (``simple`` ones or of every form); report if ``count`` 0."""
        study = self.studies.studies[row]
        ask = self.simple if simple else self.questions
        return Dialogue(row, self._turns(study, ask(study.findings, rng, count), [], not count))

    def with_references(
        self, row: int, rng: Rng, count: int = 6, stray_share: float = 0.4
    ) -> Dialogue:
        """References that mostly agree with the study; by ``stray_share``, beside a stray image.
        Questions about it, or its report (``count`` 0).

        One to four references, each the study's own report or that of a case with the same
        phenotype, as retrieval finds them: mostly right, sometimes wrong. Beside a stray image
        the first is the study's own, and half of the questions are about what it states; the
        others teach that a report is silent about what is not there.
        """
        study, stray = self.studies.studies[row], rng.chance(stray_share)
        more = 0 if stray_share == 1 else rng.weighted((0, 1, 2, 3), MORE)
        references = []
        for i in range(1 + more):
            own = rng.chance(OWN) or (stray and i == 0)
            whose = study if own else self.studies.studies[rng.choice(self.similar(study))]
            references.append(self.report(whose, rng))
        if stray:
            mentioned = (count - QUOTES) // 2 if count else 0
            asked = self.mentioned(study, references[0], rng, mentioned)
            others = count - QUOTES - mentioned if count else 0
            asked += self.questions(study.findings, rng, others)
            row = rng.integer(0, len(self.studies.studies) - 1)
        else:
            asked = self.questions(study.findings, rng, count)
        turns = self._turns(study, asked, references, not count)
        if stray and count:
            turns += self.quotes(references, rng, QUOTES)
        return Dialogue(row, turns)

    def _turns(
        self, study: Study, asked: list[Question], references: list[str], report: bool
    ) -> list[Turn]:
        turns = [(self.prompt("vqa", q.text, q.closed, references), q.answer) for q in asked]
        if report:
            domain, truth = self.studies.domain, study.findings
            text = structured_report(domain, truth, study.attributes)
            turns.append((self.prompt("report", None, False, references), text))
        return turns
