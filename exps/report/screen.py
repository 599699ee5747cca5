"""Runs side by side on a screen: a text table, and a plot of accuracy curves for a paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from exps.report.entries import Entry, Runs, entries
from exps.report.figures import COLOURS
from exps.report.tables import mean_std
from utils import cli
from utils.files import printable, write_atomically
from utils.results.records import Spread

_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^v<>PX*"


def show(runs: Runs, file: TextIO | None = None) -> None:
    """Print a table of several runs to `file` (default: stdout).

    For each: top-1 accuracy after each phase and their average in %, forgetting (PyCIL's and backward transfer where
    they say something else), memory in units and bytes, seconds (with phase 0's training also where a network was
    reused); mean ± standard deviation, and a line that says so, where there are several seeds.
    """
    compared = entries(runs)
    columns: dict[str, list[str]] = {"": [entry.title for entry in compared]}
    columns["top-1 after each phase"] = [_curve(entry) for entry in compared]
    spreads: dict[str, list[Spread | None]] = {
        "average": [entry.averages.average_incremental_accuracy for entry in compared],
        "forgetting": [entry.averages.forgetting for entry in compared],
    }
    if _say_more(spreads["forgetting"], in_tens := [entry.averages.forgetting_in_tens for entry in compared], 1):
        spreads["forgetting (PyCIL)"] = in_tens
    if _say_more(spreads["forgetting"], transfer := [entry.averages.backward_transfer for entry in compared], -1):
        spreads["transfer"] = transfer
    spreads["units"] = [entry.results.summary.units for entry in compared]
    columns |= {title: [mean_std(value) for value in values] for title, values in spreads.items()}
    columns["bytes"] = [mean_std(entry.results.summary.bytes, 0) for entry in compared]
    columns["seconds"] = [mean_std(entry.results.summary.seconds, 0) for entry in compared]
    several = any(len(entry.orders) > 1 for entry in compared)
    notes = ["mean ± standard deviation over class orders"] if several else []
    cli.show_table(list(columns), list(zip(*columns.values(), strict=True)), notes, file=file)


def _curve(entry: Entry) -> str:
    """Such as "91.0±0.4 82.1±1.0": no spaces within a phase's, so that a long curve is folded between phases."""
    top1 = entry.averages.top1
    points = (mean_std(Spread(mean=mean, std=std)) for mean, std in zip(top1.mean, top1.std, strict=True))
    return " ".join(point.replace(" ", "") for point in points)


def _say_more(forgetting: Sequence[Spread | None], others: Sequence[Spread | None], sign: int) -> bool:
    """Whether other measures, times `sign`, differ from the forgetting somewhere."""
    pairs = zip(forgetting, others, strict=True)
    return any(one and other and abs(one.mean - sign * other.mean) > 0.05 for one, other in pairs)


def drawn(text: str) -> str:
    """A name as matplotlib draws it: in UTF-8, no formula, and not left out of a legend."""
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def plot(runs: Runs, path: Path) -> None:
    """Top-1 accuracy over the number of classes seen, a line a run; a band of one standard deviation over its seeds."""
    import numpy as np
    from matplotlib.figure import Figure  # slow to import, and needed here alone
    from matplotlib.ticker import MaxNLocator

    compared = entries(runs)
    crowded, several = len(compared) > 6, any(len(entry.orders) > 1 for entry in compared)
    figure = Figure(figsize=(10 if crowded else 7, max(4.5, 0.25 * len(compared))))
    figure.set_layout_engine("constrained" if crowded else "none")  # only a legend beside the axes needs to be measured
    axes = figure.subplots()
    for number, entry in enumerate(compared):
        colour, seen = COLOURS[number % len(COLOURS)], entry.results.summary.classes_seen
        mean, std = np.array(entry.averages.top1.mean), np.array(entry.averages.top1.std)
        label = drawn(f"{entry.title}: average {entry.averages.average_incremental_accuracy.mean:.1f} %")
        style, marker = _STYLES[number // len(COLOURS) % len(_STYLES)], _MARKERS[number % len(_MARKERS)]
        axes.plot(seen, mean, style, color=colour, marker=marker, markersize=5, alpha=0.9, label=label)
        if len(entry.orders) > 1:
            axes.fill_between(seen, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(drawn(_subject([results.config for _, results in runs.values()])), fontsize=10)
    axes.set_xlabel("classes seen")
    axes.set_ylabel("top-1 accuracy (%)" + (", mean ± standard deviation over class orders" if several else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if crowded:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    else:
        axes.legend(frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _subject(configs: Sequence[Mapping[str, str]]) -> str:
    """Such as "CIFAR100, icarl / der, resnet32"."""
    titles = []
    for key in ("dataset", "model_name", "convnet_type"):
        names = list(dict.fromkeys(config[key] for config in configs))
        titles.append(" / ".join(names[:3]) + (" / ..." if len(names) > 3 else ""))
    return ", ".join(titles)
