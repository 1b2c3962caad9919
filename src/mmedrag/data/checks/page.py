"""The page of a check: counts, findings with places, thumbnails of the worst, baselines.

One self-contained HTML file for the user's own eyes: it shows small copies of his pictures, so
it is as confidential as they are.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from mmedrag.data.checks.report import FINDINGS, CheckReport, Finding
from mmedrag.images import load_image
from mmedrag.records import UserError
from mmedrag.runtime import write_bytes

THUMBNAILS = 60  # pictures on the page
SIDE = 160
LISTED = 40  # findings of one kind on the page; the JSON has them all

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data check</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 68rem;
        padding: 0 1rem; color: #1a1a1a; background: #fff; }
 table { border-collapse: collapse; width: 100%; } caption { text-align: left; font-weight: 600; }
 th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ccc;
          vertical-align: top; }
 td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
 td:first-child { white-space: nowrap; } a { color: #0b4fa8; }
 .error { color: #8f1414; } .warning { color: #7a4a00; } .note { color: #333; }
 p, li { overflow-wrap: anywhere; } li { margin-bottom: .3rem; } ul { padding-left: 1.2rem; }
 figure { display: inline-block; margin: .3rem; }
 figcaption { font-size: .8rem; max-width: 10rem; overflow-wrap: anywhere; }
 .wide { overflow-x: auto; }
 @media (max-width: 40rem) {
  th, td { padding: .25rem .3rem; } td:first-child { white-space: normal; } }
 @media (prefers-color-scheme: dark) {
  body { color: #eee; background: #161616; } th, td { border-color: #444; } a { color: #9cc2ff; }
  .error { color: #ff9b9b; } .warning { color: #ffc56b; } .note { color: #ccc; } }
</style></head><body><main>
<h1>Data check</h1>
<p>{{ report.paths | join(", ") }}: {{ rows }}; {{ report.images }} image files.
<strong class="{{ 'error' if report.errors else 'note' }}">{{ report.errors }} errors</strong>,
{{ warnings }} warnings.</p>
{% for note in report.notes %}<p>{{ note }}</p>{% endfor %}
<table><caption>What was found</caption>
<thead><tr><th scope="col">kind</th><th scope="col">meaning</th>
<th scope="col" class="n">how many</th></tr></thead><tbody>
{% for code, count in report.totals.items() %}
<tr><td class="{{ kinds[code][0] }}"><a href="#{{ code }}">{{ code }}</a>
({{ kinds[code][0] }})</td>
<td>{{ kinds[code][1] }}</td><td class="n">{{ count }}</td></tr>
{% else %}<tr><td colspan="3">nothing</td></tr>{% endfor %}
</tbody></table>
{% if report.baselines %}
<h2>What closed questions give away without an image</h2>
<div class="wide"><table><thead><tr><th scope="col">source</th><th scope="col">split</th>
{% for name in ("n", "always yes", "always no", "F1 of always yes",
"question only (leave one out)", "question only (from train)") %}
<th scope="col" class="n">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for b in report.baselines %}<tr><td>{{ b.source }}</td><td>{{ b.split }}</td>
<td class="n">{{ b.n }}</td><td class="n">{{ pct(b.yes) }}</td><td class="n">{{ pct(b.no) }}</td>
<td class="n">{{ pct(b.f1_yes) }}</td><td class="n">{{ pct(b.question_only) }}</td>
<td class="n">{{ pct(b.train_prior) }}</td></tr>{% endfor %}
</tbody></table></div>{% endif %}
{% for code, found in groups.items() %}
<section><h2 id="{{ code }}" class="{{ kinds[code][0] }}">{{ code }}</h2>
<p>{{ kinds[code][1] }}{% if report.totals[code] > found | length %}
 (first {{ found | length }} of {{ report.totals[code] }}){% endif %}</p>
<ul>{% for f in found %}
<li><code>{{ f.file }}:{{ f.line }}</code> {{ f.message }}
{% if f.related %}<br>with {% for r in f.related[:5] %}<code>{{ r }}</code> {% endfor %}{% endif %}
{% if pictures.get(loop.index0 | string + code) %}<br>
{% for name, data in pictures[loop.index0 | string + code] %}<figure>
<img src="data:image/jpeg;base64,{{ data }}" alt="{{ name }}" width="160">
<figcaption>{{ name }}</figcaption></figure>{% endfor %}{% endif %}</li>{% endfor %}
</ul></section>{% endfor %}
</main></body></html>
"""


def write_page(report: CheckReport, path: Path) -> None:
    """Write the page of a report, atomically."""
    groups: dict[str, list[Finding]] = {}
    for finding in report.findings:
        shown = groups.setdefault(finding.code, [])
        if len(shown) < LISTED:
            shown.append(finding)
    pictures: dict[str, list[tuple[str, str]]] = {}
    left = THUMBNAILS
    for code, found in groups.items():
        for number, finding in enumerate(found):
            small = [_thumbnail(name) for name in finding.images[: max(0, left)]]
            kept = [one for one in small if one is not None]
            left -= len(kept)
            if kept:
                pictures[f"{number}{code}"] = kept
    page = (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(_PAGE)
        .render(
            report=report,
            kinds=FINDINGS,
            groups=groups,
            pictures=pictures,
            pct=_percent,
            rows=", ".join(f"{n} {kind} rows" for kind, n in sorted(report.rows.items())),
            warnings=report.total("warning"),
        )
    )
    write_bytes(path, page.encode("utf-8", "replace"), own=True)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _thumbnail(name: str) -> tuple[str, str] | None:
    """(file name, base64 JPEG) of a picture; None where it cannot be shown."""
    try:
        picture = load_image(name)
    except UserError:
        return None  # the finding itself says what is wrong with it
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=70)
    return Path(name).name, base64.b64encode(out.getvalue()).decode("ascii")
