"""`python -m exps.report`: runs of main.py side by side."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from exps.report.tables import show
from utils import cli
from utils.files import printable, write_text
from utils.results.records import load_results


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the results of several output folders.  Returns the exit code (`utils.cli`)."""
    return cli.run(lambda: command(argv))


def command(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m exps.report", description="Compare runs of main.py.")
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER", help="an output folder of main.py")
    parser.add_argument("--plot", type=cli.output_file, metavar="FILE.png", help="also draw the accuracy curves")
    html = "also write one page with all that is known"
    parser.add_argument("--html", type=cli.output_file, metavar="FILE.html", help=html)
    arguments = parser.parse_args(argv)
    runs = {}
    for name, path in named_paths(arguments.runs).items():
        runs[printable(name)] = (path if path.is_dir() else path.parent, load_results(path))
    show(runs)
    if arguments.plot:
        from exps.report.gallery import plot

        plot(runs, arguments.plot)
    if arguments.html:
        from exps.report.page import page  # imports Jinja2

        write_text(arguments.html, page(runs, file=arguments.html))
    if written := [cli.visible(str(file)) for file in (arguments.plot, arguments.html) if file]:
        print("written:", *written, file=sys.stderr)


def named_paths(arguments: Sequence[str]) -> dict[str, Path]:
    """The output folders by the names that a table gives them.

    [NAME=]FOLDER each; without a name it is the folder's, with as many of the folders above as make it unique.
    """
    folders = []
    for text in arguments:
        name, equals, path = text.partition("=")
        has_name = equals and not Path(text).expanduser().exists()
        folders.append((name if has_name else None, Path(path if has_name else text).expanduser()))
    named: dict[str, Path] = {}
    for own_name, folder in folders:
        alike = [other for name, other in folders if name is None and other.resolve().name == folder.resolve().name]
        parts, depth = folder.resolve().parts, 1
        while len({other.resolve().parts[-depth:] for other in alike}) < len(set(map(Path.resolve, alike))):
            depth += 1
        base = own_name or "/".join(parts[-depth:])
        names = itertools.chain([base], (f"{base} ({number})" for number in itertools.count(2)))
        named[next(name for name in names if name not in named)] = folder
    return named


if __name__ == "__main__":
    sys.exit(main())
