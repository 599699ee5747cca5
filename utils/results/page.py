"""One self-contained HTML page of several runs: figures, tables and pictures, with nothing from elsewhere."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from utils.results import comparison, figures, pictures
from utils.results import entries as compared
from utils.results.entries import Entry

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = ROOT / "ControlNet" / "models"
TEMPLATE = Path(__file__).with_name("page.html")
FILES = ("report.html", "results.json", "phases.csv", "epochs.csv", "log.txt")
"""What a run's folder may have that the page links to."""


def page(
    runs: Mapping[str, tuple[Path, Mapping]],
    title: str = "",
    notes: Sequence[str] = (),
    *,
    labels: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> str:
    """The page's text.

    runs: name -> (output folder, content of results.json); labels: name -> what the table calls the form; file: where
    the page will lie, from which it links to the runs' files; None for no links.
    """
    of = compared.entries(runs, labels)
    lines = compared.lines(of)
    single = len(runs) == 1
    configs = {name: content["config"] for name, (_, content) in runs.items()}
    titles, rows = pictures.form_rows(of)
    looks = figures.Looks([entry.method for entry in of])
    table = comparison.rows_of(of)
    return _template().render(
        title=title or _title(of),
        notes=notes,
        verdict=[] if single else comparison.verdict(table),
        single=single,
        table=table,
        classifiers=[c for c in comparison.CLASSIFIERS if any(c in row.cells for row in table)],
        several_methods=len({entry.model for entry in of}) > 1,
        budgets=len({entry.budget for entry in of}) > 1,
        over_bytes=figures.accuracy_over_bytes(lines, looks) if len({entry.place for entry in of}) > 1 else None,
        over_phases=phase_figures(of, looks),
        forgetting=_forgetting(of),
        areas=area_table(lines),
        details=[_details(row, of, file) for row in table],
        forms_titles=titles,
        forms_rows=rows,
        memory=memory_rows(of),
        cost=[_cost(row) for row in table],
        provenance=provenance_groups(of),
        config_names=list(configs),
        differences=compared.config_differences(configs) if not single else [],
        config=json.dumps(next(iter(configs.values())), indent=2, ensure_ascii=False) if single else None,
        foot=_foot(runs),
    )


@cache
def _template():
    """Compiled once, as a run of several class orders writes its page after each."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mean_std"] = mean_std
    environment.filters["difference"] = comparison.difference
    environment.globals["words"] = comparison.CLASSIFIERS
    environment.globals["legend"] = comparison.LEGEND
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def mean_std(value: Mapping[str, float] | None, digits: int = 1) -> str:
    """Such as "71.3 ± 0.4"."""
    if value is None:
        return "–"
    spread = f" ± {value['std']:,.{digits}f}" if value["std"] else ""
    return f"{value['mean']:,.{digits}f}{spread}"


def _title(of: Sequence[Entry]) -> str:
    """Such as "MNIST, der: edges, p = 0.4"."""
    subjects = ", ".join(dict.fromkeys(f"{e.config['dataset']}, {e.config['model_name']}" for e in of))
    lines = list(dict.fromkeys(entry.line for entry in of))
    return f"{subjects}: {lines[0]}" if len(lines) == 1 else subjects


def _name(entry: Entry) -> str:
    """A run's name, with the classifier where it has several."""
    several = entry.method != entry.model
    return f"{entry.name} {entry.method[entry.method.rindex('(') :]}" if several else entry.name


def _cost(row: comparison.Row) -> dict[str, Any]:
    content = row.entry.content
    return {
        "name": row.entry.name,
        "units": content["summary"]["units"],
        "seconds": content["summary"]["seconds"],
        "memory_bytes": content["summary"]["bytes"]["mean"],
        "network_bytes": 4 * row.entry.runs[0]["phases"][-1]["parameters"],
    }


def _details(row: comparison.Row, of: Sequence[Entry], file: Path | None) -> dict[str, Any]:
    """What unfolds below a run: its files, its accuracy on each class, its confusion matrix."""
    own = [entry for entry in of if entry.name == row.entry.name]
    per_class: dict[str, list[float | None]] = {}
    for place, entry in enumerate(own):
        scores: dict[str, list[float]] = {}
        for run in entry.runs:
            for label, curve in (run[entry.classifier].get("per_class") or {}).items():
                if curve and curve[-1] is not None:
                    scores.setdefault(label, []).append(curve[-1])
        for label, values in scores.items():
            per_class.setdefault(label, [None] * len(own))[place] = sum(values) / len(values)
    return {
        "name": row.entry.name,
        "links": _links(row.entry.folder, file),
        "classifiers": [comparison.CLASSIFIERS[entry.classifier] for entry in own],
        "per_class": sorted(per_class.items()),
        "confusion": pictures.confusion(next((e for e in own if e.classifier == "cnn"), own[0])),
    }


def _links(folder: Path, file: Path | None) -> list[tuple[str, str]]:
    """(name, address) of a run's files, as seen from the page."""
    if file is None:
        return []
    there = [name for name in FILES if (folder / name).is_file() and (folder / name).resolve() != file.resolve()]
    return [(name, Path(os.path.relpath(folder / name, file.parent)).as_posix()) for name in there]


def phase_figures(of: Sequence[Entry], looks: figures.Looks, most: int = 24) -> list[tuple[str, str]]:
    """(title, figure) of accuracy over phases: one for each budget and classifier, and for each `most` lines.

    All have the same range of accuracies.
    """
    groups: dict[tuple[int | None, str], dict[tuple[str, str], Entry]] = {}
    for entry in of:
        group = groups.setdefault((entry.budget, entry.classifier), {})
        alike = [e for e in of if (e.budget, e.method, e.line) == (entry.budget, entry.method, entry.line)]
        group[entry.method, entry.line if len(alike) == 1 else f"{entry.line}: {entry.name}"] = entry
    limits = figures.accuracy_limits(of)
    found = []
    for (budget, classifier), group in groups.items():
        lines = list(group.items())
        parts = [f"{budget:,} bytes per class"] if budget and len({b for b, _ in groups}) > 1 else []
        parts += [comparison.CLASSIFIERS[classifier]] if len({c for _, c in groups}) > 1 else []
        for start in range(0, len(lines), most):
            name = f"phases-{budget or 0}-{classifier}-{start}"
            shown = dict(lines[start : start + most])
            found.append((", ".join(parts), figures.accuracy_over_phases(shown, name, looks, limits)))
    return found


def _forgetting(of: Sequence[Entry]) -> str | None:
    several = len({entry.budget for entry in of}) > 1, len({entry.model for entry in of}) > 1
    rows = []
    for entry in of:
        if entry.summary["forgetting"]:
            parts = [entry.model] if several[1] else []
            parts += [entry.line, *([f"{entry.budget:,} bytes"] if several[0] and entry.budget else [])]
            parts.append(comparison.CLASSIFIERS[entry.classifier])
            label = ", ".join(parts)
            alike = [e for e in of if (e.model, e.line, e.place, e.classifier) == _identity(entry)]
            label = label if len(alike) == 1 else f"{entry.name}: {label}"
            rows.append((label, entry.summary["forgetting"]["mean"], entry.summary["forgetting"]["std"]))
    return figures.bars(rows, "forgetting", "forgetting (points, lower is better)") if rows else None


def _identity(entry: Entry) -> tuple:
    return entry.model, entry.line, entry.place, entry.classifier


def area_table(lines: Mapping[tuple[str, str], Sequence[Entry]]) -> list[dict[str, Any]]:
    """Mean accuracy over the budgets that all lines of a method share, and its difference to real exemplars."""
    rows = []
    for method in dict.fromkeys(method for method, _ in lines):
        of_method = {form: of_line for (m, form), of_line in lines.items() if m == method}
        at = [{entry.place for entry in of_line} for of_line in of_method.values()]
        budgets = sorted(set.intersection(*(b for b in at if len(b) > 1))) if any(len(b) > 1 for b in at) else []
        areas = {form: compared.areas(of_line, budgets) for form, of_line in of_method.items()}
        for form, scores in areas.items():
            if scores:
                against = compared.paired(scores, areas.get(compared.REAL, {})) if form != compared.REAL else None
                mean = compared.paired(scores, dict.fromkeys(scores, 0.0))
                rows.append({"method": method, "form": form, "mean": mean, "against": against, "budgets": budgets})
    return sorted(rows, key=lambda row: (row["method"], -row["mean"].mean))


def memory_rows(of: Sequence[Entry]) -> list[dict[str, Any]]:
    """The memory after the last phase by form, of the first class order; a row a run and form."""
    rows, seen = [], set()
    for entry in of:
        if entry.name in seen:
            continue
        seen.add(entry.name)
        memory = entry.runs[0]["memory"]
        for of_form in memory.get("forms", ()):
            if of_form["exemplars"]:
                rows.append({"name": entry.name, "total": memory["bytes_total"], **of_form})
    largest = max((row["bytes"] for row in rows), default=0) or 1
    return [{**row, "share": 100 * row["bytes"] / largest} for row in rows]


def provenance_groups(of: Sequence[Entry]) -> list[dict[str, Any]]:
    """What made the copies: for runs with the same provenance their names, what differs from the first group's, and
    all of it."""
    groups: dict[tuple, list[str]] = {}
    for entry in of:
        if rows := pictures.provenance(entry, MODELS):
            names = groups.setdefault(tuple(rows), [])
            if entry.name not in names:
                names.append(entry.name)
    first = set(next(iter(groups), ()))
    short = [{"names": names, "all": rows} for rows, names in groups.items()]
    for number, group in enumerate(short):
        about = [row for row in group["all"] if row[0] in pictures.ABOUT_GENERATOR]
        other = [row for row in group["all"] if number and row not in first and row not in about]
        group["short"] = [*about, *other]
    return short


def _foot(runs: Mapping[str, tuple[Path, Mapping]]) -> dict[str, str]:
    """What somebody needs who gets the page alone: when, from which code, where and by which command it was made."""
    times = [file.stat().st_mtime for folder, _ in runs.values() if (file := folder / "results.json").is_file()]
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(max(times))) if times else "unknown"
    program = Path(sys.argv[0])
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    words = ["-m", module.name.removesuffix(".__main__")] if module else [program.name]
    command = shlex.join(["python", *words, *sys.argv[1:]])
    return {"results of": made, "commit": _commit(), "machine": _machine(), "command": command}


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
    names = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        pass
    cores = f"{os.cpu_count()} cores"
    return ", ".join(
        [platform.system(), names[0] if names else platform.machine(), cores, f"Python {sys.version.split()[0]}"]
    )
