"""What references could give at most: fusers fitted to what the model sees and its references say.

``python -m training.embedded.fusion [WORK]``, after pairs are made (stage ``adapters``): a fuser
gets the untuned model's p(yes) without references, and how many references say yes, no or nothing
of the asked finding. It shows what this evidence is worth; a tuned reader that gets more out of
the picture than its own p(yes) says may do better.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmedrag.phantom import DOMAINS, findings_in, read_reference
from mmedrag.records import Trace, is_right, target_of
from mmedrag.runtime import read_jsonl
from training.embedded.stages import FULL

TEST_SEED = 3001
LEAN = (0.5, 1.0, 2.0)  # log-odds by which a fuser is made to lean to the picture's answer


def questions(folder: Path) -> Iterator[tuple[Trace, Trace]]:
    """Closed questions of a PAIRS folder: the untuned answers without and with references."""
    rows = {
        name: {
            t.example_id: t for t in read_jsonl(folder / "traces" / name / "traces.jsonl", Trace)
        }
        for name in ("clean", "clean-references")
    }
    for key, none in rows["clean"].items():
        aided = rows["clean-references"].get(key)
        if aided and none.answer_type == "closed" and none.answer and none.answer.p_yes is not None:
            yield none, aided


def statements(trace: Trace) -> list[float]:
    """Per reference: 1 it says yes to the question, -1 no, half of it uncertainly, 0 nothing."""
    out = []
    for hit in trace.hits:
        found = findings_in(str(trace.target_domain), hit.text).get(trace.meta["finding"])
        weight = 0.0 if found is None else 0.5 if found["uncertain"] else 1.0
        out.append(weight if read_reference(trace, hit.text) == "yes" else -weight)
    return out


def features(pairs: list[tuple[Trace, Trace]]) -> tuple[np.ndarray, np.ndarray]:
    """float [n, features], and the log-odds of yes without references [n]."""
    odds = np.array([_odds(none.answer.p_yes) for none, _ in pairs])  # type: ignore
    rows = []
    for (none, aided), own in zip(pairs, odds, strict=True):
        says = np.array(statements(aided) or [0.0])
        silent = (says == 0).sum() * (-1 if none.meta.get("form") == "negated" else 1)
        base = [
            own,
            own * abs(own),
            (says > 0).sum(),
            (says < 0).sum(),
            silent,
            says[0],
            says.sum() / len(says),
            silent / len(says),
            np.sign(silent),
        ]
        here = [float(none.target_domain == name) for name in DOMAINS]
        rows.append([*base, *(value * flag for value in base for flag in here), *here])
    return np.array(rows, dtype=float), odds


def _odds(p: float) -> float:
    p = float(np.clip(p, 1e-4, 1 - 1e-4))
    return float(np.log(p / (1 - p)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.embedded.fusion", description=__doc__)
    parser.add_argument("work", type=Path, nargs="?", default=Path("build/embedded"))
    work = parser.parse_args().work
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    folders = {seed: work / f"pairs-{seed}" for seed in FULL.pair_seeds}
    test = list(questions(folders.pop(TEST_SEED)))
    train = [row for folder in folders.values() for row in questions(folder)]
    without = np.array([is_right(none) for none, _ in test])
    yes = np.array([target_of(none) == "yes" for none, _ in test])

    def show(name: str, correct: np.ndarray) -> None:
        harm = (~correct)[without].mean()
        print(f"{name:<34} right {correct.mean():.3f}  over-reliance {harm:.3f}")

    print(f"fitted on {len(train)} questions, measured on {len(test)} (seed {TEST_SEED})")
    show("without references", without)
    show("untuned, with references", np.array([is_right(aided) for _, aided in test]))
    sides = [target_of(none) == "yes" for none, _ in train]
    (seen, _), (asked, odds) = features(train), features(test)
    models: dict[str, Any] = {
        "logistic regression": LogisticRegression(max_iter=3000, C=0.3),
        "boosted trees": HistGradientBoostingClassifier(
            max_depth=4, max_iter=200, learning_rate=0.05, random_state=0
        ),
    }
    for name, model in models.items():
        decide: Callable[[np.ndarray], np.ndarray] = model.fit(seen, sides).decision_function
        scores = decide(asked)
        show(name, (scores > 0) == yes)
        for lean in LEAN:
            show(f"{name}, leaning {lean}", (scores + lean * np.sign(odds) > 0) == yes)


if __name__ == "__main__":
    main()
