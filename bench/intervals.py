"""How often 95 % intervals hold the truth, and how often a system is called better that is not.

Studies are drawn from populations whose truth is known, four questions a patient
(``tests/interval_tools.py``), and evaluated as ``mmedrag eval`` does. Of 200 studies a share of
0.95 is known to 0.015 (one standard error).

    python bench/intervals.py [--studies N] [--patients N ...] [--out bench/results] [--docs PAGE]

--docs also writes the table into that page, between its marks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from interval_tools import KINDS, RESAMPLES, coverage  # noqa: E402

MARKS = ("<!-- coverage -->", "<!-- end of coverage -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--patients", type=int, nargs="+", default=[10, 30, 300])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--docs", type=Path)
    asked = parser.parse_args()
    held: dict[str, dict[int, float]] = {}
    called: dict[str, dict[int, float]] = {}
    for patients in asked.patients:
        for kind in KINDS:
            inside, better = coverage(kind, patients, asked.studies)
            for table, found in ((held, inside), (called, better)):
                for name, share in found.items():
                    table.setdefault(name, {})[patients] = share
            print(f"{kind}, {patients} patients: done", file=sys.stderr, flush=True)
    lines = [
        f"| 95 % interval of | {' | '.join(f'{n} patients' for n in asked.patients)} |",
        "|---" * (len(asked.patients) + 1) + "|",
        *(_row(f"`{name}`" if " " not in name else name, held[name]) for name in held),
        *(_row(f"*marked as better, of equals:* `{name}`", called[name]) for name in called),
    ]
    print("\n".join(lines))
    found = {"studies": asked.studies, "resamples": RESAMPLES, "held": held, "better": called}
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "intervals.json").write_text(json.dumps(found, indent=1) + "\n")
    if asked.docs:
        text = asked.docs.read_text(encoding="utf-8")
        body = f"{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}"
        pattern = re.compile(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", re.DOTALL)
        asked.docs.write_text(pattern.sub(lambda _: body, text), encoding="utf-8")


def _row(name: str, shares: dict[int, float]) -> str:
    return f"| {name} | {' | '.join(f'{share:.3f}' for share in shares.values())} |"


if __name__ == "__main__":
    main()
