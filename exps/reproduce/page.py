"""Rows as text: the table of --list, and the recorded runs of docs/reproduced.md."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from exps.report.tables import columns, markdown, mean_std
from exps.reproduce.rows import Row, Table, shown
from utils.results.records import Spread

WIDTH = 80
HEADING = "## Recorded runs\n"
"""What follows it in docs/reproduced.md is written by `python -m exps.reproduce --record`."""


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def with_records(page: str, tables: Sequence[Table], records: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/reproduced.md with its last section, the recorded runs, written anew.  page: its present text."""
    recorded = [(table, row) for table in tables for row in table.rows if row.name in records]
    waiting = sum(len(table.rows) for table in tables) - len(recorded)
    total = waiting + len(recorded)
    lines = [f"{waiting} of {total} published rows wait for somebody with a GPU: each takes hours or days of one."]
    if recorded:
        header = [
            "row",
            "method, dataset, protocol",
            "published: average",
            "last",
            "recorded: average",
            "last",
            "config",
        ]
        lines += ["", markdown(header, [_cells(row, records[row.name]) for _, row in recorded])]
        lines += ["", *(_note(table, row, records[row.name]) for table, row in recorded)]
    return page.partition(HEADING)[0] + HEADING + "\n" + "\n".join(lines) + "\n"


def _cells(row: Row, entry: Mapping[str, Any]) -> list[str]:
    config = " ".join([f"`{shown(row.base)}`", *(f"`{override}`" for override in row.overrides)])
    cells = [f"`{row.name}`", f"{row.method}, {row.dataset}, {row.protocol}", number(row.average), number(row.last)]
    return [*cells, _recorded(entry, "average"), _recorded(entry, "last"), config]


def _recorded(entry: Mapping[str, Any], key: str) -> str:
    text = mean_std(Spread(mean=entry[key], std=entry.get(f"{key}_std", 0.0)), 2)
    return f"{text} (NME {entry[f'nme_{key}']:.2f})" if f"nme_{key}" in entry else text


def _note(table: Table, row: Row, entry: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, entry["seeds"]))
    made = f"recorded {entry['date']}, class orders {seeds}" + (f"; {entry['note']}" if entry["note"] else "")
    remark = f" {row.note}." if row.note else ""
    return f"- `{row.name}`: {made}. Published in [{table.source}, {table.table}]({table.url}). {table.note}{remark}"


def listing(tables: Sequence[Table], records: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows at 80 columns: published average and last accuracy, and recorded ones where there are any."""
    lines: list[str] = []
    for table in tables:
        lines += [*([""] if lines else []), *textwrap.wrap(table.title, WIDTH)]
        several = len(table.protocols) > 1
        header = ["row", "protocol" if several else "method", "published", "recorded"]
        rows = []
        for row in table.rows:
            entry = records.get(row.name)
            what = f"{row.dataset}, {row.protocol}" if several else row.method
            recorded = _pair(entry["average"], entry["last"]) if entry else ""
            rows.append([row.name, what, _pair(row.average, row.last), recorded])
        if not any(row[-1] for row in rows):
            rows, header = [row[:-1] for row in rows], header[:-1]
        lines.append(columns(header, rows, WIDTH, left=2))
    return "\n".join(lines)


def _pair(average: float | None, last: float | None) -> str:
    return "-" if average is None and last is None else f"{number(average) or '-'} / {number(last) or '-'}"
