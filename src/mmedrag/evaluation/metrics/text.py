"""Metrics of generated reports over kept libraries: BLEU, ROUGE, METEOR.

Place in the picture: ``Trace`` -> metrics -> ``Score``, for ``task="report"``. A BLEU without
its tokenizer, case and smoothing is not a number; each family carries a signature
(:func:`signatures`) and the tests compare it with its library.

- ``bleu_1..4``: sacrebleu corpus BLEU of maximum order n (13a, lower case, exp smoothing).
- ``bleu_nltk_1..4``: mean over rows of nltk ``sentence_bleu`` with uniform weights up to n,
  nltk's own default of no smoothing, on lower-cased words with "." and "," split off: the
  family that the field's papers use, though they seldom say so. ``bleu_nltk_avg``: of the four.
- ``rouge_1``, ``rouge_2``, ``rouge_l``: mean F1 of rouge-score with Porter stemming.
- ``meteor``: mean of nltk ``meteor_score`` over WordNet, where its data is installed (nltk looks
  synonyms up for stems, so it finds fewer than the original Java tool).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mmedrag.evaluation.metrics.questions import average
from mmedrag.evaluation.metrics.statistics import AnyStat, Stat, ratio
from mmedrag.records import UserError
from mmedrag.runtime import cache_folder, write_bytes, write_text

ORDERS = (1, 2, 3, 4)
METEOR_HELP = (
    "meteor: WordNet data is not installed; run 'make meteor' "
    "(or: apt-get install wordnet-base && python -m mmedrag.evaluation.metrics.text)"
)
WORDNET_SOURCES = (Path("/usr/share/wordnet"), Path("/usr/local/share/wordnet"))
# lexicographer files in the order that WordNet numbers them (wninput(5WN)); Debian leaves the
# list itself out of its package
LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute "
    "noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group "
    "noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant "
    "noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion "
    "verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()


def words(text: str) -> list[str]:
    """Lower-cased words with "." and "," split off."""
    return re.sub(r"([.,])", r" \1 ", text.lower()).split()


@lru_cache(maxsize=1)
def _bleu():  # type: ignore[no-untyped-def]
    from sacrebleu.metrics import BLEU

    return BLEU(lowercase=True, tokenize="13a", effective_order=True)


@lru_cache(maxsize=65536)
def _bleu_counts(text: str, target: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """sacrebleu's counts of one sentence (matches and totals of order 1-4, the two lengths)
    and its sentence BLEU-1..4."""
    score = _bleu().sentence_score(text, [target])
    counts = (*score.counts, *score.totals, score.sys_len, score.ref_len)
    sums = np.array(counts, dtype=float)[None]
    each = tuple(float(bleu_of(sums, n, effective=True)[0]) for n in ORDERS)
    return counts, each


def bleu_of(sums: np.ndarray, order: int, effective: bool = False) -> np.ndarray:
    """Corpus BLEU of maximum order n in [0, 1] from summed counts (Papineni et al. 2002).

    Equal to sacrebleu with ``smooth:exp``; ``effective`` stops at the longest order that the
    text has (sacrebleu's ``eff:yes``, for single sentences).

    Args:
        sums: [..., 10] matches 1-4, totals 1-4, length of the output, length of the target.
    """
    matches, totals = sums[..., 0:order], sums[..., 4 : 4 + order]
    out_len, ref_len = sums[..., 8], sums[..., 9]
    # each order without a match halves the count that stands in for it (exp smoothing)
    halvings = np.cumsum(matches == 0, axis=-1)
    stand_in = np.where(matches == 0, 0.5**halvings, matches)
    logs = np.log(np.where(totals > 0, stand_in / np.where(totals > 0, totals, 1), 1e-300))
    if effective:
        logs = np.where(totals > 0, logs, 0)
        used = np.maximum((totals > 0).sum(axis=-1), 1)
    else:
        used = np.full(totals.shape[:-1], order)
    penalty = np.exp(np.minimum(0, 1 - ratio(ref_len, out_len)))
    score = np.nan_to_num(penalty) * np.exp(logs.sum(axis=-1) / used)
    return np.where(matches.sum(axis=-1) > 0, score, 0.0)


def bleu(texts: Sequence[str], targets: Sequence[str]) -> dict[str, AnyStat]:
    """``bleu_1..4``: corpus BLEU of maximum order n, with sentence BLEU per example."""
    found = [_bleu_counts(a, b) for a, b in zip(texts, targets, strict=True)]
    rows = np.array([counts for counts, _ in found], dtype=float).reshape(-1, 10)
    return {
        f"bleu_{n}": Stat(
            rows, partial(bleu_of, order=n), np.array([each[n - 1] for _, each in found])
        )
        for n in ORDERS
    }


@lru_cache(maxsize=65536)
def _nltk_bleu(text: str, target: str) -> tuple[float, ...]:
    from nltk.translate.bleu_score import sentence_bleu

    a, b = words(text), words(target)
    if not a or not b:
        return (0.0,) * 4
    weights = [tuple([1 / n] * n) for n in ORDERS]
    with warnings.catch_warnings():  # it warns of every text without a matching 4-gram
        warnings.simplefilter("ignore", UserWarning)
        return tuple(float(v) for v in sentence_bleu([b], a, weights))


def nltk_bleu(texts: Sequence[str], targets: Sequence[str]) -> dict[str, AnyStat]:
    """``bleu_nltk_1..4`` and their mean ``bleu_nltk_avg``: means of sentence BLEU."""
    rows = [_nltk_bleu(a, b) for a, b in zip(texts, targets, strict=True)]
    out: dict[str, AnyStat] = {
        f"bleu_nltk_{n}": average([row[n - 1] for row in rows]) for n in ORDERS
    }
    out["bleu_nltk_avg"] = average([sum(row) / 4 for row in rows])
    return out


class _CachedTokens:
    """rouge-score's own tokenizer, each text once: stemming is most of its time."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.tokenize = lru_cache(maxsize=65536)(DefaultTokenizer(use_stemmer=True).tokenize)


@lru_cache(maxsize=1)
def _rouge_scorer():  # type: ignore[no-untyped-def]
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_CachedTokens())


@lru_cache(maxsize=65536)
def _rouge(text: str, target: str) -> tuple[float, float, float]:
    score = _rouge_scorer().score(target, text)
    return tuple(score[name].fmeasure for name in ("rouge1", "rouge2", "rougeL"))  # type: ignore[return-value]


def rouge(texts: Sequence[str], targets: Sequence[str]) -> dict[str, AnyStat]:
    """``rouge_1``, ``rouge_2``, ``rouge_l``: mean F1 with stemming."""
    rows = [_rouge(a, b) for a, b in zip(texts, targets, strict=True)]
    return {
        name: average([row[i] for row in rows])
        for i, name in enumerate(("rouge_1", "rouge_2", "rouge_l"))
    }


def wordnet_folder() -> Path:
    """Where METEOR's WordNet lies: ``$NLTK_DATA/corpora/wordnet``, else in the cache folder."""
    first = os.environ.get("NLTK_DATA", "").split(os.pathsep)[0]
    return (Path(first) if first else cache_folder("nltk_data")) / "corpora/wordnet"


def prepare_wordnet(source: Path | None = None, folder: Path | None = None) -> Path:
    """Lay out WordNet's dictionary files as nltk reads them. Done already: nothing happens.

    Args:
        source: folder with ``data.noun`` and the rest: Debian's ``wordnet-base`` (the default,
            /usr/share/wordnet) or the ``dict`` folder of any WordNet 3.0/3.1 distribution.
        folder: where to, by default :func:`wordnet_folder`.

    Raises:
        UserError: no dictionary files at ``source``.
    """
    folder = folder or wordnet_folder()
    if (folder / "lexnames").exists():
        return folder
    found = [p for p in ([source] if source else WORDNET_SOURCES) if (p / "data.noun").exists()]
    if not found:
        where = source or " or ".join(map(str, WORDNET_SOURCES))
        raise UserError(f"{where}: no WordNet dictionary (data.noun). {METEOR_HELP}")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(found[0].iterdir()):
        if file.is_file() and file.name != "lexnames":
            write_bytes(folder / file.name, file.read_bytes())
    for name in ("index.sense", *(f"{p}.exc" for p in ("adj", "adv", "noun", "verb"))):
        (folder / name).touch()
    part_of_speech = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    lines = [f"{i:02d}\t{n}\t{part_of_speech[n.split('.')[0]]}\n" for i, n in enumerate(LEXNAMES)]
    write_text(folder / "lexnames", "".join(lines))  # its presence says that all is there
    return folder


class _Words:
    """nltk's stemmer and WordNet for METEOR, each word once: reports repeat their words."""

    def __init__(self, folder: Path) -> None:
        import nltk.data
        from nltk.corpus.reader.wordnet import WordNetCorpusReader
        from nltk.stem.porter import PorterStemmer

        # nltk refuses to open corpora outside its own path list
        root = str(folder.parent.parent)
        if root not in nltk.data.path:
            nltk.data.path.append(root)
        with warnings.catch_warnings():  # it says that multilingual data is absent: not needed
            warnings.simplefilter("ignore", UserWarning)
            reader = WordNetCorpusReader(str(folder), None)
        self.synsets = lru_cache(maxsize=65536)(reader.synsets)
        self.stem = lru_cache(maxsize=65536)(PorterStemmer().stem)


@lru_cache(maxsize=1)
def _wordnet(folder: Path) -> _Words:
    return _Words(folder)


def meteor_ready() -> bool:
    """Is METEOR's WordNet installed (or can it be laid out from the system's own copy)?"""
    try:
        prepare_wordnet()
    except (UserError, OSError):
        return False
    return True


@lru_cache(maxsize=65536)
def _meteor(text: str, target: str) -> float:
    from nltk.translate.meteor_score import meteor_score

    known = _wordnet(wordnet_folder())
    return float(meteor_score([words(target)], words(text), stemmer=known, wordnet=known))  # type: ignore[arg-type]


def meteor(texts: Sequence[str], targets: Sequence[str]) -> dict[str, AnyStat]:
    """``meteor``: mean sentence METEOR (Banerjee & Lavie 2005, nltk defaults)."""
    return {"meteor": average([_meteor(a, b) for a, b in zip(texts, targets, strict=True)])}


def reports(
    texts: Sequence[str], targets: Sequence[str | None], with_meteor: bool | None = None
) -> dict[str, AnyStat]:
    """All text metrics of reports. METEOR is left out where its data is absent (the caller
    prints :data:`METEOR_HELP`); an empty report scores 0 everywhere."""
    wanted = [t or "" for t in targets]
    out = bleu(texts, wanted) | nltk_bleu(texts, wanted) | rouge(texts, wanted)
    if meteor_ready() if with_meteor is None else with_meteor:
        out |= meteor(texts, wanted)
    return out


def signatures() -> dict[str, str]:
    """What exactly each text metric is, with versions, in the style of sacrebleu."""
    return {
        "bleu_n": f"sacrebleu|corpus|nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|order:n|"
        f"version:{version('sacrebleu')}",
        "bleu_nltk_n": "nltk.sentence_bleu|mean over rows|case:lc|tok:whitespace, '.' and ',' "
        f"split off|weights:1/n|smooth:none|version:{version('nltk')}",
        "rouge": f"rouge_score|F1|mean over rows|stemmer:porter|version:{version('rouge_score')}",
        "meteor": "nltk.meteor_score|mean over rows|case:lc|tok:as bleu_nltk|wordnet:3.x|"
        f"alpha:0.9|beta:3|gamma:0.5|version:{version('nltk')}",
    }


if __name__ == "__main__":
    import sys

    try:
        sys.stdout.write(f"{prepare_wordnet(Path(sys.argv[1]) if sys.argv[1:] else None)}\n")
    except UserError as problem:
        sys.exit(str(problem))
