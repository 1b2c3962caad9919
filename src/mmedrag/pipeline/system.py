"""From a system file and flags to a Pipeline, so that every command assembles the same one.

Place in the picture: before it. Parts come, in this order, from flags, a recipe's
``[selection]``, ``[generator]`` and ``[prompts]`` tables, the system file, and the embedded
system. The system file::

    [domain]              model = "folder", encoder of it; or label = "radiology" to fix it
    [domains.radiology]   index = "folder", retriever = "encoder folder", adapter = "folder"
    [generator]           kind = "hf" | "openai" | "scripted", model, adapter, options
    [selection]           rule = "log_ratio", gamma = ..., k = ...
    [prompts]             set = "default" | "llava_med" | "released"

The embedded indexes belong to the embedded model: with another model and no index named,
answers are given without references. Paths in a system file are relative to the file.

Who states a picture's domain: ``--domain NAME``; else the domain model that the user named; else
the row itself; else a model that ships, the embedded one where every index is of the benchmark and
the one for real pictures elsewhere; else the only index.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmedrag.answering import TemplateSet
from mmedrag.embedded import EMBEDDED, foreign, located
from mmedrag.pipeline.embedded import of_benchmark, real_domain_model
from mmedrag.pipeline.pipeline import GENERIC, Pipeline
from mmedrag.pipeline.settings import Flags
from mmedrag.records import Adaptable, Generator, UserError, protocols
from mmedrag.retrieval import RuleSpec
from mmedrag.runtime import config, read_json

log = logging.getLogger(__name__)
SIDECAR = "mmedrag.json"  # beside a model's config.json: {"min_confidence": ...}
HITS = 8  # how many hits are retrieved at least, before selection


@dataclass(frozen=True)
class DomainTable:
    """``[domain]``: the identification model (and its encoder, if that is one of the user's
    own), or one fixed label."""

    model: str | None = None
    label: str | None = None
    encoder: str | None = None


@dataclass(frozen=True)
class OneDomainTable:
    """``[domains.NAME]``: what serves one domain."""

    index: str | None = None
    retriever: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class PromptTable:
    """``[prompts]``: which set, a name or a TOML file."""

    set: str = "default"


@dataclass
class System:
    """Names of all parts: what ``config.json`` records, and what :func:`build` opens."""

    domain: DomainTable = field(default_factory=DomainTable)
    domains: dict[str, OneDomainTable] = field(default_factory=dict)
    generator: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    prompts: PromptTable = field(default_factory=PromptTable)
    routing: Literal["model", "embedded", "shipped"] = "model"  # whose the domain model is

    def describe(self) -> dict[str, Any]:
        told = {k: v for k, v in vars(self).items() if k != "routing" or v == "shipped"}
        described: dict[str, Any] = config.as_dict(told)
        if self.domain.encoder is None:  # as it was before there was one
            del described["domain"]["encoder"]
        return described

    def caution(self, sources: Iterable[str | None], answers: bool = False) -> None:
        """Warn once where embedded parts meet pictures that are not the benchmark's.

        Args:
            sources: of the rows that are worked on. answers: the generator is asked too.
        """
        specs = [index_encoder(part.index) for part in self.domains.values() if part.index]
        specs += [self.generator.get("model")] if answers else []
        if said := foreign(specs, sources):
            log.warning(said)

    def inputs(self) -> dict[str, Path]:
        """name → file or folder whose content decides the result (indexes: their manifest)."""
        named = [self.domain.model, self.generator.get("model"), self.generator.get("adapter")]
        named += [d.adapter for d in self.domains.values()]
        found = {n: located(n) for n in named if n}
        found |= {
            d.index: Path(d.index) / "manifest.json" for d in self.domains.values() if d.index
        }
        return {name: path for name, path in found.items() if path.exists()}


def resolve_system(
    flags: Flags,
    recipe: Mapping[str, Mapping[str, Any]] | None = None,
    references: bool = True,
    interactive: bool = False,
) -> System:
    """Names of all parts from flags, system file, recipe and the embedded default.

    Without ``references`` the embedded indexes are not asked for (they are built on first use).
    ``interactive``: pictures come from outside, so that one index alone says nothing of them.

    Raises:
        UserError: an unreadable file, an unknown key, or two indexes for one domain.
    """
    tables, recipe = _read(flags.system), recipe or {}
    where = f"{flags.system}: " if flags.system else ""
    generator = {**tables["generator"], **recipe.get("generator", {})}
    for key in ("model", "adapter"):
        if getattr(flags, key) is not None:
            generator[key] = getattr(flags, key)
    own_model = not generator.get("model") and generator.get("kind", "hf") == "hf"
    if own_model:
        generator["model"] = f"{EMBEDDED}:vlm"
        if "adapter" not in generator and _embedded_has("adapter"):
            generator["adapter"] = f"{EMBEDDED}:adapter"
    if generator.get("adapter") == "none":
        del generator["adapter"]
    generator.setdefault("kind", "hf")
    domains = _domains(
        flags,
        {
            name: config.settings(OneDomainTable, table, f"{where}[domains.{name}]")
            for name, table in tables["domains"].items()
        },
        references and own_model and flags.system is None,
    )
    stated = _domain(flags, config.settings(DomainTable, tables["domain"], f"{where}[domain]"))
    domain, routing = _routing(stated, domains, own_model, interactive)
    system = System(
        domain=domain,
        routing=routing,
        domains=domains,
        generator=generator,
        selection=config.over(tables["selection"], recipe.get("selection", {})),
        prompts=config.settings(
            PromptTable, {**tables["prompts"], **recipe.get("prompts", {})}, f"{where}[prompts]"
        ),
    )
    if flags.rule is not None:
        system.selection = config.over(system.selection, {"rule": flags.rule})
    _rule(system.selection)
    return system


def build_pipeline(
    system: System, *, references: bool = True, answers: bool = True, seed: int = 0, **search: Any
) -> Pipeline:
    """Open every part.

    Args:
        references: False leaves the retrievers out (``--no-rag``).
        answers: False leaves the generator out (``retrieve``).
        seed: of sampled decoding.
        search: ``views``, ``exclude``, ``where`` of :func:`mmedrag.retrieval.open_retriever`.
    """
    from mmedrag.answering.generators import load_generator

    generator = None
    adapters: dict[str, Any] = {}
    if answers:
        options = dict(system.generator)
        if "seed" in _known_options(options):
            options.setdefault("seed", seed)
        if options["kind"] == "hf":
            for key in ("model", "adapter"):
                if options.get(key):
                    options[key] = str(located(options[key]))
        generator = load_generator(**options)
        if options.get("adapter") and not isinstance(generator, Adaptable):
            raise UserError(f"[generator]: adapter: kind {options['kind']!r} takes none")
        adapters = {
            name: _adapted(generator, options["kind"], name, part.adapter)
            for name, part in system.domains.items()
            if part.adapter
        }
    return Pipeline(
        domain=system.domain.label or _identifier(system),
        retrievers=_retrievers(system, search) if references else {},
        rule=_rule(system.selection),
        templates=TemplateSet(system.prompts.set),
        generator=generator,
        adapters=adapters,
        k=max(HITS, int(system.selection.get("k") or 0)),
        min_confidence=min_confidence(located(str(system.generator.get("model")))),
        benchmark_only=foreign([str(system.generator.get("model"))]) if answers else None,
    )


def _adapted(generator: Generator, kind: str, name: str, adapter: str) -> Generator:
    if not isinstance(generator, Adaptable):
        raise UserError(f"[domains.{name}]: adapter: a generator of kind {kind!r} takes none")
    return generator.with_adapter(str(located(adapter)))


def min_confidence(model: Path) -> float:
    """The fitted threshold beside a model; 0 where none was fitted."""
    path = model / SIDECAR
    return float(read_json(path).get("min_confidence") or 0) if path.is_file() else 0.0


def index_domain(path: str | Path) -> str:
    """The domain an index serves; ``generic`` when it serves all."""
    from mmedrag.retrieval.stores import read_manifest

    return read_manifest(Path(path))["domain"] or GENERIC


def index_encoder(path: str | Path) -> str | None:
    """Name of the encoder that an index was built with."""
    from mmedrag.retrieval.stores import read_manifest

    return (read_manifest(Path(path)).get("encoder") or {}).get("spec")


def _identifier(system: System) -> Any:
    from mmedrag.domain import open_domain

    if system.domain.model is None:
        return None
    model = open_domain(located(system.domain.model), encoder=system.domain.encoder)
    model.by = system.routing
    return model


def _retrievers(system: System, search: Mapping[str, Any]) -> dict[str, Any]:
    from mmedrag.retrieval import open_retriever

    return {
        name: open_retriever(part.index, part.retriever, **search)
        for name, part in system.domains.items()
        if part.index
    }


def _known_options(options: Mapping[str, Any]) -> set[str]:
    """What the generator's kind takes; other keys of ``[generator]`` fail, these listed."""
    from mmedrag.answering.generators import EXTRAS, GENERATORS

    kind = options["kind"]
    built = protocols.resolve_object(kind, GENERATORS, "generator", EXTRAS)
    parameters = inspect.signature(built).parameters
    known = {"kind", *parameters}
    unknown = sorted(set(options) - known)
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        listed = ", ".join(sorted(known))
        raise UserError(f"[generator]: unknown key {unknown[0]!r}, expected one of {listed}")
    return known


def _rule(table: Mapping[str, Any]) -> RuleSpec:
    return RuleSpec(**table)


def _domain(flags: Flags, found: DomainTable) -> DomainTable:
    if flags.domain_model is not None:
        found = DomainTable(model=flags.domain_model)
    if flags.domain_encoder is not None:
        found = replace(found, encoder=flags.domain_encoder)
    if flags.domain not in (None, "auto"):
        return DomainTable(label=flags.domain)
    if flags.domain == "auto" and found.label:
        found = replace(found, label=None)
    return found


def _routing(
    stated: DomainTable, domains: Mapping[str, OneDomainTable], own_model: bool, interactive: bool
) -> tuple[DomainTable, Literal["model", "embedded", "shipped"]]:
    """The domain model that is asked, and whose it is, where nobody states one."""
    if stated.model or stated.label:
        return stated, "model"
    indexes = [part.index for part in domains.values() if part.index]
    if (indexes or own_model) and all(of_benchmark(index) for index in indexes):
        return DomainTable(model=f"{EMBEDDED}:domain"), "embedded"
    shipped = real_domain_model()
    if shipped and (interactive or len(indexes) > 1):
        return DomainTable(model=shipped), "shipped"
    return DomainTable(), "model"


def _domains(
    flags: Flags, named: Mapping[str, OneDomainTable], fallback: bool
) -> dict[str, OneDomainTable]:
    """Parts of each domain. An ``--index`` replaces that of its domain in the system file."""
    found = dict(named)
    for name, part in found.items():
        if part.index and (own := index_domain(part.index)) not in (name, GENERIC):
            raise UserError(f"[domains.{name}]: index {part.index} is of domain {own!r}")
    given: dict[str, str] = {}
    for path in flags.index:
        name = index_domain(path)
        if name in given:
            raise UserError(f"--index {path}: domain {name!r} has one already, {given[name]}")
        given[name] = str(path)
        old = found.get(name, OneDomainTable())
        found[name] = OneDomainTable(str(path), flags.retriever, old.adapter)
    if not any(part.index for part in found.values()):
        if not fallback:
            log.info("no index is named: answers are given without references")
            return found
        from mmedrag.pipeline.embedded import index_folders

        for name, folder in index_folders().items():
            old = found.get(name, OneDomainTable())
            found[name] = OneDomainTable(str(folder), old.retriever, old.adapter)
    return found


def _read(path: Path | None) -> dict[str, dict[str, Any]]:
    """The tables of a system file, its relative paths made relative to where we are."""
    names = ("domain", "domains", "generator", "selection", "prompts")
    if path is None:
        return {name: {} for name in names}
    tables = config.read_toml(path)
    for name, table in tables.items():
        if name not in names or not isinstance(table, dict):
            raise UserError(f"{path}: unknown table [{name}], expected one of {', '.join(names)}")
    found = {name: dict(tables.get(name, {})) for name in names}
    domains = [t for t in found["domains"].values() if isinstance(t, dict)]
    if len(domains) != len(found["domains"]):
        raise UserError(
            f"{path}: [domains]: expected a table per domain, such as [domains.radiology]"
        )
    for table in [found["domain"], found["generator"], *domains]:
        for key in ("model", "encoder", "index", "retriever", "adapter"):
            value = table.get(key)
            if isinstance(value, str) and (path.parent / value).exists():
                table[key] = str(path.parent / value)
    return found


def _embedded_has(name: str) -> bool:
    try:
        return located(f"{EMBEDDED}:{name}").is_dir()
    except (ImportError, UserError):
        return False


def load_system(
    path: str | Path | None = None,
    *,
    recipe: str | Path | None = None,
    references: bool = True,
    seed: int = 0,
    interactive: bool = False,
    **flags: Any,
) -> Pipeline:
    """The pipeline that a system file and flags name, ready to answer; by default the embedded one.

    Args:
        path: a system file (TOML).
        recipe: name or file of a recipe: its ``[selection]``, ``[generator]`` and ``[prompts]``.
        references: False leaves retrieval out.
        seed: of sampled decoding.
        interactive: as in :func:`resolve_system`.
        flags: ``domain``, ``domain_model``, ``model``, ``adapter``, ``index`` (one or several
            folders), ``rule``: as the options of the same names.

    Raises:
        UserError: an unreadable file, an unknown key or flag, or a part that cannot be opened.

    Example::

        pipeline = load_system(domain="radiology", index="index-radiology", adapter="none")
    """
    index = flags.pop("index", ())
    indexes = [str(one) for one in ([index] if isinstance(index, (str, Path)) else index)]
    named = {key: value if value is None else str(value) for key, value in flags.items()}
    given = config.settings(Flags, {"system": path, "index": indexes, **named}, "load_system")
    system = resolve_system(given, config.load(recipe), references, interactive)
    return build_pipeline(system, references=references, seed=seed)
