"""The reproduction matrix: published and own numbers as data, re-derived by a command.

Place in the picture: beside everything. ``repro/matrix.toml`` (and ``repro/ablation.toml``, our
own numbers) hold rows; each names a function of ``repro_checks``, the data that it needs, and
what should come out. Data that the user does not have makes a row "no data", never a failure. The
last measured values are kept in ``repro/results/latest.json``, so that
``docs/reproduce.md`` can be written without the data.

A row::

    [[row]]
    id = "always-yes-harvard"
    about = "Harvard VQA: accuracy of always answering yes, %"
    check = "always_yes"
    data = { source = "released", path = "data/test/vqa/harvard_test.jsonl", commit = "45ceed3" }
    args = {}
    expected = 86.1
    tolerance = 0.05
    from = "always-yes control on the released test set"
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmedrag.evaluation import OVERALL, EvaluationResult
from mmedrag.evaluation.metrics import CONTRACT_NAMES
from mmedrag.experiments import repro_checks
from mmedrag.experiments.repro_checks import NoData, Rows
from mmedrag.records import UserError
from mmedrag.runtime import read_json, read_toml, write_json, write_text

OK, NEAR, FAIL, NO_DATA = "OK", "near", "FAIL", "no data"
HEAD = "45ceed3"
ENVIRONMENT = {"released": "MMEDRAG_RELEASED", "demo": "MMEDRAG_DEMO"}
SOURCES = {
    "released": "a clone (with history) of github.com/richard-peng-xia/MMed-RAG",
    "demo": "the output folder of `mmedrag demo`",
    "own": "nothing: the benchmark is computed",
}
# files behind Git LFS pointers in the source's own history cannot be read from a clone without
# them: such a row has no data
POINTER = "version https://git-lfs"


@dataclass(frozen=True)
class Row:
    """One number: how to get it, what it should be, how far off it may be."""

    id: str
    about: str
    check: str
    expected: float
    tolerance: float
    source: str
    path: str = ""
    commit: str = HEAD
    args: Mapping[str, Any] = field(default_factory=dict)
    near: float | None = None  # within this it is "near"; by default three times the tolerance
    origin: str = ""  # where the expected number stands

    @property
    def command(self) -> str:
        """What re-derives this number alone."""
        return f"mmedrag repro --check --row {self.id}"

    @property
    def data(self) -> str:
        where = f"{self.path} at {self.commit}" if self.source == "released" else self.path
        return f"{self.source}: {where}" if where else self.source


@dataclass(frozen=True)
class Result:
    """The outcome of a row; ``measured`` is None without data."""

    row: Row
    status: str
    measured: float | None = None
    why: str = ""


_KEYS = {"id", "about", "check", "expected", "tolerance", "near", "data", "args", "from"}


def load_matrix(files: Sequence[str | Path]) -> list[Row]:
    """Rows of TOML files, in order.

    Raises:
        UserError: unreadable file, unknown or missing key, unknown check, or an id twice.
    """
    rows: list[Row] = []
    for file in files:
        tables = read_toml(file).get("row", [])
        rows += [_row(str(file), number, table) for number, table in enumerate(tables, 1)]
    twice = [name for name, n in Counter(r.id for r in rows).items() if n > 1]
    if twice:
        raise UserError(f"matrix: row {twice[0]!r} stands twice, expected unique ids")
    return rows


def _row(file: str, number: int, table: Mapping[str, Any]) -> Row:
    where = f"{file}: row {number} ({table.get('id', 'no id')})"
    for key in table:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key!r}, expected {', '.join(sorted(_KEYS))}")
    for key in ("id", "about", "check", "expected", "tolerance", "data"):
        if key not in table:
            raise UserError(f"{where}: {key} is missing")
    if not callable(getattr(repro_checks, table["check"], None)):
        raise UserError(
            f"{where}: check {table['check']!r} is not in mmedrag.experiments.repro_checks"
        )
    data = dict(table["data"])
    if data.get("source") not in SOURCES:
        raise UserError(f"{where}: data.source is one of {', '.join(SOURCES)}")
    return Row(
        id=table["id"],
        about=table["about"],
        check=table["check"],
        expected=table["expected"],
        tolerance=table["tolerance"],
        near=table.get("near"),
        origin=table.get("from", ""),
        args=table.get("args", {}),
        source=data["source"],
        path=data.get("path", ""),
        commit=data.get("commit", HEAD),
    )


def locate(source: str, folders: Mapping[str, str | Path] | None = None) -> Path | None:
    """Where a source lies: ``folders[source]``, else its environment variable; None if nowhere."""
    named = (folders or {}).get(source) or os.environ.get(ENVIRONMENT.get(source, ""), "")
    return Path(named) if named and Path(named).exists() else None


def read_file(folder: Path, path: str, commit: str) -> str:
    """A file of a commit of a git folder (work tree or bare), or of a plain folder at HEAD.

    Raises:
        NoData: the file, or its content, is not there.
    """
    git = subprocess.run(
        ["git", "-C", str(folder), "cat-file", "-p", f"{commit}:{path}"], capture_output=True
    )
    text = git.stdout.decode("utf-8", "replace") if git.returncode == 0 else ""
    if git.returncode and commit == HEAD and (folder / path).is_file():
        text = (folder / path).read_text(encoding="utf-8")
    if not text or text.startswith(POINTER):
        raise NoData(f"{path} at {commit} is not in {folder}")
    return text


def read_plain(folder: Path, path: str) -> str:
    """A file of a folder.

    Raises:
        NoData: it is not there.
    """
    if not (folder / path).is_file():
        raise NoData(f"{path} is not in {folder}")
    return (folder / path).read_text(encoding="utf-8")


@lru_cache(maxsize=4)
def _plain_rows(folder: Path, path: str, text: str) -> Rows:
    return repro_checks.parse_rows(text, path)


@lru_cache(maxsize=8)
def _rows_of(folder: Path, path: str, commit: str) -> Rows:
    return repro_checks.parse_rows(read_file(folder, path, commit), path)


def run_row(row: Row, folders: Mapping[str, str | Path] | None = None) -> Result:
    """Compute one row and judge it."""
    folder = locate(row.source, folders)

    def read(path: str, commit: str = row.commit) -> Rows:
        if folder is None:
            raise NoData(f"set {ENVIRONMENT[row.source]} to {SOURCES[row.source]}")
        if row.source == "released":
            return _rows_of(folder, path, commit)
        return _plain_rows(folder, path, read_plain(folder, path))

    file = {"file": row.path} if row.path else {}
    try:
        measured = float(getattr(repro_checks, row.check)(read, **file, **row.args))
    except NoData as error:
        return Result(row, NO_DATA, why=str(error))
    return judge(row, measured)


def judge(row: Row, measured: float) -> Result:
    """OK within the tolerance, near within ``near`` (three tolerances by default), else FAIL."""
    off = abs(measured - row.expected)
    near = 3 * row.tolerance if row.near is None else row.near
    slack = 1e-9 * max(1.0, abs(row.expected))
    status = OK if off <= row.tolerance + slack else NEAR if off <= near + slack else FAIL
    return Result(row, status, measured)


@dataclass(frozen=True)
class Report:
    """All results. ``failed`` decides the exit code: a row failed, or none could be run."""

    results: list[Result]

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(r.status for r in self.results)
        return {status: found[status] for status in (OK, NEAR, FAIL, NO_DATA)}

    @property
    def failed(self) -> bool:
        return bool(self.counts[FAIL]) or not self.ran

    @property
    def ran(self) -> bool:
        return any(r.status != NO_DATA for r in self.results)

    def lines(self) -> list[str]:
        """One line a row for the terminal, then the count line."""
        width = max((len(r.row.id) for r in self.results), default=0)
        out = []
        for r in self.results:
            found = r.why if r.measured is None else f"{r.measured:g} ({expectation(r.row)})"
            out.append(f"{r.status:<8}{r.row.id:<{width}}  {found}")
        return [*out, self.count_line()]

    def count_line(self) -> str:
        counted = ", ".join(f"{n} {status}" for status, n in self.counts.items())
        return f"{len(self.results)} rows: {counted}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "counts": self.counts,
            "failed": self.failed,
            "rows": [
                {
                    **asdict(r.row),
                    "args": dict(r.row.args),
                    "command": r.row.command,
                    "status": r.status,
                    "measured": r.measured,
                    "why": r.why,
                }
                for r in self.results
            ],
        }


def expectation(row: Row) -> str:
    return f"expected {row.expected:g} ± {row.tolerance:g}"


def run_matrix(
    root: str | Path = ".",
    only: Sequence[str] = (),
    folders: Mapping[str, str | Path] | None = None,
    write: bool = True,
) -> Report:
    """Run the matrix of a checkout and rewrite ``docs/reproduce.md``.

    Args:
        root: the checkout: ``repro/matrix.toml``, ``repro/ablation.toml``, ``docs``.
        only: ids of rows; all by default. Nothing is written for a part of the matrix.
        folders: source ("released", "demo") -> folder; by default the environment variables
            MMEDRAG_RELEASED and MMEDRAG_DEMO.
        write: keep the measured values in ``repro/results/latest.json`` and rewrite the page.

    Returns:
        The report; ``report.failed`` means exit code 1, ``report.lines()`` is what to print.

    Raises:
        UserError: no matrix at ``root``, a broken matrix, or an unknown id in ``only``.
    """
    root = Path(root)
    files = [f for f in (root / "repro/matrix.toml", root / "repro/ablation.toml") if f.exists()]
    if not files:
        raise UserError(f"{root / 'repro/matrix.toml'}: no such file, expected a checkout")
    rows = load_matrix(files)
    unknown = set(only) - {r.id for r in rows}
    if unknown:
        raise UserError(f"--row {min(unknown)}: no such row in the matrix")
    latest, book = root / "repro/results/latest.json", root / "docs/reproduce.md"
    recorded: dict[str, Any] = {}
    if write and not only:  # before the rows, which take minutes
        _check_written(book)
        recorded = _recorded(latest)
    report = Report([run_row(r, folders) for r in rows if not only or r.id in only])
    if write and not only:
        recorded |= {
            r.row.id: {"measured": round(r.measured, 6), "status": r.status}
            for r in report.results
            if r.measured is not None
        }
        recorded = {r.id: recorded[r.id] for r in rows if r.id in recorded}
        write_json(latest, recorded)
        write_text(book, page(rows, recorded))
    return report


def _recorded(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    rows = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(row, dict) and {"measured", "status"} <= row.keys() for row in rows):
        raise UserError(f"{path}: not what `mmedrag repro` writes; move it away")
    return found


def _check_written(path: Path) -> None:
    """That a file may be written: in a checkout no ledger tells, but each says what wrote it."""
    if path.exists() and b"by `mmedrag repro" not in path.read_bytes():
        raise UserError(
            f"{path}: is there already and not written by `mmedrag repro`; move it away"
        )


def page(rows: Sequence[Row], recorded: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/reproduce.md: every row with its last measured value, grouped by source."""
    counted = Counter(recorded[r.id]["status"] for r in rows if r.id in recorded)
    never = len(rows) - sum(counted.values())
    out = [
        "# Reproduction matrix",
        "",
        "Generated by `mmedrag repro`; do not edit. Rows live in `repro/matrix.toml` and "
        "`repro/ablation.toml`; measured values are the last ones that were computed where the "
        "data was at hand (`repro/results/latest.json`). OK: within the tolerance. near: within "
        "three times it (or the row's own bound). The released data is not part of this "
        "repository; rows without it are skipped.",
        "",
        f"{len(rows)} rows: {counted[OK]} OK, {counted[NEAR]} near, {counted[FAIL]} FAIL, "
        f"{never} never run.",
        "",
    ]
    for source, what in SOURCES.items():
        own = [r for r in rows if r.source == source]
        if not own:
            continue
        variable = f" (`{ENVIRONMENT[source]}`)" if source in ENVIRONMENT else ""
        out += [
            f"## From {what}{variable}",
            "",
            "| row | what | data | expected | measured | | expected from |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in own:
            last = recorded.get(row.id)
            measured = f"{last['measured']:g}" if last else "–"
            status = last["status"] if last else "never run"
            where = f"`{row.path}`" if row.path else "–"
            if row.source == "released":
                where += f" at `{row.commit}`"
            out.append(
                f"| `{row.id}` | {row.about} | {where} | {row.expected:g} ± {row.tolerance:g} | "
                f"{measured} | {status} | {row.origin} |"
            )
        out.append("")
    out += ["One row alone: `mmedrag repro --check --row ID`.", ""]
    return "\n".join(out)


def adopt(demo: str | Path, out: str | Path, tolerance: float = 0.02) -> int:
    """Write our own ablation as matrix rows: what a demo's folder says becomes expected.

    Of every plain row the leading metrics overall and by domain, and the reliance of every
    system. The rows are for that very sample; a demo on another one is no data for them.

    Returns:
        How many rows.

    Raises:
        UserError: ``demo`` is no finished demo.
    """
    result = EvaluationResult.read(Path(demo) / "metrics.json")
    try:
        few = json.loads(read_plain(Path(demo), "sample.json"))["studies_per_domain"]
    except NoData as error:
        raise UserError(f"--adopt: {error}, expected the output of `mmedrag demo`") from None
    commit = result.environment.commit or "unknown commit"
    origin = f"our own demo, {few or 'all'} studies per domain, {commit[:12]}"
    lines = ["# Our own ablation; written by `mmedrag repro --demo DEMO --adopt`.", ""]
    made = list(_own_numbers(result))
    for name, about, path, value in made:
        identity = "own-" + "-".join(name.replace("/", " ").replace("_", " ").split())
        lines += [
            "[[row]]",
            f"id = {json.dumps(identity)}",
            f"about = {json.dumps(about, ensure_ascii=False)}",
            'check = "of_evaluation"',
            'data = { source = "demo", path = "metrics.json" }',
            f"args = {{ path = {json.dumps(path)}, studies = {few} }}",
            f"expected = {round(value, 4)}",
            f"tolerance = {tolerance}",
            f"from = {json.dumps(origin)}",
            "",
        ]
    _check_written(Path(out))
    write_text(out, "\n".join(lines))
    return len(made)


def _own_numbers(result: EvaluationResult) -> Iterator[tuple[str, str, list[str], float]]:
    """(name, about, path in metrics.json, value) of the numbers that stand for our ablation."""
    from mmedrag.report import LEADING, SECOND

    for name, run in result.runs.items():
        for task, groups in run.tasks.items() if run.plain else ():
            wanted = [(LEADING[task], domain) for domain in groups] + [(SECOND[task], OVERALL)]
            for metric, domain in wanted:
                found = groups[domain].known(metric)
                if found and found.value is not None:
                    path = ["runs", name, "tasks", task, domain, "metrics", metric]
                    about = f"{run.title}: {metric}, {task}, {domain}"
                    yield f"{name} {task} {domain} {metric}", about, path, found.value
    for name, system in result.reliance.items():
        for metric, rate in system.metrics.items():
            if metric in CONTRACT_NAMES and rate.value is not None:
                path = ["reliance", name, "metrics", metric]
                yield f"{name} {metric}", f"{system.title}: {metric}", path, rate.value
