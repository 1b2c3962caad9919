"""Train, val or test for rows whose source has no split: by group, seeded, leak-free.

Place in the picture: the end of ``data import``. A group is a patient or, where no patient is
known, the cluster of near-duplicates of the row's image. Groups that share a patient or an
identical picture are one group, so none of these crosses splits.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np

from mmedrag.images import MAX_BITS, MIN_LIKENESS, Look, fine, near_identical
from mmedrag.records import Split
from mmedrag.runtime import seeded_share

SHARES: dict[Split, float] = {"train": 0.7, "val": 0.15, "test": 0.15}


class Groups:
    """Disjoint sets of hashable keys (union-find with path halving)."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def find(self, key: Hashable) -> Hashable:
        parent = self._parent
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    def join(self, a: Hashable, b: Hashable) -> None:
        self._parent[self.find(a)] = self.find(b)


def near_duplicates(looks: Sequence[Look]) -> Iterator[tuple[int, int]]:
    """Index pairs (i < j) of pictures that look the same; enough of them to join each cluster.

    Banded hashing instead of all pairs: the 64 hash bits are dealt to 8 bands, and pictures
    are compared when two bands agree. Hashes that differ in at most 6 bits always meet, those
    with 7 or 8 (the most that counts) nearly always.
    """
    heads: dict[int, list[int]] = defaultdict(list)  # hash → its distinct pictures
    for index, look in enumerate(looks):
        for head in heads[look.hash]:
            if near_identical(looks[head], look):
                yield head, index
                break
        else:
            heads[look.hash].append(index)
    if not heads:
        return
    order = np.array(sorted(i for group in heads.values() for i in group), dtype=np.int64)
    hashes = np.array([looks[i].hash for i in order], dtype=np.uint64)
    first = fine(looks[order[0]].small)
    details = np.empty((len(order), *first.shape), dtype=np.float16)  # 2 KB a picture
    for place, index in enumerate(order):
        details[place] = fine(looks[index].small)
    bits = (hashes[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    bands = np.packbits(bits.reshape(-1, 8, 8).astype(np.uint8), axis=1).reshape(-1, 8)
    seen: set[tuple[int, int]] = set()
    for a, b in itertools.combinations(range(8), 2):
        keys = bands[:, a].astype(np.int32) << 8 | bands[:, b]
        by_key = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[by_key])) + 1
        for bucket in np.split(by_key, cuts):
            for at in range(len(bucket) - 1):
                here, rest = bucket[at], bucket[at + 1 :]
                rest = rest[_popcount(hashes[here] ^ hashes[rest]) <= MAX_BITS]
                if not len(rest):
                    continue
                alike = details[rest].astype(np.float32) @ details[here].astype(np.float32)
                for other in rest[alike >= MIN_LIKENESS]:
                    pair = (int(order[min(here, other)]), int(order[max(here, other)]))
                    if pair not in seen:
                        seen.add(pair)
                        yield pair


_ONES = np.array([n.bit_count() for n in range(1 << 16)], dtype=np.uint8)


def _popcount(words: np.ndarray) -> np.ndarray:
    return _ONES[words.view(np.uint16).reshape(-1, 4)].sum(axis=1)


def assign_split(key: str, seed: int, shares: dict[Split, float] | None = None) -> Split:
    """The split of a group: a seeded hash of its name, so that it never depends on the others."""
    point = seeded_share(seed, key)
    last: Split = "train"
    for split, share in (shares or SHARES).items():
        if share <= 0:
            continue
        last = split
        if point < share:
            return split
        point -= share
    return last


def assign(
    rows: Iterable[tuple[str, str | None, Sequence[Look], Split | None]],
    seed: int = 0,
    shares: dict[Split, float] | None = None,
) -> dict[str, Split]:
    """Split per row id, for rows (id, patient, pictures, split given by the source).

    A given split stays; an ungiven one follows its group's given one (the first, if several),
    otherwise it is drawn. The group's name is its smallest patient or, without any, its
    smallest row id.
    """
    rows = list(rows)
    groups = Groups()
    pictures: list[Look] = []
    owners: list[tuple[Hashable, bool]] = []
    for row_id, patient, seen, _ in rows:
        groups.find(("row", row_id))
        if patient is not None:
            groups.join(("row", row_id), ("patient", patient))
        for picture in seen:
            groups.join(("row", row_id), ("pixels", picture.pixels))
            pictures.append(picture)
            owners.append((("row", row_id), patient is None))
    for i, j in near_duplicates(pictures):
        (a, a_alone), (b, b_alone) = owners[i], owners[j]
        if a_alone or b_alone:  # look-alikes of two known patients are two patients
            groups.join(a, b)
    names: dict[Hashable, tuple[int, str]] = {}
    given: dict[Hashable, Split] = {}
    for row_id, patient, _, split in rows:
        root = groups.find(("row", row_id))
        name = (0, patient) if patient is not None else (1, row_id)
        names[root] = min(names.get(root, name), name)
        if split is not None:
            given.setdefault(root, split)
    result: dict[str, Split] = {}
    for row_id, _, _, split in rows:
        root = groups.find(("row", row_id))
        result[row_id] = split or given.get(root) or assign_split(names[root][1], seed, shares)
    return result
