"""``python -m training.real_domain --data DATA --out DIR``: fit, judge and write the model.

DATA is the folder of ``data import manifest``. Pictures under CC0, MIT and CC BY are fitted on;
those under other licences only judge. Features are kept in ``--work`` and read again; delete it
after a change of data. They are the picture statistics, which need no extra, and those of
``real:lite0`` (extra ``real``) for the pictures themselves and some outliers.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from PIL import Image

from mmedrag.domain import DomainModel, embed
from mmedrag.evaluation import EVERYDAY, blank, everyday
from mmedrag.records import Encoder, Row, UserError
from mmedrag.retrieval.encoders import load_encoder
from mmedrag.runtime import (
    DataFolder,
    Figures,
    ModelCard,
    numpy_rng,
    seeded_share,
    write_json,
    write_train_ids,
)
from training.real_domain import model, pictures
from training.real_domain.rows import picture_licence, rows_to_fit

log = logging.getLogger("training.real_domain")
NOTICE = (
    "fitted on pictures of six public collections; other scanners and stains may be unknown to it"
)
TITLE = "Domain model for real pictures"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.real_domain", allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="DATA folders")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--work", type=Path, default=Path("build/real-domain"), help="features")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        build([DataFolder(path) for path in options.data], options.out, options.work, options.jobs)
    except UserError as error:
        parser.exit(1, f"{error}\n")


def build(data: Sequence[DataFolder], out: Path, work: Path, jobs: int) -> None:
    """Features, the fit, its judgement with sources and patients left out, and the folder."""
    rows, use = rows_to_fit(data)
    fitted = [row for row, permitted in zip(rows, use, strict=True) if permitted]
    log.info("%d pictures to fit on, %d that only judge", len(fitted), len(rows) - len(fitted))

    encoder = load_encoder(model.ENCODER)

    def block(name: str, made: Callable[[], Iterable[Any]]) -> np.ndarray:
        return _kept(work / f"{name}.npy", made)

    def seen(name: str, made: Callable[[], Iterable[Any]]) -> np.ndarray:
        return _kept(work / f"{name}-lite0.npy", made, encoder)

    def files() -> list[Path]:
        return [row.images[0] for row in rows]

    photos, unseen = block("everyday", everyday), ~_photos()
    of_photos = seen("everyday", everyday)
    blocks = model.Blocks(
        block("own", files),
        block("copies", lambda: pictures.copies(rows)),
        block("drawn", lambda: pictures.drawn(pictures.DRAWN, 1_000_000)),
        block("fresh", lambda: pictures.drawn(pictures.FRESH, 2_000_000)),
        block("photos", pictures.photo_copies),
        {
            "own": seen("own", files),
            "fresh": seen("fresh", pictures.fresh_seen),
            "photos": of_photos[~unseen],
            "photos_statistics": photos[~unseen],
            "everyday": of_photos[unseen],
            "plain": seen("plain", lambda: _some(list(_plain()))),
        },
        {"spec": model.ENCODER, "fingerprint": encoder.fingerprint, "dim": encoder.dim},
    )
    own = blocks.both("own", blocks.own)
    left = left_out(rows, use)
    log.info("one model of all %d, %d with a source or patients left out", len(fitted), len(left))
    shipped, *without = Parallel(n_jobs=jobs)(
        delayed(model.fit)(rows, chosen, blocks)
        for chosen in (use, *(use & ~mine for mine in left.values()))
    )
    domains = np.array([str(row.domain) for row in rows], dtype=object)
    table = {
        name: model.judged(fitted_without, own[mine], domains[mine][0])
        for (name, mine), fitted_without in zip(left.items(), without, strict=True)
    }
    table |= of_held(rows, use, own, shipped)
    table |= of_outliers(shipped, blocks, photos, block("plain", _plain))
    shipped.config |= {
        "notice": NOTICE,
        "settings": asdict(model.SETTINGS) | {"leaf": model.LEAF, "flagged": model.FLAGGED},
        "metrics": table,
    }
    out.mkdir(parents=True, exist_ok=True)
    shipped.save(out)
    write_train_ids(out / "train_ids.jsonl", fitted)
    card(fitted, table).write(out)
    write_json(work / "table.json", table)
    for name, value in table.items():
        print(f"{name}: {value}")


def _kept(
    file: Path, made: Callable[[], Iterable[Any]], encoder: Encoder | None = None
) -> np.ndarray:
    """A block of features from an earlier call, or computed now."""
    if file.exists():
        return np.load(file)
    log.info("features: %s", file.stem)
    found, errors = embed(made(), encoder, encoder is None)
    if errors:
        raise UserError(f"real_domain: unreadable: {next(iter(errors.values()))}")
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, found)
    return found


def _plain() -> Iterable[Image.Image]:
    """100 blank pictures and 100 of uniform or normal noise, of many sizes."""
    for number in range(100):
        yield blank(number, 7)
    for number in range(100):
        rng = numpy_rng(4_000_000 + number)
        size = tuple(int(v) for v in rng.integers(64, 512, 2))
        shape = (*size, 1 if number % 4 > 1 else 3)
        spread = rng.uniform(10, 90)
        noise = rng.uniform(0, 255, shape) if number % 2 else rng.normal(128, spread, shape)
        pixels = np.broadcast_to(np.clip(noise, 0, 255), (*size, 3)).astype(np.uint8)
        yield Image.fromarray(pixels)


def _some(plain: Sequence[Any]) -> list[Any]:
    """40 of the blank and 40 of the noisy (pictures or their features)."""
    return [*plain[:40], *plain[100:140]]


def _photos() -> np.ndarray:
    """Which of the everyday pictures are those of the fit, bool [n]."""
    return np.array([name in pictures.PHOTOS for listed in EVERYDAY.values() for name in listed])


def left_out(rows: Sequence[Row], use: np.ndarray) -> dict[str, np.ndarray]:
    """What is left out -> which rows that is, bool [n]: each source, or three patients of ten where
    it is the only one of its domain."""
    sources = np.array([row.source for row in rows], dtype=object)
    domains = np.array([str(row.domain) for row in rows], dtype=object)
    drawn = np.array([seeded_share(0, row.patient or row.id) < 0.3 for row in rows])
    found = {}
    for source in sorted(set(sources[use])):
        mine = use & (sources == source)
        if set(domains[use & ~mine]) == set(domains):
            found[f"{source} left out"] = mine
        else:
            found[f"{source}, 3 of 10 patients left out"] = mine & drawn
    return found


def of_held(
    rows: Sequence[Row], use: np.ndarray, own: np.ndarray, shipped: DomainModel
) -> dict[str, Any]:
    """Pictures under other licences, by source."""
    sources = np.array([row.source for row in rows], dtype=object)
    domains = np.array([str(row.domain) for row in rows], dtype=object)
    found = {}
    for source in sorted(set(sources[~use])):
        chosen = ~use & (sources == source)
        known = "other pictures of" if source in set(sources[use]) else "never fitted on:"
        name = f"{known} {source}"
        found[name] = model.judged(shipped, own[chosen], domains[chosen][0])
    return found


def of_outliers(
    shipped: DomainModel, blocks: model.Blocks, photos: np.ndarray, plain: np.ndarray
) -> dict[str, Any]:
    """Share flagged of each kind of what belongs to no domain; with the neighbours, of some."""
    unseen = ~_photos()
    some = np.array(_some(list(plain)))
    both = {
        "drawn, unseen": blocks.fresh_both()[model.SEEN :],
        "blank": blocks.both("plain", some)[:40],
        "noise": blocks.both("plain", some)[40:],
        "everyday, unseen": blocks.both("everyday", photos[unseen]),
        "everyday, fitted on": blocks.both("photos", photos[~unseen]),
    }
    kinds = {
        "drawn, unseen": blocks.fresh[len(blocks.fresh) // 2 :],
        "blank": plain[:100],
        "noise": plain[100:],
        "everyday, unseen": photos[unseen],
        "everyday, fitted on": photos[~unseen],
    }
    out = {}
    for name, found in kinds.items():
        out[name] = {
            "n": len(found),
            "flagged": model.below(shipped, shipped.scores(found)[1]),
            f"flagged with {model.ENCODER}": model.below(shipped, shipped.scores(both[name])[1]),
        }
    return out


def card(fitted: Sequence[Row], table: dict[str, Any]) -> ModelCard:
    """Sources with licence and attribution, and the measured table."""
    counts = Counter((row.source, picture_licence(row)) for row in fitted)
    thanks: dict[tuple[str | None, str], set[str]] = {key: set() for key in counts}
    for row in fitted:
        thanks[row.source, picture_licence(row)].add(row.attribution or "")
    given = [
        (
            f"{source} ({licence})",
            f"{counts[source, licence]} pictures. " + _short(thanks[source, licence]),
        )
        for source, licence in sorted(counts, key=str)
    ]
    return ModelCard(
        title=TITLE,
        what="Labels: ophthalmology, pathology, radiology, or unknown. Features: picture "
        "statistics; where the extra real is installed, *unknown* also looks at the "
        f"{model.NEAREST} nearest by {model.ENCODER}. Weights and features alone: no picture and "
        "no text is in this folder.",
        facts=[
            NOTICE,
            "Outliers of the fit: drawn pictures, and of scikit-image (CC0) "
            + ", ".join(pictures.PHOTOS),
            "Threshold: 98 % of other drawn pictures are flagged; that share was chosen with the "
            "figures below in view.",
            "Neighbours: their weight (of 5 to 40) lost least of the sources left out, on average; "
            "that there are 5 was fixed with the judged figures in view; "
            f"their level flags 98 % of {model.SEEN} drawn pictures and all everyday ones of the "
            f"fit. With {model.ENCODER} {model.SEEN} drawn, 40 blank and 40 noisy ones are judged.",
            "`python -m training.real_domain --data DATA --out DIR` makes it again.",
        ],
        figures=[
            Figures("Fitted on:", ("source", "pictures and attribution"), given),
            Figures("Measured:", ("what", "value"), [(k, _told(v)) for k, v in table.items()]),
        ],
        settings=asdict(model.SETTINGS),
    )


def _told(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _short(lines: set[str], most: int = 60) -> str:
    """Every attribution once; of collections that name each file, the common beginning."""
    if len(lines) <= most:
        return "; ".join(sorted(lines))
    return os.path.commonprefix(sorted(lines)).rstrip(" ;,(-") + " …"


if __name__ == "__main__":
    main()
