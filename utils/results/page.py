"""One self-contained HTML page of several runs: figures, tables and pictures, with nothing from elsewhere."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from utils.results import entries as compared
from utils.results import figures, pictures
from utils.results.entries import Entry

MODELS = Path(__file__).resolve().parent.parent.parent / "ControlNet" / "models"
TEMPLATE = Path(__file__).with_name("page.html")


def page(runs: Mapping[str, tuple[Path, Mapping]], title: str = "", notes: Sequence[str] = ()) -> str:
    """The page's text.  runs: name -> (output folder, content of results.json)."""
    of = compared.entries(runs)
    lines = compared.lines(of)
    single = len(runs) == 1
    sizes = {entry.budget or round(entry.bytes_a_class) for entry in of}
    configs = {name: content["config"] for name, (_, content) in runs.items()}
    titles, rows = pictures.form_rows(of)
    return _template().render(
        title=title or ", ".join(dict.fromkeys(f"{c['dataset']}, {c['model_name']}" for c in configs.values())),
        notes=notes,
        single=single,
        entries=[_row(entry) for entry in of],
        budgets=any(entry.budget for entry in of),
        over_bytes=figures.accuracy_over_bytes(lines) if len(sizes) > 1 else None,
        over_phases=phase_figures(of),
        forgetting=_forgetting(of),
        areas=area_table(lines),
        paired=paired_table(of),
        confusions=[(_name(e), picture) for e in of if e.classifier == "cnn" and (picture := pictures.confusion(e))],
        forms_titles=titles,
        forms_rows=rows,
        memory=memory_rows(of),
        provenance=provenance_groups(of),
        config_names=list(configs),
        differences=compared.config_differences(configs) if not single else [],
        config=json.dumps(next(iter(configs.values())), indent=2, ensure_ascii=False) if single else None,
    )


@cache
def _template():
    """Compiled once, as a run of several class orders writes its page after each."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mean_std"] = mean_std
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def mean_std(value: Mapping[str, float] | None, digits: int = 1) -> str:
    """Such as "71.3 ± 0.4"."""
    if value is None:
        return "–"
    spread = f" ± {value['std']:,.{digits}f}" if value["std"] else ""
    return f"{value['mean']:,.{digits}f}{spread}"


def _name(entry: Entry) -> str:
    """A run's name, with the classifier where it has several."""
    several = entry.method.endswith(")")
    return f"{entry.name} {entry.method[entry.method.rindex('(') :]}" if several else entry.name


def _row(entry: Entry) -> dict[str, Any]:
    """A run's row of the first table."""
    content = entry.content
    parameters = entry.runs[0]["phases"][-1]["parameters"]
    return {
        "name": _name(entry),
        "run": entry.name,
        "first": entry.classifier == "cnn",
        "method": entry.method,
        "form": entry.form,
        "budget": entry.budget,
        "bytes": round(entry.bytes_a_class),
        "units": content["summary"]["units"],
        "seeds": content["summary"]["seeds"],
        "average": entry.summary["average_incremental_accuracy"],
        "last": {key: values[-1] for key, values in entry.summary["top1"].items()},
        "forgetting": entry.summary["forgetting"],
        "seconds": content["summary"]["seconds"],
        "memory_bytes": content["summary"]["bytes"]["mean"],
        "network_bytes": 4 * parameters,
        "unfinished": content.get("unfinished"),
    }


def phase_figures(of: Sequence[Entry], most: int = 24) -> list[tuple[str, str]]:
    """(title, figure) of accuracy over phases: one for each budget, and for each `most` lines."""
    budgets = {entry.budget for entry in of}
    groups: dict[int | None, dict[tuple[str, str], Entry]] = {}
    for entry in of:
        group = groups.setdefault(entry.budget, {})
        alike = [e for e in of if (e.budget, e.method, e.form) == (entry.budget, entry.method, entry.form)]
        group[entry.method, entry.form if len(alike) == 1 else f"{entry.form}: {entry.name}"] = entry
    found = []
    for budget, group in groups.items():
        lines = list(group.items())
        title = f"{budget:,} bytes a class" if budget and len(budgets) > 1 else ""
        for start in range(0, len(lines), most):
            name = f"phases{budget or 0}-{start}"
            found.append((title, figures.accuracy_over_phases(dict(lines[start : start + most]), name)))
    return found


def _forgetting(of: Sequence[Entry]) -> str | None:
    rows = [
        (_name(e), e.summary["forgetting"]["mean"], e.summary["forgetting"]["std"])
        for e in of
        if e.summary["forgetting"]
    ]
    return figures.bars(rows, "forgetting", "forgetting (points, lower is better)") if rows else None


def area_table(lines: Mapping[tuple[str, str], Sequence[Entry]]) -> list[dict[str, Any]]:
    """Mean accuracy over the budgets that all lines of a method share, and its difference to real exemplars."""
    rows = []
    for method in dict.fromkeys(method for method, _ in lines):
        of_method = {form: of_line for (m, form), of_line in lines.items() if m == method}
        at = [{entry.budget or entry.bytes_a_class for entry in of_line} for of_line in of_method.values()]
        budgets = sorted(set.intersection(*(b for b in at if len(b) > 1))) if any(len(b) > 1 for b in at) else []
        areas = {form: compared.areas(of_line, budgets) for form, of_line in of_method.items()}
        for form, scores in areas.items():
            if scores:
                against = compared.paired(scores, areas.get(compared.REAL, {})) if form != compared.REAL else None
                mean = compared.paired(scores, dict.fromkeys(scores, 0.0))
                rows.append({"method": method, "form": form, "mean": mean, "against": against, "budgets": budgets})
    return sorted(rows, key=lambda row: (row["method"], -row["mean"].mean))


def paired_table(of: Sequence[Entry]) -> dict[str, Any]:
    """Differences to the reference at the same budget, by class order: {"seeds": [...], "rows": [...]}."""
    rows = []
    for entry in of:
        reference = compared.reference_of(entry, of)
        if reference is None or (pair := compared.paired(entry.scores, reference.scores)) is None:
            continue
        sizes = [round(e.bytes_a_class) for e in (entry, reference)]
        rows.append({"name": _name(entry), "reference": _name(reference), "pair": pair, "bytes": sizes})
    seeds = sorted({seed for row in rows for seed in row["pair"].differences})
    return {"seeds": seeds, "rows": rows}


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


def provenance_groups(of: Sequence[Entry]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(names of runs, what made their copies), runs with the same provenance together."""
    groups: dict[tuple, list[str]] = {}
    for entry in of:
        if rows := pictures.provenance(entry, MODELS):
            names = groups.setdefault(tuple(rows), [])
            if entry.name not in names:
                names.append(entry.name)
    return [(", ".join(names), list(rows)) for rows, names in groups.items()]
