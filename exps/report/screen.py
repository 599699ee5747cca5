"""Runs side by side on a screen: a text table, and a plot of accuracy curves for a paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from exps.report.entries import Runs, entries
from exps.report.figures import COLOURS
from exps.report.tables import mean_std
from utils import cli
from utils.files import printable, write_atomically
from utils.results.records import Averages, Spread

_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^v<>PX*"


def show(runs: Runs, file: TextIO | None = None) -> None:
    """Print a table of several runs to `file` (default: stdout).

    For each: top-1 accuracy after each phase and their average in %, forgetting (PyCIL's and backward transfer where
    they say something else), memory in units and bytes, seconds (with phase 0's training also where a network was
    reused); mean ± standard deviation, and a line that says so, where there are several seeds.
    """
    compared = entries(runs)
    averages, summaries = [entry.averages for entry in compared], [entry.results.summary for entry in compared]
    columns = {"": [entry.title for entry in compared], "top-1 after each phase": [_curve(a) for a in averages]}
    columns["average"] = [mean_std(a.average_incremental_accuracy) for a in averages]
    columns["forgetting"] = [mean_std(a.forgetting) for a in averages]
    if any(_differ(a.forgetting, a.forgetting_in_tens, 1) for a in averages):
        columns["forgetting (PyCIL)"] = [mean_std(a.forgetting_in_tens) for a in averages]
    if any(_differ(a.forgetting, a.backward_transfer, -1) for a in averages):
        columns["transfer"] = [mean_std(a.backward_transfer) for a in averages]
    columns["units"] = [mean_std(summary.units) for summary in summaries]
    columns["bytes"] = [mean_std(summary.bytes, 0) for summary in summaries]
    columns["seconds"] = [mean_std(summary.seconds, 0) for summary in summaries]
    several = any(len(entry.orders) > 1 for entry in compared)
    notes = ["mean ± standard deviation over class orders"] if several else []
    cli.show_table(list(columns), list(zip(*columns.values(), strict=True)), notes, file=file)


def _curve(averages: Averages) -> str:
    """Such as "91.0±0.4 82.1±1.0": no spaces within a phase's, so that a long curve is folded between phases."""
    points = zip(averages.top1.mean, averages.top1.std, strict=True)
    return " ".join(mean_std(Spread(mean=mean, std=std)).replace(" ", "") for mean, std in points)


def _differ(forgetting: Spread | None, other: Spread | None, sign: int) -> bool:
    """Whether another measure, times `sign`, says something else than the forgetting."""
    return bool(forgetting and other) and abs(forgetting.mean - sign * other.mean) > 0.05


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
