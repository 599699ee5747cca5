"""The command of `exps.reproduce`."""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import exps.reproduce
from exps.estimates import class_order_hours
from exps.reproduce.page import listing, number, page
from exps.reproduce.rows import FOLDER, Row, figures, find_row, keep, read_results, read_tables, shown
from exps.runs import MAIN, ROOT, call, follow, last_words, nb_cores
from utils import cli
from utils.config.read import read_json
from utils.config.schema import Config, keys_of
from utils.errors import UserError
from utils.results import report

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
    what.add_argument("--list", action="store_true", help="print the rows, published and ours")
    what.add_argument("--run", metavar="ROW", help="run a row with main.py and keep our number")
    what.add_argument("--write", action="store_true", help="write the page from the rows and results.json")
    parser.add_argument("--dry-run", action="store_true", help="with --run: the command and its hours, nothing else")
    parser.add_argument(
        "--rows", type=cli.path, default=FOLDER, metavar="DIR", help="folder of the rows [exps/reproduce]"
    )
    parser.add_argument("--page", type=cli.path, default=PAGE, metavar="FILE", help="the page [docs/reproduced.md]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --run: replaces a key of the config")
    options = parser.parse_intermixed_args(cli.options_as_overrides(parser, argv))
    tables = read_tables(options.rows)
    if options.run:
        return run(options, *find_row(tables, options.run))
    if options.overrides or options.dry_run:
        raise UserError("key=value and --dry-run go with --run.")
    results = read_results(options.rows)
    if options.list:
        print(listing(tables, results))
    else:
        report.write_text(options.page, page(tables, results))
        print(options.page)
    return 0


def run(options: argparse.Namespace, table: Any, row: Row) -> int:
    """Run or estimate a row.  Returns main.py's exit code."""
    arguments = row.arguments(options.overrides)
    config = checked(arguments)
    changed = changed_keys(row, config, options.overrides)
    typed = ["--config", shown(row.base), *arguments[2:]]
    print(f"{row.name}: {row.method}, {row.dataset}, {row.protocol}; {table.source}, {table.table or 'no table'}")
    print(f"published: average {number(row.average) or '-'}, last {number(row.last) or '-'}")
    print(f"$ python main.py {shlex.join(typed)}", flush=True)
    if options.dry_run:
        return estimate(options, row, config, changed)
    if code := follow(MAIN, *arguments):
        return code
    entry = figures(report.load_results(Path(config["output_dir"])), row, config["seed"])
    entry |= {"date": time.strftime("%Y-%m-%d"), "machine": machine(config)[0], "commit": commit()}
    if changed:
        entry["changed"] = [override for override in options.overrides if override.partition("=")[0] in changed]
    results = keep(options.rows, "changed" if changed else "runs", row.name, entry)
    report.write_text(options.page, page(read_tables(options.rows), results))
    print(f"ours: average {number(entry['average'])}, last {number(entry['last'])}; in {shown(options.page)}")
    if changed:
        print(f"no reproduction, as these keys are not the row's: {', '.join(changed)}")
    return 0


def estimate(options: argparse.Namespace, row: Row, config: Mapping[str, Any], changed: Sequence[str]) -> int:
    """Print the hours of one class order on this machine, and keep them where it has a GPU."""
    hours, left_out = class_order_hours(config)
    on, gpus = machine(config)
    time_words = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    print("; ".join([f"about {time_words} a class order on {on}, from two epochs of each kind", *left_out]))
    if gpus == 1 and not changed and not left_out:
        entry = {"hours": round(hours, 2), "machine": on, "date": time.strftime("%Y-%m-%d")}
        results = keep(options.rows, "hours", row.name, entry)
        report.write_text(options.page, page(read_tables(options.rows), results))
    print("dry run: no run was kept")
    return 0


def checked(arguments: Sequence[str]) -> dict[str, Any]:
    """The whole config of a run.  Raises UserError with what main.py says against it."""
    done = call(MAIN, *arguments, "--show-config")
    if done.returncode:
        raise UserError(last_words(done))
    return json.loads(done.stdout)


def changed_keys(row: Row, config: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """The user's keys that may change a row's numbers: not those of the machine, nor those with the row's own value."""
    keys = keys_of(Config)
    plain = {**{name: key.default for name, key in keys.items()}, **read_json(row.base), **row.config}
    given = [override.partition("=")[0] for override in overrides]
    known = [key for key in given if key not in keys or keys[key].result]
    return [key for key in known if key not in plain or config.get(key) != plain[key]]


def machine(config: Mapping[str, Any]) -> tuple[str, int]:
    """What a run of a config runs on here, such as "one NVIDIA H200" or a processor's name, and its number of GPUs."""
    import torch

    if config["device"] != "cpu" and torch.cuda.is_available():
        devices = config["device"] if isinstance(config["device"], list) else [0]
        name = torch.cuda.get_device_name(devices[0])
        return (f"one {name}" if len(devices) == 1 else f"{len(devices)} x {name}"), len(devices)
    return f"{_processor()}, {nb_cores()} cores", 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this code, with "+" where files differ from it; "" outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        name = git("rev-parse", "--short", "HEAD")
        dirty = name and git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except OSError:
        return ""
    return f"{name}+" if dirty else name


if __name__ == "__main__":
    sys.exit(main())
