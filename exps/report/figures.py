"""The page's figures: line charts as SVG, written here since importing matplotlib takes longer than all of a page."""

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import NamedTuple

from exps.report.entries import Entry
from exps.report.tables import mean_std
from utils.results.records import Spread

COLOURS = ("#1f77b4", "#c95a02", "#178f6a", "#7a6fc0", "#d62a80", "#57921a", "#9a6d1d", "#7d7d7d", "#a88203", "#0e8fa0")
"""Each with a contrast of at least 3 on the page's light ground and on its dark one."""
DASHES = ("", "6 3", "2 2", "8 3 2 3", "6 2 1 2 1 2", "12 4")
MARKERS = (
    "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0", "M-3,-3h6v6h-6z", "M0,-4l4,4l-4,4l-4,-4z", "M-3.5,-3h7l-3.5,6z",
    "M-3.5,3h7l-3.5,-6z", "M3,-3.5v7l-6,-3.5z", "M-3,-3.5v7l6,-3.5z", "M-1,-4h2v3h3v2h-3v3h-2v-3h-3v-2h3z",
    "M0,-4l3.8,2.8l-1.5,4.4h-4.6l-1.5,-4.4z",
)  # fmt: skip
"""Disc, square, diamond, triangles, plus and pentagon, as SVG paths around 0, 0."""
WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 46
"""Margins in the units of the figure, of which a letter is 12 high."""
NO_MARKER_ABOVE = 30
"""Points of a line that has no markers."""


class Look(NamedTuple):
    """How a line is drawn."""

    colour: str
    dash: str
    marker: str

    def line(self, path: str) -> str:
        dash = f' stroke-dasharray="{self.dash}"' if self.dash else ""
        return f'<path d="{path}" fill="none" stroke="{self.colour}" stroke-width="1.6"{dash}/>'


class Looks:
    """How lines are drawn on one page: a colour and a marker for each form, a dash pattern for each method.

    lines: (method, form) of the page; a form that is not among them has its colour from when it is first drawn.
    """

    def __init__(self, lines: Sequence[tuple[str, str]]):
        self.methods = list(dict.fromkeys(method for method, _ in lines))
        self.forms = list(dict.fromkeys(form for _, form in lines))

    def look(self, method: str, form: str) -> Look:
        if form not in self.forms:
            self.forms.append(form)
        f, dash = self.forms.index(form), self.methods.index(method) % len(DASHES)
        return Look(COLOURS[f % len(COLOURS)], DASHES[dash], MARKERS[f % len(MARKERS)])


def labels(lines: Collection[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(method, form) -> what a figure with these lines calls it: the form, with the method where there are several."""
    several = len({method for method, _ in lines}) > 1
    return {(method, form): f"{method}, {form}" if several else form for method, form in lines}


def accuracy_limits(compared: Sequence[Entry]) -> tuple[float, float]:
    """The range of accuracies that figures over phases share: from and to a multiple of ten, in percent."""
    values = [value.mean for entry in compared for value in entry.top1]
    low, high = min(values, default=0.0), max(values, default=100.0)
    return max(0.0, 10 * math.floor(low / 10 - 0.2)), min(100.0, 10 * math.ceil(high / 10 + 0.2))


def accuracy_over_bytes(lines: Mapping[tuple[str, str], Sequence[Entry]], looks: Looks) -> str:
    """Average incremental accuracy against bytes per class, a line a method and form; bars: standard deviation."""
    names = labels(lines)
    sizes = sorted({entry.size for line in lines.values() for entry in line})
    averages = [entry.average for line in lines.values() for entry in line]
    low = 10 * math.floor(min(value.mean - value.std for value in averages) / 10)
    high = 10 * math.ceil(max(value.mean + value.std for value in averages) / 10)
    axes = _Axes((math.log(sizes[0]), math.log(sizes[-1])), (max(0, low), min(100, high)))
    ticks = sizes if len(sizes) <= 6 else [sizes[0], *sizes[len(sizes) // 3 :: len(sizes) // 3]]
    names_of_axes = "memory (bytes per class, log scale)", "average incremental accuracy (%)"
    axes.grid([(math.log(size), f"{size:,}") for size in ticks], *names_of_axes)
    for (method, form), entries in lines.items():
        points = [(math.log(entry.size), entry.average) for entry in entries]
        titles = [f"{names[method, form]}, {entry.size:,} bytes" for entry in entries]
        axes.line(points, titles, looks.look(method, form), band=False, bars=True)
    return axes.svg("bytes", "Average incremental accuracy against bytes per class") + _legend(lines, looks)


def accuracy_over_phases(
    lines: Mapping[tuple[str, str], Entry], name: str, looks: Looks, limits: tuple[float, float]
) -> str:
    """Top-1 accuracy against the number of classes seen; bands: standard deviation.

    name: of the figure; limits: of the y axis.
    """
    names = labels(lines)
    seen = sorted({n for entry in lines.values() for n in entry.results.summary.classes_seen})
    axes = _Axes((seen[0], seen[-1]), limits)
    axes.grid([(n, str(n)) for n in seen[:: math.ceil(len(seen) / 8)]], "classes seen", "top-1 accuracy (%)")
    for (method, form), entry in lines.items():
        classes = entry.results.summary.classes_seen
        points = list(zip(classes, entry.top1, strict=True))
        titles = [f"{names[method, form]}, {n} classes" for n in classes]
        # More bands hide each other.
        axes.line(points, titles, looks.look(method, form), band=len(lines) <= 6, bars=False)
    return axes.svg(name, "Top-1 accuracy against classes seen") + _legend(lines, looks)


def _legend(lines: Mapping[tuple[str, str], object], looks: Looks) -> str:
    items = []
    for line, name in labels(lines).items():
        look = looks.look(*line)
        piece = f'{look.line("M0,6H34")}<path d="{look.marker}" transform="translate(17,6)" fill="{look.colour}"/>'
        swatch = f'<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true">{piece}</svg>'
        items.append(f"<li>{swatch} {escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


class _Axes:
    """A chart being drawn.  x, y: the ranges of its values."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x, self.y = x, y
        self.parts: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the figure; what is above or below the range lies on its edge."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = min(1.0, max(0.0, (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)))
        inner = 8  # no point lies on the axis
        width, height = WIDTH - LEFT - RIGHT - 2 * inner, HEIGHT - TOP - BOTTOM
        return round(LEFT + inner + across * width, 1), round(TOP + (1 - up) * height, 1)

    def grid(self, ticks: Sequence[tuple[float, str]], x_name: str, y_name: str) -> None:
        """ticks: values of the x axis, and what stands below them."""
        bottom = HEIGHT - BOTTOM
        for x, label in ticks:
            left, _ = self.at(x, 0)
            self.parts.append(f'<path class="grid" d="M{left},{TOP}V{bottom}"/>')
            self.parts.append(f'<text x="{left}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
        step = next(step for step in (1, 2, 5, 10, 20, 50) if (self.y[1] - self.y[0]) / step <= 6)
        for value in range(math.ceil(self.y[0] / step) * step, math.floor(self.y[1]) + 1, step):
            _, top = self.at(self.x[0], value)
            self.parts.append(f'<path class="grid" d="M{LEFT},{top}H{WIDTH - RIGHT}"/>')
            self.parts.append(f'<text x="{LEFT - 6}" y="{top + 4}" text-anchor="end">{value}</text>')
        self.parts.append(f'<path class="axis" d="M{LEFT},{TOP}V{bottom}H{WIDTH - RIGHT}"/>')
        x, y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        self.parts.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{x_name}</text>')
        self.parts.append(f'<text transform="rotate(-90)" x="{-y}" y="14" text-anchor="middle">{y_name}</text>')

    def line(
        self, points: Sequence[tuple[float, Spread]], titles: Sequence[str], look: Look, band: bool, bars: bool
    ) -> None:
        """titles: of the points, shown where the mouse is, with their values; band, bars: of deviations."""
        if band and any(value.std for _, value in points):
            upper = [self.at(x, value.mean + value.std) for x, value in points]
            lower = [self.at(x, value.mean - value.std) for x, value in reversed(points)]
            outline = "L".join(f"{x},{y}" for x, y in [*upper, *lower])
            self.parts.append(f'<path d="M{outline}z" fill="{look.colour}" opacity=".13"/>')
        self.parts.append(look.line("M" + "L".join("{},{}".format(*self.at(x, value.mean)) for x, value in points)))
        for (x, value), title in zip(points, titles, strict=True):
            left, top = self.at(x, value.mean)
            if bars and value.std:
                high, low = (self.at(x, value.mean + sign * value.std)[1] for sign in (1, -1))
                ends = f"M{left},{high}V{low}M{left - 3},{high}h6M{left - 3},{low}h6"
                self.parts.append(f'<path d="{ends}" stroke="{look.colour}" fill="none"/>')
            if len(points) <= NO_MARKER_ABOVE:
                marker = f'<path d="{look.marker}" transform="translate({left},{top})" fill="{look.colour}">'
                self.parts.append(f"{marker}<title>{escape(title)}: {mean_std(value)}</title></path>")

    def svg(self, name: str, title: str) -> str:
        """name: an id that no other figure of the page has."""
        head = f'<svg role="img" class="figure" viewBox="0 0 {WIDTH} {HEIGHT}" aria-labelledby="{name}-title">'
        return f'{head}<title id="{name}-title">{title}</title>{"".join(self.parts)}</svg>'
