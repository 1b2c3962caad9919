"""`python -m training.fusion RUN_WITHOUT RUN_WITH --fit-on RUN_WITHOUT RUN_WITH`: the attainable.

Two run folders of one untuned system on the same questions, without references and with them, and
the same of other seeds to fit on. Prints, and writes as JSON, accuracy, over-reliance and following
of the best fuser (:mod:`mmedrag.evaluation.fusion`) beside those of the untuned reader with its
references and of the one that ignores them. `mmedrag ablation --set ablation.attainable=FILE` shows
them in its tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mmedrag.evaluation import Fusion, asked_twice, attainable
from mmedrag.records import Trace, UserError
from mmedrag.runtime import read_jsonl, write_json


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.fusion", description=__doc__)
    parser.add_argument("without", type=Path, help="run folder of --references none")
    parser.add_argument("with_", metavar="with", type=Path, help="run folder with references")
    parser.add_argument(
        "--fit-on",
        type=Path,
        nargs=2,
        action="append",
        required=True,
        metavar=("WITHOUT", "WITH"),
        help="the same two runs on another seed; repeatable",
    )
    parser.add_argument(
        "--against", type=Path, help="run folder of --references contradicting, for follow_rate"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        without = traces(given.without)
        pairs = asked_twice(without, traces(given.with_))
        against = asked_twice(without, traces(given.against)) if given.against else []
        fit_on = [row for two in given.fit_on for row in asked_twice(*map(traces, two))]
        found = attainable(pairs, fit_on, against, given.seed)
        if given.out:
            write_json(given.out, asdict(found))
    except UserError as error:
        print(f"fusion: {error}".replace("fusion: fusion: ", "fusion: "), file=sys.stderr)
        return 2
    print(table(found, len(pairs)))
    return 0


def traces(folder: Path) -> list[Trace]:
    return list(read_jsonl(folder / "traces.jsonl", Trace))


def table(found: Fusion, questions: int) -> str:
    """The effects in words, a line an answerer."""
    lines = [f"fitted on {found.fitted} questions, measured on {questions}: {found.policy}"]
    titles = {"fuser": "fuser", "reader": "untuned, references", "ignored": "references ignored"}
    for name, effects in found.effects.items():
        cells = [
            f"{effect} -"
            if cell.value is None
            else f"{effect} {cell.value:.3f} [{_bound(cell.low)}, {_bound(cell.high)}] n={cell.n}"
            for effect, cell in effects.items()
        ]
        lines.append(f"{titles[name]:<22} {'  '.join(cells)}")
    return "\n".join(lines)


def _bound(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
