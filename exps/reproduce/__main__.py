"""`python -m exps.reproduce`, and its rows as text: for --list, and for docs/reproduced.md."""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import exps.reproduce
from exps.report.tables import markdown, mean_std
from exps.reproduce.rows import (
    FOLDER,
    RECORDED,
    Row,
    Table,
    figures,
    find_row,
    read_records,
    read_tables,
    rows_of,
    user_path,
)
from exps.runs import MAIN, ROOT, follow
from utils import cli
from utils.errors import UserError
from utils.files import write_json, write_text
from utils.results.records import Spread, load_results

PAGE = ROOT / "docs" / "reproduced.md"
HEADING = "## Recorded runs\n"
"""What follows it in docs/reproduced.md is written by `python -m exps.reproduce --record`."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    return cli.run(lambda: command(argv))


def command(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m exps.reproduce",
        description=exps.reproduce.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print the rows, published and recorded")
    what.add_argument("--run", metavar="ROW", help="run a row with main.py")
    what.add_argument("--record", type=cli.path, metavar="FILE", help="keep the numbers of a finished results.json")
    parser.add_argument("--dry-run", action="store_true", help="with --run: print the command, start nothing")
    parser.add_argument("--note", default="", metavar="TEXT", help="with --record: whose run it is, on what machine")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --run: replaces a key of the config")
    options = parser.parse_intermixed_args(cli.options_as_overrides(parser, argv))
    if (options.overrides or options.dry_run) and not options.run:
        raise UserError("key=value and --dry-run go with --run.")
    if options.note and not options.record:
        raise UserError("--note goes with --record.")
    tables = read_tables(FOLDER)
    if options.run:
        return run(*find_row(tables, options.run), options.overrides, only_print=options.dry_run)
    if options.record:
        return record(tables, options.record, options.note)
    show(tables, read_records(FOLDER))
    return 0


def run(table: Table, row: Row, overrides: Sequence[str], *, only_print: bool) -> int:
    """Print a row's command and start it.  Returns main.py's exit code.  Raises UserError for a wrong key=value."""
    config = row.load(overrides)
    arguments = row.arguments(overrides)
    print(f"{row.name}: {row.method}, {row.dataset}, {row.protocol}; {table.source}, {table.table or 'no table'}")
    print(f"published: average {number(row.average) or '-'}, last {number(row.last) or '-'}")
    print(f"$ python main.py {shlex.join(['--config', user_path(row.base), *arguments[2:]])}", flush=True)
    if only_print:
        print("dry run: nothing was started")
        return 0
    if code := follow(MAIN, *arguments):
        return code
    results = shlex.quote(str(Path(config.output_dir or "") / "results.json"))
    print(f"to keep its numbers: python -m exps.reproduce --record {results}")
    return 0


def record(tables: Sequence[Table], file: Path, note: str) -> int:
    """Keep a run's numbers as those of the rows that it reproduces.  Raises UserError where there is none."""
    results, records = load_results(file), read_records(FOLDER)
    for row in rows_of(tables, results.config):
        entry = records[row.name] = {**figures(results, row), "date": time.strftime("%Y-%m-%d"), "note": note}
        recorded = _pair(entry["average"], entry["last"])
        print(f"{row.name}: published {_pair(row.average, row.last)}, recorded {recorded}")
    write_json(FOLDER / RECORDED, dict(sorted(records.items())))
    if PAGE.is_file():  # not where the project was installed without its docs
        write_text(PAGE, with_records(PAGE.read_text(encoding="utf-8"), tables, records))
        print(user_path(PAGE))
    return 0


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def with_records(page: str, tables: Sequence[Table], records: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/reproduced.md with its last section, the recorded runs, written anew.  page: its present text."""
    recorded = [(table, row) for table in tables for row in table.rows if row.name in records]
    total = sum(len(table.rows) for table in tables)
    waiting = f"{total - len(recorded)} of {total} published rows wait for somebody with a GPU"
    lines = [f"{waiting}: each takes hours or days of one."]
    if recorded:
        numbers = ("published: average", "last", "recorded: average", "last")
        header = ["row", "method, dataset, protocol", *numbers, "config"]
        lines += ["", markdown(header, [_cells(row, records[row.name]) for _, row in recorded])]
        lines += ["", *(_note(table, row, records[row.name]) for table, row in recorded)]
    return page.partition(HEADING)[0] + HEADING + "\n" + "\n".join(lines) + "\n"


def _cells(row: Row, entry: Mapping[str, Any]) -> list[str]:
    config = " ".join([f"`{user_path(row.base)}`", *(f"`{override}`" for override in row.overrides)])
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


def show(tables: Sequence[Table], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the rows: published average and last accuracy, and recorded ones where there are any."""
    for table in tables:
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
        print(f"\n{table.title}")
        cli.show_table(header, rows, left=2)


def _pair(average: float | None, last: float | None) -> str:
    return "-" if average is None and last is None else f"{number(average) or '-'} / {number(last) or '-'}"


if __name__ == "__main__":
    sys.exit(main())
