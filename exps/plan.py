"""What a budget of bytes holds: exemplars of each form, measured on a dataset's own images, and what copies take.

    python -m exps.plan --dataset D --bytes 200000 [--forms real,webp:30,edges,text] [--real R] [--copies K]
                        [--settings "--model tiny --resolution high"] [--time]

--bytes is the memory of all classes together (--bytes-per-class: of each).  For each form: R real exemplars of a class,
then S of the form as fit, in bytes and in the paper's units, and the copies, disk and, with --time, hours of K copies.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from exps.estimates import exemplars
from exps.runs import measured
from utils import cli
from utils.errors import UserError

FORMS = "real,jpeg:10,webp:10,webp:30@64,avif:20,edges,edges@64,text"
HEADER = ("form", "bytes each", "R", "S", "K", "bytes a class", "units a class", "copies", "disk, MB", "hours")


def row(name: str, of: dict[str, Any], budget: int, options: argparse.Namespace) -> list[str]:
    """A form's row.  of: all that `compress.measure` says; budget: bytes of a class."""
    form, real_bytes = of["forms"][name], of["forms"]["real"]["bytes"]
    keys = {"real_per_class": options.real, "syn_per_class": "fill"}
    if name == "real":
        keys = {"real_per_class": None, "syn_per_class": 0}
    elif name == "text" and options.real is None:
        keys["real_per_class"] = None
    else:
        keys["real_per_class"] = 1 if options.real is None else options.real
    real, synthetic = exemplars(form, real_bytes, budget, keys, of["images_per_class"])
    used = real * real_bytes + synthetic * form["bytes"] + form["text_bytes"] * (synthetic > 0)
    units = "-" if form["units"] is None and synthetic else f"{real + synthetic * (form['units'] or 0):.1f}"
    each = 1 if form["deterministic"] else options.copies
    copies = synthetic * each * of["classes"]
    hours = "-" if not options.time else f"{copies * form['seconds_per_copy'] / 3600:.2f}"
    numbers = [
        f"{form['bytes']:,.0f}",
        str(real),
        str(synthetic),
        str(each) if synthetic else "-",
        f"{used:,.0f}",
        units,
    ]
    return [name, *numbers, f"{copies:,}", f"{copies * form['copy_bytes'] / 1e6:,.1f}", hours]


def plan(options: argparse.Namespace) -> int:
    """Print the table.  Returns the exit code."""
    names = list(dict.fromkeys(["real", *options.forms.split(",")]))
    config = {"dataset": options.dataset, "data_dir": options.data_dir}
    where = ["--sample", str(options.sample)]
    of = measured(config, names, options.settings, *where, *["--time"] * options.time)
    budget = options.bytes_per_class or options.bytes // of["classes"]
    failed = {name: form["error"] for name, form in of["forms"].items() if "error" in form}
    if "real" in failed:
        raise UserError(failed["real"])
    print(
        f"{options.dataset}: {of['classes']} classes of at least {of['images_per_class']} train images; "
        f"{budget:,} bytes a class; means of {of['images']} images\n"
    )
    rows = [HEADER, *(row(name, of, budget, options) for name in of["forms"] if name not in failed)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        print("  ".join(padded).rstrip())
    print(
        "\nCopies are those of the exemplars (regenerate=on_demand); with regenerate=ahead all train images get copies:"
    )
    print(f"{of['train_images']:,} x K. 1 unit = the raw bits of one real image; '-': the paper has no count for it.")
    settings = shlex.quote(options.settings) if options.settings else '""'
    print(
        f"Train with: budget_in=bytes memory_bytes_per_class={budget} syn_form=FORM real_per_class=R "
        f"syn_per_class=fill augmentations_per_image=K regenerate=on_demand regenerate_options={settings}"
    )
    print(*(f"{name}: {words}" for name, words in failed.items()), sep="\n", end="\n" * bool(failed), file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    return cli.run(lambda: command(argv))


def command(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m exps.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="folder of all datasets [$ESCORT_DATA_DIR, else ./data]")
    parser.add_argument("--dataset", required=True)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--bytes", type=cli.at_least(1), metavar="N", help="memory of all classes together")
    budget.add_argument("--bytes-per-class", type=cli.at_least(1), metavar="N")
    parser.add_argument("--forms", default=FORMS, help="names with commas between them [%(default)s]")
    parser.add_argument(
        "--real", type=cli.at_least(0), metavar="R", help="real exemplars beside a form's [1; with text all that fit]"
    )
    parser.add_argument("--copies", type=cli.at_least(1), default=5, metavar="K", help="copies of an exemplar [5]")
    parser.add_argument("--settings", default="", help="options of compress/run.py about settings and model")
    parser.add_argument("--sample", type=cli.at_least(1), default=64, metavar="N", help="images to look at [64]")
    parser.add_argument("--time", action="store_true", help="also time a copy with the model, for the hours")
    return plan(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
