"""Contact sheets: every finding of a domain once, beside the same study without it.

``python -m mmedrag.phantom.sheet DOMAIN OUT.png [SIZE] [CONTRAST]``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from PIL import Image

from mmedrag.phantom.canvas import Canvas, Rng
from mmedrag.phantom.grammar import DomainSpec, load_domain, states
from mmedrag.phantom.sample import Knobs, Study, picture
from mmedrag.records import Finding


def contact_sheet(domain: DomainSpec, size: int = 128, contrast: float = 1.0) -> Image.Image:
    """Pairs without | with each finding, four pairs a row, in the order of the specification."""
    canvas, knobs = Canvas(size), Knobs(size=size, contrast=contrast)
    tiles = []
    for i, spec in enumerate(domain.findings):
        rng = Rng("sheet", domain.name, i)
        attributes: Mapping[str, str] = {
            a.name: rng.choice(list(a.values)) for a in domain.attributes
        }
        absent = {other.name: Finding(present=False) for other in domain.findings}
        study = Study(f"{i}", "-", domain.name, "test", f"sheet/{i}", attributes, absent)
        shown = replace(study, findings={**absent, spec.name: rng.choice(states(domain, spec))})
        for one in (study, shown):
            tiles.append(
                np.asarray(Image.fromarray(picture(domain, one, canvas, knobs)).convert("RGB"))
            )
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % 8)
    rows = [np.concatenate(tiles[i : i + 8], 1) for i in range(0, len(tiles), 8)]
    return Image.fromarray(np.concatenate(rows, 0))


if __name__ == "__main__":
    name, out, *rest = sys.argv[1:]
    contact_sheet(
        load_domain(name), int(rest[0]) if rest else 128, float(rest[1]) if rest[1:] else 1.0
    ).save(out, optimize=True)
