"""The whole system in one place: route → retrieve → select → prompt → answer.

    Example ─ domain.identify ─ retrievers[d].search ─ rule ─ prompts.render ─ generate ─► Trace

Every part may be replaced or ``None``, so a row of an ablation table is a constructor
argument. Stages take and return lists of equal length and are joined by id, never by file
position. A row that fails carries its ``error``; the others go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmedrag.answering import prompts
from mmedrag.records import (
    UNKNOWN,
    Condition,
    Domain,
    DomainIdentifier,
    Example,
    Generator,
    Hit,
    Request,
    Searcher,
    Selection,
    Trace,
    UserError,
    answers,
)
from mmedrag.retrieval import select

GENERIC = "generic"  # key of the one retriever that serves every domain (naive RAG)


@dataclass
class Pipeline:
    """``Pipeline(domain, retrievers, rule, templates, generator)(examples) -> traces``.

    Args:
        domain: identifier, a fixed label, or None (the example's own domain is used).
        retrievers: searcher per domain label; key ``"generic"`` serves every domain.
        rule: selection rule with parameters; None keeps all ``k`` hits.
        templates: prompt set; generator: answers requests; None stops after the prompt.
        adapters: the generator of a domain label, where it has its own.
        k: how many hits are retrieved before selection.
        min_confidence: under it, whoever asks gets no answer to a closed question.

    Example::

        pipeline = load_system(domain="radiology", index="index-radiology")
        (trace,) = pipeline([Example.of("chest.png", "Is there a nodule?")])
    """

    domain: DomainIdentifier | str | None = None
    retrievers: Mapping[str, Searcher] = field(default_factory=dict)
    rule: select.RuleSpec | None = field(default_factory=select.RuleSpec)
    templates: prompts.TemplateSet = field(default_factory=prompts.TemplateSet)
    generator: Generator | None = None
    adapters: Mapping[str, Generator] = field(default_factory=dict)
    k: int = 8
    report_tokens: int = 256
    min_confidence: float = 0.0

    def __call__(
        self, examples: Sequence[Example], condition: Condition | None = None
    ) -> list[Trace]:
        traces = [Trace.of(example, condition) for example in examples]
        self.route(traces)
        self.retrieve(traces)
        self.select(traces)
        self.prompt(traces)
        self.answer(traces)
        return traces

    def route(self, traces: list[Trace]) -> None:
        """d = F(x_v) (paper §3.1): which domain's retriever is asked."""
        if self.domain is None or isinstance(self.domain, str):
            for trace in traces:
                label = self.domain or trace.target_domain or UNKNOWN
                trace.domain = Domain(label=label)
            return
        ready = [t for t in traces if _example(t).images]
        found = self.domain.identify([_example(t).images for t in ready])
        for trace, domain in zip(ready, found, strict=True):
            trace.domain = domain
        for trace in traces:
            trace.domain = trace.domain or Domain(label=UNKNOWN)

    def retrieve(self, traces: list[Trace]) -> None:
        """x_r candidates: the k nearest reports of the domain, own studies excluded."""
        if not self.retrievers:
            return
        groups: dict[str, list[Trace]] = {}
        for trace in traces:
            key = self._key(trace)
            if key is not None and _example(trace).image:
                groups.setdefault(key, []).append(trace)
        for key, group in groups.items():
            hits, excluded = self.retrievers[key].search([_example(t) for t in group], self.k)
            unread = getattr(self.retrievers[key], "errors", {})
            for trace, found, own in zip(group, hits, excluded, strict=True):
                trace.hits, trace.excluded = found, own
                trace.error = trace.error or unread.get(trace.example_id)

    def select(self, traces: list[Trace]) -> None:
        """Adaptive retrieved-context selection (paper §3.2): how many hits to keep.

        Traces with the same hits (the questions of a picture) share one selection.
        """
        made: dict[tuple[tuple[str, float], ...], Selection] = {}
        for trace in traces:
            if trace.condition.references == "none":
                trace.selection = Selection(rule="none", reason="references switched off")
            elif self.rule is None or trace.condition.references == "all":
                kept = [hit.id for hit in trace.hits]
                trace.selection = Selection(rule="all", kept=kept, reason="every hit kept")
            else:
                hits = tuple((hit.id, hit.score) for hit in trace.hits)
                if hits not in made:
                    made[hits] = self.rule(trace.hits)
                trace.selection = made[hits]

    def prompt(self, traces: list[Trace]) -> None:
        """x_t + x_r as one prompt; unknown domain or nothing kept → no references."""
        for trace in traces:
            kept = set(trace.selection.kept) if trace.selection else set()
            references: list[Hit] = [hit for hit in trace.hits if hit.id in kept]
            trace.prompt = self.templates.render(trace, references, self.generator)

    def answer(self, traces: list[Trace]) -> None:
        """M(x_v, x_t + x_r): generate, then read the answer of closed questions."""
        if self.generator is None:
            return
        groups: dict[str, list[Trace]] = {}
        for trace in traces:
            label = trace.domain.label if trace.domain else UNKNOWN
            groups.setdefault(label if label in self.adapters else UNKNOWN, []).append(trace)
        for label, group in groups.items():
            generator = self.adapters.get(label, self.generator)
            found = generator.generate([self.request(trace) for trace in group])
            for trace, answer in zip(group, found, strict=True):
                if answer is not None and trace.answer_type == "closed":
                    answer.label = answers.parse_strict(answer.text, trace.question)
                trace.answer = answer

    def request(self, trace: Trace) -> Request:
        if trace.prompt is None:
            raise UserError(f"{trace.example_id}: no prompt was rendered before answering")
        closed = trace.task == "vqa" and trace.answer_type == "closed"
        return Request(
            prompt=trace.prompt,
            images=tuple(_example(trace).images),
            noise=trace.condition.noise,
            closed=closed,
            max_new_tokens=self.report_tokens if trace.task == "report" else 16 if closed else 48,
        )

    def _key(self, trace: Trace) -> str | None:
        label = trace.domain.label if trace.domain else UNKNOWN
        if label != UNKNOWN and label in self.retrievers:
            return label
        return GENERIC if GENERIC in self.retrievers else None


def _example(trace: Trace) -> Example:
    if trace.example is None:
        raise UserError(f"{trace.example_id}: trace was read from a file, expected a live example")
    return trace.example
