"""Look into an exemplar memory: python -m utils.memory show FILE | extract FILE [--to FOLDER]

FILE is one of a run's `memory/phaseNN.memory`.
"""

import argparse
import sys
from collections.abc import Sequence

from utils import cli
from utils.memory import archive


def command(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.memory", description="Look into a run's exemplar memory.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what the memory holds, in exemplars and bytes")
    extract = commands.add_parser("extract", help="write its files into a folder")
    for subcommand in (show, extract):
        subcommand.add_argument("file", type=cli.path, help="a run's memory/phaseNN.memory")
    extract.add_argument("--to", metavar="FOLDER", type=cli.path, help="[FILE without its ending]")
    options = parser.parse_args(arguments)
    if options.command == "extract":
        folder = options.to or options.file.with_suffix("")
        print(cli.visible(f"{archive.extract(options.file, folder)} files in {folder}"))
        return
    summary = archive.summary(options.file)
    print(cli.visible(f"{summary['dataset']}, {summary['classes']} classes, {summary['bytes']:,} bytes"))
    payloads = sum(row["bytes"] for row in summary["forms"])
    for row in summary["forms"]:
        missing = row["exemplars"] - row["files"]
        more = f", {missing} without a kept file" if missing else ""
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row["settings"].items())
        words = f"{row['form']}: {row['exemplars']} exemplars, {row['bytes']:,} bytes{more}"
        print(cli.visible(f"{words} ({settings})" if settings else words))
    print(f"labels, texts, lengths, sizes and settings: {summary['bytes'] - payloads:,} bytes")


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.run(lambda: command(arguments))


if __name__ == "__main__":
    sys.exit(main())
