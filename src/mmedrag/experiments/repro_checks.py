"""What a row of the reproduction matrix computes, each a function of files -> one number.

Place in the picture: behind ``repro``. The released data stays where the user has
it; these functions read it and return counts and percentages, through the same metrics and
controls that score our own runs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mmedrag import evaluation
from mmedrag.evaluation import controls
from mmedrag.evaluation.metrics import questions, text as metrics_text
from mmedrag.records import Example, Hit, Reference, Trace, Truth, UserError, answers
from mmedrag.runtime import DataFolder

Rows = list[dict[str, Any]]
Read = Callable[..., Rows]  # Read(path, commit of the row) -> rows


class NoData(Exception):
    """The data of a row is not here; the message says what and how to name it."""


def rows(read: Read, file: str) -> float:
    """How many rows a file has."""
    return len(read(file))


def images(read: Read, file: str) -> float:
    """How many distinct images the rows of a file name."""
    return len({_image(row) for row in read(file)})


def always_yes(read: Read, file: str, metric: str = "accuracy") -> float:
    """A VQA test set under the control that always says yes, in percent."""
    targets = [row["answer"] for row in read(file)]
    truth = [answers.parse_released(t) for t in targets]
    sums = questions.confusion(["yes"] * len(truth), truth).sum(axis=0)
    return 100 * float({"accuracy": questions.accuracy, "f1_yes": questions.f1_yes}[metric](sums))


def always_no(read: Read, file: str) -> float:
    return 100 - always_yes(read, file)


def question_prior(read: Read, file: str) -> float:
    """Leave-one-out majority of rows with exactly the same question text, in percent."""
    found = read(file)
    truth = [answers.parse_released(row["answer"]) for row in found]
    prior = controls.leave_one_out_prior([row["question"] for row in found], truth, str)
    right = [a == b for a, b in zip(prior.texts, truth, strict=True)]
    return 100 * sum(right) / len(right)


def closed_answers(read: Read, file: str, metric: str) -> float:
    """An answer file of closed questions, in percent, under the parser of the published numbers."""
    found = read(file)
    stats = questions.closed([r["answer"] for r in found], [r["gt_answer"] for r in found])
    return 100 * stats[metric].point()


def starts_with_yes_or_no(read: Read, file: str) -> float:
    found = read(file)
    starts = [re.match(r"(yes|no)\b", row["answer"].strip(), re.IGNORECASE) for row in found]
    return 100 * sum(map(bool, starts)) / len(starts)


def report_answers(read: Read, file: str, metric: str) -> float:
    """An answer file of reports; ``words`` is the mean length."""
    found = read(file)
    texts, targets = [r["answer"] for r in found], [r["gt_report"] for r in found]
    if metric in ("words", "target_words"):
        return sum(len(t.split()) for t in (texts if metric == "words" else targets)) / len(found)
    return 100 * metrics_text.reports(texts, targets, with_meteor=False)[metric].point()


def report_control(read: Read, file: str, control: str, metric: str) -> float:
    """A retrieval file scored as if references were the report, in percent.

    ``control`` is copied_reference, constant_retrieved or shuffled_references.
    """
    found = read(file)
    traces = [
        Trace(
            example_id=str(i),
            task="report",
            target=row["report"],
            image=f"row-{i}",
            hits=[Hit(id=str(i), text=row["reference_reports"][0], score=1.0, rank=0)],
        )
        for i, row in enumerate(found)
    ]
    found_control = controls.report_controls(traces, None)[0][control]
    stats = metrics_text.reports(found_control.texts, [t.target for t in traces], with_meteor=False)
    return 100 * stats[metric].point()


def pairs(read: Read, file: str, kind: str, root: str = "", apart: str = "order") -> float:
    """Preference rows of a kind: cross_modal (the image is noised), rest, resist, copy.

    ``root`` restricts to rows whose ``image_root`` contains it. resist and copy stand one after
    the other without a mark. They are told ``apart`` where the order of their images restarts
    ("order"), or, in files whose rows were shuffled, where the rejected answers change their
    length ("length"): those of resist were written with a reference, those of copy without.
    """
    found = [r for r in read(file) if root in str(r.get("image_root", ""))]
    rest = [r for r in found if not r["rejected_noised"]]
    if kind == "all":
        return len(found)
    if kind in ("cross_modal", "rest"):
        return len(found) - len(rest) if kind == "cross_modal" else len(rest)
    resist = _restart(rest, file) if apart == "order" else _change(rest)
    return resist if kind == "resist" else len(rest) - resist


def _restart(found: Rows, file: str) -> int:
    """Where the numbers in the names of the images fall; all rows if they never do."""
    names = [_numbers(_image(r)) for r in found]
    falls = [i for i in range(1, len(names)) if names[i] < names[i - 1]]
    if len(falls) > 1:
        raise UserError(f"{file}: the order of its images falls {len(falls)} times, expected once")
    return falls[0] if falls else len(found)


def _change(found: Rows) -> int:
    """Where the mean length of the rejected answers changes most (CUSUM: Page 1954)."""
    words = np.array([len(_answer(r, "rejected_").split()) for r in found], dtype=float)
    n = np.arange(1, len(words))
    drift = np.cumsum(words - words.mean())[:-1] / np.sqrt(n * (len(words) - n))
    return int(np.argmax(np.abs(drift))) + 1


def identical_pairs(read: Read, file: str) -> float:
    """Rows whose chosen and rejected answers are the same text."""
    return sum(_answer(r) == _answer(r, "rejected_") for r in read(file))


def same_polarity(read: Read, file: str, noised: int) -> float:
    """Rows (noised or not) whose two answers parse alike."""
    return sum(
        answers.parse_released(_answer(r)) == answers.parse_released(_answer(r, "rejected_"))
        for r in read(file)
        if r["rejected_noised"] == noised
    )


def wrong_images(read: Read, file: str, root: str) -> float:
    """Noised rows of a source whose image does not carry the row's own id."""
    return sum(r["id"] not in _image(r) for r in _noised(read(file), root))


def noised_images(read: Read, file: str, root: str) -> float:
    """Distinct images of the noised rows of a source."""
    return len({_image(r) for r in _noised(read(file), root)})


def answers_on_wrong_image(read: Read, file: str, truth: str, truth_commit: str) -> float:
    """Answers whose image is not the one that the test set gives for their id."""
    own = {row["id"]: _image(row) for row in read(truth, truth_commit)}
    return sum(own.get(row["question_id"]) != row["image"] for row in read(file))


def shared(read: Read, file: str, other: str, key: str) -> float:
    """Distinct values of a key that stand in both files."""
    one, two = ({r[key] for r in read(name) if key in r} for name in (file, other))
    return len(one & two)


def unfinished(read: Read, file: str, key: str) -> float:
    """Texts under a key that end neither in a full stop nor in a closing bracket."""
    texts = [r[key].rstrip() for r in read(file) if key in r]
    return sum(not t.endswith((".", ")")) for t in texts)


def distinct_references(read: Read, file: str) -> float:
    """How many different references are ever retrieved first."""
    return len({row["reference_reports"][0] for row in read(file)})


def most_reused(read: Read, file: str) -> float:
    """Share of distinct images that get the most frequent reference, in percent."""
    first: dict[str, str] = {}
    for row in read(file):
        first.setdefault(_image(row), row["reference_reports"][0])
    return 100 * Counter(first.values()).most_common(1)[0][1] / len(first)


def from_pool(read: Read, file: str, pool: str, other: str) -> float:
    """Retrieved references whose text stands in ``pool`` and not in ``other``."""
    inside, outside = ({r["report"] for r in read(name)} for name in (pool, other))
    first = [row["reference_reports"][0] for row in read(file)]
    return sum(t in inside and t not in outside for t in first)


def reference_agreement(
    read: Read, file: str, finding: str = "", shuffled: bool = False, domain: str = "radiology"
) -> float:
    """How far the first references of a retrieval file agree with the cases' own reports.

    In one finding, or ("") the mean over all; of another case's reference where ``shuffled``.
    """
    words = evaluation.findings_of(evaluation.load_keywords(), domain)
    cases = [
        evaluation.case_of_reports(None, row["report"], row["reference_reports"][0], words)
        for row in read(file)
    ]
    result = evaluation.agreement(cases, len(cases), "keywords", resamples=1)
    cell = result.findings[finding] if finding else result.mean
    return float((cell.shuffled if shuffled else cell).value or 0)


def of_evaluation(read: Read, file: str, path: Sequence[str], studies: int | None = None) -> float:
    """A value of a metrics.json: keys from the top, such as runs, base/none, tasks, ...

    ``studies``: only of a demo on so many studies per domain (0: all); another is no data.
    """
    if studies is not None:
        sample: Any = read("sample.json")
        if sample["studies_per_domain"] != studies:
            raise NoData(
                f"that demo has {sample['studies_per_domain'] or 'all'} studies per "
                f"domain, expected {studies or 'all'}"
            )
    value: Any = read(file)
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            raise UserError(f"{file}: no {key!r} in {' > '.join(path)}")
        value = value[key]
    return float(value["value"] if isinstance(value, Mapping) else value)


@lru_cache(maxsize=4)
def _benchmark(
    domain: str, studies: int
) -> tuple[list[Example], list[Reference], dict[str, Truth]]:
    """A benchmark of small pictures: its questions, reports and truth."""
    from mmedrag.phantom import build_benchmark

    with TemporaryDirectory() as folder:
        build_benchmark(folder, studies=studies, domains=[domain], size=32, workers=1, hedging=0.0)
        data = DataFolder(folder)
        return data.examples(), data.corpus(), data.truth()


def benchmark_yes(read: Read, domain: str, studies: int = 200) -> float:
    """Share of yes among the benchmark's balanced closed questions, in percent."""
    truth = [e.answer for e in _benchmark(domain, studies)[0] if e.answer_type == "closed"]
    return 100 * truth.count("yes") / len(truth)


def benchmark_prior(read: Read, domain: str, studies: int = 200) -> float:
    """Leave-one-out majority of the same question on the benchmark, in percent."""
    asked = [e for e in _benchmark(domain, studies)[0] if e.answer_type == "closed"]
    truth = [e.answer or "" for e in asked]
    prior = controls.leave_one_out_prior([e.question or "" for e in asked], truth)
    return 100 * sum(a == b for a, b in zip(prior.texts, truth, strict=True)) / len(truth)


def benchmark_labeller(read: Read, domain: str, studies: int = 200) -> float:
    """Errors of the benchmark's labeller on its own reports: a finding read otherwise than it
    is, a present one that is not read, or a sentence outside the vocabulary."""
    from mmedrag.phantom import label_report

    _, corpus, truth = _benchmark(domain, studies)
    wrong = 0
    for report in corpus:
        stated, known = label_report(domain, report.text), truth[report.meta["study"]].findings
        wrong += len(stated["unreadable"])
        wrong += sum(f["present"] != known[name].present for name, f in stated["findings"].items())
        wrong += sum(s.present and name not in stated["findings"] for name, s in known.items())
    return wrong


def parse_rows(text: str, name: str) -> Rows:
    """Rows of a JSON Lines or JSON file."""
    try:
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON: {error}") from None


def _image(row: Mapping[str, Any]) -> str:
    found = row.get("image", row.get("image_path"))
    return str(found[0] if isinstance(found, list) else found)


def _numbers(name: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", name)]


def _noised(found: Rows, root: str) -> Rows:
    return [r for r in found if r["rejected_noised"] and root in str(r.get("image_root", ""))]


def _answer(row: Mapping[str, Any], which: str = "") -> str:
    return row[f"{which}conversations"][1]["value"]
