"""Compress a dataset's train images into prompts, and regenerate copies from them.

    python compress/run.py --data-dir D --dataset Food101 --resolution high --seeds 5
    python compress/run.py --dataset Caltech256 --resolution low --seeds 0,3,7 --batch-size 8 --precision bf16
    torchrun --nproc-per-node 8 compress/run.py ...                # shares the work, as SLURM's srun does

What is on disk already is skipped, so a run that was stopped goes on when it is started again.
"""

import argparse
import difflib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # `python compress/run.py`: Python would look into compress/ alone
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from lightning_fabric import Fabric
from tqdm import tqdm

from compress.machine import accelerator, choose_precision, download, fingerprint, make_regenerator
from compress.options import chosen_preset, parser
from compress.plan import Plan, plan
from compress.records import MadeOtherwise, Records
from compress.share import PATIENCE, by_first, deal, gather
from compress.summary import report, report_estimate, report_findings, report_plan
from compress.verify import Findings, verify
from utils.data.paths import DatasetPaths, data_dir
from utils.devices import launch
from utils.errors import UserError
from utils.log import tolerate_odd_names

DONE, SOME_FAILED, WRONG_COMMAND, INTERRUPTED = 0, 1, 2, 130
MIXING = "Make those again with --replace, or put this run's beside them with --keep-apart NAME."


def main(arguments: list[str] | None = None) -> int:
    """The command line.  Returns its exit code; leaves through SystemExit where argparse does."""
    options = parser().parse_args(arguments)
    tolerate_odd_names()
    try:
        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_COMMAND
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here.", file=sys.stderr)
        return INTERRUPTED


def run(options: argparse.Namespace) -> int:
    """What the options say.  Returns the exit code; raises UserError for what the user can mend.

    Of several processes the first one looks at the disk and talks; each makes its part; the first one sums up.
    """
    fabric = launch(*accelerator(options.device), patience=PATIENCE)
    paths = DatasetPaths(data_dir(options.data_dir), options.dataset, options.keep_apart)
    if options.verify:
        return by_first(fabric, lambda: check(options, paths)) or DONE
    whole, empty = by_first(fabric, lambda: prepare(options, paths, fabric.device)) or (None, [])
    if options.dry_run and not fabric.is_global_zero:
        return DONE
    todo = whole if options.dry_run else deal(fabric, whole)
    precision = todo.records.precision if todo.copies_missing else None
    regenerator = make_regenerator(options, paths, todo.records.preset, fabric.device, precision)
    if precision and fabric.is_global_zero:
        at_a_time = f"{regenerator.generate.batch_size} at a time"
        where = fabric.device if fabric.world_size == 1 else f"{fabric.world_size} processes ({fabric.device.type})"
        print(f"model {options.model} on {where} in {precision}, {at_a_time}", flush=True)
    if options.dry_run:
        report_estimate(regenerator, todo)
        return DONE

    start = time.perf_counter()
    with progress_bar(todo.copies_missing, "copy", fabric) as bar:
        result = regenerator.run(todo, bar.update)
    result = gather(fabric, result)
    if not fabric.is_global_zero:
        return DONE
    report(result, empty, time.perf_counter() - start)
    return SOME_FAILED if result.failures or empty else DONE


def prepare(options: argparse.Namespace, paths: DatasetPaths, device: torch.device) -> tuple[Plan, list[Path]]:
    """What there is to do, told and returned, and the class folders without images."""
    if options.download:
        download(options.model)
    images, empty = select(paths, options.classes, options.limit, options.shard)
    todo = find_work(options, paths, device, images)
    report_plan(todo, f"{options.dataset}, {options.resolution} resolution")
    return todo, empty


def check(options: argparse.Namespace, paths: DatasetPaths) -> int:
    """`--verify`.  Returns the exit code."""
    images, empty = select(paths, options.classes, options.limit, options.shard)
    findings = verified(Records(paths, chosen_preset(options), None, named(options.precision)), images, options.seeds)
    return DONE if findings.is_well and not empty else SOME_FAILED


def find_work(options: argparse.Namespace, paths: DatasetPaths, device: torch.device, images: list[Path]) -> Plan:
    """The plan for these images.  The model's weights, and what "auto" precision means, matter only to new copies.

    Raises UserError where files on disk were made with other settings, and the options don't say what to do with them.
    """

    def planned(model: str | None, precision: str | None) -> Plan:
        records = Records(paths, chosen_preset(options), model, precision)
        return plan(records, images, options.seeds, replaced=options.replace, overwrite=options.overwrite)

    def planned_to_make() -> Plan:
        return planned(fingerprint(options), choose_precision(options.precision, device))

    again = options.replace or options.overwrite
    try:
        todo = planned_to_make() if again else planned(None, named(options.precision))
        findings = verified(todo.records, images, options.seeds) if options.repair else Findings()
        if findings.repairs(todo).copies_missing and not again:
            todo = planned_to_make()
    except MadeOtherwise as error:
        raise UserError(f"{error}.\n{MIXING}") from error
    return findings.repairs(todo)


def named(precision: str) -> str | None:
    """The precision that the user has named; None for "auto"."""
    return None if precision == "auto" else precision


def verified(records: Records, images: list[Path], copy_numbers: Sequence[int]) -> Findings:
    """What is wrong with the edge maps and copies of these images, told and returned."""
    with progress_bar(len(images), "image") as bar:
        findings = verify(records, images, copy_numbers, bar.update)
    report_findings(findings)
    return findings


def progress_bar(total: int, unit: str, fabric: Fabric | None = None) -> tqdm:
    """With the time left; in a log file, a line every half minute; of several processes, the first one's share."""
    seldom = 0.1 if sys.stderr.isatty() else 30
    many = fabric is not None and fabric.world_size > 1
    return tqdm(
        desc=f"process 1 of {fabric.world_size}" if many else None,
        disable=many and not fabric.is_global_zero,
        total=total,
        unit=unit,
        dynamic_ncols=True,
        mininterval=seldom,
        smoothing=0.05,
    )


def select(
    paths: DatasetPaths, classes: list[str] | None = None, limit: int | None = None, shard: tuple[int, int] = (1, 1)
) -> tuple[list[Path], list[Path]]:
    """The train images to work on, and the class folders that hold none.

    classes: labels, None for all; limit: images per class; shard: (i, n), 1 <= i <= n, takes every n-th image.
    Raises UserError for a missing folder, an unknown label, or where there is no image at all.
    """
    known = paths.classes()
    labels = chosen_labels(classes, known) if classes else known
    images, empty = [], []
    for label in labels:
        of_class = paths.images(label)
        images += of_class[:limit]
        if not of_class:
            empty.append(paths.folder("train") / label)
    if not images:
        raise UserError(f"no images in {paths.folder('train')}: its class folders hold no file that Pillow could read.")
    i, n = shard
    return images[i - 1 :: n], empty


def chosen_labels(classes: list[str], known: list[str]) -> list[str]:
    """The labels of --classes: each value is one label, or several with commas between them."""
    labels = []
    for value in classes:
        labels += [value] if value in known else [label.strip() for label in value.split(",") if label.strip()]
    for label in labels:
        if label not in known:
            near = difflib.get_close_matches(label, known, n=1)
            some = ", ".join(known[:5]) + ", ..." * (len(known) > 5)
            hint = f"did you mean {near[0]!r}?" if near else f"the dataset has {some}"
            raise UserError(f"no class {label!r}: {hint}")
    return sorted(set(labels))


if __name__ == "__main__":
    sys.exit(main())
