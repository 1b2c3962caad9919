"""The whole system in one place: route → retrieve → references → select → prompt → answer → read.

    Example ─ domain.identify ─ retrievers[d].search ─ rule ─ prompts.render ─ generate ─► Trace

``STAGES`` is the figure, and what runs: every command, the service and pair building go through
:meth:`Pipeline.run`. Every part may be replaced or ``None``, so a row of an ablation table is a
constructor argument. Stages take and return lists of equal length and are joined by id, never by
file position. A row that fails carries its ``error``; the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from mmedrag.answering import TemplateSet
from mmedrag.pipeline.conditions import Pool, degraded
from mmedrag.records import (
    UNKNOWN,
    ConditionSpec,
    Domain,
    DomainIdentifier,
    Example,
    Faulting,
    Generator,
    Hit,
    Request,
    Searcher,
    Selection,
    Trace,
    UserError,
    read_answer,
)
from mmedrag.retrieval import RuleSpec

GENERIC = "generic"  # key of the one retriever that serves every domain (naive RAG)


@dataclass(frozen=True)
class Stage:
    """One arrow of the figure.

    Attributes:
        name: as in ``RUN/timings.jsonl``.
        step: fills in what the traces gain.
        shared: done once for an example, whatever conditions it is answered under.
        for_references: left out where no condition asks for references.
    """

    name: str
    step: Callable[[Pipeline, list[Trace]], None]
    shared: bool = False
    for_references: bool = False


Guard = Callable[[Stage, "list[Trace]"], None]  # runs one stage, whatever its rows do


@dataclass
class Pipeline:
    """``Pipeline(domain, retrievers, rule, templates, generator)(examples) -> traces``.

    Attributes:
        domain: identifier, a fixed label, or None. A label and an identifier that somebody named
            go before a row's own domain, one that ships (``by`` is ``"embedded"`` or
            ``"shipped"``) after it; what nobody states is that of the only retriever.
        retrievers: searcher per domain label; key ``"generic"`` serves every domain.
        rule: selection rule with parameters; None keeps all ``k`` hits.
        templates: prompt set; generator: answers requests; None stops after the prompt.
        adapters: the generator of a domain label, where it has its own.
        k: how many hits are retrieved before selection.
        pool: what substituted references and noise are drawn from.
        min_confidence: under it, whoever asks gets no answer to a closed question.
        benchmark_only: why the generator's answers mean nothing on other pictures, if so.
        stages: the figure; in order, the shared ones first.

    Example::

        pipeline = load_system(domain="radiology", index="index-radiology")
        (trace,) = pipeline([Example.of("chest.png", "Is there a nodule?")])
    """

    domain: DomainIdentifier | str | None = None
    retrievers: Mapping[str, Searcher] = field(default_factory=dict)
    rule: RuleSpec | None = field(default_factory=RuleSpec)
    templates: TemplateSet = field(default_factory=TemplateSet)
    generator: Generator | None = None
    adapters: Mapping[str, Generator] = field(default_factory=dict)
    k: int = 8
    report_tokens: int = 256
    pool: Pool = field(default_factory=Pool)
    min_confidence: float = 0.0
    benchmark_only: str | None = None
    stages: Sequence[Stage] = field(default_factory=lambda: STAGES)

    def __call__(
        self, examples: Sequence[Example], condition: ConditionSpec | None = None
    ) -> list[Trace]:
        """The examples under one condition; the first failure is raised."""
        return self.run(examples, {"": condition or ConditionSpec()})[""]

    def run(
        self,
        examples: Sequence[Example],
        conditions: Mapping[str, ConditionSpec],
        guard: Guard | None = None,
        last: str | None = None,
    ) -> dict[str, list[Trace]]:
        """Every example under every condition, stage by stage.

        Args:
            conditions: name → condition.
            guard: how a stage is run (see ``worker``); None calls it.
            last: name of the stage to stop after.

        Returns:
            name of the condition → traces in the order of ``examples``.
        """
        guard = guard or (lambda stage, traces: stage.step(self, traces))
        base = [Trace.of(example) for example in examples]
        wanted = any(spec.references != "none" for spec in conditions.values())
        made: dict[str, list[Trace]] | None = None
        every = base
        for stage in self.stages:
            if made is None and not stage.shared:
                made = {n: [self._under(c, t) for t in base] for n, c in conditions.items()}
                every = [trace for group in made.values() for trace in group]
            if wanted or not stage.for_references:
                guard(stage, every)
            if stage.name == last:
                break
        return made or {n: [self._under(c, t) for t in base] for n, c in conditions.items()}

    def _under(self, spec: ConditionSpec, base: Trace) -> Trace:
        """A fresh trace of the same example under a condition, with what the conditions share."""
        trace = Trace.of(base.live)
        try:
            trace.condition = self.pool.condition(base.live, spec)
        except UserError as error:
            trace.error = str(error)
            return trace
        trace.domain = base.domain
        if spec.references != "none":
            trace.hits, trace.excluded = list(base.hits), base.excluded
        else:
            trace.hits, trace.excluded = [], 0
        if base.error:
            trace.error = base.error
        return trace

    def route(self, traces: list[Trace]) -> None:
        """d = F(x_v) (paper §3.1): which domain's retriever is asked."""
        if isinstance(self.domain, str):
            for trace in traces:
                trace.domain = Domain(label=self.domain, by="option")
        else:
            by = getattr(self.domain, "by", "model")
            if self.domain is None or by != "model":
                for trace in traces:
                    if trace.target_domain:
                        trace.domain = Domain(label=trace.target_domain, by="row")
            if self.domain is not None:
                ready = [t for t in traces if t.live.images and t.domain is None]
                found = self.domain.identify([t.live.images for t in ready])
                for trace, domain in zip(ready, found, strict=True):
                    trace.domain = domain.model_copy(update={"by": by})
        for trace in traces:
            trace.domain = self._told(trace.domain or self._only())

    def _only(self) -> Domain:
        """What a row that states no domain gets where no model is asked."""
        if self.domain is not None:
            return Domain(label=UNKNOWN, reason="it has no picture")
        if len(self.retrievers) == 1:
            (label,) = self.retrievers
            return Domain(label=UNKNOWN if label == GENERIC else label, by="index")
        return Domain(
            label=UNKNOWN, reason="nobody states it: name it (--domain) or a model (--domain-model)"
        )

    def _told(self, domain: Domain) -> Domain:
        """The domain; with a word on it where none of the retrievers serves it."""
        label, known = domain.label, self.retrievers
        if label == UNKNOWN or not known or label in known or GENERIC in known:
            return domain
        reason = f"no index of domain {label} is given, only of {', '.join(known)}"
        return domain.model_copy(update={"reason": reason})

    def retrieve(self, traces: list[Trace]) -> None:
        """x_r candidates: the k nearest reports of the domain, own studies excluded."""
        if not self.retrievers:
            return
        groups: dict[str, list[Trace]] = {}
        for trace in traces:
            key = self._key(trace)
            if key is not None and trace.live.image:
                groups.setdefault(key, []).append(trace)
        for key, group in groups.items():
            searcher = self.retrievers[key]
            hits, excluded = searcher.search([t.live for t in group], self.k)
            unread = searcher.errors if isinstance(searcher, Faulting) else {}
            for trace, found, own in zip(group, hits, excluded, strict=True):
                trace.hits, trace.excluded = found, own
                trace.error = trace.error or unread.get(trace.example_id)

    def references(self, traces: list[Trace]) -> None:
        """Other references than the retrieved ones, where the condition asks for them."""
        for trace in traces:
            mode = trace.condition.references
            if mode == "random":
                trace.hits = self.pool.random(trace)
            elif mode == "own":
                trace.hits = self.pool.own(trace)
            elif mode == "contradicting":
                trace.hits = self.pool.contradicting(trace)
        shuffled = [t for t in traces if t.condition.references == "shuffled"]
        if shuffled:
            self._shuffle(shuffled)
        shown = [t for t in traces if t.condition.references == "shown" and t.condition.noise]
        if shown:
            self._retrieve_for_shown(shown)

    def _shuffle(self, traces: Sequence[Trace]) -> None:
        """The hits of the partner example; none of them may be the example's own."""
        partners = [self.pool.partner(t.live, "shuffle") for t in traces]
        probes = [Trace.of(p) if p else None for p in partners]
        for trace, probe in zip(traces, probes, strict=True):
            if probe:
                probe.domain = trace.domain
        self.retrieve([probe for probe in probes if probe])
        for trace, probe in zip(traces, probes, strict=True):
            trace.hits = list(probe.hits) if probe else []

    def _retrieve_for_shown(self, traces: Sequence[Trace]) -> None:
        """The hits of the degraded pictures: the whole system sees what the model is shown."""
        with TemporaryDirectory(prefix="mmedrag-shown-") as folder:
            probes = [degraded(trace, Path(folder)) for trace in traces]
            self.retrieve(probes)
        for trace, probe in zip(traces, probes, strict=True):
            trace.hits, trace.excluded = probe.hits, probe.excluded
            trace.error = trace.error or probe.error

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
        """M(x_v, x_t + x_r)."""
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
                trace.answer = answer

    def read(self, traces: list[Trace]) -> None:
        """Free text → yes, no or unclear: the label that everything after this goes by."""
        for trace in traces:
            read_answer(trace)

    def request(self, trace: Trace) -> Request:
        if trace.prompt is None:
            raise UserError(f"{trace.example_id}: no prompt was rendered before answering")
        closed = trace.task == "vqa" and trace.answer_type == "closed"
        return Request(
            prompt=trace.prompt,
            images=tuple(trace.live.images),
            noise=trace.condition.noise,
            closed=closed,
            max_new_tokens=self.report_tokens if trace.task == "report" else 16 if closed else 48,
        )

    def _key(self, trace: Trace) -> str | None:
        label = trace.domain.label if trace.domain else UNKNOWN
        if label != UNKNOWN and label in self.retrievers:
            return label
        return GENERIC if GENERIC in self.retrievers else None


STAGES: tuple[Stage, ...] = (
    Stage("route", Pipeline.route, shared=True),
    Stage("retrieve", Pipeline.retrieve, shared=True, for_references=True),
    Stage("references", Pipeline.references),
    Stage("select", Pipeline.select),
    Stage("prompt", Pipeline.prompt),
    Stage("answer", Pipeline.answer),
    Stage("read", Pipeline.read),
)
