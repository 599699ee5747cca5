"""Results of several runs side by side: a text table and a plot of accuracy curves."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.data.images import write_atomically

CLASSIFIERS = {"cnn": "CNN", "nme": "NME", "student": "student", "svm": "SVM"}
"""Classifiers by their keys in results.json, as tables call them; student: FOSTER's compressed network; svm: FeTrIL's
second classifier."""

_COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#444444")
_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^v<>PX*"


def curves(runs: Mapping[str, Mapping]) -> dict[str, tuple[Mapping, str]]:
    """Name -> (summary, classifier) for each line of a table or a plot: NME and FOSTER's student get their own."""
    lines = {}
    for name, content in runs.items():
        if phases := content.get("unfinished"):
            name = f"{name}, unfinished: {phases} phase{'s' * (phases > 1)}"
        there = [classifier for classifier in CLASSIFIERS if content["summary"].get(classifier) is not None]
        for classifier in there:
            lines[f"{name} ({CLASSIFIERS[classifier]})" if len(there) > 1 else name] = (content["summary"], classifier)
    return lines


def table(runs: Mapping[str, Mapping], width: int | None = None) -> str:
    """A text table of several runs' results.json, by name.

    For each: top-1 accuracy after each phase and their average in %, forgetting (PyCIL's and backward transfer where
    they say something else), memory in units and bytes, seconds (with phase 0's training also where a network was
    reused); mean ± standard deviation, and a line that says so, where there are several seeds.  Where all this is wider
    than `width` (default: the terminal), it becomes two tables, and phases in the middle are left out.
    """
    lines = curves(runs)
    width = width or shutil.get_terminal_size().columns
    nb_phases = max(len(entry["classes_seen"]) for entry, _ in lines.values())
    accuracy: dict[str, list[str]] = {"": list(lines)}
    for phase in range(nb_phases):
        accuracy[f"phase {phase}"] = [
            _cell(_at(entry[classifier]["top1"], phase), entry) for entry, classifier in lines.values()
        ]
    average, *others = _figures(lines)
    accuracy["average"], rest = average[1], dict(others)
    whole = {**accuracy, **rest}
    several = any(len(entry["seeds"]) > 1 for entry, _ in lines.values())
    legend = "\n\nmean ± standard deviation over class orders" if several else ""
    if _width(whole) <= width:
        return _text(whole) + legend
    while _width(accuracy) > width and nb_phases > 2:
        nb_phases -= 1
        accuracy.pop(f"phase {nb_phases - 1}")
    return _text(accuracy) + "\n\n" + _text({"": list(lines), **rest}) + legend


def _figures(lines: Mapping[str, tuple[Mapping, str]]) -> list[tuple[str, list[str]]]:
    """(title, a cell a line) of what a table has beside the accuracy of each phase."""
    metrics = [(entry[classifier], entry) for entry, classifier in lines.values()]
    columns = [("average", "average_incremental_accuracy"), ("forgetting", "forgetting")]
    forgotten = [_mean(of_line["forgetting"]) for of_line, _ in metrics]
    for title, key, sign in (("PyCIL's", "forgetting_in_tens", 1), ("transfer", "backward_transfer", -1)):
        others = [_mean(of_line.get(key)) for of_line, _ in metrics]  # not in results of earlier versions
        if any(
            None not in pair and abs(pair[0] - sign * pair[1]) > 0.05 for pair in zip(forgotten, others, strict=True)
        ):
            columns.append((title, key))
    figures = [(title, [_cell(of_line.get(key), entry) for of_line, entry in metrics]) for title, key in columns]
    for key, digits in (("units", 1), ("bytes", 0), ("seconds", 0)):
        figures.append((key, [_cell(entry[key], entry, digits) for entry, _ in lines.values()]))
    return figures


def _mean(value: Mapping[str, float] | None) -> float | None:
    return None if value is None else value["mean"]


def _at(curve: Mapping[str, Sequence[float]], phase: int) -> dict[str, float] | None:
    return {key: values[phase] for key, values in curve.items()} if phase < len(curve["mean"]) else None


def _cell(value: Mapping[str, float] | None, entry: Mapping, digits: int = 1) -> str:
    if value is None:
        return "-"
    text = f"{value['mean']:,.{digits}f}"
    return f"{text} ± {value['std']:,.{digits}f}" if len(entry["seeds"]) > 1 and value["std"] > 0 else text


def _widths(columns: Mapping[str, Sequence[str]]) -> list[int]:
    return [max(map(len, [title, *cells])) for title, cells in columns.items()]


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    widths = _widths(columns)
    return sum(widths) + 2 * (len(widths) - 1)


def _text(columns: Mapping[str, Sequence[str]]) -> str:
    """Columns side by side under their titles; the first one, of names, to the left."""
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    widths = _widths(columns)
    printed = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([printed[0], "-" * _width(columns), *printed[1:]])


def printable(text: str) -> str:
    """A name with its undecodable bytes escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def drawn(text: str) -> str:
    """A name as matplotlib draws it: printable, no formula, and not left out of a legend."""
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def plot(runs: Mapping[str, Mapping], path: Path) -> None:
    """Top-1 accuracy over the number of classes seen, a line a run; a band of one standard deviation over its seeds."""
    from matplotlib.figure import Figure  # slow to import, and needed here alone
    from matplotlib.ticker import MaxNLocator

    lines = curves(runs)
    crowded = len(lines) > 6
    figure = Figure(figsize=(10 if crowded else 7, max(4.5, 0.25 * len(lines))))
    figure.set_layout_engine("constrained" if crowded else "none")  # only a legend beside the axes needs to be measured
    axes = figure.subplots()
    for number, (name, (entry, classifier)) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        seen, metrics = entry["classes_seen"], entry[classifier]
        mean, std = np.array(metrics["top1"]["mean"]), np.array(metrics["top1"]["std"])
        label = drawn(f"{name}: average {metrics['average_incremental_accuracy']['mean']:.1f} %")
        look = {
            "linestyle": _STYLES[number // len(_COLOURS) % len(_STYLES)],
            "marker": _MARKERS[number % len(_MARKERS)],
        }
        axes.plot(seen, mean, color=colour, markersize=5, alpha=0.9, label=label, **look)
        if len(entry["seeds"]) > 1:
            axes.fill_between(seen, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    configs = [content["config"] for content in runs.values()]
    titles = []
    for key in ("dataset", "model_name", "convnet_type"):
        names = list(dict.fromkeys(config[key] for config in configs))
        titles.append(" / ".join(names[:3]) + (" / ..." if len(names) > 3 else ""))
    axes.set_title(drawn(", ".join(titles)), fontsize=10)
    axes.set_xlabel("classes seen")
    several = any(len(entry["seeds"]) > 1 for entry, _ in lines.values())
    axes.set_ylabel("top-1 accuracy (%)" + ", mean ± standard deviation over class orders" * several)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if crowded:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    else:
        axes.legend(frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
