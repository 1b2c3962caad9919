"""The ablation in one call: base model, naive retrieval, and the paper's parts one by one.

Place in the picture: each row is the same pipeline with one constructor argument changed (paper
Table 4; the sets of RAG-PT alone and in pairs, Table 5), run under its own conditions and under
those of its controls. Finished rows are skipped on a re-run; a row that cannot be run says what
it lacks. :mod:`mmedrag.experiments.demo` scores what was run.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from mmedrag import embedded
from mmedrag.answering import TemplateSet
from mmedrag.embedded import EMBEDDED, located
from mmedrag.experiments.settings import AblationSettings
from mmedrag.pipeline import (
    GENERIC,
    OneDomainTable,
    Pipeline,
    RunSettings,
    System,
    build_pipeline,
    run_conditions,
)
from mmedrag.records import ConditionSpec, DomainIdentifier, Example, Generator, Searcher, UserError
from mmedrag.retrieval import RuleSpec
from mmedrag.runtime import DataFolder, counted

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
Adapter = str | Mapping[str, str]  # one folder, or one for each domain

CLEAN = {"none": ConditionSpec("none")}
# controls that are runs stand beside every score: a picture without content, shown to the
# generator or to the whole system, and references that are somebody else's
ALONE = CLEAN | {
    "noise-none": ConditionSpec("none", "gaussian_clip"),
    "blank-none": ConditionSpec("none", "blank"),
}
WITH = {
    "references": ConditionSpec("selected"),
    "noise-references": ConditionSpec("selected", "gaussian_clip"),
    "blank-references": ConditionSpec("selected", "blank"),
    "system-blank": ConditionSpec("shown", "blank"),
    "shuffled": ConditionSpec("shuffled"),
    "random": ConditionSpec("random"),
}
AGAINST = {"contradicting": ConditionSpec("contradicting")}
OWN = {"own-report": ConditionSpec("own")}

SETS = ("cross_modal", "copy", "resist")  # RAG-PT's kinds of pairs
PAIRWISE = tuple("+".join(two) for two in combinations(SETS, 2))
ALL = "all"  # the full method


@dataclass(frozen=True)
class Row:
    """One row of the table: what is put into the pipeline, and the conditions it is run under."""

    name: str
    title: str
    plans: Mapping[str, ConditionSpec]
    retrieval: str | None = None  # None | "generic" | "domain"
    rule: RuleSpec | None = None  # None: all k hits are kept
    adapter: Adapter | None = None
    beams: int = 1
    lacks: str = ""  # why the row cannot be run here


@dataclass(frozen=True)
class Parts:
    """What the rows are assembled from.

    ``generator`` gives the model for (adapter folder or None, beams). ``beams`` of 1 and
    ``adapts`` False: it has no beam search, it takes no adapter. ``described`` goes into every
    row's ``config.json``, ``inputs`` (name -> file or folder) are hashed there.
    """

    domain: DomainIdentifier | str | None
    domain_retrievers: Mapping[str, Searcher]
    generic: Searcher | None
    generator: Callable[[str | None, int], Generator]
    rule: RuleSpec
    k: int = 4
    beams: int = 4
    adapts: bool = True
    templates: TemplateSet = field(default_factory=TemplateSet)
    described: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Path] = field(default_factory=dict)


def rows(
    parts: Parts, adapters: Mapping[str, Adapter], pairwise: bool = True, truth: bool = True
) -> list[Row]:
    """The table's rows, also those that lack a part here (``Row.lacks``).

    Args:
        adapters: RAG-PT set -> adapter; the key "all" is the full method.
        pairwise: also the rows of two sets.
        truth: the data has exact findings, so that references which contradict them exist.
    """
    acs = parts.rule
    against, own = (AGAINST, OWN) if truth else ({}, {})
    table = [
        Row("base", "base model", ALONE),
        Row("beam", "base model, beam search", ALONE, beams=parts.beams),
        Row("naive", "+ naive RAG (one generic retriever, top-k)", WITH, "generic"),
        Row("domain", "+ domain-aware retrieval", WITH, "domain"),
        Row("selection", "+ adaptive selection", WITH | against | own, "domain", acs),
    ]
    others = [name for name in adapters if name not in (*SETS, *PAIRWISE, ALL)]
    for name in (*SETS, *(PAIRWISE if pairwise else ()), *others):
        plans = ALONE | WITH | against
        table.append(Row(f"pt-{name}", _title(name), plans, "domain", acs, adapters.get(name)))
    every = ALONE | WITH | against | own
    full = Row("pt-all", "+ RAG-PT (full method)", every, "domain", acs, adapters.get(ALL))
    return [replace(row, lacks=_lacks(row, parts)) for row in (*table, full)]


def _title(name: str) -> str:
    sets = [part.replace("_", "-") for part in name.split("+")]
    return f"+ RAG-PT, {' and '.join(sets)}{' only' if len(sets) == 1 else ''}"


def _lacks(row: Row, parts: Parts) -> str:
    """Why a row cannot be run; "" when it can."""
    if row.retrieval == "generic" and parts.generic is None:
        return "no index over all domains"
    if row.retrieval == "domain" and not parts.domain_retrievers:
        return "no index of a domain"
    if row.name == "beam" and row.beams == 1:
        return "this generator has no beam search"
    if row.name.startswith("pt-") and not (row.adapter and parts.adapts):
        return "no adapter of this set is named" if parts.adapts else "it takes no adapter"
    return next(filter(None, map(absent, _folders(row.adapter))), "")


def _folders(adapter: Adapter | None) -> list[str]:
    if adapter is None:
        return []
    return [adapter] if isinstance(adapter, str) else list(adapter.values())


def absent(adapter: str) -> str:
    """Why an adapter cannot be used; "" when it can."""
    try:
        there = (located(adapter) / "adapter_config.json").is_file()
    except UserError:
        return f"{adapter} is not in this installation"
    return "" if there else f"{adapter}: no adapter (adapter_config.json) in it"


def run_rows(
    table: Sequence[Row],
    parts: Parts,
    data: DataFolder,
    examples: Sequence[Example],
    out: Path,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Run every row that lacks nothing under its conditions into ``out/runs/ROW/CONDITION``;
    finished ones stand.

    Raises:
        UserError: no examples, or a folder that was begun with other parts.
    """
    if not examples:
        raise UserError(f"{data.path}: no example to run")
    folders = []
    for row in table:
        if row.lacks:
            log.warning("not run: %s: %s", row.title, row.lacks)
            continue
        pipeline = assemble(row, parts)
        system = {
            "row": row.name,
            "title": row.title,
            "retrieval": row.retrieval,
            "k": parts.k,
            "rule": str(row.rule),
            "beams": row.beams,
            "parts": dict(parts.described),
            "generator": {"model": parts.generator(None, row.beams).name, "adapter": row.adapter},
        }
        inputs = {**parts.inputs, **{name: located(name) for name in _folders(row.adapter)}}
        folder = out / "runs" / row.name
        asked = list(_asked(row, examples))
        for i, (plans, chosen) in enumerate(asked):
            settings = RunSettings(ids=tuple(example.id for example in chosen))
            part = f" ({i + 1} of {len(asked)})" if len(asked) > 1 else ""
            report = partial(progress, row.title + part) if progress else None
            run_conditions(pipeline, data, plans, folder, settings, seed, system, inputs, report)
        folders += [folder / name for name in row.plans]
    return folders


def assemble(row: Row, parts: Parts) -> Pipeline:
    """The pipeline of a row."""
    found: Mapping[str, Searcher] = {}
    if row.retrieval == "generic" and parts.generic is not None:
        found = {GENERIC: parts.generic}
    elif row.retrieval == "domain":
        found = parts.domain_retrievers
    one = row.adapter if isinstance(row.adapter, str) else None
    several = row.adapter if isinstance(row.adapter, Mapping) else {}
    return Pipeline(
        domain=parts.domain,
        retrievers=found,
        rule=row.rule,
        templates=parts.templates,
        generator=parts.generator(one, row.beams),
        k=parts.k,
        adapters={d: parts.generator(a, row.beams) for d, a in several.items()},
    )


def _asked(
    row: Row, examples: Sequence[Example]
) -> Iterator[tuple[dict[str, ConditionSpec], list[Example]]]:
    """Conditions with their examples: image twins are asked on the clean image alone, with the
    row's own references and without, where image sensitivity is measured."""
    asked = (CLEAN["none"], WITH["references"])
    twins = {name for name, plan in row.plans.items() if plan in asked}
    originals = [e for e in examples if not e.meta.get("twin_of")]
    if len(originals) == len(examples) or not twins or twins == set(row.plans):
        yield dict(row.plans), list(examples if twins else originals)
        return
    yield {name: row.plans[name] for name in row.plans if name in twins}, list(examples)
    yield {name: row.plans[name] for name in row.plans if name not in twins}, originals


def sample(data: DataFolder, studies: int = 0, split: str = "test") -> list[Example]:
    """All questions and reports of ``studies`` studies of each domain, with twins; 0: of all.

    One study of each patient before a second one of any, because intervals count patients;
    otherwise in file order, so that nobody chose them.

    Raises:
        UserError: there are no examples of this split.
    """
    examples = data.examples(split)
    if not examples:
        there = counted(data.examples())
        raise UserError(f"{data.path}: no example of split {split}; there are: {there}")
    log.info("%d examples of split %s, any domain", len(examples), split)
    if not studies:
        return examples
    turns: dict[str | None, dict[str, int]] = {}  # domain -> study -> how many of its patient's
    seen: Counter[tuple[str | None, str]] = Counter()
    for example in examples:
        own = turns.setdefault(example.domain, {})
        if (study := _study(example)) not in own:
            patient = (example.domain, example.patient or study)
            own[study] = seen[patient]
            seen[patient] += 1
    chosen = {d: set(sorted(own, key=own.__getitem__)[:studies]) for d, own in turns.items()}
    return [e for e in examples if _study(e) in chosen[e.domain]]


def _study(example: Example) -> str:
    return str(example.meta.get("study", example.id)).split("-twin-")[0]


def describe_sample(studies: int, examples: Sequence[Example], split: str = "test") -> str:
    """The sample of :func:`sample` in a sentence."""
    which = f"{studies} {split} studies of each domain, of as many patients as possible"
    per = ", ".join(f"{n} {d}" for d, n in Counter(e.domain or "?" for e in examples).items())
    patients = len({e.patient for e in examples if e.patient})
    return (
        f"{which if studies else f'all {split} studies'} ({len(examples)} examples of {patients} "
        f"patients: {per})."
    )


def parts_of(system: System, settings: AblationSettings, seed: int = 0) -> Parts:
    """The parts of a system (see :mod:`mmedrag.pipeline.system`), opened once for all rows.

    The embedded domain model counts as named: it is asked for every picture, whatever the data
    states, because the rows measure what identification is worth.
    """
    from mmedrag.retrieval import open_retriever

    named = system.routing == "embedded" or system.domain.label or system.domain.model
    if system.domains and (not named or system.routing == "shipped"):
        log.warning("rows go by the domain that they state; to identify it: --domain-model")
    bare = replace(
        system,
        routing="model" if system.routing == "embedded" else system.routing,
        generator={k: v for k, v in system.generator.items() if k != "adapter"},
        domains={d: replace(part, adapter=None) for d, part in system.domains.items()},
    )
    if settings.generic:
        bare.domains[GENERIC] = OneDomainTable(settings.generic, settings.generic_retriever)
    whole = build_pipeline(replace(bare, domains={}), seed=seed)
    found = {
        name: open_retriever(part.index, part.retriever)
        for name, part in bare.domains.items()
        if part.index
    }
    assert whole.generator is not None and whole.rule is not None
    greedy = system.generator["kind"] == "hf" and not system.generator.get("temperature")
    return Parts(
        domain=whole.domain,
        domain_retrievers=found,
        generic=found.pop(GENERIC, None),
        generator=variants(whole.generator),
        rule=whole.rule,
        k=settings.k,
        beams=settings.beams if greedy else 1,
        adapts=hasattr(whole.generator, "with_adapter"),
        templates=whole.templates,
        described=bare.describe(),
        inputs=bare.inputs(),
    )


def variants(base: Any) -> Callable[[str | None, int], Generator]:
    """(adapter, beams) -> the model under them; its weights are loaded once, by the caller."""
    made: dict[tuple[str | None, int], Generator] = {}

    def variant(adapter: str | None, beams: int) -> Generator:
        key = (adapter, beams)
        if key not in made:
            found = base
            if beams > 1:
                found = copy.copy(base)
                found.decoding = replace(base.decoding, num_beams=beams)
            made[key] = found.with_adapter(str(located(adapter))) if adapter else found
        return made[key]

    return variant


def system_adapters(system: System, settings: AblationSettings) -> dict[str, Adapter]:
    """RAG-PT set -> adapter: the recipe's, and the system's own as the full method."""
    found: dict[str, Adapter] = dict(settings.adapters)
    own = system.generator.get("adapter")
    each = {name: part.adapter for name, part in system.domains.items() if part.adapter}
    if ALL not in found and (own or each):
        found[ALL] = own or each
    return found


def embedded_adapters() -> dict[str, str]:
    """RAG-PT set -> name of the adapters that ship; "all" is the full method."""
    names = [name for name in embedded.available() if name.startswith("adapter")]
    return {name.partition("-")[2] or ALL: f"{EMBEDDED}:{name}" for name in names}
