"""The command of `exps.reproduce`."""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import exps.reproduce
from exps.reproduce.page import listing, number, with_records
from exps.reproduce.rows import FOLDER, Row, Table, figures, find_row, keep, read_records, read_tables, rows_of, shown
from exps.runs import MAIN, ROOT, follow
from utils import cli
from utils.errors import UserError
from utils.files import write_text
from utils.results.records import ResultsFile, load_results

PAGE = ROOT / "docs" / "reproduced.md"


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
    print(listing(tables, read_records(FOLDER)))
    return 0


def run(table: Table, row: Row, overrides: Sequence[str], *, only_print: bool) -> int:
    """Print a row's command and start it.  Returns main.py's exit code.  Raises UserError for a wrong key=value."""
    config = row.load(overrides)
    arguments = row.arguments(overrides)
    print(f"{row.name}: {row.method}, {row.dataset}, {row.protocol}; {table.source}, {table.table or 'no table'}")
    print(f"published: average {number(row.average) or '-'}, last {number(row.last) or '-'}")
    print(f"$ python main.py {shlex.join(['--config', shown(row.base), *arguments[2:]])}", flush=True)
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
    loaded = load_results(file)
    results = ResultsFile.of(loaded.config, loaded.runs)
    for row in rows_of(tables, results.config):
        entry = {**figures(results, row), "date": time.strftime("%Y-%m-%d"), "note": note}
        keep(FOLDER, row.name, entry)
        print(f"{row.name}: published {number(row.average) or '-'} / {number(row.last) or '-'}, ", end="")
        print(f"recorded {number(entry['average'])} / {number(entry['last'])}")
    if PAGE.is_file():  # not where the project was installed without its docs
        text = with_records(PAGE.read_text(encoding="utf-8"), tables, read_records(FOLDER))
        write_text(PAGE, text)
        print(shown(PAGE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
