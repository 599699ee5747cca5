"""Rows as text: docs/reproduced.md, and the table of --list."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exps.reproduce.rows import Row, Table, shown

WIDTH = 80
_INTRODUCTION = """\
# Published numbers, and ours

Average incremental and last top-1 accuracy in %. Published numbers are copied from the source named with each table,
papers' tables from conversions of their PDF files to text: look at the paper before you cite one. Ours are those of
runs of this code, with date, machine and commit below the table. An empty cell: not published there, or not run here.
Hours are of one class order on one GPU, estimated by a dry run on it.

```
python -m exps.reproduce --list
python -m exps.reproduce --run survey-inc10-icarl --dry-run          # the command, and its hours on your machine
python -m exps.reproduce --run survey-inc10-icarl data_dir=~/data    # goes on where it stopped; writes this page anew
```

This page is written by `python -m exps.reproduce --write` from `exps/reproduce/*.json`.
"""


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def page(tables: Sequence[Table], results: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/reproduced.md."""
    return "\n".join([_INTRODUCTION, *(line for table in tables for line in _section(table, results))])


def _section(table: Table, results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield f"## {table.title}\n"
    yield f"[Source]({table.url}). {table.note}\n"
    own = ["dataset, protocol"] if len(table.protocols) > 1 else []
    header = ["row", "method", *own, "published: average", "last", "ours: average", "last", "hours", "config"]
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in table.rows:
        ours, hours = results["runs"].get(row.name, {}), results["hours"].get(row.name, {})
        where = [f"{row.dataset}, {row.protocol}"] if own else []
        config = " ".join([f"`{shown(row.base)}`", *(f"`{override}`" for override in row.overrides)])
        cells = [f"`{row.name}`", row.method, *where, number(row.average), number(row.last), _ours(ours, "average")]
        cells += [_ours(ours, "last"), number(hours.get("hours")), config]
        yield "| " + " | ".join(cells) + " |"
    notes = list(_notes(table.rows, results))
    if notes:
        yield ""
        yield from (f"- {note}" for note in notes)
    yield ""


def _ours(entry: Mapping[str, Any], key: str) -> str:
    text = number(entry.get(key))
    if (std := entry.get(f"{key}_std")) is not None:
        text += f" ± {std:.2f}"
    return f"{text} (NME {entry[f'nme_{key}']:.2f})" if f"nme_{key}" in entry else text


def _notes(rows: Sequence[Row], results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row.note:
            yield f"`{row.name}`: {row.note}."
        for kind in ("runs", "changed"):
            if entry := results[kind].get(row.name):
                keys = f" with {', '.join(entry['changed'])}" if kind == "changed" else ""
                came = f": {number(entry['average'])}, {number(entry['last'])}" if keys else ""
                seeds = ", ".join(map(str, entry["seeds"]))
                made = f"{entry['date']}, {entry['machine']}, commit {entry['commit'] or 'unknown'}, seed {seeds}"
                yield f"`{row.name}`, ours{keys}{came} ({made})."
        if hours := results["hours"].get(row.name):
            yield f"`{row.name}`, hours: {hours['date']}, {hours['machine']}."


def listing(tables: Sequence[Table], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows at 80 columns: published average and last accuracy, and ours."""
    lines = []
    for table in tables:
        lines += [*([""] if lines else []), *textwrap.wrap(table.title, WIDTH)]
        several = len(table.protocols) > 1
        rows = [("row", "protocol" if several else "method", "published", "ours")]
        for row in table.rows:
            ours = results["runs"].get(row.name, {})
            what = f"{row.dataset}, {row.protocol}" if several else row.method
            rows.append((row.name, what, _pair(row.average, row.last), _pair(ours.get("average"), ours.get("last"))))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines += [
            f"  {name:<{widths[0]}}  {what:<{widths[1]}}  {published:>{widths[2]}}  {ours:>{widths[3]}}".rstrip()
            for name, what, published, ours in rows
        ]
    return "\n".join(lines)


def _pair(average: float | None, last: float | None) -> str:
    return "-" if average is None and last is None else f"{number(average) or '-'} / {number(last) or '-'}"
