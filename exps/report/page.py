"""One self-contained HTML page of several runs: figures, tables and pictures, with nothing from elsewhere."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, Template

from exps.report import figures, pictures, tables
from exps.report.entries import REAL, Entry, Runs, areas, config_differences, entries, lines
from exps.report.tables import paired
from utils.files import write_text
from utils.results.records import Classifier, load_results

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).with_name("page.html")
FILES = ("report.html", "results.json", "phases.csv", "epochs.csv", "log.txt")
"""What a run's folder may have that the page links to."""
PANEL = 24
"""Most lines of a figure."""


def write_page(folder: Path) -> None:
    """A run's page, report.html in its output folder."""
    results, file = load_results(folder), folder / "report.html"
    write_text(file, page({str(results.config["model_name"]): (folder, results)}, file=file))


def page(
    runs: Runs,
    title: str = "",
    notes: Sequence[str] = (),
    *,
    labels: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> str:
    """The page's text.

    notes: paragraphs below the title; labels: name -> what the table calls the form; file: where the page will lie,
    from which it links to the runs' files; None for no links.
    """
    compared = entries(runs, labels)
    by_line = lines(compared)
    single = len(runs) == 1
    configs = {name: results.config for name, (_, results) in runs.items()}
    looks = figures.Looks(list(by_line))
    table = tables.table_rows(compared)
    return _template().render(
        title=title or _title(compared),
        notes=notes,
        verdict=[] if single else tables.verdict(table),
        single=single,
        table=table,
        classifiers=[c for c in tables.WORDS if any(c in row.cells for row in table)],
        several_orders=any(len(entry.orders) > 1 for entry in compared),
        grouped=len({row.group for row in table}) > 1,
        over_bytes=figures.accuracy_over_bytes(by_line, looks) if len({e.size for e in compared}) > 1 else None,
        over_phases=phase_figures(compared, looks),
        forgetting=_forgetting(compared),
        areas=area_table(by_line),
        details=[_details(row, compared, file) for row in table],
        forms_rows=pictures.form_rows(compared),
        provenance=_provenance_groups(compared),
        differences=config_differences(configs),
        config=json.dumps(next(iter(configs.values())), indent=2, ensure_ascii=False) if single else None,
        foot=_foot(runs),
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mean_std"] = tables.mean_std
    environment.globals |= {"words": tables.WORDS, "legend": tables.LEGEND}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _title(compared: Sequence[Entry]) -> str:
    """Such as "MNIST, der: edges, p = 0.4"."""
    subjects = ", ".join(dict.fromkeys(f"{e.config['dataset']}, {e.config['model_name']}" for e in compared))
    forms = list(dict.fromkeys(entry.line for entry in compared))
    return f"{subjects}: {forms[0]}" if len(forms) == 1 else subjects


def _details(row: tables.Row, compared: Sequence[Entry], file: Path | None) -> dict[str, Any]:
    """What unfolds below a run: its files, its accuracy on each class, its confusion matrices."""
    own = [entry for entry in compared if entry.name == row.entry.name]
    per_class: dict[str, list[float | None]] = {}
    for column, entry in enumerate(own):
        last: dict[str, list[float]] = {}
        for order in entry.orders:
            for label, curve in getattr(order, entry.classifier).per_class.items():
                if curve and curve[-1] is not None:
                    last.setdefault(label, []).append(curve[-1])
        for label, values in last.items():
            per_class.setdefault(label, [None] * len(own))[column] = fmean(values)
    matrices = [(tables.WORDS[entry.classifier], pictures.confusion(entry)) for entry in own]
    return {
        "name": row.entry.name,
        "links": _links(row.entry.folder, file),
        "classifiers": [tables.WORDS[entry.classifier] for entry in own],
        "per_class": sorted(per_class.items()),
        "confusions": [(word, matrix) for word, matrix in matrices if matrix],
    }


def _links(folder: Path, file: Path | None) -> list[tuple[str, str]]:
    """(name, address) of a run's files, as seen from the page."""
    if file is None:
        return []
    files = [folder / name for name in FILES if (folder / name).is_file()]
    others = [other for other in files if other.resolve() != file.resolve()]
    return [(other.name, Path(os.path.relpath(other, file.parent)).as_posix()) for other in others]


def phase_figures(compared: Sequence[Entry], looks: figures.Looks) -> list[tuple[str, str]]:
    """(title, figure) of accuracy over phases: one for each budget and classifier, and for each PANEL lines.

    All have the same range of accuracies.
    """
    groups: dict[tuple[int | None, Classifier], dict[tuple[str, str], Entry]] = {}
    for entry in compared:
        form = entry.line_among(e for e in compared if e.budget == entry.budget)
        groups.setdefault((entry.budget, entry.classifier), {})[entry.method, form] = entry
    limits = figures.accuracy_limits(compared)
    budgets, classifiers = {budget for budget, _ in groups}, {classifier for _, classifier in groups}
    panels = []
    for (budget, classifier), group in sorted(groups.items(), key=lambda item: item[0][0] or 0):
        parts = [f"{budget:,} bytes per class"] if budget and len(budgets) > 1 else []
        parts += [tables.WORDS[classifier]] if len(classifiers) > 1 else []
        for start in range(0, len(group), PANEL):
            name = f"phases-{budget or 0}-{classifier}-{start}"
            part = dict(list(group.items())[start : start + PANEL])
            panels.append((", ".join(parts), figures.accuracy_over_phases(part, name, looks, limits)))
    return panels


def _forgetting(compared: Sequence[Entry]) -> list[dict[str, Any]]:
    """Rows of bars.  share: of the longest one, in percent."""
    models, budgets = {entry.model for entry in compared}, {entry.budget for entry in compared}
    rows: list[dict[str, Any]] = []
    for entry in compared:
        if spread := entry.forgetting:
            parts = [entry.model] if len(models) > 1 else []
            parts += [entry.line, *([f"{entry.budget:,} bytes"] if len(budgets) > 1 and entry.budget else [])]
            label = ", ".join([*parts, tables.WORDS[entry.classifier]])
            rows.append({"run": entry.name, "label": label, "spread": spread})
    labels = Counter(row["label"] for row in rows)
    longest = max((row["spread"].mean for row in rows), default=0) or 1
    for row in rows:
        row["name"] = row["label"] if labels[row["label"]] == 1 else f"{row['run']}: {row['label']}"
        row["share"] = max(0.0, 100 * row["spread"].mean / longest)
    return rows


def area_table(by_line: Mapping[tuple[str, str], Sequence[Entry]]) -> list[dict[str, Any]]:
    """Mean accuracy over the budgets that all lines of a method share, and its difference to real exemplars."""
    rows = []
    for method in dict.fromkeys(method for method, _ in by_line):
        own = {form: line for (m, form), line in by_line.items() if m == method}
        sizes = [{entry.size for entry in line} for line in own.values() if len({entry.size for entry in line}) > 1]
        budgets = sorted(set.intersection(*sizes)) if sizes else []
        by_form = {form: areas(line, budgets) for form, line in own.items()}
        listed = ", ".join(f"{budget:,}" for budget in budgets)
        for form, scores in by_form.items():
            if mean := paired(scores, dict.fromkeys(scores, 0.0)):
                against = paired(scores, by_form.get(REAL, {})) if form != REAL else None
                rows.append({"method": method, "form": form, "mean": mean, "against": against, "budgets": listed})
    return sorted(rows, key=lambda row: (row["method"], -row["mean"].mean))


def _provenance_groups(compared: Sequence[Entry]) -> list[dict[str, Any]]:
    """What made the copies: for runs with the same provenance their names, what the generator has seen and which of
    the first group's settings are others, and all of it."""
    groups: dict[tuple, list[str]] = {}
    for entry in compared:
        if rows := pictures.provenance(entry):
            names = groups.setdefault(tuple(rows), [])
            names += [entry.name] if entry.name not in names else []
    first = dict(next(iter(groups), ()))
    described: list[dict[str, Any]] = []
    for settings, names in groups.items():
        about = [row for row in settings if row[0] in pictures.ABOUT_GENERATOR]
        other = [row for row in settings if row not in about and first.get(row[0], row[1]) != row[1]]
        described.append({"names": names, "short": [*about, *other], "all": settings})
    return described


def _foot(runs: Runs) -> dict[str, str]:
    """What somebody needs who gets only the page: when, from which code, where and by which command it was made."""
    times = [file.stat().st_mtime for folder, _ in runs.values() if (file := folder / "results.json").is_file()]
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(max(times))) if times else "unknown"
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    words = ["-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    command = shlex.join(["python", *words, *sys.argv[1:]])
    return {"results of": made, "version": _version(), "commit": _commit(), "machine": _machine(), "command": command}


def _version() -> str:
    """Of the project: the installed one, or that of its sources."""
    try:
        return metadata.version("escort-cil")
    except metadata.PackageNotFoundError:
        file = ROOT / "pyproject.toml"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        return text.partition('\nversion = "')[2].partition('"')[0]


@cache
def _commit() -> str:
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


@cache
def _machine() -> str:
    processor = platform.machine()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpus:
        processor = next((cpu.partition(":")[2].strip() for cpu in cpus if cpu.startswith("model name")), processor)
    return f"{platform.system()}, {processor}, {os.cpu_count()} cores, Python {sys.version.split()[0]}"
