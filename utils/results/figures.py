"""The page's figures, as SVG text for a place inside HTML."""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from utils.results.entries import Entry

COLOURS = ("#1f77b4", "#c95a02", "#178f6a", "#7a6fc0", "#d62a80", "#57921a", "#9a6d1d", "#7d7d7d", "#a88203", "#0e8fa0")
"""Each with a contrast of at least 3 on the page's light ground and on its dark one."""
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = "osD^v<>PX*"

_SETTINGS = {
    "text.parse_math": False,  # names may have dollar signs
    "svg.hashsalt": "page",  # the same page each time
    "svg.fonttype": "none",  # text stays text: small, and the reader's font
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


class Looks:
    """How lines are drawn on one page: a colour a form, a dash pattern and a marker a method, so that both can be read
    off, and mean the same in all figures.

    methods: of all of the page.  A form has its colour from when it is first drawn.
    """

    def __init__(self, methods: Sequence[str]):
        self.methods = list(dict.fromkeys(methods))
        self.forms: list[str] = []

    def of(self, method: str, form: str) -> dict:
        """matplotlib's keywords of a line."""
        if form not in self.forms:
            self.forms.append(form)
        m, f = self.methods.index(method), self.forms.index(form)
        many = f // len(COLOURS)  # a colour comes again with another marker
        return {
            "color": COLOURS[f % len(COLOURS)],
            "linestyle": STYLES[(m + many) % len(STYLES)],
            "marker": MARKERS[(f if len(self.methods) == 1 else m + many) % len(MARKERS)],
            "markersize": 5,
        }

    def label(self, method: str, form: str) -> str:
        return form if len(self.methods) == 1 else f"{method}, {form}"


def accuracy_limits(of: Sequence[Entry]) -> tuple[float, float]:
    """The range of accuracies that figures over phases share: from and to a multiple of ten, in percent."""
    values = [value for entry in of for value in entry.summary["top1"]["mean"]]
    low, high = min(values, default=0.0), max(values, default=100.0)
    return max(0.0, 10 * math.floor(low / 10 - 0.2)), min(100.0, 10 * math.ceil(high / 10 + 0.2)) + 1


def accuracy_over_bytes(lines: Mapping[tuple[str, str], Sequence[Entry]], looks: Looks) -> str:
    """Average incremental accuracy against bytes per class, a line a method and form; bars: standard deviation."""
    with _figure(len(lines)) as drawn:
        axes = drawn.axes
        for (method, form), of_line in lines.items():
            x = [entry.place for entry in of_line]
            of_line = [entry.summary["average_incremental_accuracy"] for entry in of_line]
            mean, std = [value["mean"] for value in of_line], [value["std"] for value in of_line]
            axes.errorbar(x, mean, std, capsize=2, label=looks.label(method, form), **looks.of(method, form))
        axes.set_xscale("log")
        places = sorted({entry.place for of_line in lines.values() for entry in of_line})
        if len(places) <= 8:
            axes.set_xticks(places, [f"{place:,.0f}" for place in places])
            axes.minorticks_off()
        axes.set_xlabel("memory (bytes per class, log scale)")
        axes.set_ylabel("average incremental accuracy (%)")
    return drawn.svg("bytes", "average incremental accuracy against bytes per class")


def accuracy_over_phases(
    lines: Mapping[tuple[str, str], Entry], name: str, looks: Looks, limits: tuple[float, float]
) -> str:
    """Top-1 accuracy against the number of classes seen; bands: standard deviation.

    name: of the figure; limits: of the y axis.
    """
    with _figure(len(lines)) as drawn:
        axes = drawn.axes
        for (method, form), entry in lines.items():
            seen, top1 = entry.content["summary"]["classes_seen"], entry.summary["top1"]
            mean, std, look = np.array(top1["mean"]), np.array(top1["std"]), looks.of(method, form)
            axes.plot(seen, mean, label=looks.label(method, form), **look)
            if std.any() and len(lines) <= 6:  # the bands of more lines hide each other
                axes.fill_between(seen, mean - std, mean + std, color=look["color"], alpha=0.12, linewidth=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(*limits)
        axes.set_xlabel("classes seen")
        axes.set_ylabel("top-1 accuracy (%)")
    return drawn.svg(name, "top-1 accuracy against classes seen")


def bars(rows: Sequence[tuple[str, float, float]], name: str, unit: str) -> str:
    """Horizontal bars.  rows: (label, value, standard deviation), from top to bottom; name: of the figure."""
    from matplotlib.ticker import MaxNLocator

    height = 0.7 + sum(0.13 + 0.15 * len(textwrap.wrap(row[0], 34)) for row in rows)
    with _figure(0, height=height, names=True) as drawn:
        axes = drawn.axes
        places = np.arange(len(rows))
        values, spread = [row[1] for row in rows], [row[2] for row in rows]
        axes.barh(places, values, xerr=spread if any(spread) else None, color=COLOURS[0], height=0.6, capsize=2)
        axes.set_yticks(places, [textwrap.fill(row[0], 34) for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(unit)
    return drawn.svg(name, unit)


class _figure:
    """A figure whose legend of `entries` lines lies below it.  `axes` inside, `svg` afterwards.

    names: the y axis has names, for which matplotlib must make room.  Else the margins are fixed, which spares
    it a pass over all texts to measure them.
    """

    WIDTH, LEFT, RIGHT, TOP, BOTTOM, ROW = 5.2, 0.6, 0.1, 0.12, 0.5, 0.19  # inches

    def __init__(self, entries: int, height: float = 3.4, names: bool = False):
        self.entries, self.height, self.names = entries, height, names

    def __enter__(self):
        import matplotlib
        from matplotlib.figure import Figure  # slow to import, and not needed by other commands

        self.context = matplotlib.rc_context(_SETTINGS)
        self.context.__enter__()
        self.figure = Figure(figsize=(self.WIDTH, self.height), layout="constrained" if self.names else None)
        self.axes = self.figure.subplots()
        return self

    def __exit__(self, kind, *error):
        try:
            if kind is None:
                self.text = self._draw()
        finally:
            self.context.__exit__(kind, *error)

    def _draw(self) -> str:
        below = 0.0
        if self.entries:
            handles, labels = self.axes.get_legend_handles_labels()
            labels = [textwrap.fill(label, 60) for label in labels]
            columns = max(1, min(3, 64 // (max(map(len, labels), default=1) + 8)))
            below = self.ROW * math.ceil(len(labels) / columns) + 0.15
            look = {"frameon": False, "fontsize": 9, "handlelength": 3, "borderaxespad": 0.2}
            self.figure.legend(handles, labels, loc="lower center", ncols=columns, **look)
        if not self.names:
            height = self.height + below
            self.figure.set_figheight(height)
            self.figure.subplots_adjust(
                left=self.LEFT / self.WIDTH, right=1 - self.RIGHT / self.WIDTH,
                bottom=(self.BOTTOM + below) / height, top=1 - self.TOP / height,
            )  # fmt: skip
        file = io.StringIO()
        self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        return file.getvalue()

    def svg(self, name: str, title: str) -> str:
        """The element, with a title, and ids that no other figure of the page has; black is the page's ink."""
        text = self.text[self.text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'(?<=\sid=")|(?<=xlink:href="#)|(?<=url\(#)', f"{name}-", text)
        text = text.replace("#000000", "currentColor")
        head, rest = text.split(">", 1)
        head = re.sub(r'\s(width|height)="[^"]*"', "", head)
        named = f'role="img" class="figure" aria-labelledby="{name}-title"><title id="{name}-title">{title}</title>'
        return f"{head} {named}{rest}"
