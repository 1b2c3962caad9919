"""Charts as inline SVG: no library, no script, colours from the page's own variables.

Place in the picture: numbers -> figures of the report. Everything is drawn in a box about 400
units wide, so that text of 13 units stays readable on a phone; colours are CSS classes, so that
dark mode and print need nothing else. Each figure has a title and a description for readers
who cannot see it, and its numbers stand in a table beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

WIDTH = 400
SERIES = 6  # colour classes s0..s5


@dataclass(frozen=True)
class Frame:
    """Plot area in data coordinates: x0..x1 by y0..y1 inside left, top, width, height."""

    left: float
    top: float
    width: float
    height: float
    x0: float = 0.0
    x1: float = 1.0
    y0: float = 0.0
    y1: float = 1.0

    def x(self, value: float) -> float:
        span = self.x1 - self.x0 or 1.0
        return round(self.left + (value - self.x0) / span * self.width, 1)

    def y(self, value: float) -> float:
        span = self.y1 - self.y0 or 1.0
        return round(self.top + self.height - (value - self.y0) / span * self.height, 1)


def figure(body: Sequence[str], height: float, title: str, description: str) -> str:
    """An accessible <svg> around drawn parts."""
    label = escape(f"{title}. {description}", quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" class="chart" role="img" aria-label="{label}">'
        f"{''.join(body)}</svg>"
    )


def standalone(chart: str) -> str:
    """A chart as a file of its own: with the page's light colours and chart rules inside."""
    css = files("mmedrag.report").joinpath("page.css").read_text("utf-8")
    colours = css[: css.index("}") + 1]
    rules = "\n".join(rule for rule in css.splitlines() if re.match(r"svg |\.s\d ", rule))
    back = f'<style>{colours}\n{rules}</style><rect width="100%" height="100%" fill="#fff"/>'
    whole = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return whole.replace(">", f">{back}", 1) + "\n"


def text(x: float, y: float, words: str, anchor: str = "start", cls: str = "") -> str:
    style = f' class="{cls}"' if cls else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, cls: str) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{cls}"/>'


def path(points: Sequence[tuple[float, float]], cls: str) -> str:
    steps = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{steps}" class="{cls}"/>'


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """At most ``most`` round values (steps of 1, 2 or 5 times a power of ten) in [low, high]."""
    raw = ((high - low) or 1.0) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw - 1e-12)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * i, 10) for i in range(first, last + 1)]


def axes(
    frame: Frame, x_label: str, y_label: str, x_ticks: Sequence[float] | None = None
) -> list[str]:
    """Axis lines, grid, tick labels and names."""
    parts = []
    for value in ticks(frame.y0, frame.y1):
        y = frame.y(value)
        parts += [line(frame.left, y, frame.left + frame.width, y, "grid")]
        parts += [text(frame.left - 6, y + 4, f"{value:g}", "end", "tick")]
    bottom = frame.top + frame.height
    for value in ticks(frame.x0, frame.x1) if x_ticks is None else x_ticks:
        parts += [text(frame.x(value), bottom + 16, f"{value:g}", "middle", "tick")]
    parts += [line(frame.left, bottom, frame.left + frame.width, bottom, "axis")]
    parts += [text(frame.left + frame.width / 2, bottom + 34, x_label, "middle")]
    parts += [text(4, frame.top - 16, y_label)]
    return parts


def legend(names: Sequence[str], top: float) -> tuple[list[str], float]:
    """Colour key under a chart, one name a line; (parts, height)."""
    parts = []
    for i, name in enumerate(names):
        y = top + 18 * i
        parts += [f'<rect x="40" y="{y - 9:g}" width="12" height="10" class="fill s{i % SERIES}"/>']
        parts += [text(58, y, shorten(name, 46))]
    return parts, 18.0 * len(names)


def shorten(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _grid(frame: Frame) -> list[str]:
    """Vertical lines with their values below, for horizontal charts."""
    parts = []
    bottom = frame.top + frame.height
    for value in ticks(frame.x0, frame.x1):
        x = frame.x(value)
        parts += [line(x, frame.top, x, bottom, "grid")]
        parts += [text(x, bottom + 16, f"{value:g}", "middle", "tick")]
    return parts


@dataclass(frozen=True)
class Dot:
    """One row of a dot plot: a value with its interval, and its best control."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    control: float | None = None
    marked: bool = False


def dots(rows: Sequence[Dot], title: str, x_label: str) -> str:
    """Values with intervals, one line each; a hollow diamond is the best control."""
    known = [v for r in rows for v in (r.value, r.low, r.high, r.control) if v is not None]
    low, high = min([0.0, *known]), max([*known, 1e-9])
    frame = Frame(20, 8, WIDTH - 40, 44.0 * len(rows), low, max(high, low + 1e-9))
    parts = _grid(frame)
    for i, row in enumerate(rows):
        y = frame.top + 44 * i + 32
        label = f"{shorten(row.name, 48)}: {row.value:.3f}{' †' if row.marked else ''}"
        parts += [text(frame.left, y - 14, label)]
        if row.low is not None and row.high is not None:
            parts += [line(frame.x(row.low), y, frame.x(row.high), y, "whisker")]
        if row.control is not None:
            x = frame.x(row.control)
            parts += [f'<path d="M{x} {y - 6}l6 6l-6 6l-6 -6z" class="hollow"/>']
        kind = "hollow" if row.marked else "fill s0"
        parts += [f'<circle cx="{frame.x(row.value)}" cy="{y:g}" r="5" class="{kind}"/>']
    bottom = frame.top + frame.height
    parts += [text(WIDTH / 2, bottom + 34, x_label, "middle")]
    described = "; ".join(f"{r.name} {r.value:.3f}" for r in rows)
    return figure(parts, bottom + 44, title, described)


def bars(
    groups: Sequence[str],
    names: Sequence[str],
    values: Sequence[Sequence[tuple[float, float | None, float | None] | None]],
    title: str,
) -> str:
    """Horizontal bars with whiskers: per group (metric) one bar for each name (system)."""
    cells = [c for row in values for c in row if c]
    known = [v for c in cells for v in c if v is not None]
    low, high = min([0.0, *known]), max([0.05, *known])
    gap, thick = 26.0, 14.0
    block = gap + thick * len(names)
    frame = Frame(20, 4, WIDTH - 40, block * len(groups), low, high)
    parts = _grid(frame)
    zero = frame.x(0)
    for g, group in enumerate(groups):
        top = frame.top + block * g
        parts += [text(frame.left, top + 18, group)]
        for i, cell in enumerate(values[g]):
            y = top + gap + thick * i
            if cell is None:
                parts += [text(zero + 4, y + 10, "–", "start", "tick")]
                continue
            end = frame.x(cell[0])
            parts += [
                f'<rect x="{min(zero, end):g}" y="{y:g}" width="{abs(end - zero):g}" '
                f'height="{thick - 3:g}" class="fill s{i % SERIES}"/>'
            ]
            if cell[1] is not None and cell[2] is not None:
                middle = y + (thick - 3) / 2
                parts += [line(frame.x(cell[1]), middle, frame.x(cell[2]), middle, "whisker")]
    bottom = frame.top + frame.height
    key, height = legend(names, bottom + 44)
    described = "; ".join(
        f"{group}: " + ", ".join(f"{n} {c[0]:.3f}" for n, c in zip(names, row, strict=True) if c)
        for group, row in zip(groups, values, strict=True)
    )
    return figure([*parts, *key], bottom + 36 + height, title, described)


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    title: str,
    x_label: str,
    y_label: str,
    bands: Sequence[Sequence[tuple[float, float, float]]] = (),
    cuts: Sequence[tuple[int, float]] = (),
    diagonal: bool = False,
    x_ticks: Sequence[float] | None = None,
    unit: bool = False,
    marks: Sequence[tuple[int, float, float, float | None, float | None]] = (),
) -> str:
    """Line chart.

    Args:
        bands: per series (x, low, high) drawn behind it.
        marks: (series, x, y, low, high): diamonds with whiskers that no line joins.
        cuts: (series, x): dashed vertical lines.
        diagonal: draw y = x, the line of perfect calibration.
        unit: both axes from 0 to 1.
    """
    points = [p for _, row in series for p in row] + [(x, y) for _, x, y, *_ in marks]
    edges = [v for band in bands for _, *pair in band for v in pair]
    edges += [v for *_, low, high in marks for v in (low, high) if v is not None]
    xs, ys = [x for x, _ in points] or [0.0], [y for _, y in points] + edges or [0.0]
    if unit:
        frame = Frame(44, 34, WIDTH - 60, 230)
    else:
        spread = (max(ys) - min(ys)) or 1.0
        frame = Frame(
            44,
            34,
            WIDTH - 60,
            190,
            min(xs),
            max(xs),
            min(ys) - 0.05 * spread,
            max(ys) + 0.05 * spread,
        )
    parts = axes(frame, x_label, y_label, x_ticks)
    if diagonal:
        parts += [line(frame.x(0), frame.y(0), frame.x(1), frame.y(1), "dashed")]
    for i, band in enumerate(bands):
        around = [(frame.x(x), frame.y(hi)) for x, _, hi in band]
        around += [(frame.x(x), frame.y(lo)) for x, lo, _ in reversed(band)]
        corners = " ".join(f"{x:g},{y:g}" for x, y in around)
        parts += [f'<polygon points="{corners}" class="band s{i % SERIES}"/>']
    for i, (_, row) in enumerate(series):
        drawn = [(frame.x(x), frame.y(y)) for x, y in row]
        parts += [path(drawn, f"line s{i % SERIES}")]
        if len(drawn) <= 24:
            parts += [
                f'<circle cx="{x:g}" cy="{y:g}" r="3" class="fill s{i % SERIES}"/>'
                for x, y in drawn
            ]
    for i, x, y, low, high in marks:
        at = frame.x(x)
        if low is not None and high is not None:
            parts += [line(at, frame.y(low), at, frame.y(high), f"line s{i % SERIES}")]
        diamond = f"M{at:g} {frame.y(y) - 6:g}l6 6l-6 6l-6 -6z"
        parts += [f'<path d="{diamond}" class="fill s{i % SERIES}"/>']
    for i, x in cuts:
        at = frame.x(x)
        parts += [line(at, frame.top, at, frame.top + frame.height, f"cut s{i % SERIES}")]
    bottom = frame.top + frame.height
    key, height = legend([name for name, _ in series], bottom + 54)
    described = "; ".join(
        f"{name}: from {row[0][1]:.3f} to {row[-1][1]:.3f} over {len(row)} points"
        for name, row in series
        if row
    )
    return figure([*parts, *key], bottom + 46 + height, title, described)


def counts(
    blocks: Sequence[tuple[str, Sequence[Sequence[int]]]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> str:
    """Tables of counts, one below the other; a cell's colour is its share of its row.

    Args:
        blocks: (name, counts [rows][columns]).
    """
    left, wide, high = 110.0, (WIDTH - 120.0) / len(columns), 30.0
    parts, top = [], 0.0
    for name, table in blocks:
        parts += [text(4, top + 18, name)]
        parts += [
            text(left + wide * (i + 0.5), top + 18, column, "middle", "tick")
            for i, column in enumerate(columns)
        ]
        top += 26
        for side, row in zip(rows, table, strict=True):
            parts += [text(left - 8, top + 20, side, "end", "tick")]
            for i, number in enumerate(row):
                share = 0.6 * number / max(sum(row), 1)
                x = left + wide * i
                parts += [
                    f'<rect x="{x:g}" y="{top:g}" width="{wide - 2:g}" height="{high - 2:g}" '
                    f'class="fill s0" fill-opacity="{share:.2f}"/>',
                    text(x + wide / 2, top + 19, str(number), "middle"),
                ]
            top += high
        top += 12
    described = "; ".join(
        f"{name}, {side}: " + ", ".join(f"{c} {n}" for c, n in zip(columns, row, strict=True))
        for name, table in blocks
        for side, row in zip(rows, table, strict=True)
    )
    return figure(parts, top, title, described)


def spark(scores: Sequence[float], kept: int, width: int = 120, height: int = 34) -> str:
    """Similarities of one case, best first, with the place of the cut."""
    if len(scores) < 2:
        return ""
    low, span = min(scores), (max(scores) - min(scores)) or 1.0
    step = (width - 8) / (len(scores) - 1)
    points = [
        (round(4 + i * step, 1), round(4 + (height - 8) * (1 - (s - low) / span), 1))
        for i, s in enumerate(scores)
    ]
    at = round(4 + (kept - 0.5) * step, 1)
    described = (
        f"similarities from {scores[0]:.3f} to {scores[-1]:.3f}, {kept} of {len(scores)} kept"
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" class="spark" role="img" aria-label="{described}">'
        + path(points, "line s0")
        + "".join(
            f'<circle cx="{x:g}" cy="{y:g}" r="2.5" class="{"fill s0" if i < kept else "hollow"}"/>'
            for i, (x, y) in enumerate(points)
        )
        + (line(at, 0, at, height, "cut") if 0 < kept < len(scores) else "")
        + "</svg>"
    )
